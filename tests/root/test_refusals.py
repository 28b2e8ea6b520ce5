"""Refusals: at once where nothing must be read for them, never a traceback, and with a remedy that is true."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gptoss_quantize import cli_early as early
from gptoss_quantize.calibration.sources import PACKAGED
from gptoss_quantize.errors import InputError
from gptoss_quantize.layouts import AUTO, DENSE, WRITTEN, pick_layout
from gptoss_quantize.quantize.recipes import RECIPES, override
from gptoss_quantize.quantize.scales import RULES
from gptoss_quantize.shards import ShardFile
from gptoss_quantize.units import parse_size

# runs command lines in one fresh process: what each said, seconds of processor time, whether torch was imported
RUNNER = """
import contextlib, io, json, sys, time
found = []
start = time.process_time()
from gptoss_quantize import cli, terminal
importing = time.process_time() - start
for words in json.loads(sys.argv[1]):
    sys.argv = ["gptoss-quantize", *words]
    err, code, start = io.StringIO(), 0, time.process_time()
    terminal.console.file = err
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(err):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
    heavy = sorted({"torch", "transformers", "datasets", "huggingface_hub"} & set(sys.modules))
    found.append([code, " ".join(err.getvalue().split()), importing + time.process_time() - start, heavy])
print(json.dumps(found))
"""


def environment(**more: str) -> dict[str, str]:
    # a cache that is not there: no data set is in it
    base = {"PYTHONSAFEPATH": "1", "COLUMNS": "300", "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "HF_HOME": "/no/cache"}
    return os.environ | base | more


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny) -> Path:
    """Return a directory with all sorts of places in it."""
    home = tmp_path_factory.mktemp("places")
    for name in ("empty", "thesis", "ours", "left.partial", "exported.partial", "adapter", "outer"):
        (home / name).mkdir()
    (home / "thesis" / "thesis.tex").write_text("x")
    (home / "ours" / ".gptoss-quantize.json").write_text(
        '{"command": "quantize", "files": [".gptoss-quantize.json"]}'
    )
    (home / "left.partial" / ".gptoss-quantize.json").write_text('{"command": "quantize"}')
    (home / "exported.partial" / ".gptoss-quantize.json").write_text('{"command": "export --to bf16"}')
    (home / "adapter" / "adapter_config.json").write_text("{}")
    (home / "file").write_text("x")
    (home / "m.gguf").write_text("GGUF")
    shutil.copytree(tiny.path(), home / "outer" / "inner")
    (home / "loop").symlink_to("loop")
    return home


# words (M: a model, H/: a place), parts of the answer
CHEAP = {
    "OUT taken by others": ("quantize M H/thesis", "not written by gptoss-quantize", "choose another name"),
    "OUT taken by ours": ("quantize M H/ours", "already exists; choose another name or pass --overwrite"),
    "OUT unfinished": ("quantize M H/left", "continue it with --resume, or drop it with --overwrite"),
    "OUT unfinished export": ("quantize M H/exported", "an unfinished `export --to bf16`; drop it with --overwrite"),
    "OUT is a file": ("quantize M H/file", "is not a directory; choose another name"),
    "OUT below a file": ("quantize M H/file/x", "cannot be written", "choose another place"),
    "OUT is a loop": ("quantize M H/loop", "is a link to loop; choose another name"),
    "OUT is too long": (f"quantize M H/{'a' * 300}", "File name too long; choose another place"),
    "OUT is not UTF-8": ("quantize M H/o\udcff", "is not UTF-8", "rename or move the directory"),
    "OUT is MODEL": ("quantize M M --overwrite", "holds the input"),
    "nothing to resume": ("quantize M H/new --resume", "nothing to resume; run without --resume"),
    "finished": ("quantize M H/ours --resume", "is finished; run without --resume, with --overwrite"),
    "resume what is not ours": ("quantize M H/exported --resume", "left by `export --to bf16`", "to drop it"),
    "contradiction": ("quantize M H/new --resume --overwrite", "contradict each other; give one of them"),
    "group of mxfp4": (
        "quantize M H/new --format mxfp4 --group-size 64",
        "groups of 32, not 64",
        "leave --group-size",
    ),
    "awq to mxfp4": ("quantize M H/new --format mxfp4 --method awq", "use --method gptq or rtn"),
    "signed to mxfp4": (
        "quantize M H/new --format mxfp4 --method rtn-signed",
        "'signed'",
        "use --method gptq or rtn",
    ),
    "rule of the other": ("quantize M H/new --set scale=ceil", "no scale rule 'ceil'", "--set scale=absmax or"),
    "dense to mxfp4": ("quantize M H/new --format mxfp4 --dense int8", "--dense int8 and --format mxfp4"),
    "dense to auto": ("quantize M H/new --format auto --dense int8", "--dense int8 and --format auto"),
    "dense and polish": ("quantize M H/new --dense int8 --polish 3", "--dense int8 and --polish do not go together"),
    "size and bits": ("quantize M H/new --size 1GiB --bits 3", "--size chooses bits", "leave --bits, --format"),
    "fit and dense": ("quantize M H/new --fit 12GiB --dense int8", "--fit chooses bits", "and --dense out"),
    "size and fit": ("quantize M H/new --size 1GiB --fit 2GiB", "--size is of the files", "give one of them"),
    "context alone": ("quantize M H/new --context 4096", "--context 4096 goes with --fit"),
    "size without a unit": ("quantize M H/new --size 9", "--size 9", "GiB"),
    "polish without text": ("quantize M H/new --method rtn --polish 3", "--polish needs a method", "use gptq"),
    "recipe field": ("quantize M H/new --set dampening=1", "unknown recipe field 'dampening'"),
    "recipe value": ("quantize M H/new --set damping=nan", "'nan' is no number from 0 on"),
    "recipe below 0": ("quantize M H/new --set sweeps=-1", "'-1' is no number from 0 on"),
    "budget": ("quantize M H/new --tokens 8", "8 tokens do not fill one sequence of 512"),
    "no text": ("quantize M H/new --calibration H/no.jsonl", "no.jsonl: no such file; check the path"),
    "size": ("quantize M H/new --memory much", "--memory 'much': expected a size"),
    "endless size": (f"quantize M H/new --memory {'9' * 400}TiB", "expected a size such as 12GiB"),
    "device": ("quantize M H/new --device cuda:x:", "--device cuda:x:: expected auto, cpu or cuda"),
    "no model": ("quantize H/nowhere H/new", "no such directory, and not a hub name"),
    "no config": ("quantize H/empty H/new", "config.json: no such file; expected a Hugging Face"),
    "model is an adapter": (
        "quantize H/adapter H/new",
        "this is a LoRA adapter; give the model that it was trained on",
    ),
    "model one below": ("quantize H/outer H/new", "but inner/ has one; give that directory"),
    "model is a GGUF": ("quantize H/m.gguf H/new", "is a GGUF file, not a directory"),
    "model is a loop": ("quantize H/loop H/new", "Too many levels of symbolic links"),
    "model is too long": (f"quantize {'a' * 300} H/new", "File name too long"),
    "revision of a directory": ("quantize M H/new --revision v1", "this is a local directory; leave it out"),
    "adapter is a model": ("quantize M H/new --adapter M", "it holds a whole model: give that as MODEL"),
    "no adapter": ("quantize M H/new --adapter H/empty", "no adapter_config.json"),
    "export: taken": ("export M H/thesis --to bf16", "not written by gptoss-quantize"),
    "export: unfinished run": ("export M H/left --to bf16", "continue it with `quantize --resume`"),
    "export: dtype of gguf": ("export M H/new --to gguf --dtype float32", "--dtype float32 is for --to bf16"),
    "export: type of bf16": ("export M H/new --to bf16 --expert-type q8_0", "--expert-type q8_0 is for --to gguf"),
    "import: taken": ("import M H/ours", "already exists; choose another name or pass --overwrite"),
    "demo-model: taken": ("demo-model H/ours", "already exists; choose another name"),
    "synthetic-model: taken": ("synthetic-model H/thesis", "not written by gptoss-quantize"),
    "evaluate: json": ("evaluate M --baseline M --json H/no/x.json", "make the directory first"),
    "evaluate: json is a directory": ("evaluate M --baseline M --json H/empty", "expected a file in an existing"),
    "evaluate: no candidate": ("evaluate H/no --baseline M", "no such directory"),
    "verify: json": ("verify M --json H/empty", "expected a file in an existing directory"),
    "verify: no text": ("verify M --text H/no.txt", "no such file"),
    "plan: json": ("plan M --json H/no/x.json", "make the directory first"),
    "plan: context": ("plan 20b --context 131073", "20b was made for 131072 tokens; ask for that many"),
    "plan: size": ("plan M --gpu-memory big", "--gpu-memory 'big': expected a size"),
    "compare: report is a file": ("compare M --baseline M --report H/file", "is a file; give a directory"),
    "compare: report below a file": ("compare M --baseline M --report H/file/x", "choose another place"),
    "compare: twice": ("compare M M --baseline M --report H/new", "a candidate is named twice"),
    "compare: task without a network": (
        "compare M --baseline M --report H/new --tasks offline,hellaswag",
        "--tasks hellaswag: needs the data set Rowan/hellaswag, and there is no network",
        "--tasks offline",
    ),
    "compare: group without a network": (
        "compare M --baseline M --report H/new --tasks mmlu",
        "--tasks mmlu: is no packaged task",
    ),
    "generate: no model": ("generate H/no --prompt x", "no such directory"),
}


def test_cheap_refusals_come_at_once(home, tiny):
    """Before torch, transformers and huggingface_hub are imported, in under a second of the processor's time."""
    before = tiny.snapshot(home)
    words = [
        [
            word.replace("M", str(tiny.path())) if word == "M" else word.replace("H/", f"{home}/")
            for word in case[0].split()
        ]
        for case in CHEAP.values()
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(words)],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    for (name, (_, *parts)), (code, said, seconds, heavy) in zip(CHEAP.items(), json.loads(done.stdout), strict=True):
        assert code in (1, 2), f"{name}: {code}, {said}"
        assert "Traceback" not in said
        assert not [part for part in parts if part not in said], f"{name}: {said}"
        assert not heavy, f"{name} imported {heavy}"
        assert seconds < 1, f"{name} took {seconds:.2f} s"
    assert tiny.snapshot(home) == before


