"""Our perplexity and KL divergence beside llama-perplexity's, on the same tokens of the same pair of models.

    gptoss-quantize export MODEL a --to gguf; gptoss-quantize export INT4 b --to gguf
    python benchmarks/llama_kl.py LLAMA_BIN MODEL a/model.gguf INT4 b/model.gguf [--chunks 8]

llama-perplexity cuts the text into chunks of 512 and scores the second half of each: the last 255 tokens, given
the 257 before them. Ours scores the same tokens (trees with a context of 257), in float32 and in bfloat16 products.
What differs by design: llama.cpp multiplies int4 weights with activations rounded to int8 in blocks of 32 (Q8_0), and
stores the baseline's log-probabilities in 16 bits; ours does neither. The token ids of both are compared first.
"""

import argparse
import gzip
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from gptoss_quantize.calibration.sources import default_heldout_path
from gptoss_quantize.calibration.text import load_tokenizer
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.eval.divergence import compare_states, summarize
from gptoss_quantize.eval.trees import Tree, lay_out, predicting_states

CONTEXT = 512
NUMBER = r"\s*:?\s*(-?[\d.]+)\s*(?:±|%|$)"


def run(command: list[str]) -> str:
    """Return what a program printed; its error is ours."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def number(text: str, name: str) -> float | None:
    """Return the number that follows a name at the start of a line of llama-perplexity's report."""
    found = re.search(rf"^\s*{re.escape(name)}{NUMBER}", text, flags=re.MULTILINE)
    return None if found is None else float(found[1])


def theirs(options: argparse.Namespace, text: Path, folder: Path) -> dict[str, Any]:
    """Return what llama-perplexity says about the pair."""
    base = folder / "base.kld"
    common = ["-f", str(text), "-c", str(CONTEXT), "--chunks", str(options.chunks), "--kl-divergence-base", str(base)]
    program = str(options.llama / "llama-perplexity")
    run([program, "-m", str(options.baseline_gguf), *common])
    report = run([program, "-m", str(options.candidate_gguf), *common, "--kl-divergence"])
    (folder / "llama.txt").write_text(report, encoding="utf-8")
    names = {"perplexity": "Mean PPL(Q)", "baseline_perplexity": "Mean PPL(base)", "kl_mean": "Mean    KLD",
             "kl_median": "Median  KLD", "kl_p99": "99.0%   KLD", "rms_probability_change": "RMS Δp",
             "top1_agreement": "Same top p"}  # fmt: skip
    return {key: number(report, name) for key, name in names.items()}


def ours(options: argparse.Namespace, ids: list[int], dtype: torch.dtype) -> dict[str, Any]:
    """Return our numbers on the tokens that llama-perplexity scores."""
    half = CONTEXT // 2 + 1
    rows = [ids[i * CONTEXT : (i + 1) * CONTEXT] for i in range(options.chunks)]
    layout = lay_out([Tree(tuple(row[:half]), (tuple(row[half:]),)) for row in rows])
    states, heads = [], []
    for path in (options.baseline, options.candidate):
        checkpoint = Checkpoint(path)
        states.append(predicting_states(checkpoint, layout, dtype))
        heads.append(checkpoint.head().to(dtype))
    (tokens,) = compare_states(states[0], heads[0], [(states[1], heads[1])], layout.target)
    summary = summarize(tokens, layout.owner)
    change = (-tokens.nll.double()).exp() - (-tokens.baseline_nll.double()).exp()
    keys = ("perplexity", "baseline_perplexity", "kl_mean", "kl_mean_se", "kl_median", "kl_p99", "top1_agreement")
    return {key: summary[key] for key in keys} | {"rms_probability_change": float(change.square().mean().sqrt())}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("llama", "baseline", "baseline_gguf", "candidate", "candidate_gguf"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("llama-kl"), help="folder for the text and llama's output")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    text = options.work / "text.txt"
    with gzip.open(default_heldout_path(), "rt", encoding="utf-8") as file:
        text.write_text("\n\n".join(json.loads(line)["text"] for line in file), encoding="utf-8")
    tokenizer = load_tokenizer(options.baseline)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    printed = run([str(options.llama / "llama-tokenize"), "-m", str(options.baseline_gguf), "-f", str(text), "--ids"])
    listed = [int(n) for n in re.findall(r"\d+", re.findall(r"\[[\d,\s]+\]", printed)[-1])]
    needed = options.chunks * CONTEXT
    result = {
        "chunks": options.chunks,
        "scored_tokens": options.chunks * (CONTEXT - CONTEXT // 2 - 1),
        "same_ids": listed[:needed] == ids[:needed],
        "llama.cpp": theirs(options, text, options.work),
        "ours float32": ours(options, ids, torch.float32),
        "ours bfloat16": ours(options, ids, torch.bfloat16),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
