"""What each method is, as data: every step of the stack is a field that can be switched off by itself.

The numbers behind the defaults stand in docs/lab-notes.md; the steps are E1 to E12 in docs/method.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from gptoss_quantize.errors import InputError

SCALES = ("absmax", "ceil", "signed", "search")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way to choose codes, scales and biases of an expert."""

    scale: str = "search"  # a rule of quantize.scales for the output's format; search: weighted by importance
    lattice: bool = True  # with search to int4: also scales that hit the lattice of weights that are MXFP4 values
    gptq: bool = True  # error feedback column by column (arXiv 2210.17323)
    act_order: bool = True  # columns by descending Hessian diagonal, groups static
    damping: float = 0.003  # share of the mean Hessian diagonal added to the diagonal
    damping_starved: float = 0.2  # the same, times columns / effective tokens of the expert
    token_power: float = 1.0  # token weight = router probability ** token_power
    centre: bool = True  # centred covariance; the expert's bias absorbs the mean error
    sweeps: int = 1  # rounds of joint scale refit and coordinate descent after GPTQ
    asymmetric: float = 0.75  # how far the down_proj target corrects for its quantized input (0: not at all)
    native: bool = True  # column steps, scale search, Hessians in C++ where it compiles; equal but for rounding
    awq: bool = False  # scales folded into norm, router and up->down before quantizing
    awq_strength: float = 1.0  # exponent of the folds that suit plain rounding best; error feedback needs less
    awq_down: bool = True  # with awq: also the per-neuron up->down fold

    @property
    def calibrated(self) -> bool:
        """Whether the recipe looks at activations at all."""
        return self.gptq or self.awq or self.scale == "search" or self.sweeps > 0 or self.centre


RECIPES: dict[str, Recipe] = {
    "rtn": Recipe(scale="absmax", gptq=False, act_order=False, centre=False, sweeps=0, asymmetric=0.0),
    "rtn-signed": Recipe(scale="signed", gptq=False, act_order=False, centre=False, sweeps=0, asymmetric=0.0),
    "awq": Recipe(gptq=False, act_order=False, sweeps=0, asymmetric=0.0, centre=False, awq=True),
    "gptq": Recipe(),
    "awq+gptq": Recipe(awq=True, awq_strength=0.5),
}


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


_PARSERS: dict[str, Callable[[str], Any]] = {"bool": _parse_bool, "int": int, "float": float, "str": str}


def override(recipe: Recipe, settings: list[str]) -> Recipe:
    """Return the recipe with `name=value` settings applied; InputError for an unknown name or a wrong value."""
    kinds = {f.name: f.type if isinstance(f.type, str) else f.type.__name__ for f in fields(Recipe)}
    values: dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in kinds:
            raise InputError(f"unknown recipe field {name!r}; known: {', '.join(kinds)} (--set name=value)")
        try:
            values[name] = _PARSERS[kinds[name]](text)
        except ValueError:
            raise InputError(f"recipe field {name}: {text!r} is not a {kinds[name]} (--set name=value)") from None
        if isinstance(values[name], int | float) and not 0 <= values[name] < float("inf"):
            raise InputError(f"recipe field {name}: {text!r} is no number from 0 on (--set name=value)")
    if (scale := values.get("scale", recipe.scale)) not in SCALES:
        raise InputError(f"recipe field scale: {scale!r} is unknown; expected one of {', '.join(SCALES)}")
    changed = replace(recipe, **values)
    if changed.asymmetric and not changed.gptq:
        raise InputError(
            "recipe field asymmetric corrects the target of error feedback: gptq=false needs asymmetric=0"
        )
    return changed


# ---- what goes with a format; the same as in `layouts` and `quantize.scales` (a test compares), without torch


@dataclass(frozen=True, slots=True)
class Facts:
    """What goes with a format."""

    groups: tuple[int, ...]  # sizes that it has
    rules: tuple[str, ...]  # for its scales
    awq: bool
    dense: tuple[str, ...]


FORMATS = {
    "int4": Facts((64, 32), ("absmax", "signed", "search"), True, ("source", "int8")),
    "int3": Facts((64, 32), ("absmax", "signed", "search"), True, ("source", "int8")),
    "int2": Facts((64, 32), ("absmax", "signed", "search"), True, ("source", "int8")),
    "mxfp4": Facts((32,), ("absmax", "ceil", "search"), False, ("source",)),
    # MXFP4 needs no recipe where it is exact, and int4 is written where it is not
    "auto": Facts((64, 32), ("absmax", "signed", "search"), True, ("source",)),
}


def format_of(bits: float | None, target: str) -> str:
    """Return the format that `bits` per code stand for, `target` without them; InputError where they do not fit."""
    if bits is None:
        return target
    name = f"int{bits:g}"
    if name not in FORMATS:
        raise InputError(f"--bits {bits:g}: expected 4, 3 or 2")
    if target not in ("int4", name):
        raise InputError(f"--bits {bits:g} and --format {target} do not go together; leave one of them out")
    return name


def check_size(size: Any, fit: Any, context: int | None, *, free: bool) -> None:
    """Raise InputError for --size, --fit and --context that do not go together, or not with what they choose.

    `free`: nothing else says the format or the form of attention, embedding and head.
    """
    for option, value in (("--size", size), ("--fit", fit)):
        if value is not None and not free:
            raise InputError(
                f"{option} chooses bits and the form of the rest; leave --bits, --format and --dense out"
            )
    if size is not None and fit is not None:
        raise InputError("--size is of the files, and --fit of the card that is to hold them; give one of them")
    if context is not None and fit is None:
        raise InputError(f"--context {context} goes with --fit: how long a conversation the card is to hold")


def check_recipe(method: str, recipe: Recipe, target: str) -> None:
    """Raise InputError for a scale rule or a method that a format does not have."""
    rules = FORMATS[target].rules
    if recipe.scale not in rules:
        other = "gptq or rtn" if target == "mxfp4" else "gptq, awq or rtn"
        given = recipe.scale != RECIPES[method].scale
        remedy = f"use --set scale={' or scale='.join(rules)}" if given else f"use --method {other}"
        raise InputError(f"format {target} has no scale rule {recipe.scale!r}, which --method {method} "
                         f"{'was given' if given else 'stands for'}; {remedy}")  # fmt: skip
    if recipe.awq and not FORMATS[target].awq:
        raise InputError(
            f"AWQ searches its folds for whole-number codes; for --format {target} use --method gptq or rtn"
        )