def test_several_processes_leave_the_place_to_the_first(tiny, home, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not early.alone()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert early.alone()


def test_the_early_facts_are_those_of_the_formats():
    assert early.FORMATS.keys() == {*WRITTEN, AUTO}
    assert set(early.PACKAGED_TEXTS) == set(PACKAGED)
    for name, layout in WRITTEN.items():
        facts = early.FORMATS[name]
        assert facts.groups == layout.group_sizes
        assert set(facts.rules) == set(RULES[layout.grid.rules])
        assert set(facts.dense) == {d for d in DENSE if d == "source" or layout.packed}
        for size in (32, 64, 48):
            options = {"method": "gptq", "recipe": [], "target": name, "dense": "source", "polish": 0}
            try:
                pick_layout(name, size)
                early.check_quantize(**options, group_size=size)
            except InputError as late:
                with pytest.raises(InputError) as error:
                    early.check_quantize(**options, group_size=size)
                assert str(error.value) == str(late)
    assert early.FORMATS[AUTO] == replace(early.FORMATS["int4"], dense=("source",))


# ---- no traceback


@pytest.fixture
def command(command, monkeypatch):
    """Return a function that runs a command line in this process: (exit code, stdout, stderr in one line)."""
    monkeypatch.setenv("COLUMNS", "400")

    def run(*words: object) -> tuple[int, str, str]:
        code, out, err = command(*words)
        return code, out, " ".join(err.split())

    return run


@pytest.fixture
def larger(tiny, tmp_path) -> tuple[Path, Path]:
    """Return a model whose tokenizer was given a word that its embedding lacks, and a text with it."""
    from tokenizers import AddedToken, Tokenizer

    path = tiny.copy("bf16", tmp_path / "larger")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(f"<|new{i}|>", special=True) for i in range(10)])
    tokenizer.save(str(path / "tokenizer.json"))
    text = tmp_path / "new.txt"
    text.write_text("The sea was calm <|new9|> and " * 400)
    return path, text


