"""What a log, a pipe and a machine see: a line per step as it happens, JSON that parses, help whole at 80 columns."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
import time

import pytest
import typer
from rich.console import Console

from gptoss_quantize import cli, logged, terminal
from gptoss_quantize.cli_help import COMMON, EXAMPLES, words_of
from gptoss_quantize.cli_runtimes import print_verified
from gptoss_quantize.errors import InputError
from gptoss_quantize.units import parse_size

COMMANDS = typer.main.get_command(cli.app).commands
STEP = re.compile(r"^gptq int4 group 64: layer (\d)/3(, \d:\d\d:\d\d gone, \d:\d\d:\d\d left)?$")


def start(*words: object) -> subprocess.Popen:
    # stdout and stderr are pipes
    command = [sys.executable, "-P", "-W", "ignore", "-c", "from gptoss_quantize.cli import main; main()"]
    environment = os.environ | {"COLUMNS": "80"}
    return subprocess.Popen(
        [*command, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The sea was calm that night and the ship lay still. " * 200)
    return path


def test_a_pipe_gets_a_line_for_each_layer_as_it_happens(tiny, text, tmp_path):
    seen, lines = [], []
    with start("quantize", tiny.path("bf16"), tmp_path / "out", "--calibration", text, "--tokens", 512) as running:
        for line in running.stderr:
            lines.append(line.rstrip("\n"))
            seen.append((time.monotonic(), (tmp_path / "out").exists()))
        assert running.stdout.read() == ""
    assert running.returncode == 0
    steps = [
        (int(m[1]), m[2] is not None, at[1]) for line, at in zip(lines, seen, strict=True) if (m := STEP.match(line))
    ]
    # the first without a time, and all before the checkpoint stands at its place
    assert [(n, timed) for n, timed, _ in steps] == [(0, False), (1, True), (2, True), (3, True)]
    assert not any(done for *_, done in steps[:3])
    assert lines[-1] == f"try: gptoss-quantize chat {tmp_path}/out"
    assert "\x1b" not in "".join(lines) and "\r" not in "".join(lines)


def test_json_lines_all_parse(tiny, text, tmp_path):
    words = ("quantize", tiny.path("bf16"), tmp_path / "out", "--calibration", text, "--tokens", 512)
    running = start(*words, "--log-format", "json", "--method", "RTN", "--format", "INT4")
    _, err = running.communicate()
    assert running.returncode == 0, err
    events = [json.loads(line) for line in err.splitlines()]
    keys = {
        "progress": {"time", "event", "phase", "news", "done", "total", "seconds", "left"},
        "message": {"time", "event", "text"},
    }
    assert all(event.keys() == keys[event["event"]] for event in events)
    steps = [e for e in events if e["event"] == "progress" and e["phase"].startswith("rtn int4")]
    assert [(e["done"], e["total"]) for e in steps] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert steps[0]["left"] is None and steps[-1]["left"] == 0.0
    # a long message is one object
    assert any("4.25 bits per weight" in e.get("text", "") and "peak" in e["text"] for e in events)
    # what is refused is an object too
    running = start(*words, "--log-format", "json")
    _, err = running.communicate()
    assert running.returncode == 1
    (refused,) = [json.loads(line) for line in err.splitlines()]
    assert "already exists" in refused["text"]


def test_many_steps_are_told_every_ten_seconds(monkeypatch):
    now, said = [0.0], io.StringIO()
    monkeypatch.setattr(logged.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", said)
    with logged.lines() as show:
        for done in range(801):
            show("copying: MiB", done, 800)
            now[0] += 0.125
    told = said.getvalue().splitlines()
    assert told[0] == "copying: MiB 0/800" and told[-1].startswith("copying: MiB 800/800, 0:01:40 gone")
    assert len(told) == 1 + 10
    assert told[5] == "copying: MiB 400/800, 0:00:50 gone, 0:00:50 left"


def test_time_left_of_a_resumed_run(monkeypatch):
    now, said = [0.0], io.StringIO()
    monkeypatch.setattr(logged.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", said)
    with logged.lines() as show:
        show("gptq: layer (resumed)", 20, 24)
        now[0] = 60.0
        show("gptq: layer", 21, 24)
    # a minute a layer, not three seconds
    assert said.getvalue().splitlines()[-1] == "gptq: layer 21/24, 0:01:00 gone, 0:03:00 left"


def test_a_session_puts_everything_back():
    before = sys.stderr
    with terminal.log_session():
        terminal.choose_log("json")
        assert isinstance(sys.stderr, logged.JsonLines) and not terminal.has_bars()
    assert sys.stderr is before and logged.log_format() == "auto" and not terminal.console.soft_wrap


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_whole_at_80_columns(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    command = COMMANDS[name]
    context = command.make_context(name, [], resilient_parsing=True, terminal_width=80, max_content_width=80)
    shown = command.get_help(context)
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    flat = " ".join(shown.split())
    for param in command.params:
        for option in (*param.opts, *param.secondary_opts):
            assert re.search(rf"(^|\s){re.escape(option)}(\s|,|\.|$)", flat), option
        # every bracket of a help text is there; click breaks lines at blanks and hyphens
        wanted = re.sub(r"\s", "", param.help or "")
        assert wanted in re.sub(r"\s", "", shown), param.help
    options = [o for param in command.params for o in param.opts]
    assert set(COMMON.get(name, ())) <= set(options)
    places = [re.search(rf" {re.escape(option)}[ ,]", flat).start() for option in COMMON.get(name, ())]
    assert places == sorted(places)


def test_every_command_has_an_example():
    assert EXAMPLES.keys() == COMMANDS.keys()


@pytest.mark.parametrize("example", [line for lines in EXAMPLES.values() for line in lines])
def test_examples_parse(example):
    name, *words = words_of(example)
    context = COMMANDS[name].make_context(name, words)
    assert context.params


def test_sizes_need_a_unit():
    with pytest.raises(InputError, match=r"--gpu-memory 16: has no unit; write 16GiB"):
        parse_size("16", "--gpu-memory")
    assert parse_size("16GiB", "x") == 16 << 30 and parse_size("800 mb", "x") == 800 * 10**6


def test_what_verify_says_fits():
    got = {"kl": 1.7812e-05, "top1": 0.98437, "mean_difference": 3.3e-3, "max_difference": 1.234e1}
    rows = [
        {"runtime": "transformers", "what": "dequantized to bfloat16", "verdict": "agrees", "got": got,
         "noise": {"kl": 1.2e-9}, "note": ""},
        {"runtime": "llama.cpp", "what": "Q4_0 experts", "verdict": "DISAGREES", "got": got, "noise": None,
         "note": "KL 6.2 nats, and 16 bit explains at most 0.05 [sic]: " + "word " * 40},
    ]  # fmt: skip
    console = Console(width=80, file=io.StringIO())
    print_verified("/a/long/path" * 5, None, rows, console)
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    # what goes on below stays under what it belongs to
    assert not [line for line in shown.splitlines() if line[:1].isdigit()]
    flat = " ".join(shown.split())
    for word in ("1.8e-05", "(noise 1.2e-09)", "98.4 %", "3.3e-03", "at most 1.2e+01", "DISAGREES", "[sic]"):
        assert word in flat
    assert flat.count("word") == 40


def test_completion_is_offered():
    environment = os.environ | {
        "_GPTOSS_QUANTIZE_COMPLETE": "complete_bash",
        "COMP_WORDS": "gptoss-quantize qu",
        "COMP_CWORD": "1",
    }
    command = [
        sys.executable,
        "-P",
        "-c",
        "import sys; sys.argv[0] = 'gptoss-quantize'; from gptoss_quantize.cli import main; main()",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.split() == ["quantize"], done


@pytest.mark.parametrize("on", [True, False])
def test_bars_of_libraries_are_as_they_were(on):
    modules = [importlib.import_module(name) for name in terminal.BARS]
    before = [terminal._shown(module) for module in modules]
    for module, word in zip(modules, terminal.BARS.values(), strict=True):
        getattr(module, f"{'enable' if on else 'disable'}_{word}")()
    try:
        # transformers' switch turns the hub's as well: one on, the other off
        modules[-1].disable_progress_bars()
        with terminal.others_quiet():
            assert not any(map(terminal._shown, modules))
        assert [terminal._shown(module) for module in modules] == [on, on, False]
    finally:
        for module, word, was in zip(modules, terminal.BARS.values(), before, strict=True):
            getattr(module, f"{'enable' if was else 'disable'}_{word}")()
