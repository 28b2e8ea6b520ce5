"""How close a quantization comes to what this machine can do: FLOPs by phase, rates by dtype, and their ratio.

Usage: roofline.py REPORT [--json FILE]        REPORT: quantization_report.json of a GPTQ run, or its directory
       roofline.py --rates                     only the matmul rates

FLOPs are those that the algorithm needs (gptoss_quantize/flops.py), not those that were done. Rates are the best of
square matrix products of several sizes in each dtype, with the threads that the run had. The least time of a phase is
its FLOPs over the rate of the dtype that it may run in: attention and forward passes in the run's dtype, Hessians in
the run's dtype with float32 sums, factors and columns in float32. The ratio is measured time over least time; phases
without products (reading, writing) have none, and count in the last line only.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from gptoss_quantize.config import parse_config, read_json
from gptoss_quantize.errors import InputError
from gptoss_quantize.flops import layer_flops, matmul_rate

RATES = (torch.float64, torch.float32, torch.bfloat16)
SIZES = (1024, 2048, 2880)


def rates(seconds: float = 0.5) -> dict[str, float]:
    """Return the best FLOP/s of matrix products by dtype."""
    return {
        str(dtype).removeprefix("torch."): max(matmul_rate(dtype, size, seconds) for size in SIZES) for dtype in RATES
    }


def compare(report: dict[str, Any], config_raw: dict[str, Any], speed: dict[str, float]) -> dict[str, Any]:
    """Return FLOPs, least time, measured time and ratio by phase of a calibrated run."""
    if report["calibration"] is None:
        raise InputError(
            f"method {report['settings']['method']} has no products to speak of; give a GPTQ run's report"
        )
    config = parse_config(config_raw, "config.json")
    sequences, positions = report["calibration"]["shape"]
    layers = len(report["layers"])
    flops = {name: layers * f for name, f in layer_flops(config, sequences * positions, positions).items()}
    dtype = report["settings"]["dtype"]
    used = {"attention": dtype, "forward": dtype, "moments": dtype, "solve": "float32"}
    rows: dict[str, dict[str, Any]] = {}
    for name, count in flops.items():
        least, measured = count / speed[used[name]], report["seconds_by_phase"].get(name, 0.0)
        rows[name] = {"flops": count, "dtype": used[name], "least_s": least, "s": measured, "ratio": measured / least}
    for name, measured in report["seconds_by_phase"].items():
        rows.setdefault(name, {"s": measured})
    least = sum(row.get("least_s", 0.0) for row in rows.values())
    total = {
        "flops": sum(flops.values()),
        "least_s": least,
        "s": report["seconds"],
        "ratio": report["seconds"] / least,
    }
    return {"rates": speed, "layers": layers, "tokens": sequences * positions, "phases": rows, "whole run": total}


def show(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    lines = [
        "rates: " + ", ".join(f"{name} {speed / 1e9:.0f} GFLOP/s" for name, speed in record["rates"].items()),
        f"{record['layers']} layer(s), {record['tokens']} calibration tokens",
        "",
        "| phase | TFLOP needed | dtype | least s | measured s | ratio |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for name, row in (*record["phases"].items(), ("**whole run**", record["whole run"])):
        if "flops" in row:
            numbers = f"{row['flops'] / 1e12:.2f} | {row.get('dtype', '')} | {row['least_s']:.1f} | {row['s']:.1f}"
            lines.append(f"| {name} | {numbers} | {row['ratio']:.2f} |")
        else:
            lines.append(f"| {name} | | | | {row['s']:.1f} | |")
    return "\n".join(lines)


def main() -> None:
    """Measure the rates, read the report, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, nargs="?")
    parser.add_argument("--rates", action="store_true")
    parser.add_argument("--json", type=Path, dest="json_out")
    args = parser.parse_args()
    if args.rates == (args.report is not None):
        parser.error("give a report, or --rates")
    speed = rates()
    if args.rates:
        print(json.dumps({"threads": torch.get_num_threads(), "flops_per_second": speed}, indent=1))
        return
    folder = args.report if args.report.is_dir() else args.report.parent
    try:
        report = read_json(folder / "quantization_report.json")
        if (threads := report["machine"]["cpu_threads"]) != torch.get_num_threads():
            print(f"the run had {threads} thread(s), this process {torch.get_num_threads()}", file=sys.stderr)
        record = compare(report, read_json(folder / "config.json"), speed)
    except InputError as error:
        sys.exit(f"refused: {error}")
    if args.json_out:
        args.json_out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(show(record))


if __name__ == "__main__":
    main()
