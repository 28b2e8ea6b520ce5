"""Write docs/api.md from the docstrings and signatures of the public interface.

Usage: make_api_docs.py [--check]                                                                  (`make docs-api`)

--check writes nothing and exits with 1 where the file is not what would be written (a test does the same). Signatures
are read from the source, so that they name types as it does.
"""

import argparse
import ast
import inspect
import sys
from pathlib import Path
from textwrap import dedent

import gptoss_quantize as gq
from gptoss_quantize import api, loading, results

DOCS = Path(__file__).resolve().parent.parent / "docs/api.md"
ORDER = ("quantize", "evaluate", "compare", "generate", "load", "register", "export", "import_checkpoint", "verify",
         "push", "plan")  # fmt: skip
RESULTS = ("Quantized", "Evaluation", "Fidelity", "Comparison", "Written", "Verification", "Pushed", "Plan")
HEAD = """# The Python interface

<!-- written by scripts/make_api_docs.py from the docstrings: change those, and run `make docs-api` -->

{about}

| name in a signature | what may be given |
|---|---|
| `Place` | a path, as `str` or `Path` (where a model is meant, also a hub name) |
| `Places` | a `Place`, a sequence of them, or a mapping of names to them |
| `Show` | a function of (phase, done, total), `True`, or `None` |

A bar stands on stderr in a terminal, and in the cell in a notebook. Importing `gptoss_quantize` takes milliseconds:
torch is loaded by the first call. `gq.quantize` is this function whatever was imported before, and
`from gptoss_quantize.quantize.recipes import RECIPES` goes on naming a module of the subpackage.
"""


def arguments(node: ast.FunctionDef) -> str:
    """Return a signature, one parameter a line where it is long."""
    positional, named = node.args.args, node.args.kwonlyargs
    first = len(positional) - len(node.args.defaults)
    parts = [_one(arg, None if i < first else node.args.defaults[i - first]) for i, arg in enumerate(positional)]
    parts += ["*"] if named else []
    parts += [_one(arg, default) for arg, default in zip(named, node.args.kw_defaults, strict=True)]
    returns = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    line = f"{node.name}({', '.join(parts)}){returns}"
    return line if len(line) < 90 else f"{node.name}(\n    " + ",\n    ".join(parts) + f",\n){returns}"


def _one(arg: ast.arg, default: ast.expr | None) -> str:
    kind = "" if arg.annotation is None else f": {ast.unparse(arg.annotation)}"
    if default is None:
        return arg.arg + kind
    return f"{arg.arg}{kind} = {ast.unparse(default)}".replace("'", '"')


def paragraphs(text: str) -> str:
    """Return a docstring in Markdown: what stands under Args becomes a list, indented lines code."""
    before, _, listed = text.partition("Args:\n")
    out: list[str] = []
    code = False
    for line in before.strip().splitlines():
        if line.startswith("    ") != code and line:
            code = not code
            out.append("```python" if code else "```")
        out.append(line.removeprefix("    ") if code else line)
    # an empty line before a closing fence belongs behind it
    found = "\n".join(out).replace("\n\n```\n", "\n```\n\n")
    items: list[str] = []
    for line in dedent(listed).splitlines():
        if line.startswith(" "):
            items[-1] += " " + line.strip()
        elif line:
            names, _, told = line.partition(": ")
            items.append(f"* {', '.join(f'`{name}`' for name in names.split(', '))}: {told}")
    return found + ("\n\n" + "\n".join(items) if items else "")


def function(name: str) -> str:
    """Return the section of a function."""
    value = getattr(api, name)
    (node,) = ast.parse(dedent(inspect.getsource(value))).body
    if not isinstance(node, ast.FunctionDef):
        raise TypeError(f"{name} is not a function")
    return f"## {name}\n\n```python\n{arguments(node)}\n```\n\n{paragraphs(inspect.getdoc(value) or '')}\n"


def result(name: str) -> str:
    """Return the section of a class: its fields and properties."""
    value = getattr(results, name)
    (node,) = ast.parse(dedent(inspect.getsource(value))).body
    lines = []
    for entry in getattr(node, "body", []):
        if isinstance(entry, ast.AnnAssign):
            lines.append(f"* `{ast.unparse(entry.target)}: {ast.unparse(entry.annotation)}`")
        elif isinstance(entry, ast.FunctionDef) and (told := ast.get_docstring(entry)):
            kind = "" if entry.returns is None else ast.unparse(entry.returns)
            said = told.removeprefix("Return ").splitlines()[0]
            shown = f"{entry.name}: {kind}"
            if not entry.decorator_list:
                given = ", ".join(_one(arg, None) for arg in entry.args.args[1:])
                shown = f"{entry.name}({given}) -> {kind}"
            lines.append(f"* `{shown}`: {said}")
    return f"### {name}\n\n{inspect.getdoc(value)}\n\n" + "\n".join(lines) + "\n"


def document() -> str:
    """Return docs/api.md."""
    missing = set(gq.__all__) - set(ORDER) - {"InputError", "__version__"}
    if missing or loading.load is not api.load:
        raise ValueError(f"not documented: {missing}")
    about = paragraphs(inspect.getdoc(api) or "")
    parts = [
        HEAD.format(about=about),
        *map(function, ORDER),
        "## Results\n\n" + paragraphs(inspect.getdoc(results) or ""),
    ]
    return "\n".join(parts) + "\n\n" + "\n".join(map(result, RESULTS))


def main() -> None:
    """Write or check the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = document()
    if args.check and DOCS.read_text(encoding="utf-8") != text:
        sys.exit(f"{DOCS} is not current; run make docs-api")
    if not args.check:
        DOCS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
