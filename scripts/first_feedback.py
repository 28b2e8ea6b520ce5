"""Seconds until each command says something, and until it refuses what is not there.

Usage: first_feedback.py DEMO_OUT        (a directory that `gptoss-quantize demo` wrote; nothing is kept)

Each command runs in a process of its own with pipes for stdout and stderr, is stopped after its first byte, and once
more with a path that does not exist. Best of three, since the first run reads the libraries from disk.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

START = [sys.executable, "-P", "-c", "from gptoss_quantize.cli import main; main()"]


def first_byte(words: list[str]) -> float:
    """Return the seconds until a command has written its first byte; it is killed then."""
    began = time.monotonic()
    with subprocess.Popen([*START, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
        assert running.stdout is not None
        os.read(running.stdout.fileno(), 1)
        seconds = time.monotonic() - began
        running.kill()
    return seconds


def refused(words: list[str]) -> float:
    """Return the seconds until a command has refused."""
    began = time.monotonic()
    done = subprocess.run([*START, *words], capture_output=True, check=False)
    if done.returncode not in (1, 2):
        sys.exit(f"{words} ended with {done.returncode}, not refused")
    return time.monotonic() - began


def main() -> None:
    """Print a table."""
    demo = Path(sys.argv[1])
    model, ours = str(demo / "model"), str(demo / "int4-rtn")
    with tempfile.TemporaryDirectory() as place:
        out = f"{place}/out"
        commands = {
            "--help": (["--help"], ["nonsense"]),
            "quantize": (["quantize", model, out], ["quantize", "/nope", out]),
            "evaluate": (["evaluate", ours, "--baseline", model], ["evaluate", "/nope", "--baseline", model]),
            "compare": (
                ["compare", ours, "--baseline", model, "--report", out],
                ["compare", ours, "--baseline", "/nope", "--report", out],
            ),
            "demo": (["demo", out], ["demo", out, "--methods", "nope"]),
            "demo-model": (["demo-model", out], ["demo-model", model]),
            "synthetic-model": (["synthetic-model", out, "--layers", "1"], ["synthetic-model", model]),
            "generate": (["generate", ours, "--prompt", "Hi"], ["generate", "/nope", "--prompt", "Hi"]),
            "chat": (["chat", ours], ["chat", "/nope"]),
            "env": (["env"], ["env", "--nope"]),
            "plan": (["plan", "20b"], ["plan", "20b", "--gpu-memory", "16"]),
            "export": (["export", ours, out, "--to", "gguf"], ["export", "/nope", out, "--to", "gguf"]),
            "import": (["import", ours, out], ["import", "/nope", out]),
            "verify": (["verify", ours], ["verify", "/nope"]),
            "push": (["push", ours, "me/x"], ["push", "/nope", "me/x"]),
        }
        print("| command | first word, s | refused, s |\n|---|---:|---:|")
        for name, (works, wrong) in commands.items():
            first = min(first_byte(works) for _ in range(3))
            no = min(refused(wrong) for _ in range(3))
            print(f"| `{name}` | {first:.1f} | {no:.1f} |", flush=True)


if __name__ == "__main__":
    main()
