"""Quantize gpt-oss experts to int4 with AWQ and GPTQ, and prove what it cost.

    import gptoss_quantize
    model = gptoss_quantize.load(DIR)        # a transformers model, experts packed in memory
    gptoss_quantize.register()               # from here on AutoModelForCausalLM loads our checkpoints too

Both are imported on first use, so that importing the package stays instant.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "register"]


def __getattr__(name: str) -> Any:
    if name in ("load", "register"):
        return getattr(import_module("gptoss_quantize.loading"), name)
    raise AttributeError(f"module 'gptoss_quantize' has no attribute {name!r}")
