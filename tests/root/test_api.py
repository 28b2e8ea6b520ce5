"""The public Python interface as a user calls it: the whole way, progress, refusals, names and types."""

import dataclasses
import inspect
import json
import pickle
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

import gptoss_quantize as gq
from gptoss_quantize import api, terminal
from gptoss_quantize.eval.examples import ask

FUNCTIONS = ["compare", "evaluate", "export", "generate", "import_checkpoint", "load", "plan", "push", "quantize",
             "register", "verify"]  # fmt: skip
SMALL = {"tokens": 128, "seq_len": 32}


@pytest.fixture(scope="module")
def text(tmp_path_factory, tiny) -> Path:
    path = tmp_path_factory.mktemp("text") / "sea.txt"
    path.write_text("\n\n".join(f"Chapter {i}. " + tiny.text * 5 for i in range(20)))
    return path


@pytest.fixture(scope="module")
def made(tiny, text, tmp_path_factory) -> dict[str, gq.api.Quantized]:
    """Checkpoints of the tiny model: with attention as in the source, and in 8 bits."""
    root = tmp_path_factory.mktemp("made")
    return {
        dense: gq.quantize(tiny.path("bf16"), root / dense, calibration=text, dense=dense, device="cpu", **SMALL)
        for dense in ("source", "int8")
    }


# ---- the whole way


@pytest.mark.parametrize("dense", ["source", "int8"])
def test_the_whole_way(tiny, made, text, tmp_path, dense):
    base, done = tiny.path("bf16"), made[dense]
    out = done.path
    assert done.bits_per_weight == 4.25 and 0 < done.output_error < 0.5
    assert done.report["settings"]["dense"] == dense
    # equal as JSON: tuples became lists
    assert json.loads((out / "quantization_report.json").read_text()) == json.loads(json.dumps(done.report))

    model = gq.load(out, dtype=torch.float32)
    with torch.inference_mode():
        assert torch.isfinite(model(tiny.ids(1, 8)).logits).all()
    assert gq.generate(out, "The sea", max_new_tokens=4, dtype="float32") == gq.generate(
        str(out), "The sea", max_new_tokens=4, dtype="float32"
    )

    found = gq.evaluate(out, base, text=text, **SMALL)
    mine = found[dense]
    assert 0 < mine.kl_mean < 2 and mine.tokens == 4 * 31 and mine.perplexity > 1
    assert mine.kl_mean == found.report["results"][dense]["kl_mean"]
    both = gq.evaluate({"ours": out, "itself": base}, base, text=text, **SMALL).results
    assert both["ours"] == mine and abs(both["itself"].kl_mean) < 1e-6

    for to in ("bf16", "gguf"):
        written = gq.export(out, tmp_path / to, to)
        assert written.size > 0 and written.report["read_back"]["different"] == 0
    exact = gq.export(out, tmp_path / "float16", "bf16", dtype="float16")
    assert abs(gq.evaluate(exact.path, out, text=text, **SMALL)["float16"].kl_mean) < 1e-6

    rows = gq.verify(out, base, runtimes="transformers", text=text, sequences=2, seq_len=32, positions=4)
    assert rows.agrees and not rows.disagreeing, rows.report
    assert not gq.verify(out, runtimes=["transformers"], text=text, sequences=1, seq_len=32, positions=1).agrees

    planned = gq.plan(out, measure=False, gpu_memory="1GiB", contexts=[64])
    assert planned.size == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert planned.seconds is None and planned.least_memory > 0
    assert planned.report["dense"] == dense
    assert isinstance(planned.fits("llama.cpp", 64), bool)


