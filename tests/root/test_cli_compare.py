"""The command `compare`: what its profiles stand for, names of candidates, what it prints and writes."""

import json
import shlex
from pathlib import Path

import pytest

from gptoss_quantize.cli_measure import after_comparing
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval.profiles import Wanted, name_candidates


@pytest.fixture
def command(command):
    """Return a function that runs a command line in this process: (exit code, stderr)."""

    def run(*words: object) -> tuple[int, str]:
        code, _, err = command(*words)
        return code, err

    return run


def settings(**options):
    return Wanted(**{"texts": ["heldout"], "tasks": ["offline"]} | options).settings()


def test_profiles_stand_for_amounts():
    full = settings()
    assert full.tasks.limit is None and len(full.tasks.names) == 9 and full.texts[0].tokens == 8192
    quick = settings(profile="quick")
    # 9 tasks, at least 300 items
    assert quick.tasks.limit == 34 and quick.texts[0].tokens == 2048 and len(quick.prompts) == 1
    assert full.margin == 0.02 and full.texts[0].source == "heldout" and not full.texts[0].shuffle
    with pytest.raises(InputError, match="unknown profile 'slow'; known: quick, full"):
        settings(profile="slow")


def test_items_per_task_cover_the_profile():
    seven = [f"t{i}" for i in range(7)]
    assert settings(profile="quick", tasks=seven).tasks.limit * 7 >= 300
    assert settings(profile="quick", tasks=seven, limit=3).tasks.limit == 3
    assert settings(tasks=seven).tasks.limit is None
    assert settings(tasks=[]).tasks is None


def test_options_win_over_the_profile(command, tiny, tmp_path):
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in texts:
        path.write_text(tiny.text * 20 + path.name)
    words = ["--profile", "quick", "--limit", 2, "--text", texts[0], "--text", texts[1], "--text-tokens", 96,
             "--seq-len", 48, "--tasks", "gptoss_kinds,gptoss_copying", "--num-fewshot", 1, "--apply-chat-template",
             "--margin", 1, "--examples", 0, "--expert-tokens", 0, "--dtype", "bfloat16"]  # fmt: skip
    base = ["compare", tiny.path("mxfp4"), "--baseline", tiny.path("bf16"), "--report", tmp_path / "my report"]
    code, err = command(*base, *words)
    assert code == 0, err
    record = json.loads((tmp_path / "my report" / "report.json").read_text())
    got = record["settings"]
    assert got["tasks"] == {"names": ["gptoss_kinds", "gptoss_copying"], "limit": 2, "num_fewshot": 1,
                            "apply_chat_template": True}  # fmt: skip
    assert [text["source"] for text in got["texts"]] == list(map(str, texts))
    assert {text["tokens"] for text in got["texts"]} == {96}
    assert (got["margin"], got["prompts"], got["expert_tokens"], got["dtype"]) == (0.01, [], 0, "bfloat16")
    assert record["command"] == shlex.join(["gptoss-quantize", *map(str, [*base, *words])])
    assert f"'{tmp_path}/my report'" in record["command"]


def test_candidates_are_named_by_their_directory():
    paths = [Path("a/int4"), Path("b/int4"), Path("c/awq"), Path("d/baseline")]
    assert list(name_candidates(paths)) == ["a/int4", "b/int4", "awq", "d/baseline"]
    with pytest.raises(InputError, match="named twice"):
        name_candidates([Path("a/int4"), Path("a/../a/int4")])


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
    last, err = err.splitlines()[-1], " ".join(err.split())
    assert "mxfp4: worse than the baseline; KL divergence" in err and "which no accuracy outvotes" in err
    assert "4.25 bits per expert weight; top-1 agreement" in err
    assert last == f"try: gptoss-quantize generate {tiny.path('bf16')} --prompt 'Why is the sky blue?'"
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


def test_refusals_are_one_message(command, tiny, tmp_path):
    base = ["compare", tiny.path("mxfp4"), "--baseline", tiny.path("bf16")]
    code, err = command(*base, "--report", tmp_path / "r", "--tasks", "gptoss_poetry")
    assert code == 1 and "--tasks gptoss_poetry: no such task" in err and "gptoss_last_words" in err
    (tmp_path / "file").write_text("")
    code, err = command(*base, "--report", tmp_path / "file")
    assert code == 1 and "is a file; give a directory" in err
    assert command("compare", "--baseline", "x", "--report", "y")[0] == 2


def found(*levels: str, suspect: str | None = None, limit: int | None = 34, alarms: tuple[str, ...] = ()) -> dict:
    """The parts of a record that say what to do next; the first candidate is the closest."""
    entries = []
    for i, level in enumerate(levels):
        kl = 0.01 * (i + 1)
        text = {"summary": {"kl_mean": kl}, "details": {"kl_mean_interval": [kl - 0.001, kl + 0.001]}}
        verdict = {"level": level, "alarms": list(alarms)}
        entries.append(
            {"name": f"c{i}", "path": f"/at/c{i}", "cost": {"bytes": 100}, "texts": [text], "verdict": verdict}
        )
    return {"candidates": entries, "suspect": suspect, "settings": {"tasks": {"limit": limit}}}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (found("broken", "equivalent"), "chat /at/c1"),
        (found("equivalent", suspect="it knows nothing"), "generate base --prompt 'Why is the sky blue?'"),
        (found("uncertain", "worse"), "compare /at/c0 /at/c1 --baseline base --adapter lora --report report"),
        (
            found("uncertain", limit=None),
            "compare /at/c0 --baseline base --adapter lora --report report --tasks offline,arc_easy",
        ),
        (found("broken"), "verify /at/c0 --baseline base"),
        (found("broken", "worse"), "quantize base c1-more-text --adapter lora --tokens 131072"),
        (
            found("equivalent", alarms=("a task fell",)),
            "quantize base c0-more-text --adapter lora --tokens 131072",
        ),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_the_next_step_is_what_the_ranking_asks_for(record, words):
    got = shlex.join(map(str, after_comparing(record, "base", Path("report"), Path("lora"))))
    assert got == words
