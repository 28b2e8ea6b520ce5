"""No folder of the checkout is a top-level module.

`kernels`, `eval` and `quantize` are also the names of packages on PyPI, and transformers looks for `kernels` by
name: with the checkout on sys.path it finds ours and breaks. So nothing may put the checkout there; see
`PYTHONSAFEPATH` in the Makefile and `conftest.py`.
"""

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOUR = ("kernels", "calibration", "quantize", "eval")
NAMES = sorted(
    {*FOUR, "tests", "benchmarks", "examples", "docs"}
    | {p.name for p in ROOT.iterdir() if p.is_dir() and p.name.isidentifier()} - {"gptoss_quantize"}
)
# what a fresh interpreter would import under each name
CODE = """
import json, sys
from importlib.util import find_spec
found = {}
for name in sys.argv[1:]:
    spec = find_spec(name)
    if spec is not None:
        found[name] = [spec.origin, *(spec.submodule_search_locations or [])]
print(json.dumps(found))
"""


def is_ours(locations: list[str | None]) -> bool:
    """Whether one of the places is in the checkout, or in the installed package."""
    homes = [Path(str(import_module("gptoss_quantize." + name).__file__)).parent for name in FOUR]
    # the interpreter's own are "frozen" or "built-in", nowhere: `site`, also the folder that `make docs` writes
    places = [Path(place).resolve() for place in locations if place and Path(place).is_absolute()]
    in_environment = Path(sys.prefix).resolve()
    return any(
        place == home or home in place.parents or (ROOT in place.parents and in_environment not in place.parents)
        for place in places
        for home in homes
    )


def found_by_a_fresh_interpreter(cwd: Path, **environment: str) -> dict[str, list[str | None]]:
    """Name -> places that `python -c` finds for each name of NAMES."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | environment
    done = subprocess.run(
        [sys.executable, "-c", CODE, *NAMES], cwd=cwd, env=env, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_not_in_this_process():
    # the finders are asked themselves: pytest has its own entry `tests` in sys.modules
    for name in NAMES:
        specs = [spec for finder in sys.meta_path if (spec := finder.find_spec(name, None)) is not None]
        for spec in specs:
            assert not is_ours([spec.origin, *(spec.submodule_search_locations or [])]), name


def test_not_in_a_process_elsewhere(tmp_path):
    found = found_by_a_fresh_interpreter(tmp_path)
    assert not [name for name, places in found.items() if is_ours(places)]


def test_not_in_a_process_in_the_checkout_with_safe_path():
    found = found_by_a_fresh_interpreter(ROOT, PYTHONSAFEPATH="1")
    assert not [name for name, places in found.items() if is_ours(places)]


def test_the_check_sees_a_folder_that_is_on_the_path():
    home = Path(str(import_module("gptoss_quantize.kernels").__file__)).parent
    spec = PathFinder.find_spec("kernels", [str(home.parent)])
    assert spec is not None and is_ours([spec.origin, *(spec.submodule_search_locations or [])])


@pytest.mark.parametrize("name", FOUR)
def test_the_packages_are_found_under_their_full_name(name):
    spec = find_spec(f"gptoss_quantize.{name}")
    assert spec is not None and is_ours([spec.origin])


def test_no_script_lies_in_the_root():
    # the folder of a script is first on sys.path: scripts belong to benchmarks/ or examples/
    assert not list(ROOT.glob("*.py"))
