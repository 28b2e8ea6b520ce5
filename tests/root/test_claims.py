"""The claims of README.md and docs/ hold, and scripts/check_claims.py sees those that do not."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name: str):
    """Return a script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def claims():
    return script("check_claims")


def test_all_claims_hold(claims):
    assert claims.problems() == []


def test_the_picture_is_that_of_the_numbers():
    picture = script("kl_picture")
    assert picture.words(picture.points()) in picture.OUT.read_text(encoding="utf-8")


def changed(claims, page: str, old: str, new: str) -> str:
    text = claims.read(page)
    assert old in text
    return text.replace(old, new)


def test_wrong_claims_are_seen(claims):
    wrong = changed(claims, "docs/claims.md", "::test_experts_stay_packed", "::test_experts_stay_put")
    assert claims.names(wrong) == ["tests/root/test_loading.py: has no test_experts_stay_put"]
    wrong = changed(claims, "docs/claims.md", "benchmarks/decode.py", "benchmarks/decoded.py")
    assert claims.names(wrong) == ["benchmarks/decoded.py: no such file"]
    wrong = changed(claims, "README.md", "0.0332", "0.0331")
    assert claims.numbers("README.md", wrong) == ["README.md: 0.0331 is no row of benchmarks/fidelity.json"]
    wrong = changed(claims, "docs/fidelity.md", "| 0.30 | 91.0 %", "| 0.31 | 91.0 %")
    assert len(claims.table(wrong)) == 1
    rows = claims.read("docs/fidelity.md").split("\n")
    at = next(i for i, row in enumerate(rows) if "the default" in row and "±" in row)
    rows[at], rows[at + 1] = rows[at + 1], rows[at]
    assert claims.table("\n".join(rows)) == ["docs/fidelity.md: rows are missing, or not sorted by bits and KL"]
    wrong = changed(claims, "README.md", "96,256", "131,072")
    assert claims.cards("README.md", wrong) == ["README.md: the row of 16 GiB has no '96,256'"]
    wrong = changed(claims, "README.md", "--n-cpu-moe 16`", "--n-cpu-moe 6`")
    assert claims.cards("README.md", wrong) == ["README.md: the row of 8 GiB has no '--n-cpu-moe 16`'"]


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("--format auto", "--layout auto", "README.md: quantize has no --layout"),
        ("gptoss-quantize chat", "gptoss-quantize talk", "README.md: no such command"),
    ],
)
def test_commands_that_do_not_exist_are_seen(claims, old, new, found):
    assert any(
        line.startswith(found) for line in claims.commands("README.md", changed(claims, "README.md", old, new))
    )


def test_messages_that_nobody_says_are_seen(claims):
    wrong = changed(claims, "docs/troubleshooting.md", "not a whole safetensors file", "not half a safetensors file")
    assert claims.messages(wrong) == ["docs/troubleshooting.md: no source says 'not half a safetensors file ('"]
    assert claims.words("word " * 1201) and not claims.words("word " * 1200)


# ---- the notebooks, which `make notebooks` runs

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_the_notebooks_are_those_of_the_page():
    page = (ROOT / "docs/notebooks.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 4
    assert all(f"`{path.name}`" in page for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs_and_check_themselves(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert sum("assert " in "".join(cell["source"]) for cell in code) >= 3
