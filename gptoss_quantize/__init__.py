"""Quantize gpt-oss experts to int4 with AWQ and GPTQ, and prove what it cost.

    import gptoss_quantize as gq

    gq.quantize("openai/gpt-oss-20b", "gpt-oss-20b-int4", progress=True)
    gq.evaluate("gpt-oss-20b-int4", "openai/gpt-oss-20b").results
    model = gq.load("gpt-oss-20b-int4")      # a transformers model, experts packed in memory
    gq.register()                            # from here on AutoModelForCausalLM loads our checkpoints too

docs/api.md describes every function. They are imported on first use, so that importing the package stays instant.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gptoss_quantize.errors import InputError

if TYPE_CHECKING:
    from gptoss_quantize.api import (
        compare,
        evaluate,
        export,
        generate,
        import_checkpoint,
        load,
        plan,
        push,
        quantize,
        register,
        verify,
    )

__version__ = "0.1.0"
__all__ = [
    "InputError",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "generate",
    "import_checkpoint",
    "load",
    "plan",
    "push",
    "quantize",
    "register",
    "verify",
]
_HERE = {"InputError", "__version__"}


class _Package(ModuleType):
    """This module: its public functions come from `api` on first use.

    `quantize` is a function and a subpackage. The function has the name: the import system, which would bind the
    subpackage to it, is not heard. Modules of the subpackage are attributes of the function too, as
    `import gptoss_quantize.quantize.gptq as gptq` and references by dotted name look them up step by step.
    """

    @property
    def quantize(self) -> Any:
        function = import_module("gptoss_quantize.api").quantize
        inside = __name__ + ".quantize."
        for name in [name for name in sys.modules if name.startswith(inside)]:
            setattr(function, name.removeprefix(inside), sys.modules[name])
        return function

    @quantize.setter
    def quantize(self, value: object) -> None:
        if not isinstance(value, ModuleType):
            raise AttributeError("gptoss_quantize.quantize cannot be replaced; replace gptoss_quantize.api.quantize")

    def __getattr__(self, name: str) -> Any:
        if name in __all__ and name not in _HERE | {"quantize"}:
            return getattr(import_module("gptoss_quantize.api"), name)
        raise AttributeError(f"module 'gptoss_quantize' has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
