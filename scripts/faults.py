"""Kill a quantization again and again with SIGKILL, resume it each time, and compare the result bit by bit.

Usage: faults.py OUT [--model DIR] [--kills 20] [--seed 0] [--method gptq] [--tokens 2048]           (`make faults`)

Without --model a small synthetic model is made (12 layers, 8 experts, hidden 192, MXFP4). The same command is run
undisturbed first. Then it is started over and over, with --resume where an unfinished run is there, and killed at a
random moment: during reading, calibration, solving, writing, between two renames. When all kills are spent the run
may finish, and every file must equal the undisturbed one's (in the report: everything but times). A run that reaches
its end before it is killed is compared as well, and the next one starts from nothing. Processes are forked from one
that has imported everything, so that kills fall into the work and not into imports.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptoss_quantize import api
from gptoss_quantize.demo.synthetic import build_synthetic_model
from gptoss_quantize.demo.tour import sample_text
from gptoss_quantize.quantize.recipes import RECIPES

SHAPE = {
    "model_type": "gpt_oss",
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 12,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 16,
    "vocab_size": 4000,
}
REPORT = "quantization_report.json"


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a child process and return its id; the child exits with 0 when it returns, 1 when it raises."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        # a child that is killed must not leave threads of its own waiting
        torch.set_num_threads(1)
        work()
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> None:
    """Wait for a child that is expected to succeed."""
    _, status = os.waitpid(pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(f"a run that nobody disturbed ended with {code}")


def quantize(args: argparse.Namespace, model: Path, dest: Path, resume: bool) -> None:
    """Do one run of the command that is tested."""
    api.quantize(model, dest, args.method, tokens=args.tokens, seq_len=128, device="cpu", resume=resume)


def killed(pid: int, seconds: float) -> bool:
    """Kill a child after some seconds; return whether it was still at work."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if code := os.waitstatus_to_exitcode(status):
                sys.exit(f"a resumed run ended with {code}")
            return False
        time.sleep(min(0.002, max(0.0, end - time.monotonic())))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def differences(dest: Path, reference: Path) -> list[str]:
    """Return the files in which two checkpoints differ; of the report all that is not time is compared."""
    names = {p.name for p in dest.iterdir()} | {p.name for p in reference.iterdir()}
    wrong = []
    for name in sorted(names):
        if name == REPORT:
            ours, theirs = (json.loads((path / name).read_text(encoding="utf-8")) for path in (dest, reference))
            keys = ("settings", "layers", "crc32", "bytes", "calibration")
            if any(ours[key] != theirs[key] for key in keys):
                wrong.append(name)
        elif (
            not ((dest / name).exists() and (reference / name).exists())
            or (dest / name).read_bytes() != (reference / name).read_bytes()
        ):
            wrong.append(name)
    return wrong


def state_of(partial: Path) -> str:
    """Say how far an interrupted run had come."""
    if not partial.exists():
        return "before its folder"
    state = partial / "state.json"
    if not state.exists():
        return "before the first state" if not (partial / REPORT).exists() else "after the last state"
    return f"after layer {len(json.loads(state.read_text(encoding='utf-8'))['layers'])}"


def campaign(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Kill and resume until all kills are spent; return what happened."""
    reference, dest = args.out / "undisturbed", args.out / "killed"
    partial = dest.with_name("killed.partial")
    for path in (reference, dest, partial):
        shutil.rmtree(path, ignore_errors=True)
    started = time.monotonic()
    wait(fork(lambda: quantize(args, model, reference, False)))
    whole = time.monotonic() - started
    chance = random.Random(args.seed)
    where: Counter[str] = Counter()
    kills = finished = 0
    while kills < args.kills:
        pid = fork(lambda: quantize(args, model, dest, partial.exists()))
        # short enough that most runs are killed several times on their way
        if killed(pid, chance.uniform(0, whole * 0.6)):
            kills += 1
            where[state_of(partial)] += 1
        if dest.exists():
            finished += 1
            if wrong := differences(dest, reference):
                sys.exit(f"after {kills} kills these files differ: {wrong}")
            shutil.rmtree(dest)
    wait(fork(lambda: quantize(args, model, dest, partial.exists())))
    wrong = differences(dest, reference)
    return {
        "kills": kills,
        "seconds_undisturbed": round(whole, 2),
        "killed": dict(sorted(where.items())),
        "checkpoints_compared": finished + 1,
        "different_files": wrong,
        "left_behind": sorted(p.name for p in args.out.glob("killed.*")),
    }


def main() -> None:
    """Make the model, run the campaign, print and check its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="gptq", choices=list(RECIPES))
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = args.model or args.out / "model"
    if not model.exists():
        (args.out / "shape.json").write_text(json.dumps(SHAPE), encoding="utf-8")
        shape = str(args.out / "shape.json")
        wait(fork(lambda: build_synthetic_model(model, like=shape, sample_text=sample_text())))
    record = campaign(args, model)
    (args.out / "faults.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))
    if record["different_files"] or record["left_behind"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
