"""What each option costs and buys: time, peak memory, size and KL divergence on the demo model.

Usage: cost.py OUT [--only gptq --only rtn] [--tokens 32768] [--eval-tokens 12288]          (`make bench` runs all)

Every row is `gptoss-quantize quantize` in a process of its own, measured from outside: wall time of the whole
process, and the kernel's high-water mark of its resident memory. Then all results are evaluated on the same held-out
tokens. The table is printed as Markdown; OUT/cost.json also holds the machine, the versions, the commit and every
command. The demo model is made once in OUT/model and kept, checkpoints are replaced. Use an idle machine.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gptoss_quantize import api

ROWS: dict[str, list[str]] = {
    "rtn": ["--method", "rtn"],
    "rtn-signed": ["--method", "rtn-signed"],
    "awq": ["--method", "awq"],
    "gptq": ["--method", "gptq"],
    "awq+gptq": ["--method", "awq+gptq"],
    "gptq, group 32": ["--method", "gptq", "--group-size", "32"],
    "gptq, float32": ["--method", "gptq", "--dtype", "float32"],
    "gptq, a quarter of the tokens": ["--method", "gptq", "--tokens", "{quarter}"],
}


def run(command: list[str], log: Path) -> dict[str, float]:
    """Run a command to its end and return its wall and processor time in seconds and its peak resident MiB."""
    started = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with {process.returncode}; see {log}")
    wall, cpu = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    return {"wall_s": round(wall, 1), "cpu_s": round(cpu, 1), "peak_rss_mib": usage.ru_maxrss // 1024}


def machine() -> dict[str, Any]:
    """Return where the numbers come from."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?")
    git = {"cwd": Path(__file__).parent, "capture_output": True, "check": False}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], text=True, **git).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain"], **git).stdout
    return {
        "cpu": cpu.rpartition(": ")[2],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "commit": commit + ("+changes" if changed else ""),
    }


def table(record: dict[str, Any]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| options | bits | KL mean | top-1 | MiB | seconds | peak MiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in record["rows"].items():
        result, error = row["result"], row["result"]["kl_mean_se"]
        kl = f"{result['kl_mean']:.4f}" + ("" if error is None else f" ± {error:.4f}")
        lines.append(
            f"| {name} | {row['bits']:.2f} | {kl} | {100 * result['top1_agreement']:.1f} % "
            f"| {row['mib']} | {row['wall_s']:.0f} | {row['peak_rss_mib']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Quantize once per row, evaluate all, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", action="append", choices=list(ROWS), help="a row; may be repeated")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--eval-tokens", type=int, default=12288)
    args = parser.parse_args()
    chosen = args.only or list(ROWS)

    tool = str(Path(sys.executable).with_name("gptoss-quantize"))
    model = args.out / "model"
    args.out.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        run([tool, "demo-model", str(model)], args.out / "demo-model.log")
    record: dict[str, Any] = {"machine": machine(), "tokens": args.tokens, "rows": {}}
    paths = {}
    for number, name in enumerate(chosen):
        paths[name] = args.out / f"int4-{number}"
        options = [part.format(quarter=args.tokens // 4) for part in ROWS[name]]
        if "--tokens" not in options:
            options += ["--tokens", str(args.tokens)]
        command = [tool, "quantize", str(model), str(paths[name]), "--overwrite", *options]
        print(f"{name} ...", file=sys.stderr)
        cost = run(command, args.out / f"int4-{number}.log")
        report = json.loads((paths[name] / "quantization_report.json").read_text(encoding="utf-8"))
        record["rows"][name] = {
            "command": command,
            **cost,
            "bits": report["expert_bits_per_weight"],
            "mib": report["bytes"] >> 20,
        }
    results = api.evaluate(paths, model, tokens=args.eval_tokens).report["results"]
    for name, result in results.items():
        record["rows"][name]["result"] = result
    (args.out / "cost.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record))


if __name__ == "__main__":
    main()
