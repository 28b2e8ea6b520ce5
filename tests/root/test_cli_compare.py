"""The command `compare`: what its profiles stand for, names of candidates, what it prints and writes."""

import json
import sys
from pathlib import Path

import pytest

from gptoss_quantize import api, cli
from gptoss_quantize.cli_compare import Profile, _candidates, _profile
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval import report as page
from gptoss_quantize.eval.compare import Settings


@pytest.fixture
def command(monkeypatch, capsys):
    """Return a function that runs a command line in this process: (exit code, stderr)."""
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["gptoss-quantize", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """What the command hands on, instead of doing it."""
    calls: list[tuple] = []

    def instead(baseline, candidates, settings, dest, **options):
        calls.append((baseline, candidates, settings, dest, options))
        return {"candidates": [], "seconds": 0.0}

    monkeypatch.setattr(api, "compare_models", instead)
    return calls


def settings_of(command, asked, *words: object) -> Settings:
    code, _ = command("compare", "a/int4", "--baseline", "base", "--report", "out", *words)
    assert code == 0
    return asked.pop()[2]


def test_profiles_stand_for_amounts(command, asked):
    full = settings_of(command, asked)
    assert full.tasks.limit is None and len(full.tasks.names) == 9 and full.texts[0].tokens == 8192
    quick = settings_of(command, asked, "--profile", "quick")
    # 9 tasks, at least 300 items
    assert quick.tasks.limit == 34 and quick.texts[0].tokens == 2048 and len(quick.prompts) == 1
    assert full.margin == 0.02 and full.texts[0].source == "heldout" and not full.texts[0].shuffle


def test_options_win_over_the_profile(command, asked):
    words = ["--profile", "quick", "--limit", 5, "--text", "a.jsonl", "--text", "b.txt", "--text-tokens", 1024,
             "--tasks", "gptoss_kinds,hellaswag", "--num-fewshot", 2, "--apply-chat-template", "--margin", 1,
             "--examples", 0, "--expert-tokens", 0]  # fmt: skip
    got = settings_of(command, asked, *words)
    assert got.tasks.names == ("gptoss_kinds", "hellaswag") and got.tasks.limit == 5
    assert got.tasks.num_fewshot == 2 and got.tasks.apply_chat_template
    assert [spec.source for spec in got.texts] == ["a.jsonl", "b.txt"] and got.texts[0].tokens == 1024
    assert got.margin == 0.01 and got.prompts == () and got.expert_tokens == 0
    assert settings_of(command, asked, "--tasks", "none").tasks is None


def test_the_command_line_is_kept(command, asked):
    command("compare", "a/int4", "--baseline", "my model", "--report", "out")
    assert asked[0][4]["command"] == "gptoss-quantize compare a/int4 --baseline 'my model' --report out"


def test_items_per_task_cover_the_profile():
    assert _profile(Profile.quick, 7, None)[0] * 7 >= 300
    assert _profile(Profile.quick, 7, 3)[0] == 3
    assert _profile(Profile.full, 7, None)[0] is None


def test_candidates_are_named_by_their_directory():
    paths = [Path("a/int4"), Path("b/int4"), Path("c/awq"), Path("d/baseline")]
    assert list(_candidates(paths)) == ["a/int4", "b/int4", "awq", "d/baseline"]
    with pytest.raises(InputError, match="named twice"):
        _candidates([Path("a/int4"), Path("a/../a/int4")])


def test_a_report_is_written_and_the_verdict_printed(command, tiny, tmp_path):
    text = tmp_path / "sea.txt"
    text.write_text(tiny.text * 20)
    words = [
        "compare",
        tiny.path("mxfp4"),
        "--baseline",
        tiny.path("bf16"),
        "--report",
        tmp_path / "report",
        "--text",
        text,
    ]
    words += ["--tasks", "none", "--examples", 0, "--expert-tokens", 0, "--seq-len", 48, "--text-tokens", 192]
    code, err = command(*words)
    assert code == 0, err
    assert "mxfp4: worse than the baseline; KL divergence" in err and "which no accuracy outvotes" in err
    assert "4.25 bits per expert weight; top-1 agreement" in err
    # a model of random numbers is named
    assert "warning: baseline" in err and "above half of its vocabulary of 300" in err
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "cache",
        "README.md",
        "report.html",
        "report.json",
    }
    record = json.loads((tmp_path / "report" / "report.json").read_text())
    assert record["command"].startswith("gptoss-quantize compare ") and record["schema"] == 1


def test_refusals_are_one_message(command, tiny, tmp_path, monkeypatch):
    base = ["compare", tiny.path("mxfp4"), "--baseline", tiny.path("bf16")]
    code, err = command(*base, "--report", tmp_path / "r", "--tasks", "gptoss_poetry")
    assert code == 1 and "no such task" in err
    (tmp_path / "file").write_text("")
    code, err = command(*base, "--report", tmp_path / "file")
    assert code == 1 and "is a file; give a directory" in err
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    code, err = command(*base, "--report", tmp_path / "r")
    assert code == 1 and "pip install 'gptoss-quantize[eval]'" in err
    assert command("compare", "--baseline", "x", "--report", "y")[0] == 2
