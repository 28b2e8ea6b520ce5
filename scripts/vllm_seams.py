"""Does a version of vLLM still have what our plugin is built on? Reads its source, imports nothing.

    pip download --no-deps vllm==0.33.0 && unzip -q vllm-0.33.0*.whl 'vllm/*.py' -d tree
    python scripts/vllm_seams.py tree [OTHER ...]

Every line is a function with the arguments that we give it, or that vLLM gives it and we take.
Exit code 1 where one is missing: such a version does not go into `runtimes/vllm_rules.py`.
"""

import ast
import sys
from pathlib import Path

LAYERS = "vllm/model_executor/layers/"
# file, class ("" for none), function, arguments that must be there in this order
SEAMS = (
    (LAYERS + "quantization/__init__.py", "", "register_quantization_config", "quantization"),
    (
        LAYERS + "quantization/base_config.py",
        "QuantizationConfig",
        "override_quantization_method",
        "cls hf_quant_cfg user_quant hf_config",
    ),
    (
        LAYERS + "quantization/base_config.py",
        "QuantizationConfig",
        "maybe_update_config",
        "self model_name hf_config revision",
    ),
    (LAYERS + "quantization/base_config.py", "QuantizationConfig", "get_quant_method", "self layer prefix"),
    (
        LAYERS + "fused_moe/fused_moe_method_base.py",
        "FusedMoEMethodBase",
        "apply",
        "self layer x topk_weights topk_ids shared_experts shared_experts_input",
    ),
    (
        LAYERS + "fused_moe/fused_moe_method_base.py",
        "FusedMoEMethodBase",
        "create_weights",
        "self layer num_experts hidden_size intermediate_size_per_partition params_dtype",
    ),
    (
        LAYERS + "fused_moe/fused_moe_method_base.py",
        "FusedMoEMethodBase",
        "maybe_roundup_sizes",
        "self hidden_size intermediate_size_per_partition",
    ),
    (
        LAYERS + "fused_moe/routed_experts.py",
        "RoutedExperts",
        "_map_global_expert_id_to_local_expert_id",
        "self expert_id",
    ),
    (LAYERS + "fused_moe/routed_experts.py", "RoutedExperts", "expert_map", "self"),
    (
        "vllm/model_executor/models/config.py",
        "GptOssForCausalLMConfig",
        "verify_and_update_config",
        "vllm_config",
    ),
    (
        LAYERS + "vocab_parallel_embedding.py",
        "VocabParallelEmbedding",
        "__init__",
        "self num_embeddings embedding_dim params_dtype org_num_embeddings padding_size quant_config prefix",
    ),
    ("vllm/model_executor/models/gpt_oss.py", "GptOssForCausalLM", "load_weights", "self weights"),
    (
        "vllm/model_executor/models/gpt_oss.py",
        "GptOssModel",
        "_try_load_streamed_expert",
        "cls name loaded_weight params_dict loaded_params",
    ),
    ("vllm/model_executor/models/registry.py", "_ModelRegistry", "register_model", "self model_arch model_cls"),
)
# file, text that must be in it
TEXTS = (
    ("vllm/model_executor/models/gpt_oss.py", '"w13_weight_packed": "gpt_oss_w13"'),
    ("vllm/model_executor/models/gpt_oss.py", "return_success=True"),
    ("vllm/model_executor/models/gpt_oss.py", "self.model = GptOssModel("),
    ("vllm/model_executor/models/gpt_oss.py", "self.embedding = VocabParallelEmbedding("),
    ("vllm/model_executor/models/gpt_oss.py", '".embed_tokens.weight": ".embedding.weight"'),
    ("vllm/config/vllm.py", "hf_config=model_config.hf_config"),
    ("vllm/config/model.py", "hf_config=self.hf_config"),
    ("vllm/config/vllm.py", "cls = MODELS_CONFIG_MAP.get(architecture, None)"),
    ("vllm/model_executor/models/config.py", '"GptOssForCausalLM": GptOssForCausalLMConfig'),
    ("vllm/model_executor/models/config.py", 'structured_outputs_config.reasoning_parser = "openai_gptoss"'),
    ("vllm/renderers/online_renderer.py", 'self.use_harmony = model_config.hf_config.model_type == "gpt_oss"'),
    (LAYERS + "fused_moe/runner/moe_runner.py", "self._quant_method.moe_kernel is not None"),
)


def arguments(tree: ast.Module, owner: str, name: str) -> list[str] | None:
    """Return the argument names of a function, None where there is none."""
    bodies = (
        [tree.body] if not owner else [n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner]
    )
    for body in bodies:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return None


def missing(root: Path) -> list[str]:
    """Return what a tree of sources lacks."""
    found = []
    for file, owner, name, wanted in SEAMS:
        place = root / file
        has = arguments(ast.parse(place.read_text(encoding="utf-8")), owner, name) if place.exists() else None
        if has is None or has[: len(wanted.split())] != wanted.split():
            found.append(f"{file}: {owner}.{name}({wanted.replace(' ', ', ')}), found {has}")
    for file, text in TEXTS:
        place = root / file
        if not place.exists() or text not in place.read_text(encoding="utf-8"):
            found.append(f"{file}: {text}")
    return found


def main() -> None:
    """Say it for every tree."""
    bad = False
    for place in sys.argv[1:]:
        lacks = missing(Path(place))
        bad = bad or bool(lacks)
        print(f"{place}: {len(SEAMS) + len(TEXTS) - len(lacks)} of {len(SEAMS) + len(TEXTS)} seams")
        for line in lacks:
            print(f"  missing  {line}")
    sys.exit(bad)


if __name__ == "__main__":
    main()