def test_import_of_what_was_exported(tiny, made, text, tmp_path):
    gq.export(made["source"].path, tmp_path / "legacy", "autogptq")
    back = gq.import_checkpoint(tmp_path / "legacy", tmp_path / "back", text=text, tokens=512)
    assert back.report["reading"]["split"] == "interleaved"
    again = gq.evaluate(back.path, made["source"].path, text=text, **SMALL)["back"]
    assert abs(again.kl_mean) < 1e-9
    told = gq.import_checkpoint(tmp_path / "legacy", tmp_path / "told", "bf16", split="interleaved")
    assert told.report["reading"]["because"] == "--split" and told.report["to"] == "bf16"


@pytest.mark.parametrize("dense", ["source", "int8"])
def test_compare_writes_a_report_for_every_form(tiny, made, text, tmp_path, dense):
    candidates = {"ours": made[dense].path, "mx": tiny.path("mxfp4")}
    amounts = {"text_tokens": 96, "seq_len": 48, "expert_tokens": 48, "examples": 1}
    done = gq.compare(candidates, tiny.path("bf16"), tmp_path / "report", text=text, tasks="none", **amounts)
    assert done.page.is_file() and json.loads((done.path / "report.json").read_text()) == done.report
    assert list(done.verdicts) == list(done.sentences) == ["ours", "mx"]
    cost = done.report["candidates"][0]["cost"]
    stored = sum(t.nbytes for t in tiny.load_all(made[dense].path).values())
    assert cost["bytes"] == sum(cost["bytes_by_part"].values()) == stored
    assert cost["bits_per_expert_weight"] == 4.25
    # no command made it, so none is told
    assert "To repeat it" not in (done.path / "README.md").read_text()


def test_resume_and_overwrite(tiny, text, tmp_path):
    class StopError(Exception):
        pass

    def stop(phase: str, done: int, total: int) -> None:
        if done == 2:
            raise StopError

    asked = {"calibration": text, "device": "cpu", **SMALL}
    with pytest.raises(StopError):
        gq.quantize(tiny.path("bf16"), tmp_path / "out", progress=stop, **asked)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    gq.quantize(tiny.path("bf16"), tmp_path / "out", resume=True, **asked)
    with pytest.raises(gq.InputError, match="--overwrite"):
        gq.quantize(tiny.path("bf16"), tmp_path / "out", **asked)
    gq.quantize(tiny.path("bf16"), tmp_path / "out", "rtn", overwrite=True)


def test_a_recipe_is_given_by_name_or_as_on_the_command_line(tiny, tmp_path):
    ways = {"mapping": {"scale": "signed", "native": False}, "words": ["scale=signed", "native=false"]}
    found = {
        name: gq.quantize(tiny.path("bf16"), tmp_path / name, "rtn", group_size=32, recipe=way)
        for name, way in ways.items()
    }
    for done in found.values():
        assert done.report["settings"]["recipe"]["scale"] == "signed"
        assert not done.report["settings"]["recipe"]["native"] and done.bits_per_weight == 4.5
    assert tiny.load_all(tmp_path / "mapping").keys() == tiny.load_all(tmp_path / "words").keys()


# ---- progress


def test_progress_is_told_to_any_callable(tiny, text, tmp_path):
    calls: dict[str, list[tuple[int, int]]] = {}

    def note(phase: str, done: int, total: int) -> None:
        calls.setdefault(phase.partition(" (")[0], []).append((done, total))

    gq.quantize(
        tiny.path("bf16"), tmp_path / "out", calibration=text, polish=2, dtype="float32", progress=note, **SMALL
    )
    assert calls.pop("gptq int4 group 64: layer") == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert calls.pop("polish: step") == [(1, 2), (2, 2)]
    gq.evaluate(tmp_path / "out", tiny.path("bf16"), text=text, progress=note, **SMALL)
    assert calls.pop("evaluate: layer") == [(i, 6) for i in range(7)]
    gq.export(tmp_path / "out", tmp_path / "gguf", progress=note)
    assert {steps[-1][0] == steps[-1][1] for steps in calls.values()} == {True}
    assert set(calls) == {"can it predict text? layer", "gguf: tensor", "read back: layer"}


