"""The measured half of run_autoround.py: only what a user of AutoRound would write."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound

ITERATIONS = {"auto-round-50": 50, "auto-round-200": 200, "rtn": 0}
BATCH = 8


def main() -> None:
    """argv: model, tokens, output directory, group size, method."""
    model_dir, tokens_path, out_dir, group_size, method = sys.argv[1:]
    started = time.perf_counter()
    tokens = torch.from_numpy(np.load(tokens_path))
    compressor = AutoRound(
        model_dir,
        scheme="W4A16",
        bits=4,
        group_size=int(group_size),
        sym=True,
        iters=ITERATIONS[method],
        nsamples=tokens.shape[0],
        seqlen=tokens.shape[1],
        batch_size=BATCH,
        dataset=[{"input_ids": batch} for batch in tokens.split(BATCH)],
        device_map="cpu",
        # experts only
        ignore_layers="self_attn,router,lm_head",
    )
    loaded = time.perf_counter()
    # AutoRound saves while it quantizes, so the two cannot be told apart
    compressor.quantize_and_save(out_dir, format="auto_round")
    saved = time.perf_counter()
    times = {"wall_load_s": round(loaded - started, 2), "wall_quantize_s": round(saved - loaded, 2)}
    Path(out_dir, "worker.json").write_text(json.dumps(times))


if __name__ == "__main__":
    main()
