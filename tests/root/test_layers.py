"""Rules of CONTRIBUTING.md that a program can check, read from the syntax tree of the installed package."""

import ast
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 450
MAX_TEST_LINES = 500
# each may import itself and those below it; modules of the root package that are not named are "root"
ORDER = ("kernels", "root", "calibration", "quantize", "eval", "runtimes", "api", "demo", "cli")
PACKAGES = ("", "kernels", "calibration", "quantize", "eval", "runtimes", "demo")


def modules() -> dict[str, Path]:
    """Every module of the six packages by its full name, __init__ as the package itself."""
    out = {}
    for package in PACKAGES:
        name = ".".join(("gptoss_quantize", package)).rstrip(".")
        for path in Path(str(import_module(name).__file__)).parent.glob("*.py"):
            out[name if path.stem == "__init__" else f"{name}.{path.stem}"] = path
    return out


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def layer(module: str) -> str:
    """The entry of ORDER that a module of ours belongs to."""
    # cli_compare.py and its like are part of the command line, and lm_eval.py is one of its own
    if module.endswith(".__main__") or module == "gptoss_quantize.lm_eval":
        return "cli"
    part = module.split(".")[1].split("_")[0] if "." in module else ""
    return part if part in ORDER else "root"


def for_checkers(node: ast.AST) -> bool:
    """Whether a statement is for type checkers only, and never executed."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(tree: ast.Module) -> set[str]:
    """Full names that a module imports anywhere, at the top or inside a function."""
    names: set[str] = set()
    executed = ast.Module([node for node in tree.body if not for_checkers(node)], [])
    for node in ast.walk(executed):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            # `from package import module` imports the module
            names |= {full if (full := f"{module}.{a.name}") in MODULES else module for a in node.names}
    return names


def ours(tree: ast.Module) -> set[str]:
    """The modules of ours that a module imports."""
    return {name for name in imports(tree) if name.split(".")[0] == "gptoss_quantize"}


def nodes(kind: type) -> list[tuple[str, ast.AST]]:
    """Every node of a kind, with its place."""
    return [
        (f"{MODULES[name]}:{node.lineno}", node)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, kind)
    ]


def test_all_modules_are_read():
    assert {layer(name) for name in MODULES} == set(ORDER)
    assert len(MODULES) > 20


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_one_way(name):
    own = ORDER.index(layer(name))
    wrong = {other for other in ours(TREES[name]) if ORDER.index(layer(other)) > own}
    assert not wrong, f"{name} ({ORDER[own]}) may import {', '.join(ORDER[: own + 1])} only"
    missing = ours(TREES[name]) - MODULES.keys()
    assert not missing, f"{name} imports what is not there"


def test_measuring_knows_nothing_of_quantizing():
    for name, tree in TREES.items():
        if layer(name) == "eval":
            assert not [other for other in ours(tree) if layer(other) == "quantize"], name


def test_only_the_package_names_what_it_does_not_import():
    # its public functions come from above it, on first use
    seen = {name for name, tree in TREES.items() if any(map(for_checkers, ast.walk(tree)))}
    # and `atomic` may write tensors without importing torch first
    assert seen == {"gptoss_quantize", "gptoss_quantize.atomic"}


def test_rich_draws_for_people_only():
    above = {"gptoss_quantize.terminal"} | {name for name in MODULES if layer(name) == "cli"}
    assert not [
        name for name in MODULES.keys() - above if any(i.split(".")[0] == "rich" for i in imports(TREES[name]))
    ]


def test_no_import_cycle():
    # raises CycleError with the cycle in its message
    TopologicalSorter({name: ours(tree) for name, tree in TREES.items()}).prepare()


def test_kernels_import_torch_only():
    for name, tree in TREES.items():
        if layer(name) == "kernels":
            outside = {full.split(".")[0] for full in imports(tree)} - set(sys.stdlib_module_names)
            assert outside <= {"torch", "gptoss_quantize", "triton"}, name


def test_imports_are_absolute():
    assert not [where for where, node in nodes(ast.ImportFrom) if node.level]


def test_the_builtin_eval_is_not_hidden():
    hidden = [
        where
        for where, node in nodes(ast.ImportFrom)
        for alias in node.names
        if (alias.asname or alias.name) == "eval" or alias.name == "*"
    ]
    assert not hidden


def test_no_handler_swallows_everything():
    # `except Exception` is allowed where it ends in a raise: some libraries raise nothing narrower; and where it
    # becomes a FAILED line, which ends the command with 1
    wrong = []
    for where, handler in nodes(ast.ExceptHandler):
        caught = set() if handler.type is None else {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)}
        broad = handler.type is None or caught & {"Exception", "BaseException"}
        recorded = any(isinstance(n, ast.Name) and n.id == "FAILED" for n in ast.walk(handler.body[-1]))
        if broad and not recorded and not isinstance(handler.body[-1], ast.Raise):
            wrong.append(where)
    assert not wrong


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module_says_what_it_is_for(name):
    assert ast.get_docstring(TREES[name])


def test_files_stay_short():
    scripts = [path for folder in ("benchmarks", "scripts") for path in (ROOT / folder).rglob("*.py")]
    limits = dict.fromkeys([*MODULES.values(), *scripts], MAX_LINES)
    limits |= dict.fromkeys((ROOT / "tests").rglob("*.py"), MAX_TEST_LINES)
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in limits}
    assert not {str(path): length for path, length in lengths.items() if length > limits[path]}
