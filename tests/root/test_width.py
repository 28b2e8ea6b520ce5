"""What commands print in a pipe at 80 columns: only what is there to be copied is wider, and nothing is cut."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gptoss_quantize import env

WIDTH = 80
# a command, after the word before it
COPIED = re.compile(r"^(try:|make it|vLLM|llama\.cpp)? *(gptoss-quantize|vllm serve|llama-server) ")
STEP = re.compile(r" \d+/\d+, \d:\d\d:\d\d gone, \d:\d\d:\d\d left$")
LONG = "gpt-oss-20b-fine-tuned-on-mail-in-int4"


def too_wide(text: str) -> list[str]:
    """Lines that do not fit, and those that were cut to fit; a step of a log is a line, however long its name."""
    whole = [line for line in text.splitlines() if not STEP.search(line)]
    return [line for line in whole if "…" in line or (len(line) > WIDTH and not COPIED.match(line.strip()))]


def run(place: Path, *words: object) -> str:
    """What a command printed into a pipe."""
    command = [sys.executable, "-P", "-W", "ignore", "-c", "from gptoss_quantize.cli import main; main()"]
    done = subprocess.run(
        [*command, *map(str, words)], cwd=place, capture_output=True, text=True, check=False,
        env=os.environ | {"COLUMNS": str(WIDTH), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory) -> Path:
    """A directory with a model, a candidate with a long name, and a text."""
    path = tmp_path_factory.mktemp("width")
    tiny.copy("bf16", path / "model")
    tiny.copy("mxfp4", path / LONG)
    (path / "sea.txt").write_text(tiny.text * 20)
    return path


def test_the_measure_is_not_blind():
    assert too_wide("a" * 81) and too_wide("23.…") and too_wide("warning: gptoss-quantize " + "a" * 80)
    assert not too_wide("a" * 80) and not too_wide("try: gptoss-quantize chat " + "a" * 80)


def test_evaluate(place):
    said = run(place, "evaluate", LONG, "--baseline", "model", "--text", "sea.txt", "--tokens", 96, "--seq-len", 48)
    assert "top1_agreement" in said and "warning: baseline" in said
    assert not too_wide(said)


def test_compare(place):
    amounts = ["--text-tokens", 96, "--seq-len", 48, "--tasks", "none", "--examples", 0, "--expert-tokens", 0]
    said = run(place, "compare", LONG, "--baseline", "model", "--report", "report", "--text", "sea.txt", *amounts)
    flat = " ".join(said.split())
    assert f"{LONG}: worse than the baseline" in flat and "report/report.html written" in flat
    assert not too_wide(said)


@pytest.mark.parametrize("model", ["20b", "120b", LONG])
@pytest.mark.parametrize("size", ["8GiB", "80GiB"])
def test_plan(place, model, size):
    said = run(place, "plan", model, "--gpu-memory", size, "--details", "--no-measure", "--dense", "int8")
    assert "KV window" in said and "Does it fit?" in said
    assert not too_wide(said)


def test_env(place):
    said = run(place, "env")
    # paths are as long as they are, and stand alone
    lines = [line for line in said.splitlines() if not re.match(r"^( +|[\w +]+: )?\S*(/|\\)\S*$", line.strip())]
    assert len(lines) > 20 and not too_wide("\n".join(lines))


def test_a_long_fact_of_env_goes_on_below():
    words = "C++ with avx512vnni (this processor and compiler have portable, avx2, avx512, avx512vnni)"
    shown = env.lines({"kernels for packed experts": {"cpu": words}})
    assert shown[1].startswith("  cpu: C++") and shown[2].startswith("    ") and not too_wide("\n".join(shown))
    assert " ".join(" ".join(shown[1:]).split()) == f"cpu: {words}"
