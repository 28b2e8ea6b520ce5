"""The big table: every way to quantize one model's experts, ours and others', judged by one evaluator.

Usage: fidelity.py MODEL OUT --list                                     names of our rows
       fidelity.py MODEL OUT --ours NAME [--ours NAME ...]              quantize (if needed), evaluate, record
       fidelity.py MODEL OUT --peer NAME=DIR [...]                      evaluate a peer's dequantized output, record
       fidelity.py MODEL OUT --write-tokens                             OUT/tokens.npy for the peers
       fidelity.py MODEL OUT                                            print the table again

MODEL is the unquantized gpt-oss directory. One row per checkpoint goes to OUT/fidelity.json as soon as it is
measured, so rows can be run one at a time, in any order, and an interrupted run loses one row at most; the table is
written to OUT/fidelity.md. Rows that are there are kept unless --again is given. Our rows are `gptoss-quantize
quantize` in a process of its own, measured from outside; the table shows processor time (user and system),
which other work on the machine disturbs little, and the file wall time too. A peer's DIR comes from
benchmarks/peers/run_*.py: a gpt-oss directory with dequantized experts, and bench.json with bits, time and memory.

The unquantized model's final hidden states on the held-out text are kept in OUT/baseline-*.pt.
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptoss_quantize.calibration.text import TextSpec, load_tokenizer, load_tokens
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.eval.divergence import check_pair, compare_hidden, summarize
from gptoss_quantize.model import hidden_states

sys.path.insert(0, str(Path(__file__).resolve().parent))

from blocks import JUDGED
from cost import machine, run

POLISH = "40"
OURS: dict[str, list[str]] = {
    f"{method} {name}": [*options, *grid]
    for name, grid in (
        ("g64", ["--group-size", "64"]),
        ("g32", ["--group-size", "32"]),
        ("mxfp4", ["--format", "mxfp4"]),
        *(
            (f"int{bits} g{group}", ["--bits", bits, "--group-size", group])
            for bits in "32"
            for group in ("64", "32")
        ),
    )
    for method, options in (
        ("RTN", ["--method", "rtn"]),
        ("RTN signed", ["--method", "rtn-signed"]),
        ("AWQ", ["--method", "awq"]),
        ("GPTQ", ["--method", "gptq"]),
        ("AWQ+GPTQ", ["--method", "awq+gptq"]),
        ("GPTQ + polish", ["--method", "gptq", "--polish", POLISH]),
        ("AWQ+GPTQ + polish", ["--method", "awq+gptq", "--polish", POLISH]),
    )
    if name in ("g64", "g32")
    or method in ("RTN", "GPTQ", "GPTQ + polish")
    or (name.startswith("int") and method in ("AWQ", "AWQ+GPTQ"))
}
OURS["RTN mxfp4 ceil"] = ["--method", "rtn", "--format", "mxfp4", "--set", "scale=ceil"]
# what four times the text buys at the same bits
OURS["GPTQ g64, 131072 calibration tokens"] = ["--method", "gptq", "--group-size", "64", "--tokens", "131072"]
OURS["GPTQ int3 g64, 131072 calibration tokens"] = ["--bits", "3", "--group-size", "64", "--tokens", "131072"]
# experts that see fewer than 50 tokens
OURS["GPTQ g64, 256 calibration tokens"] = [
    "--method",
    "gptq",
    "--group-size",
    "64",
    "--tokens",
    "256",
    "--seq-len",
    "256",
]


def calibration(args: argparse.Namespace) -> np.ndarray:
    """Return the token ids [N, S] that every row of the table is calibrated on."""
    return load_tokens(TextSpec(tokens=args.tokens, seq_len=512), load_tokenizer(args.model)).ids.numpy()


def baseline(model: Checkpoint, out: Path, ids: torch.Tensor) -> torch.Tensor:
    """Return the unquantized model's final hidden states, computed once."""
    files = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in model.files()]
    key = hashlib.sha256(ids.numpy().tobytes() + str(sorted(files)).encode()).hexdigest()[:12]
    path = out / f"baseline-{key}.pt"
    if not path.exists():
        torch.save(hidden_states(model, ids), path)
    return torch.load(path)


def judge(model: Checkpoint, candidate: Checkpoint, out: Path, ids: torch.Tensor) -> dict[str, Any]:
    """Return the evaluator's summary of a candidate, products in float32."""
    check_pair(model, candidate, ids)
    base = baseline(model, out, ids)
    others = [(hidden_states(candidate, ids), candidate.head().float())]
    return summarize(compare_hidden(base, model.head().float(), others, ids)[0])


def command_of(name: str, args: argparse.Namespace) -> list[str]:
    """Return the command of one of our rows."""
    dest = args.out / ("ours-" + "".join(c if c.isalnum() else "-" for c in name))
    options = OURS[name] if "--tokens" in OURS[name] else [*OURS[name], "--tokens", str(args.tokens)]
    start = [sys.executable, "-P", "-c", "from gptoss_quantize.cli import main; main()"]
    return [*start, "quantize", str(args.model), str(dest), "--overwrite", *options]


