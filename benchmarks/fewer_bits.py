"""KL divergence, bytes and speed of the demo model at 2 to 4 bits, uniform and chosen layer by layer.

    gptoss-quantize demo-model MODEL
    python benchmarks/fewer_bits.py MODEL OUT      (half an hour on 2 cores; what is in OUT already is not made again)

Writes benchmarks/fewer_bits.json. GPTQ, group 64, 32,768 calibration tokens; judged on the packaged held-out text.
`--size` puts attention, embedding and head into 8 bits where int4 would not fit otherwise.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import gptoss_quantize as gq

UNIFORM = ("int2", "int3", "int4")
SIZES = ("294MiB", "370MiB")  # 2.5 and 3.5 bits a code
EVAL_TOKENS = 12_288


def speed(path: Path) -> float:
    """Return decoded tokens per second of 64 tokens, greedy, one sequence."""
    model = gq.load(path)
    ids = torch.arange(100, 116)[None]
    settings = {"do_sample": False, "min_new_tokens": 64, "max_new_tokens": 64}
    with torch.inference_mode():
        model.generate(ids, **settings)
        started = time.perf_counter()
        model.generate(ids, **settings)
    return 64 / (time.perf_counter() - started)


def main() -> None:
    """Make what is missing, judge all of it, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    wanted: dict[str, dict[str, Any]] = {name: {"format": name} for name in UNIFORM}
    wanted |= {f"--size {s}": {"size": s} for s in SIZES}
    paths = {name: args.out / name.replace("--size ", "size-") for name in wanted}
    for name, options in wanted.items():
        if not paths[name].exists():
            gq.quantize(args.model, paths[name], progress=True, **options)
    found = gq.evaluate(paths, args.model, tokens=EVAL_TOKENS, progress=True).report["results"]
    rows = []
    for name, path in paths.items():
        report = json.loads((path / "quantization_report.json").read_text())
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        row = {"name": name, "bits": report["expert_bits_per_weight"], "bytes": size, "result": found[name]}
        row |= {"tokens_per_second": round(speed(path), 1), "seconds": report["seconds"]}
        rows.append(row | {"mixture": report.get("mixture")})
        print(name, f"{row['bits']:.2f} bits, {size / 2**20:.0f} MiB, KL {found[name]['kl_mean']:.4f}", flush=True)
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
