"""Chats of a checkpoint that cannot hold OpenAI's chat format go through its own chat template.

vLLM's defaults for gpt-oss (MODELS_CONFIG_MAP) choose a parser of thoughts that reads Harmony alone, and its server
then answers every other chat with 501. They are taken as they are for every other model. Imported only once one of
our checkpoints without Harmony is being served.
"""

from typing import Any

from vllm.model_executor.models.config import MODELS_CONFIG_MAP, GptOssForCausalLMConfig

from gptoss_quantize.runtimes import vllm_rules as rules

GPTOSS = "GptOssForCausalLM"  # what config.json names, and vLLM's defaults go by


class Defaults(GptOssForCausalLMConfig):
    """vLLM's defaults for gpt-oss, without a parser of thoughts for a checkpoint of ours without Harmony."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Fill in what the user left open; `--reasoning-parser` stays what it is."""
        asked = vllm_config.structured_outputs_config
        parser = asked.reasoning_parser
        GptOssForCausalLMConfig.verify_and_update_config(vllm_config)
        config = vllm_config.model_config.hf_config
        if rules.marked(config) is not None and not rules.speaks_harmony(config.vocab_size):
            asked.reasoning_parser = parser


def use_chat_template() -> None:
    """Put our defaults in the place of vLLM's, which they call; safe to call again."""
    MODELS_CONFIG_MAP[GPTOSS] = Defaults