def test_progress_true_draws_on_stderr(tiny, text, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    gq.evaluate(tiny.path("bf16"), tiny.path("bf16"), text=text, progress=True, **SMALL)
    out, err = capsys.readouterr()
    assert out == "" and "evaluate: layer" in err and "6/6" in err
    gq.evaluate(tiny.path("bf16"), tiny.path("bf16"), text=text, **SMALL)
    assert capsys.readouterr() == ("", "")


def test_progress_true_draws_in_the_cell_of_a_notebook(monkeypatch):
    shown: list[str] = []

    class ZMQInteractiveShell:
        pass

    class Handle:
        def update(self, content: str) -> None:
            shown.append(content)

    ipython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = ZMQInteractiveShell
    ipython.display = display
    display.HTML = str
    display.display = lambda content, display_id: Handle()
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    with terminal.showing(True) as show:
        show("polish: step (KL <1>)", 0, 2)
        show("polish: step (KL 0.5)", 2, 2)
        show("counting", 3, 0)
    assert '<progress value="2" max="2"></progress> polish: step (KL 0.5) 2/2' in shown[-1]
    assert shown[-1].count("polish") == 1 and "counting 3," in shown[-1]


@pytest.mark.parametrize("wrong", [3, "bar"])
def test_what_is_no_progress_is_refused(tiny, text, wrong):
    with pytest.raises(gq.InputError, match=r"progress .*: expected a function of \(phase, done, total\)"):
        gq.evaluate(tiny.path("bf16"), tiny.path("bf16"), text=text, progress=wrong, **SMALL)


# ---- refused


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, o: gq.quantize(o / "none", o / "x"), "no such directory"),
        (lambda m, o: gq.quantize(m, o / "x", "hqq"), "--method hqq: expected one of rtn"),
        (lambda m, o: gq.quantize(m, o / "x", format="nf4"), "unknown format 'nf4'; known: int4, int3, int2"),
        # what the compiled loops cannot take
        (lambda m, o: gq.quantize(m, o / "x", "rtn", group_size=24), "has groups of 32 or 64, not 24"),
        (lambda m, o: gq.quantize(m, o / "x", "rtn", group_size=192), "has groups of 32 or 64, not 192"),
        (lambda m, o: gq.quantize(m, o / "x", "rtn", dense="int4"), "--dense int4"),
        (lambda m, o: gq.quantize(m, o / "x", tokens=0), "tokens"),
        (lambda m, o: gq.quantize(m, o / "x", "rtn", dtype="fp8"), "--dtype fp8: expected one of auto"),
        (lambda m, o: gq.quantize(m, o / "x", "rtn", memory="lots"), "--memory 'lots': expected a size"),
        (lambda m, o: gq.quantize(m, o / "x", "rtn", memory=0), "--memory 0: expected a number of bytes"),
        (lambda m, o: gq.quantize(m, o / "x", polish=-1), "--polish -1: expected at least 0"),
        (lambda m, o: gq.quantize(m, o / "x", "rtn", recipe={"dampening": 1}), "unknown recipe field 'dampening'"),
        (lambda m, o: gq.evaluate([m, m], m), "named twice"),
        (lambda m, o: gq.evaluate(m, m, dtype="half"), "--dtype half"),
        (lambda m, o: gq.compare(m, m, o / "x", profile="slow"), "unknown profile 'slow'"),
        (lambda m, o: gq.compare(m, m, o / "x", limit=0), "--limit 0: expected at least 1"),
        (lambda m, o: gq.export(m, o / "x", "onnx"), "--to onnx: expected one of gguf"),
        (lambda m, o: gq.export(m, o / "x", dense_type="q3"), "--dense-type q3: expected one of stored"),
        (lambda m, o: gq.import_checkpoint(m, o / "x", split="thirds"), "--split thirds: expected one of detect"),
        (lambda m, o: gq.verify(m, runtimes="ollama"), "--runtime ollama: expected one of transformers"),
        (lambda m, o: gq.verify(m, positions=0), "--positions 0: expected at least 1"),
        (lambda m, o: gq.plan("gpt-oss-20b", contexts=[]), "contexts"),
        (lambda m, o: gq.plan("gpt-oss-20b", gpu_memory=-1), "--gpu-memory -1"),
        (lambda m, o: gq.generate(m, "", raw=True), "prompt is empty"),
        (lambda m, o: gq.generate(m, "x", max_new_tokens=0), "--max-new-tokens 0: expected at least 1"),
        (lambda m, o: gq.load(m), "not int4"),
    ],
)
def test_refused(tiny, tmp_path, call, words):
    with pytest.raises(gq.InputError, match=None) as stop:
        call(tiny.path("bf16"), tmp_path)
    assert words in str(stop.value) and isinstance(stop.value, ValueError)
    assert list(tmp_path.iterdir()) == []


