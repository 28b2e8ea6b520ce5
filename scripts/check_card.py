"""Run what needs a card, or another processor, on a machine that has one: without installing anything.

Usage: check_card.py MODEL [--json FILE] [--skip PART ...]    MODEL: a small bf16 gpt-oss with tokenizer

1. The C++ kernels' tests, with every instruction set of that processor (pytest, without the project's fixtures).
2. MODEL quantized by GPTQ and AWQ+GPTQ on the card and on the processor: the errors of the experts' outputs agree.
3. The int4 checkpoint loaded on both: the same predictions, greedy answer and gradients; tokens per second.
4. `evaluate --device` of that checkpoint against MODEL on both: the same KL divergence and perplexities.

Exits 1 if anything disagrees.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/kernels/test_experts_op.py", "tests/kernels/test_linear_op.py", "tests/kernels/test_native.py")


def lay_out() -> Path:
    """Return a folder in which the checkout's packages lie as the wheel lays them out, by links."""
    package = Path(tempfile.mkdtemp(), "gptoss_quantize")
    package.mkdir()
    for path in (ROOT / "gptoss_quantize").iterdir():
        (package / path.name).symlink_to(path)
    for name in ("kernels", "calibration", "quantize", "eval", "runtimes"):
        (package / name).symlink_to(ROOT / name)
    return package.parent


def kernel_tests(place: Path) -> dict[str, Any]:
    """Return how the tests of the C++ kernels ended on this processor."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-x"]
    # also for the processes that the tests start
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(place), os.getenv("PYTHONPATH"))))}
    started = time.monotonic()
    done = subprocess.run(
        [*command, *TESTS], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    lines = done.stdout.strip().splitlines()
    return {
        "ok": done.returncode == 0,
        "seconds": round(time.monotonic() - started, 1),
        "said": lines[-1] if lines else done.stderr[-300:],
        "failed": [line for line in lines if line.startswith(("FAILED", "E "))][:5],
    }


def quantized(model: Path, work: Path) -> list[dict[str, Any]]:
    """Return a row for every method: what the card and the processor made of the same model and text."""
    import torch  # noqa: PLC0415 - after the packages are laid out

    from gptoss_quantize.calibration.text import Tokens  # noqa: PLC0415
    from gptoss_quantize.checkpoint import Checkpoint  # noqa: PLC0415
    from gptoss_quantize.quantize.job import Job  # noqa: PLC0415
    from gptoss_quantize.quantize.recipes import RECIPES  # noqa: PLC0415
    from gptoss_quantize.quantize.run import quantize_checkpoint  # noqa: PLC0415

    source = Checkpoint(model)
    ids = torch.randint(0, source.config.vocab, (32, 128), generator=torch.Generator().manual_seed(0))
    tokens = Tokens(ids=ids, source="random", documents=1, separator=None, sha256="0" * 64)
    rows = []
    for method in ("gptq", "awq+gptq"):
        row: dict[str, Any] = {"method": method}
        for device in ("cpu", "cuda"):
            dest = work / f"{method}-{device}"
            job = Job(dest=dest, method=method, recipe=RECIPES[method], device=device, dtype=torch.float32)
            report = quantize_checkpoint(source, job, tokens)
            row[device] = {"output error": report["mean_output_error"], "seconds": report["seconds"]}
        ratio = row["cuda"]["output error"] / row["cpu"]["output error"]
        rows.append(row | {"ratio": ratio, "ok": 0.98 < ratio < 1.02})
    return rows


def loaded(checkpoint: Path) -> dict[str, Any]:
    """Return how the predictions of a checkpoint on the card differ from those on the processor."""
    import torch  # noqa: PLC0415

    import gptoss_quantize  # noqa: PLC0415

    found: dict[str, Any] = {}
    models = {d: gptoss_quantize.load(checkpoint, dtype=torch.float32, device=d) for d in ("cpu", "cuda")}
    ids = torch.randint(0, models["cpu"].config.vocab_size, (2, 96), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = {d: m(ids.to(d)).logits.float().cpu().log_softmax(-1) for d, m in models.items()}
        found["largest difference of log-probabilities"] = float((logits["cpu"] - logits["cuda"]).abs().max())
        for device, model in models.items():
            started = time.monotonic()
            out = model.generate(ids[:1].to(device), max_new_tokens=32, min_new_tokens=32, do_sample=False)
            found[f"{device} tokens/s"] = round(32 / (time.monotonic() - started), 1)
            found[f"{device} answer"] = out[0, -32:].tolist()
    found["gradient difference"] = gradient_difference(models, ids)
    found["ok"] = (
        found["largest difference of log-probabilities"] < 1e-3
        and found["cpu answer"] == found["cuda answer"]
        and found["gradient difference"] < 1e-3
    )
    return found


def gradient_difference(models: dict[str, Any], ids: Any) -> float:
    """Return |card - processor| / |processor| of the loss's gradient at the first query projection."""
    slopes = {}
    for device, model in models.items():
        weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
        given = ids.to(device)
        model(given, labels=given).loss.backward()
        slopes[device] = weight.grad.double().cpu()
    return float((slopes["cuda"] - slopes["cpu"]).norm() / slopes["cpu"].norm())


def evaluated(model: Path, checkpoint: Path) -> dict[str, Any]:
    """Return what `evaluate` finds on the card and on the processor, on the packaged text."""
    import gptoss_quantize  # noqa: PLC0415

    found: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        started = time.monotonic()
        options = {"tokens": 2048, "dtype": "float32", "device": device}
        (result,) = gptoss_quantize.evaluate(checkpoint, model, **options).report["results"].values()
        found[device] = {k: result[k] for k in ("kl_mean", "perplexity", "baseline_perplexity", "top1_agreement")}
        found[f"{device} seconds"] = round(time.monotonic() - started, 1)
    differences = [abs(found["cuda"][key] / value - 1) for key, value in found["cpu"].items() if value]
    # float32 rounds a KL of 1e-3 by 1e-3 of it
    found |= {"largest relative difference": max(differences), "ok": max(differences) < 5e-3}
    return found


def main() -> int:
    """Run all four, print and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--json", type=Path, default=Path("card.json"))
    parser.add_argument("--skip", nargs="+", default=[], metavar="PART", help="'kernel tests', evaluated, ...")
    args = parser.parse_args()
    place = lay_out()
    sys.path.insert(0, str(place))
    work = Path(tempfile.mkdtemp())
    record: dict[str, Any] = {}
    parts = {
        "kernel tests": lambda: kernel_tests(place),
        "quantized": lambda: quantized(args.model, work),
        "loaded": lambda: loaded(work / "gptq-cpu"),
        "evaluated": lambda: evaluated(args.model, work / "gptq-cpu"),
    }
    for name, part in parts.items():
        if name in args.skip:
            continue
        try:
            record[name] = part()
        except Exception as error:  # noqa: BLE001 - the other parts are wanted all the same
            record[name] = {"ok": False, "raised": f"{type(error).__name__}: {error}"}
        print(name, json.dumps(record[name]), flush=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    rows = [row for part in record.values() for row in (part if isinstance(part, list) else [part])]
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
