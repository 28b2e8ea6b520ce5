"""Check what can be checked cheaply of README.md and docs/: numbers, names, commands, messages.

Usage: check_claims.py                                                                         (`make claims`)

docs/claims.md lists every claim with what checks it. Here: the tests and files that it names exist; numbers equal
benchmarks/fidelity.json; the tables of cards are what `plan` computes; options in shell blocks exist; messages in
docs/troubleshooting.md stand in the source. Prints every difference, and exits with 1 if there is one.
"""

import ast
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import click
import typer

from gptoss_quantize.architectures import gptoss_config
from gptoss_quantize.cli import app
from gptoss_quantize.config import parse_config
from gptoss_quantize.runtimes.memory import RUNTIMES, llamacpp_command, longest_context, weights_on_card
from gptoss_quantize.units import GIB

ROOT = Path(__file__).resolve().parent.parent
SOURCES = tuple(
    "gptoss_quantize" + folder
    for folder in ("", ".demo", ".kernels", ".calibration", ".quantize", ".eval", ".runtimes")
)
MOST_WORDS = 1200
# KL divergences that do not stand in fidelity.json, and the page or script that they come from
ELSEWHERE = {
    "0.0203": "benchmarks/fine_tune.py", "0.0160": "benchmarks/fine_tune.py", "0.0064": "benchmarks/fine_tune.py",
    "0.0347": "docs/lab-notes.md", "0.0338": "docs/lab-notes.md",
}  # fmt: skip
CHECKED_FOR_KL = ("README.md", "docs/fidelity.md", "docs/options.md", "docs/faq.md", "docs/fine-tunes.md")


def read(name: str) -> str:
    """Return the text of a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def rows() -> dict[str, dict]:
    """Return the results of fidelity.json by row."""
    return {name: row["result"] for name, row in json.loads(read("benchmarks/fidelity.json"))["rows"].items()}


def names(text: str) -> list[str]:
    """Return tests and files named in `text` that do not exist."""
    lost = []
    for path, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        if not (ROOT / path).is_file():
            lost.append(f"{path}: no such file")
        elif test and f"def {test}(" not in read(path):
            lost.append(f"{path}: has no {test}")
    for path in re.findall(r"`((?:scripts|benchmarks|notebooks)/[\w/.]+)[ `]", text):
        if not (ROOT / path).is_file():
            lost.append(f"{path}: no such file")
    return lost


def numbers(name: str, text: str) -> list[str]:
    """Return KL divergences of a page that are nowhere in fidelity.json, rounded to four digits."""
    known = {f"{row[key]:.4f}" for row in rows().values() for key in ("kl_mean", "kl_mean_se")} | ELSEWHERE.keys()
    return [f"{name}: {found} is no row of benchmarks/fidelity.json" for found in sorted(
        set(re.findall(r"(?<![\d.])0\.\d{4}(?!\d)", text)) - known)]  # fmt: skip


def table(text: str) -> list[str]:
    """Return rows of docs/fidelity.md that differ from fidelity.json in any column, and rows out of order."""
    known = {
        (f"{r['kl_mean']:.4f} ± {r['kl_mean_se']:.4f}", f"{r['kl_p99']:.2f}", f"{100 * r['top1_agreement']:.1f} %",
         f"{r['perplexity']:.2f}") for r in rows().values()
    }  # fmt: skip
    lost, order = [], []
    for line in re.findall(r"^\| .* ± .*\|$", text, re.MULTILINE):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        order.append((float(cells[1]), float(cells[3].split()[0])))
        if tuple(cells[3:]) not in known:
            lost.append(f"docs/fidelity.md: {cells[0]} is not what benchmarks/fidelity.json says")
    if len(order) < 20 or order != sorted(order):
        lost.append("docs/fidelity.md: rows are missing, or not sorted by bits and KL")
    baseline = {f"{row['baseline_perplexity']:.2f}" for row in rows().values()}
    return lost + [f"docs/fidelity.md: perplexity {b} is missing" for b in baseline if f"**{b}**" not in text]


def cards(name: str, text: str) -> list[str]:
    """Return rows of a table of cards that are not what `plan` computes for gpt-oss-20b."""
    config = parse_config(gptoss_config("gpt-oss-20b"), "gpt-oss-20b")
    lost = []
    for gigabytes in (8, 12, 16, 24):
        made = llamacpp_command("G", config, 64, "source", gigabytes * GIB, (4096, 32768, 131072), _bf16)
        runtime = RUNTIMES["vLLM"]
        room, weights = int(gigabytes * GIB * runtime.utilization), weights_on_card(config, "source", _bf16, runtime)
        vllm = longest_context(config, 64, weights, room, runtime)
        (row,) = re.findall(rf"^\| {gigabytes} GiB \|.*$", text, re.MULTILINE) or [""]
        if layers := made["offload"]["layers"]:
            wanted = [f"--n-cpu-moe {layers}`", f"{made['offload']['bytes'] / GIB:.1f} GiB of RAM", "32k of context"]
        else:
            wanted = [f"{made['context']:,}"]
        wanted.append(f"{vllm:,} tokens" if vllm else "| no |")
        lost += [f"{name}: the row of {gigabytes} GiB has no {want!r}" for want in wanted if want not in row]
    return lost


def _bf16(name: str) -> str:
    return "BF16"


def commands(name: str, text: str) -> list[str]:
    """Return commands in shell blocks that do not exist, and options that they do not have."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    known = group.commands  # type: ignore[attr-defined]
    lost = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split("#")[0].split()
            if words[1:3] == ["-m", "gptoss_quantize"]:
                words = words[2:]
            elif words[:1] != ["gptoss-quantize"]:
                continue
            words = words[1:]
            if not words or words[0] not in known:
                lost.append(f"{name}: no such command: {line.strip()}")
                continue
            options = {opt for param in known[words[0]].params for opt in (*param.opts, *param.secondary_opts)}
            lost += [
                f"{name}: {words[0]} has no {word}"
                for word in words[1:]
                if word.startswith("--") and word.split("=")[0] not in options
            ]
    return lost