# ---- the template's date


def test_a_prompt_is_the_same_tokens_every_day(tiny, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.path("bf16"))
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}|" + tokenizer.chat_template
    ids = ask("hello", tokenizer, "here", raw=False)["input_ids"][0]
    assert "2025-08-05|" in tokenizer.decode(ids)
    assert "2025-08-05" not in tokenizer.decode(ask("hello", tokenizer, "here", raw=True)["input_ids"][0])


# ---- names

ORDERS = {
    "the function first": "import gptoss_quantize as gq; f = gq.quantize; import gptoss_quantize.quantize.solve",
    "a recipe first": "from gptoss_quantize.quantize.recipes import RECIPES",
    "a module first": "import gptoss_quantize.quantize.solve",
    "the subpackage first": "import gptoss_quantize.quantize",
    "a module under a name": "import gptoss_quantize.quantize.solve as g; assert g.__name__.endswith('e.solve')",
    "all of it": "from gptoss_quantize import *; assert callable(quantize)",
    "by its name": "from gptoss_quantize import quantize; assert callable(quantize)",
    "by path": "import importlib; importlib.import_module('gptoss_quantize.quantize.solve')",
}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("order", ORDERS)
def test_quantize_is_the_function_whatever_was_imported_before(order):
    code = f"""
        {ORDERS[order]}
        import types
        import gptoss_quantize as gq
        from gptoss_quantize.quantize.recipes import RECIPES
        from gptoss_quantize.quantize import recipes
        import gptoss_quantize.quantize.recipes as again
        assert isinstance(gq.quantize, types.FunctionType) and gq.quantize.__module__ == "gptoss_quantize.api"
        assert recipes is again and again.RECIPES is RECIPES and "gptq" in RECIPES
        import gptoss_quantize.quantize.scales
        assert gptoss_quantize.quantize.scales.__name__ == "gptoss_quantize.quantize.scales"
        import pickle
        assert pickle.loads(pickle.dumps(gq.quantize)) is gq.quantize
    """
    python(textwrap.dedent(code))


def test_importing_is_instant_and_loads_nothing():
    code = """
        import sys, time
        before, started = set(sys.modules), time.process_time()
        import gptoss_quantize as gq
        assert time.process_time() - started < 0.1
        names = dir(gq)
        assert not {"torch", "transformers", "rich", "numpy"} & set(sys.modules)
        assert not [name for name in set(sys.modules) - before if name.startswith("gptoss_quantize.api")]
    """
    python(textwrap.dedent(code))


def test_dir_and_documentation():
    assert {*FUNCTIONS, "InputError", "__version__"} == set(gq.__all__) <= set(dir(gq))
    for name in FUNCTIONS:
        function = getattr(gq, name)
        assert function is getattr(api, name) and inspect.getdoc(function)
    with pytest.raises(AttributeError, match="module 'gptoss_quantize' has no attribute 'lode'"):
        _ = gq.lode
    with pytest.raises(AttributeError, match="cannot be replaced"):
        gq.quantize = print


