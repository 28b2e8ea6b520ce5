"""The documents: files and equations that are cited exist, links lead somewhere, and the format is as described."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.cli import app

ROOT = Path(__file__).resolve().parents[2]
OURS = ("gptoss_quantize", "kernels", "calibration", "quantize", "eval", "runtimes")
FOLDERS = [ROOT / name for name in (*OURS, "tests", "benchmarks", "scripts")]
SOURCES = [path for folder in FOLDERS for kind in ("*.py", "*.cpp") for path in sorted(folder.rglob(kind))]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("benchmarks/**/*.md"))]
# made beside a checkpoint, or a model's own: not files of this repository
ELSEWHERE = {"LICENSE.md", "README.md", "report.md"}
# this file's own patterns are no citations
CITING = [path for path in (*SOURCES, *PAGES) if path != Path(__file__).resolve()]


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", text_of(ROOT / "docs" / "checkpoint-format.md"), re.DOTALL)


def test_every_page_that_is_named_exists():
    lost = []
    for path in CITING:
        for name in re.findall(r"(?<![\w/.*-])((?:[\w.-]+/)*[\w-]+\.md)\b", text_of(path)):
            places = (ROOT / name, path.parent / name, ROOT / "docs" / name)
            # a bare name in a module must be one of the root: pages of docs/ are cited with their folder
            allowed = places[:2] if path.suffix != ".md" else places
            if (
                Path(name).name not in ELSEWHERE
                and not name.startswith("OUT/")
                and not any(place.is_file() for place in allowed)
            ):
                lost.append(f"{path.relative_to(ROOT)}: {name}")
    assert lost == []


def test_every_equation_that_is_cited_is_defined():
    defined = set(re.findall(r"^## (E\d+): ", text_of(ROOT / "docs" / "method.md"), re.MULTILINE))
    assert defined == {f"E{i}" for i in range(1, len(defined) + 1)}
    cited = {name: path for path in CITING for name in re.findall(r"\bE[1-9]\d?\b(?![.\d])", text_of(path))}
    assert len(cited.keys() & defined) > 8
    assert {name: str(path) for name, path in cited.items() if name not in defined} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        place = page.parent / name if name else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            lost.append(target)
    assert lost == []


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """Return a function from options to a checkpoint of the tiny model that the command line wrote."""
    root = tmp_path_factory.mktemp("made")

    def make(*options: str) -> Path:
        out = root / "-".join(["out", *options]).replace("--", "")
        if not out.exists():
            method = "rtn" if "mxfp4" in options else "rtn-signed"
            words = ["quantize", str(tiny.path("bf16")), str(out), "--method", method, *options]
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, result.output
        return out

    return make


@pytest.fixture(scope="module")
def reader():
    """Return the names that the page's reader defines."""
    names: dict = {}
    exec(blocks()[0], names)
    return names


def stored(path: Path, name: str, reader) -> np.ndarray:
    (index,) = path.glob("*.index.json")
    return reader["read"](path / json.loads(index.read_text())["weight_map"][name], name)


@pytest.mark.parametrize("group_size", ["32", "64"])
def test_the_reader_of_int4(made, reader, group_size):
    path = made("--group-size", group_size)
    # the page's own example, as it stands there
    names = {**reader, "path": str(path)}
    exec(blocks()[1], names)
    expert = Checkpoint(path).expert(0, 5)
    np.testing.assert_array_equal(names["gate"], expert.gate_up[0::2].numpy())
    np.testing.assert_array_equal(names["up"], expert.gate_up[1::2].numpy())
    assert (names["scale"] < 0).any()
    assert (names["scale"] > 0).any()
    w2, other = "model.layers.2.mlp.experts.7.w2_", Checkpoint(path).expert(2, 7)
    packed, scale, bias = (stored(path, w2 + part, reader) for part in ("weight_packed", "weight_scale", "bias"))
    np.testing.assert_array_equal(reader["int4"](packed, scale), other.down.numpy())
    np.testing.assert_array_equal(bias, other.down_bias.numpy())


def test_the_reader_of_mxfp4(made, reader):
    path, base = made("--format", "mxfp4"), "model.layers.1.mlp.experts."
    for part in ("gate_up", "down"):
        codes, scales = (stored(path, f"{base}{part}_proj_{end}", reader) for end in ("blocks", "scales"))
        wanted = torch.stack([getattr(expert, part) for expert in Checkpoint(path).experts(1)])
        np.testing.assert_array_equal(reader["mxfp4"](codes, scales), wanted.numpy())


def test_the_reader_of_dense_int8(made, reader):
    path = made("--dense", "int8")
    for name in ("model.layers.1.self_attn.o_proj.weight", "lm_head.weight"):
        codes, scale = (stored(path, name + end, reader) for end in ("_q8", "_q8_scale"))
        assert (codes.dtype, scale.dtype) == (np.int8, np.float16)
        np.testing.assert_array_equal(reader["grouped"](codes, scale), Checkpoint(path).dense(name).numpy())


@pytest.mark.parametrize("options", [(), ("--group-size", "32"), ("--format", "mxfp4")])
def test_the_tables_say_what_the_files_hold(made, tiny, options):
    path, page = made(*options), text_of(ROOT / "docs" / "checkpoint-format.md")
    config, group = Checkpoint(path).config, 32 if options else 64
    sizes = {"E": config.experts, "D": config.hidden, "F": config.intermediate, "2F": 2 * config.intermediate}
    sizes |= {f"{name}/{by}": sizes[name] // n for name in "DF" for by, n in {"8": 8, "g": group, "32": 32}.items()}
    rows = re.findall(r"^\| `(\w+)` \| `\[([^\]]*)\]` \| (\w+)", page, re.MULTILINE)
    described = {name: (tuple(sizes.get(s, s) for s in shape.split(", ")), dtype) for name, shape, dtype in rows}
    found = {}
    for name, tensor in tiny.load_all(path).items():
        if ".experts." in name:
            kind = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            found.setdefault(name.rsplit(".", 1)[1], set()).add(kind)
    assert len(found) == 6
    assert found == {name: {(tuple(int(n) for n in described[name][0]), described[name][1])} for name in found}
