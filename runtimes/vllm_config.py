"""vLLM's view of our quantization: which layer gets which method. Imported by `vllm_plugin` only.

A class at module level, since vLLM pickles it to its engine process. Methods are imported when they are needed: every
vLLM that serves another model imports this module as well.
"""

from typing import Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from gptoss_quantize.errors import InputError
from gptoss_quantize.runtimes import vllm_rules as rules
from gptoss_quantize.runtimes.vllm_plugin import ARCHITECTURE


@register_quantization_config(rules.NAME)
class GptossQuantizeConfig(QuantizationConfig):
    """The `quantization_config` of a checkpoint of ours, and its marker."""

    def __init__(self, described: dict[str, Any]):
        super().__init__()
        self.described = described
        (group,) = described["config_groups"].values()
        self.group_size = int(group["weights"]["group_size"])
        self.dense = "source"

    @classmethod
    def get_name(cls) -> str:
        """Return the name that we are registered under."""
        return rules.NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes of `--dtype`; float32 is for comparing on a CPU."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the smallest compute capability of a card; `vllm_rules.card_backend` says more."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file: the description is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GptossQuantizeConfig":
        """Return the configuration for config.json's `quantization_config`."""
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Return our name for a checkpoint with our marker, None for every other one."""
        if rules.marked(hf_config) is not None:
            if not rules.speaks_harmony(hf_config.vocab_size):
                # here, since vLLM fills in its defaults for gpt-oss right after this question
                from gptoss_quantize.runtimes.vllm_chat import use_chat_template

                use_chat_template()
            return rules.NAME
        if isinstance(hf_quant_cfg, dict) and hf_quant_cfg.get("quant_method") == rules.NAME:
            raise InputError(
                f"config.json: quant_method is {rules.NAME!r}, and the field {rules.MARKER!r} is missing; take the "
                "config.json that the checkpoint was written with"
            )
        return None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Refuse what vLLM would serve wrong, and complete the model's config in place before it is built."""
        marker = rules.marked(hf_config)
        if marker is None:
            raise InputError(
                f"{model_name}: --quantization {rules.NAME} is for checkpoints of gptoss-quantize; leave it out"
            )
        self.dense = marker.get("dense", "source")
        rules.check_settings(hf_config.to_dict())
        hf_config.rope_parameters = rules.yarn(hf_config.rope_parameters, hf_config.max_position_embeddings)
        hf_config.architectures = [ARCHITECTURE]
        if not rules.speaks_harmony(hf_config.vocab_size):
            # the server goes by this name alone; nothing else does for our checkpoints
            hf_config.model_type = rules.MARKER

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method of a layer: int4 experts, int8 matrices, or vLLM's own unquantized one."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        if isinstance(layer, RoutedExperts):
            from gptoss_quantize.runtimes.vllm_experts import method_for

            return method_for(layer, prefix, self.described, self.group_size)
        if isinstance(layer, LinearBase | VocabParallelEmbedding) and self.dense == "int8":
            from gptoss_quantize.runtimes.vllm_dense import Int8Method

            return Int8Method(prefix)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