def test_every_parameter_is_described():
    for name in ("compare", "evaluate", "export", "generate", "import_checkpoint", "plan", "quantize", "verify"):
        function = getattr(gq, name)
        text = inspect.getdoc(function).partition("Args:")[2]
        told = {word for line in text.splitlines() for word in line.partition(":")[0].strip().split(", ")}
        told |= {"seq_len"} if "`seq_len` tokens" in text else set()
        missing = inspect.signature(function).parameters.keys() - told - {"progress"}
        assert not missing, f"{name}: {missing}"


def test_the_document_is_current():
    script = Path(__file__).resolve().parents[2] / "scripts" / "make_api_docs.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_function_travels_to_a_spawned_process():
    code = """
        import multiprocessing, gptoss_quantize as gq
        from gptoss_quantize.quantize.recipes import RECIPES
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply(repr, (gq.quantize,)).split()[1], pool.apply(len, (RECIPES,)))
    """
    assert python(textwrap.dedent(code)).split() == ["quantize", "5"]


def test_results_are_frozen_and_travel(made):
    done = pickle.loads(pickle.dumps(made["source"]))
    assert done == made["source"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        done.path = Path("elsewhere")


# ---- types

SCRIPT = """
import gptoss_quantize as gq
from gptoss_quantize.quantize.recipes import RECIPES

reveal_type(gq.quantize)
reveal_type(gq.quantize("m", "o").bits_per_weight)
reveal_type(gq.evaluate("c", "b")["c"].kl_mean)
reveal_type(gq.compare)
reveal_type(gq.export("c", "o").path)
reveal_type(gq.import_checkpoint)
reveal_type(gq.verify("c").agrees)
reveal_type(gq.plan("m").size)
reveal_type(gq.generate("m", "p"))
reveal_type(gq.load)
reveal_type(gq.register)
reveal_type(RECIPES["gptq"].damping)
gq.quantize("m", "o", group_size="64")
gq.quantise("m", "o")
"""


def test_a_type_checker_sees_it_all(tmp_path):
    pytest.importorskip("mypy")
    # as the wheel lays it out: checkers cannot follow the import hook of an editable install
    root = tmp_path / "types" / "gptoss_quantize"
    for package in ("", "kernels", "calibration", "quantize", "eval", "runtimes", "demo"):
        home = Path(
            str(__import__("importlib").import_module(f"gptoss_quantize.{package}".rstrip(".")).__file__)
        ).parent
        (root / package).mkdir(parents=True, exist_ok=True)
        for file in home.glob("*.py"):
            (root / package / file.name).write_bytes(file.read_bytes())
    (root / "py.typed").write_text("")
    (tmp_path / "script.py").write_text(SCRIPT)
    # what is others' is not read: this is about our names
    others = "\n".join(f"[mypy-{name}.*]\nfollow_imports = skip\nfollow_imports_for_stubs = True"
                       for name in ("torch", "transformers", "numpy", "accelerate", "safetensors", "gguf", "datasets",
                                    "matplotlib", "lm_eval", "pyarrow", "tokenizers", "psutil", "huggingface_hub",
                                    "rich", "jinja2"))  # fmt: skip
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nignore_missing_imports = True\n{others}\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "script.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(tmp_path / "types"), "PATH": "", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("script.py")]
    revealed = [line.partition('Revealed type is "')[2].rstrip('"') for line in lines if "Revealed" in line]
    assert len(revealed) == 12, done.stdout + done.stderr
    assert "Any" not in [kind.removeprefix("builtins.") for kind in revealed]
    assert revealed[0].startswith("def (model: ") and "gptoss_quantize.results.Quantized" in revealed[0]
    plain = [revealed[i].removeprefix("builtins.") for i in (1, 2, 6, 7, 8, 11)]
    assert plain == ["float", "float", "bool", "int", "str", "float"]
    wrong = [line for line in lines if "error" in line]
    assert len(wrong) == 2 and '"group_size"' in wrong[0] and '"quantise"' in wrong[1], wrong
