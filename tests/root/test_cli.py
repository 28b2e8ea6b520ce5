"""The command line as a person uses it: exit codes, messages without tracebacks, and the whole way end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers  # noqa: F401 - its log handler keeps the stderr of the moment, which a test's would be too short
from safetensors.torch import load_file, save_file

from gptoss_quantize import cli
from gptoss_quantize.checkpoint import Checkpoint

COMMANDS = ["quantize", "evaluate", "compare", "generate", "demo-model", "demo", "synthetic-model", "plan"]
COMMANDS += ["export", "import", "verify", "chat", "env"]


@pytest.fixture(scope="module")
def text(tmp_path_factory, tiny) -> Path:
    path = tmp_path_factory.mktemp("text") / "sea.txt"
    paragraphs = [f"Chapter {i}. " + tiny.text * 5 for i in range(20)]
    path.write_text("\n\n".join(paragraphs))
    return path


def test_help_lists_the_commands(command):
    code, out, _ = command("--help")
    assert code == 0
    assert all(f" {name} " in out for name in COMMANDS)
    # help of the program without a command is no error of usage, but it is not nothing either
    _, out, err = command()
    assert "quantize" in out + err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(command, name):
    code, out, _ = command(name, "--help")
    assert code == 0
    assert "Usage" in out
    for option in {"quantize": ["--method", "--group-size", "--resume", "--adapter"], "evaluate": ["--json"]}.get(
        name, []
    ):
        assert option in out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["quantize", "m", "o", "--method", "magic"], ["--method", "'magic'", "gptq"]),
        (["quantize", "m", "o", "--group-size", "48"], ["--group-size", "'48'", "64"]),
        (["quantize", "m", "o", "--tokens", "many"], ["--tokens", "integer"]),
        (["quantize", "m", "o", "--seq-len", "1"], ["--seq-len", "2"]),
        (["quantize", "m", "o", "--seed", "-1"], ["--seed", "0"]),
        (["quantize", "m", "o", "--dtype", "float8"], ["--dtype", "'float8'"]),
        (["quantize", "m", "o", "--nonsense"], ["No such option", "--nonsense"]),
        (["quantize", "m"], ["Missing argument", "out"]),
        (["quantise"], ["No such command", "quantise"]),
        (["evaluate", "c"], ["Missing option", "--baseline"]),
        (["generate", "m"], ["Missing option", "--prompt"]),
        (["generate", "m", "--prompt", "x", "--max-new-tokens", "0"], ["--max-new-tokens", "1"]),
        (["demo", "o", "--methods", "gptq,magic"], ["--methods", "magic", "rtn"]),
    ],
    ids=lambda value: " ".join(value) if value[0] in (*COMMANDS, "quantise") else "",
)
def test_usage_errors_are_2(command, words, named):
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    # the wording is typer's and changes with its versions; what is wrong must be named in all of them
    assert all(word.lower() in err.lower() for word in named), err


def test_version(command):
    code, out, _ = command("--version")
    assert (code, out.strip()) == (0, cli.__version__)


# ---- refused input: exit code 1, one message, nothing written


def refused(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    message = err.strip().splitlines()[-1]
    assert (code, out) == (1, "")
    assert message.startswith("refused: ")
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


def test_refused_input_is_1(command, tiny, tmp_path, text):
    model, out = tiny.path("bf16"), tmp_path / "out"
    quantize = ("quantize", model, out, "--method", "gptq", "--calibration", text, "--seq-len", "16")
    before = tiny.snapshot(tmp_path)
    refused(command("quantize", tmp_path, out), str(tmp_path / "config.json"), "no such file")
    refused(command("quantize", "owner/unknown-model", out), "owner/unknown-model", "not in the cache")
    refused(command("quantize", tmp_path / "nowhere", out), "no such directory")
    refused(command(*quantize, "--tokens", "8"), "8 tokens", "--seq-len")
    refused(command(*quantize, "--tokens", "10000000"), "sea.txt", "give more text")
    refused(command(*quantize[:5], "--calibration", "no.txt"), "no.txt: no such file")
    refused(command(*quantize, "--set", "dampening=1"), "'dampening'", "damping")
    refused(command(*quantize, "--set", "damping=much"), "damping", "'much' is not a float")
    refused(command(*quantize, "--device", "tpu"), "--device tpu", "expected auto, cpu or cuda")
    refused(command(*quantize, "--resume", "--overwrite", "--tokens", "64"), "contradict")
    refused(command(*quantize, "--resume", "--tokens", "64"), "nothing to resume")
    refused(command(*quantize, "--revision", "v1"), "--revision v1", "local directory")
    refused(command(*quantize, "--adapter", tmp_path), "no adapter_config.json")
    if not torch.cuda.is_available():
        refused(command(*quantize, "--tokens", "64", "--device", "cuda"), "no CUDA device", "--device cpu")
    refused(command("evaluate", model, "--baseline", tmp_path / "no", "--text", text), "no such directory")
    refused(command("evaluate", tmp_path, "--baseline", model, "--text", text), "config.json: no such file")
    refused(command("generate", tmp_path, "--prompt", "x"), "config.json: no such file")
    assert tiny.snapshot(tmp_path) == before


@pytest.mark.skipif(torch.version.cuda is not None or torch.version.hip is not None, reason="torch is for cards too")
@pytest.mark.parametrize("words", [["quantize", "{}", "o"], ["evaluate", "{}", "--baseline", "{}"],
                                   ["compare", "{}", "--baseline", "{}", "--report", "r"]])  # fmt: skip
def test_a_card_that_is_not_there_is_refused_before_torch_is_imported(tiny, tmp_path, words):
    code = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
    code += "from gptoss_quantize.cli import main; main()"
    given = [word.format(tiny.path("bf16")) for word in words]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *given, "--device", "cuda:1"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "False\n"), done
    message = f"refused: --device cuda:1: torch {torch.__version__} sees no CUDA device; use --device cpu"
    assert done.stderr.strip() == message and not list(tmp_path.iterdir())


def test_a_path_in_a_message_is_not_markup(command, tmp_path):
    (tmp_path / "[red]model").mkdir()
    refused(command("quantize", tmp_path / "[red]model", tmp_path / "out"), "[red]model/config.json")


def test_evaluate_refuses_before_it_works(command, tiny, tmp_path, text):
    arguments = ("evaluate", tiny.path("bf16"), "--baseline", tiny.path("bf16"), "--text", text, "--seq-len", "16")
    missing = tmp_path / "no" / "x.json"
    refused(command(*arguments, "--json", missing), str(missing), "directory")
    refused(command(*arguments, "--json", tmp_path), str(tmp_path), "directory")


def test_generate_without_a_chat_template(command, tiny, tmp_path):
    path = tiny.copy("bf16", tmp_path / "model")
    (path / "chat_template.jinja").unlink()
    refused(command("generate", path, "--prompt", "hello"), str(path), "no chat template", "--raw")
    code, _, err = command("generate", path, "--prompt", "hello", "--raw", "--max-new-tokens", "2")
    assert code == 0
    assert err.splitlines()[-1] == f"try: gptoss-quantize generate {path} --raw --prompt hello --max-new-tokens 4"
    refused(command("generate", path, "--prompt", "", "--raw"), "prompt is empty")


def test_resume_with_another_option(command, tiny, tmp_path):
    out = tmp_path / "out"
    model = tiny.copy("float32", tmp_path / "model")
    whole = (model / "model.safetensors").read_bytes()
    stat = (model / "model.safetensors").stat()
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.self_attn.sinks"][0] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused(command("quantize", model, out, "--method", "rtn"), "self_attn.sinks holds 1 NaN", "fix it first")
    refused(
        command("quantize", model, out, "--method", "rtn", "--group-size", "32", "--resume"), "group_size was 64, is"
    )
    # the mended model is another one
    (model / "model.safetensors").write_bytes(whole)
    os.utime(model / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    refused(command("quantize", model, out, "--method", "rtn", "--resume"), "source_files was")
    assert command("quantize", model, out, "--method", "rtn", "--overwrite")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


# ---- end to end


def test_mxfp4_as_a_target(command, tiny, tmp_path):
    code, _, err = command("quantize", tiny.path(), tmp_path / "out", "--method", "rtn", "--format", "mxfp4")
    assert code == 0
    assert "4.25 bits per weight" in " ".join(err.split())
    assert "keep the release" not in " ".join(err.split())
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    code, _, err = command(
        "quantize", tiny.path(), tmp_path / "no", "--method", "rtn", "--format", "mxfp4", "--group-size", "64"
    )
    assert code == 1
    assert "groups of 32, not 64" in " ".join(err.split())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_quantize_evaluate_generate(command, tiny, tmp_path, text, method):
    model, out, numbers = tiny.path("mxfp4"), tmp_path / "out", tmp_path / "numbers.json"
    budget = ("--tokens", "512", "--seq-len", "32")
    code, printed, err = command("quantize", model, out, "--method", method, "--calibration", text, *budget)
    assert (code, printed) == (0, "")
    assert "4.25 bits per weight" in " ".join(err.split())
    assert "layer" in err
    assert "keep the release" in " ".join(err.split())
    assert f"(the experts' {'weights' if method == 'rtn' else 'outputs'} move by" in " ".join(err.split())
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["settings"]["method"] == method
    if method == "gptq":
        assert report["calibration"]["shape"] == [16, 32]
        assert report["calibration"]["source"] == str(text)
        assert sum(report["layers"][0]["tokens"]) == 4 * 512

    code, printed, _ = command(
        "evaluate", out, "--baseline", model, "--text", text, *budget, "--json", numbers, "--dtype", "float32"
    )
    assert code == 0
    assert all(name in printed for name in ("perplexity", "kl_mean", "kl_p99", "top1_agreement"))
    record = json.loads(numbers.read_text())
    (result,) = record["results"].values()
    assert list(record["results"]) == [str(out)]
    assert (record["dtype"], record["text"]["tokens"], result["tokens"]) == ("float32", 512, 16 * 31)
    assert 0 < result["kl_mean"] < 2
    assert 0.2 < result["top1_agreement"] <= 1
    assert f"{result['kl_mean']:.4f}" in printed

    code, answer, err = command("generate", out, "--prompt", "The sea", "--max-new-tokens", "6", "--dtype", "float32")
    assert code == 0
    assert answer.strip("\n")
    speed, following = err.splitlines()
    assert "tokens/s" in speed and following == f"try: gptoss-quantize chat {out}"
    # packed or unpacked source: both have a chat template and answer
    assert command("generate", model, "--prompt", "The sea", "--max-new-tokens", "2")[0] == 0


def test_polish_takes_the_text_behind_the_calibrations(command, tiny, tmp_path, text):
    calibrated, out = ("--calibration", text, "--tokens", "128", "--seq-len", "32"), tmp_path / "out"
    code, _, err = command("quantize", tiny.path("bf16"), out, *calibrated, "--polish", "2", "--dtype", "float32")
    assert code == 0
    report = json.loads((out / "quantization_report.json").read_text())["polish"]
    # 2 steps of 4 sequences and one held out
    assert report["text"]["tokens"] == 9 * 32
    assert report["heldout_tokens"] == 32
    words = " ".join(err.split())
    assert (
        f"polish: KL {report['kl_before']:.4f} -> {report['kl_after']:.4f} on 32 held-out tokens after 2 steps"
        in words
    )
    assert ("nothing was changed" in words) == (not report["kept"])
    assert "ran short" not in words


def test_evaluate_a_model_against_itself(command, tiny, text, tmp_path):
    numbers = tmp_path / "x.json"
    path = tiny.path("bf16")
    arguments = ("--baseline", path, "--text", text, "--tokens", "96", "--seq-len", "32", "--json", numbers)
    assert command("evaluate", path, *arguments)[0] == 0
    (result,) = json.loads(numbers.read_text())["results"].values()
    assert abs(result["kl_max"]) < 1e-5
    assert result["top1_agreement"] == 1
    assert result["perplexity"] == result["baseline_perplexity"]


def test_group_32_adapter_and_recipe(command, tiny, tmp_path, text):
    adapter = tiny.adapter(tmp_path / "adapter")
    arguments = ("--method", "awq", "--group-size", "32", "--adapter", adapter, "--set", "awq_down=false")
    calibration = ("--calibration", text, "--tokens", "256", "--seq-len", "32", "--seed", "3")
    code, _, err = command("quantize", tiny.path("bf16"), tmp_path / "out", *arguments, *calibration)
    assert code == 0, err
    assert "4.50 bits per weight" in " ".join(err.split())
    settings = json.loads((tmp_path / "out" / "quantization_report.json").read_text())["settings"]
    assert (settings["group_size"], settings["recipe"]["awq_down"]) == (32, False)
    assert settings["adapter"] == str(adapter)
    assert Checkpoint(tmp_path / "out").group_size == 32


# ---- interrupted


SLOW = """
import signal, sys, time
# a parent that runs in the background leaves SIGINT ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
from gptoss_quantize.quantize.output import Output
save = Output.save_state
def slow(self):
    save(self)
    if len(self.state["layers"]) == 2:
        print("waiting", flush=True)
        time.sleep(60)
Output.save_state = slow
from gptoss_quantize.cli import main
main()
"""


def test_interrupt_leaves_no_half_checkpoint(command, tiny, tmp_path, text):
    out = tmp_path / "out"
    arguments = ["quantize", tiny.path("bf16"), out, "--method", "gptq", "--calibration", text]
    arguments = [*map(str, arguments), "--tokens", "256", "--seq-len", "32", "--dtype", "float32"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    started = time.perf_counter()
    _, err = process.communicate(timeout=60)
    assert time.perf_counter() - started < 30
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "interrupted" in err
    assert "--resume" in err
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    assert command(*arguments, "--resume")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    Checkpoint(out)
