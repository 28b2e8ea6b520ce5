"""A whole int4 gpt-oss of true shape and random codes, loaded and generating: seconds, memory, tokens per second.

Usage: whole_model.py MODEL [--make gpt-oss-20b|gpt-oss-120b] [--bits 4] [--layers N] [--device cpu|cuda]
                      [--compile] [--against] [--tokens 64] [--prompt 512] [--json FILE] [--checkout]

--make writes MODEL first (20b: 12.8 GiB; random words are quicker than a quantization, and as fast to read).
Rows: seconds of `load`; seconds to the first token; prompt and decode tokens per second of one sequence, eager, with
a dynamic cache; with --compile also with a static cache, which transformers then compiles. Memory is the process's
anonymous and file-mapped bytes, and the card's peak. --against: the same logits of a short prompt on the CPU, and
their largest difference. --checkout: import from this checkout, without an installation.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def use_checkout() -> None:
    """Make gptoss_quantize importable from this checkout: lay the folders out as the wheel does, by links."""
    package = Path(tempfile.mkdtemp(), "gptoss_quantize")
    package.mkdir()
    for path in (ROOT / "gptoss_quantize").iterdir():
        (package / path.name).symlink_to(path)
    for name in ("kernels", "calibration", "quantize", "eval", "runtimes"):
        (package / name).symlink_to(ROOT / name)
    sys.path.insert(0, str(package.parent))


def make(dest: Path, like: str, bits: int, layers: int | None, device: str) -> None:
    """Write a checkpoint of random codes whose outputs have about unit variance."""
    import torch  # noqa: PLC0415 - after the path is set

    from gptoss_quantize.config import parse_config  # noqa: PLC0415
    from gptoss_quantize.demo.model import ShardWriter  # noqa: PLC0415
    from gptoss_quantize.demo.synthetic import make_tokenizer, synthetic_config  # noqa: PLC0415
    from gptoss_quantize.files import write_json  # noqa: PLC0415
    from gptoss_quantize.layouts import LAYOUTS, dense_shapes, expert_shapes, quantization_config  # noqa: PLC0415

    layout, generator = LAYOUTS[f"int{bits}"], torch.Generator(device).manual_seed(0)
    raw = synthetic_config(like, layers, 0)
    raw["quantization_config"] = quantization_config(layout, 64)
    raw["gptoss_quantize"] = {"version": "0", "format": layout.name, "method": "rtn", "group_size": 64}
    config = parse_config(raw, like)
    dest.mkdir(parents=True)
    shards = ShardWriter(dest)
    rms = (4 ** (bits - 1) / 3) ** 0.5  # of uniform codes
    for name, shape in (dense_shapes(config) | expert_shapes(config, layout, 64)).items():
        if name.endswith("_packed"):
            words = torch.randint(-(2**31), 2**31, shape, generator=generator, device=device, dtype=torch.int32)
            shards.add({name: words.cpu()})
            continue
        values = torch.randn(shape, generator=generator, device=device)
        if name.endswith("_scale"):
            values = (1 + 0.2 * values.clamp(-2, 2)) * config.hidden**-0.5 / rms
        elif "norm" in name:
            values = 1 + 0.1 * values
        elif len(shape) > 1 and "embed" not in name:
            values *= shape[-1] ** -0.5
        shards.add({name: values.bfloat16().cpu()})
    shards.close()
    write_json(dest / "config.json", raw)
    text = "\n".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md")))
    make_tokenizer(text, config.vocab).save_pretrained(dest)


def resident() -> dict[str, float]:
    """Return the GiB of this process that are anonymous and that are mapped files."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        kind: round(int(rows[key].split()[0]) / 2**20, 2)
        for kind, key in (("anonymous", "RssAnon"), ("mapped", "RssFile"))
    }


def measured(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return what was seen of one model."""
    import torch  # noqa: PLC0415

    import gptoss_quantize  # noqa: PLC0415

    cuda = args.device == "cuda"
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"}

    def timed(call: Any) -> tuple[float, Any]:
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        out = call()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started, out

    found["before GiB"] = resident()
    seconds, model = timed(lambda: gptoss_quantize.load(path, device=args.device))
    found["load s"] = round(seconds, 2)
    vocab = model.config.vocab_size
    ids = torch.randint(0, vocab, (1, args.prompt), generator=torch.Generator().manual_seed(0)).to(args.device)
    model.generation_config.eos_token_id = None
    greedy = {"do_sample": False, "pad_token_id": 0}

    def generate(count: int, prompt: Any, **more: Any) -> Any:
        return model.generate(prompt, max_new_tokens=count, min_new_tokens=count, **greedy, **more)

    def speed(prompt: Any, **more: Any) -> dict[str, float]:
        """Two lengths: their difference is decoding alone."""
        for count in (2, args.tokens):
            generate(count, prompt, **more)
        short = min(timed(lambda: generate(2, prompt, **more))[0] for _ in range(2))
        long = min(timed(lambda: generate(args.tokens, prompt, **more))[0] for _ in range(2))
        return {"decode tokens/s": round((args.tokens - 2) / (long - short), 1), "whole s": round(long, 2)}

    with torch.inference_mode():
        found["first token s"] = round(timed(lambda: generate(1, ids[:, :16]))[0], 2)
        found["after GiB"] = resident()
        model(ids)
        found["prompt tokens/s"] = round(args.prompt / min(timed(lambda: model(ids))[0] for _ in range(3)))
        found["eager"] = speed(ids[:, :16])
        print(json.dumps(found), flush=True)
        if args.against:
            other = gptoss_quantize.load(path)
            want = other(ids[:, :32].cpu()).logits.float().log_softmax(-1)
            got = model(ids[:, :32]).logits.float().cpu().log_softmax(-1)
            found["against the CPU"] = {
                "KL": float((want.exp() * (want - got)).sum(-1).mean()),
                "same first choice": float((want.argmax(-1) == got.argmax(-1)).float().mean()),
            }
        if args.compile:
            eager = generate(args.tokens, ids[:, :16])
            started = time.perf_counter()
            static = generate(args.tokens, ids[:, :16], cache_implementation="static")
            found["static"] = {"compile s": round(time.perf_counter() - started, 1)} | speed(
                ids[:, :16], cache_implementation="static"
            )
            found["static"]["same tokens"] = float((eager == static).float().mean())
    if cuda:
        found["card's peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def main() -> None:
    """Make the model if asked, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--make", metavar="LIKE")
    parser.add_argument("--bits", type=int, default=4, choices=[2, 3, 4])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--json", type=Path)
    for switch in ("compile", "against", "checkout"):
        parser.add_argument(f"--{switch}", action="store_true")
    args = parser.parse_args()
    if args.checkout:
        use_checkout()
    if args.make and not args.model.exists():
        started = time.perf_counter()
        make(args.model, args.make, args.bits, args.layers, args.device)
        print(f"made in {time.perf_counter() - started:.0f} s", flush=True)
    found = measured(args.model, args)
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
