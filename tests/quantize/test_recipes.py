"""Recipes are values; a mistyped field or value is refused, not dropped."""

import pytest

from gptoss_quantize.errors import InputError
from gptoss_quantize.quantize.recipes import RECIPES, override


def test_override():
    changed = override(RECIPES["gptq"], ["sweeps=2", "centre=false", "damping=0.01", "scale=signed"])
    assert (changed.sweeps, changed.centre, changed.damping, changed.scale) == (2, False, 0.01, "signed")
    assert changed.gptq
    assert override(RECIPES["awq"], []) == RECIPES["awq"]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("sweep=2", "unknown recipe field 'sweep'"),
        ("sweeps", "'' is not a int"),
        ("sweeps=two", "'two' is not a int"),
        ("centre=0", "'0' is not a bool"),
        ("scale=minmax", "'minmax' is unknown; expected one of absmax, ceil, signed, search"),
    ],
)
def test_mistakes_are_refused(setting, words):
    with pytest.raises(InputError, match=words):
        override(RECIPES["gptq"], [setting])


@pytest.mark.parametrize("kept", ["sweeps=1", "centre=true"])
def test_what_is_left_of_a_calibrated_recipe_still_needs_text(kept):
    off = ["gptq=false", "asymmetric=0", "scale=signed", "sweeps=0", "centre=false"]
    assert not override(RECIPES["gptq"], off).calibrated
    assert override(RECIPES["gptq"], [*off, kept]).calibrated


def test_a_target_for_error_feedback_that_is_off_is_refused():
    with pytest.raises(InputError, match="gptq=false needs asymmetric=0"):
        override(RECIPES["gptq"], ["gptq=false"])


def test_only_plain_rounding_needs_no_text():
    assert [name for name, recipe in RECIPES.items() if not recipe.calibrated] == ["rtn", "rtn-signed"]