@pytest.mark.parametrize("name", ["quantize", "evaluate", "verify", "generate", "generate --raw", "export"])
def test_tokens_beyond_the_vocabulary(tiny, tmp_path, command, larger, name):
    model, text = larger
    short = ("--tokens", 64, "--seq-len", 16)
    words = {
        "quantize": ("quantize", model, tmp_path / "o", "--calibration", text, *short),
        "evaluate": ("evaluate", model, "--baseline", model, "--text", text, *short),
        "verify": ("verify", model, "--runtime", "transformers", "--text", text, "--sequences", 1, "--seq-len", 32),
        "generate": ("generate", model, "--prompt", "a <|new9|>"),
        "generate --raw": ("generate", model, "--prompt", "a <|new9|>", "--raw"),
        "export": ("export", model, tmp_path / "o", "--to", "gguf"),
    }
    code, _, err = command(*words[name])
    assert code == 1
    assert "token id 305" in err and "ends at 299" in err
    assert not (tmp_path / "o").exists()


def test_generate_refuses_what_it_cannot_encode_or_render(tiny, tmp_path, command):
    path = tiny.copy("bf16", tmp_path / "model")
    assert "the prompt is not UTF-8" in command("generate", path, "--prompt", "a\udcff")[2]
    (path / "chat_template.jinja").write_text("{% for x %}")
    code, _, err = command("generate", path, "--prompt", "a")
    assert code == 1 and "chat template is not valid" in err
    tiny.edit_json(path / "config.json", tie_word_embeddings="no")
    assert command("generate", path, "--prompt", "a")[0] == 1


