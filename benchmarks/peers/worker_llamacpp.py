"""The measured half of run_llamacpp.py: convert, importance matrix, quantize."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


def shared_fraction(ours: list[int], theirs: list[int]) -> float:
    """How much of one token list is in the other, order aside; 1.0 if the text gave the same tokens again."""
    return (Counter(ours) & Counter(theirs)).total() / max(len(ours), len(theirs))


def main() -> None:
    """argv: model, tokens, output directory, group size, method."""
    model_dir, tokens_path, out_dir, _, method = sys.argv[1:]
    out = Path(out_dir)
    binaries = Path(os.environ["LLAMA_CPP_BUILD"], "bin")
    convert = Path(os.environ["LLAMA_CPP_SOURCE"], "convert_hf_to_gguf.py")
    threads = os.environ.get("OMP_NUM_THREADS", "2")
    original, matrix, text = out / "bf16.gguf", out / "imatrix.gguf", out / "calibration.txt"
    started = time.perf_counter()
    subprocess.run([sys.executable, convert, model_dir, "--outtype", "bf16", "--outfile", original], check=True)
    converted = time.perf_counter()
    tokens = np.load(tokens_path)
    ours = tokens.flatten().tolist()
    tokenizer = Tokenizer.from_file(str(Path(model_dir, "tokenizer.json")))
    text.write_text(tokenizer.decode(ours, skip_special_tokens=False))
    listing = subprocess.run(
        [binaries / "llama-tokenize", "-m", original, "-f", text, "--ids", "--no-bos", "--log-disable"],
        check=True,
        stdout=subprocess.PIPE,
    )
    window = str(tokens.shape[1])
    collect: list[str | Path] = [
        binaries / "llama-imatrix",
        "-m",
        original,
        "-f",
        text,
        "-o",
        matrix,
        "-c",
        window,
        "-b",
        window,
    ]
    collect += ["-t", threads, "-ngl", "0", "--parse-special", "--no-ppl"]
    subprocess.run(collect, check=True)
    measured = time.perf_counter()
    # the overrides keep llama.cpp's own exceptions (a 5-bit down_proj here and there, 8-bit attention) out of
    # the comparison: the experts all get the named type, everything else stays as it was
    quantize: list[str | Path] = [binaries / "llama-quantize", "--imatrix", matrix]
    quantize += ["--output-tensor-type", "bf16", "--token-embedding-type", "bf16"]
    quantize += ["--tensor-type", "attn_.*=bf16", "--tensor-type", f"ffn_(gate|up|down)_exps={method}"]
    quantize += [original, out / "quantized.gguf", method.upper(), threads]
    subprocess.run(quantize, check=True)
    quantized = time.perf_counter()
    original.unlink()
    report = {
        "wall_load_s": round(converted - started, 2),
        "wall_imatrix_s": round(measured - converted, 2),
        "wall_quantize_s": round(quantized - converted, 2),
        "calibration_tokens_kept": round(shared_fraction(ours, json.loads(listing.stdout)), 5),
    }
    Path(out_dir, "worker.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
