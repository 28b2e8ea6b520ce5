"""The measured half of run_gptqmodel.py: only what a user of GPTQModel would write."""

import json
import sys
import time
from pathlib import Path

import numpy as np
from gptqmodel import GPTQModel, QuantizeConfig

VARIANTS = {"gptq": {}, "gptq-desc-act": {"desc_act": True, "act_group_aware": False}}


def main() -> None:
    """argv: model, tokens, output directory, group size, method."""
    model_dir, tokens_path, out_dir, group_size, method = sys.argv[1:]
    started = time.perf_counter()
    config = QuantizeConfig(
        bits=4,
        group_size=int(group_size),
        sym=True,
        # experts only: leave the attention projections alone
        dynamic={r"-:.*self_attn.*": {}},
        **VARIANTS[method],
    )
    model = GPTQModel.load(model_dir, config)
    loaded = time.perf_counter()
    rows = np.load(tokens_path).tolist()
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
    quantized = time.perf_counter()
    model.save(out_dir)
    saved = time.perf_counter()
    times = {
        "wall_load_s": round(loaded - started, 2),
        "wall_quantize_s": round(quantized - loaded, 2),
        "wall_save_s": round(saved - quantized, 2),
    }
    Path(out_dir, "worker.json").write_text(json.dumps(times))


if __name__ == "__main__":
    main()
