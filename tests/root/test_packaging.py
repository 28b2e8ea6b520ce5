"""What is installed is what the checkout holds: six packages, their data, one command, nothing beside them.

CI runs these tests twice, from the editable install and from the built wheel outside the checkout.
"""

import ast
import gzip
import json
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import distribution
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

import pytest

import gptoss_quantize

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "gptoss_quantize": "gptoss_quantize",
    "gptoss_quantize.demo": "gptoss_quantize/demo",
    "gptoss_quantize.kernels": "kernels",
    "gptoss_quantize.calibration": "calibration",
    "gptoss_quantize.quantize": "quantize",
    "gptoss_quantize.eval": "eval",
    "gptoss_quantize.runtimes": "runtimes",
}
SUITE = (
    "agreement",
    "capitals",
    "continuation",
    "copying",
    "kinds",
    "last_words",
    "opposites",
    "pronouns",
    "sequences",
)
FOLDERS_BELOW = [package for package in FOLDERS if "." in package]
# KiB; text that everybody downloads
DATA_LIMITS = {
    ("calibration", "calibration.jsonl.gz"): 320,
    ("calibration", "NOTICE"): 8,
    ("eval", "heldout.jsonl.gz"): 128,
    ("eval", "NOTICE"): 8,
    ("eval", "report.html.j2"): 16,
    **{("eval", f"tasks/{name}.jsonl"): 64 for name in SUITE},
}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def folder(package: str) -> Path:
    """The directory a package is imported from."""
    path = import_module(package).__file__
    assert path is not None, f"{package} has no __init__.py: setuptools' editable install would not find it"
    return Path(path).parent


def test_pyproject_names_the_six_packages():
    tool = PYPROJECT["tool"]["setuptools"]
    assert sorted(tool["packages"]) == sorted(FOLDERS)
    assert tool["package-dir"] == FOLDERS


def test_every_folder_of_the_checkout_with_an_init_is_packaged():
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found <= set(FOLDERS.values()), "add the folder to packages and package-dir in pyproject.toml"


@pytest.mark.parametrize("package", FOLDERS)
def test_every_module_imports(package):
    names = [module.name for module in iter_modules([str(folder(package))])]
    assert names or package not in FOLDERS_BELOW
    # the parts of the plugin that vLLM imports, where it is installed (docs/vllm.md)
    inside = {"vllm_chat", "vllm_config", "vllm_dense", "vllm_experts", "vllm_model"}
    for name in names if find_spec("vllm") else set(names) - inside:
        import_module(f"{package}.{name}")


@pytest.mark.parametrize("package", FOLDERS)
def test_packages_are_flat(package):
    # a sub-folder that pyproject does not list is missing from the wheel
    known = {folder(other) for other in FOLDERS}
    deeper = {path.parent for path in folder(package).rglob("*.py")} - known
    assert not deeper


@pytest.mark.parametrize("package", FOLDERS_BELOW)
def test_the_init_of_a_folder_is_a_docstring(package):
    # the folder may be imported by accident under its bare name: then nothing must happen
    tree = ast.parse((folder(package) / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) and len(tree.body) == 1


def test_the_version_is_written_the_same_everywhere():
    installed = distribution("gptoss-quantize").version
    assert gptoss_quantize.__version__ == PYPROJECT["project"]["version"] == installed


def test_nothing_of_ours_is_installed_beside_the_package():
    installed = distribution("gptoss-quantize")
    assert (installed.read_text("top_level.txt") or "").split() == ["gptoss_quantize"]
    first = {file.parts[0] for file in installed.files or ()}
    assert not first & {*FOLDERS.values(), "tests", "benchmarks", "examples", "docs"} - {"gptoss_quantize"}


def test_the_command_is_installed_and_says_its_version():
    (command,) = (e for e in distribution("gptoss-quantize").entry_points if e.group == "console_scripts")
    assert (command.name, command.value) == ("gptoss-quantize", "gptoss_quantize.cli:main")
    script = Path(sys.executable).with_name("gptoss-quantize")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == gptoss_quantize.__version__


def test_importing_the_package_or_its_command_line_loads_no_torch():
    code = "import sys, gptoss_quantize.cli; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


def test_types_are_shipped():
    assert files("gptoss_quantize").joinpath("py.typed").is_file()


@pytest.mark.parametrize("package", ["calibration", "eval"])
def test_packaged_data_is_complete_and_small(package):
    data = Path(str(files(f"gptoss_quantize.{package}").joinpath("data")))
    there = {str(path.relative_to(data)) for path in data.rglob("*") if path.is_file()}
    assert there == {name for owner, name in DATA_LIMITS if owner == package}
    for name in there:
        content = data.joinpath(name).read_bytes()
        assert 0 < len(content) <= DATA_LIMITS[package, name] * 1024, f"{name}: {len(content)} bytes"
        if name.endswith(".gz"):
            rows = [json.loads(line) for line in gzip.decompress(content).decode("utf-8").splitlines()]
            assert len(rows) > 1 and all(row["text"].strip() for row in rows)


CPP = (".h", "_dot.h", "_planes.h", "_vectors.h", "_dot.cpp", "_experts.cpp", "_passes.cpp", "_solve.cpp")


def test_only_data_folders_hold_anything_but_python():
    for package in FOLDERS:
        other = {p.name for p in folder(package).iterdir() if p.is_file() and p.suffix not in (".py", ".pyc")}
        assert other == {
            "gptoss_quantize": {"py.typed"},
            "gptoss_quantize.kernels": {f"native{name}" for name in CPP},
        }.get(package, set()), package