def test_export_names_a_file_that_it_cannot_read(tiny, tmp_path, command):
    path = tiny.copy("bf16", tmp_path / "model")
    (path / "tokenizer_config.json").write_text("{")
    code, _, err = command("export", path, tmp_path / "o", "--to", "gguf")
    assert code == 1 and "tokenizer_config.json" in err and not (tmp_path / "o").exists()
    code, _, err = command("export", path, tmp_path / "o", "--to", "mxfp4")
    assert "quantize --format mxfp4" in err and "int4 codes" not in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**7, "layer_types": None}, "num_hidden_layers is 10000000, expected at most"),
        ({"sliding_window": 0}, "sliding_window is 0, expected a positive integer; correct it there"),
        ({"rms_norm_eps": 1e999}, "rms_norm_eps is inf, expected a positive number"),
    ],
)
def test_sizes_that_no_model_has(tiny, tmp_path, command, change, words):
    path = tiny.copy("bf16", tmp_path / "model")
    tiny.edit_json(path / "config.json", **change)
    code, _, err = command("quantize", path, tmp_path / "o", "--method", "rtn")
    assert code == 1 and words in err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_is_not_utf8(home, tiny, encoding):
    env = environment(PYTHONIOENCODING=encoding, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    for words in (["quantize", f"{home}/模型 ü", "o"], ["plan", str(tiny.path()), "--no-measure"], ["--help"]):
        code = "import sys; from gptoss_quantize.cli import main; sys.argv[0] = 'gptoss-quantize'; main()"
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, env=env, check=False)
        assert b"Traceback" not in done.stderr, done.stderr[-600:]
        assert done.returncode == (1 if words[0] == "quantize" else 0)
        done.stdout.decode(encoding)
        done.stderr.decode(encoding)


def test_a_reader_who_has_seen_enough():
    code = "import sys; from gptoss_quantize.cli import main; sys.argv = ['gptoss-quantize', '--help']; main()"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=pipe, stderr=subprocess.PIPE, env=environment(), check=False
        )
    assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr, done.stderr


# ---- remedies


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("lfs", "it is a pointer of Git LFS, not the file: run `git lfs pull`"),
        ("pickle", "it is a pickle of torch.save under another name"),
        ("cut", "it is truncated or damaged, download it again (or copy or save it again"),
        ("dangling", "it is a link to nowhere, which is gone"),
        ("no utf-8", "its path is not UTF-8, and safetensors cannot open it: rename the directory"),
    ],
)
def test_a_shard_is_told_what_it_is(tiny, tmp_path, kind, words):
    good = sorted(tiny.path().glob("*.safetensors"))[0]
    path = tmp_path / "model.safetensors"
    if kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "no utf-8":
        path = tmp_path / "m\udcff.safetensors"
        shutil.copyfile(good, path)
    else:
        start = {
            "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "pickle": b"PK\3\4" + b"0" * 80,
        }
        path.write_bytes(start.get(kind, good.read_bytes()[:-1]))
    with pytest.raises(InputError) as error:
        ShardFile(path)
    assert words in str(error.value)


def test_numbers():
    assert parse_size("1.5KiB", "--memory") == 1536
    for text in ("9" * 400, "0", "-1", "1e9", ""):
        with pytest.raises(InputError, match="expected a size"):
            parse_size(text, "--memory")
    for setting in ("damping=inf", "damping=-0.1", "token_power=1e999", "sweeps=-1"):
        with pytest.raises(InputError, match="no number from 0 on"):
            override(RECIPES["gptq"], [setting])