def messages(text: str) -> list[str]:
    """Return messages of docs/troubleshooting.md that no string of the source holds."""
    pieces = []
    # where the package is installed: a wheel's tests run without the checkout's folders
    places = [Path(place) for name in SOURCES for place in importlib.import_module(name).__path__]
    for place in places:
        for path in sorted(place.glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    pieces.append(re.sub(r"\[/?[a-z ]+\]", "", node.value))
    source = "\n".join(pieces)
    lost = []
    for message in re.findall(r"^\*\*`(.*?)`", text, re.MULTILINE):
        parts = [part.strip(" :") for part in message.split("...") if len(part.strip(" :;,()")) > 3]
        lost += [f"docs/troubleshooting.md: no source says {p!r}" for p in parts if p not in source and p != "Killed"]
    return lost


def words(text: str) -> list[str]:
    """Return whether the README is too long."""
    count = len(text.split())
    return [f"README.md has {count} words, at most {MOST_WORDS} are wanted"] if count > MOST_WORDS else []


def problems() -> list[str]:
    """Return everything that is wrong."""
    pages = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
    found = [*names(read("docs/claims.md")), *table(read("docs/fidelity.md")), *words(read("README.md"))]
    found += messages(read("docs/troubleshooting.md"))
    checks: list[tuple[tuple[str, ...], Callable[[str, str], list[str]]]] = [
        (CHECKED_FOR_KL, numbers), (("README.md", "docs/your-gpu.md"), cards), (tuple(pages), commands),
    ]  # fmt: skip
    for where, check in checks:
        for name in where:
            found += check(name, read(name))
    return found


if __name__ == "__main__":
    if lost := problems():
        print("\n".join(lost))
        sys.exit(1)
    print("all claims that can be checked cheaply hold")