def ours(name: str, args: argparse.Namespace, ids: torch.Tensor) -> dict[str, Any]:
    """Quantize by our command line, evaluate, return the row."""
    command = command_of(name, args)
    dest = Path(command[command.index("quantize") + 2])
    cost = run(command, dest.with_suffix(".log"))
    report = json.loads((dest / "quantization_report.json").read_text(encoding="utf-8"))
    row = {
        "command": command,
        "machine": machine(),
        "wall_s": cost["wall_s"],
        "cpu_s": cost["cpu_s"],
        # the kernel's mark of the whole process would be this one's where it is higher: it is kept over exec
        "peak_rss_mib": report["peak_rss_mib"],
        "bits": report["expert_bits_per_weight"],
        "experts_under_50_tokens": len(report["experts_under_50_tokens"]) + len(report["experts_without_tokens"]),
        "tokens": 0 if report["calibration"] is None else math.prod(report["calibration"]["shape"]),
        "polish": report["polish"],
        "result": judge(Checkpoint(args.model), Checkpoint(dest), args.out, ids),
    }
    if not args.keep:
        shutil.rmtree(dest)
    return row


def peer(path: Path, args: argparse.Namespace, ids: torch.Tensor) -> dict[str, Any]:
    """Evaluate a peer's dequantized output and return the row."""
    bench = json.loads((path / "bench.json").read_text(encoding="utf-8"))
    # the first of our sequences will do, and the table's column "text" says so
    first = calibration(args)[: bench["calibration_shape"][0]]
    if bench["calibration_sha256"] != hashlib.sha256(first.tobytes()).hexdigest():
        sys.exit(f"{path}: calibrated on other tokens than ours; see --write-tokens")
    return {
        "tool": f"{bench['tool']} {bench['version']}",
        "wall_s": bench["wall_s"],
        "cpu_s": bench["cpu_s"],
        "peak_rss_mib": bench["peak_rss_mib"],
        "bits": bench["bits_per_weight"],
        "tokens": math.prod(bench["calibration_shape"]),
        "bench": bench,
        "result": judge(Checkpoint(args.model), Checkpoint(path), args.out, ids),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the rows as Markdown, by bits and then by divergence."""
    lines = [
        "| checkpoint | bits | text | KL mean | KL p99 | top-1 | perplexity | CPU s | peak MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in sorted(rows.items(), key=lambda item: (round(item[1]["bits"], 2), item[1]["result"]["kl_mean"])):
        r = row["result"]
        error = "" if r["kl_mean_se"] is None else f" ± {r['kl_mean_se']:.4f}"
        text = row["tokens"] + (row["polish"]["text"]["tokens"] if row.get("polish") else 0)
        lines.append(
            f"| {name} | {row['bits']:.2f} | {text} | {r['kl_mean']:.4f}{error} | {r['kl_p99']:.3f} "
            f"| {100 * r['top1_agreement']:.1f} % | {r['perplexity']:.2f} | {row.get('cpu_s', row['wall_s']):.0f} "
            f"| {row['peak_rss_mib']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure the rows that were asked for, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--write-tokens", action="store_true", help="our calibration tokens to OUT/tokens.npy")
    parser.add_argument("--ours", action="append", choices=list(OURS), default=[])
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--eval-tokens", type=int, default=JUDGED)
    parser.add_argument("--again", action="store_true", help="measure rows again that are there")
    parser.add_argument("--keep", action="store_true", help="keep our checkpoints")
    args = parser.parse_args()
    if args.list:
        print("\n".join(OURS))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "fidelity.json"
    settings = {"model": str(args.model.resolve()), "tokens": args.tokens, "eval_tokens": args.eval_tokens}
    record = {"settings": settings, "rows": {}}
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["settings"] != settings:
            parser.error(f"{path} was measured with {record['settings']}; use another OUT")
    if args.write_tokens:
        np.save(args.out / "tokens.npy", calibration(args))
    spec = TextSpec(source="heldout", tokens=args.eval_tokens, seq_len=512, shuffle=False)
    ids = load_tokens(spec, load_tokenizer(args.model)).ids
    jobs = [(name, lambda name=name: ours(name, args, ids)) for name in args.ours]
    for entry in args.peer:
        name, _, place = entry.partition("=")
        if not (Path(place) / "bench.json").is_file():
            parser.error(f"--peer {entry}: {place}/bench.json does not exist; expected NAME=DIR of a peers/run_*.py")
        jobs.append((name, lambda place=place: peer(Path(place), args, ids)))
    for name, job in jobs:
        before = record["rows"].get(name, {})
        if before and not args.again and (name not in args.ours or before["command"] == command_of(name, args)):
            continue
        row = job()
        if path.exists():
            # a process beside this one may have added rows meanwhile
            record = json.loads(path.read_text(encoding="utf-8"))
        record["rows"][name] = row
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(name, f"{row['result']['kl_mean']:.4f}", file=sys.stderr, flush=True)
    text = table(record["rows"])
    (args.out / "fidelity.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
