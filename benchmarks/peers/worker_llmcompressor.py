"""The measured half of run_llmcompressor.py: only what a user of llm-compressor would write."""

import json
import sys
import time
from pathlib import Path

import numpy as np
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM

# experts only
IGNORE = ["lm_head", "re:.*self_attn.*", "re:.*router.*"]
EXPERTS = [r"re:.*mlp.experts.*.gate_proj$", r"re:.*mlp.experts.*.up_proj$"]


def recipe(method: str, group_size: int) -> list:
    """The modifiers for one method, everything but the group size at its default."""
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if method.startswith("gptq"):
        return [GPTQModifier(config_groups=groups, ignore=IGNORE)]
    if method == "awq":
        return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=IGNORE)]
    # the mapping a careful user would give by hand: norm to experts alone, no inexact up -> down fold
    mapping = [AWQMapping("re:.*post_attention_layernorm$", ["re:.*mlp.router$", *EXPERTS])]
    return [
        AWQModifier(mappings=mapping),
        QuantizationModifier(config_groups=groups, ignore=IGNORE),
    ]


def main() -> None:
    """argv: model, tokens, output directory, group size, method."""
    model_dir, tokens_path, out_dir, group_size, method = sys.argv[1:]
    # 0.14.0.1's AWQ pins its cache unasked and so raises where there is no accelerator; pinning changes no value
    IntermediatesCache.pin_memory = lambda *_: None
    started = time.perf_counter()
    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    loaded = time.perf_counter()
    tokens = np.load(tokens_path)
    dataset = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()})
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe(method, int(group_size)),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=tokens.shape[0],
        shuffle_calibration_samples=False,
        # the default sends every token through every expert
        moe_calibrate_all_experts=method != "gptq-routed",
    )
    quantized = time.perf_counter()
    model.save_pretrained(out_dir, save_compressed=True)
    saved = time.perf_counter()
    times = {
        "wall_load_s": round(loaded - started, 2),
        "wall_quantize_s": round(quantized - loaded, 2),
        "wall_save_s": round(saved - quantized, 2),
    }
    Path(out_dir, "worker.json").write_text(json.dumps(times))


if __name__ == "__main__":
    main()
