"""The entry point `vllm.general_plugins`: makes vLLM serve our int4 checkpoints, and nothing else.

vLLM calls `register` in each of its processes, whatever it serves, so this module imports nothing heavy, and a vLLM
that it does not know keeps working for other models: one of our checkpoints is refused there, with the versions that
work. What is used of vLLM: a quantization method under our own name (`register_quantization_config`), asked by
`override_quantization_method` before the built-in ones and given the model's config, in which our marker stands; and
a model class under a name of our own, so that no other gpt-oss model changes hands. docs/vllm.md says what was tried.
"""

import importlib
import logging
from typing import Any

from gptoss_quantize.runtimes import vllm_rules as rules

ARCHITECTURE = "GptossQuantizeForCausalLM"


def register() -> None:
    """Register our quantization method and model class with vLLM; safe to call again."""
    version = importlib.import_module("vllm.version").__version__
    if rules.known_version(version):
        importlib.import_module("gptoss_quantize.runtimes.vllm_config")
        registry = importlib.import_module("vllm.model_executor.models").ModelRegistry
        if ARCHITECTURE not in registry.models:
            # by name: loaded when the first of our checkpoints is
            registry.register_model(ARCHITECTURE, f"gptoss_quantize.runtimes.vllm_model:{ARCHITECTURE}")
        return
    try:
        _refuse_ours(version)
    except (ImportError, AttributeError, TypeError) as error:
        logging.getLogger(__name__).warning("gptoss-quantize has no plugin for vLLM %s (%s)", version, error)


def _refuse_ours(version: str) -> None:
    """Register a quantization method that takes no checkpoint, and refuses ours."""
    base = importlib.import_module("vllm.model_executor.layers.quantization.base_config").QuantizationConfig
    quantization = importlib.import_module("vllm.model_executor.layers.quantization")

    def override(cls: Any, quantization_config: Any, *args: Any, hf_config: Any = None, **kwargs: Any) -> None:
        own = isinstance(quantization_config, dict) and quantization_config.get("quant_method") == rules.NAME
        if own or rules.marked(hf_config) is not None:
            raise ValueError(rules.version_message(version))

    def nothing(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(rules.version_message(version))

    names: frozenset[str] = getattr(base, "__abstractmethods__", frozenset())
    body: dict[str, Any] = dict.fromkeys(names, nothing)
    body["override_quantization_method"] = classmethod(override)
    quantization.register_quantization_config(rules.NAME)(type("Refusing", (base,), body))
