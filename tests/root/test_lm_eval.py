"""lm-eval's own command line with our models and tasks in it."""

import json
import logging
import re
import sys

import pytest

from gptoss_quantize import lm_eval as command_line
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.eval import suite
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint


@pytest.fixture
def lm_eval(monkeypatch, capsys, tmp_path):
    """Run a command line in this process: (exit code, what it printed)."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lm_eval", *map(str, words)])
        before = {logger: list(logger.handlers) for logger in (logging.getLogger(), logging.getLogger("lm_eval"))}
        try:
            command_line.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        for logger, handlers in before.items():
            # lm-eval's write to the stderr of this test
            logger.handlers = handlers
        out, err = capsys.readouterr()
        return code, out + err

    return run


@pytest.fixture(scope="module")
def int4(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("int4") / "out"
    quantize_checkpoint(Checkpoint(tiny.path()), Job(dest=path, method="rtn", recipe=RECIPES["rtn"]), None)
    return path


def test_the_suite_by_name(int4, lm_eval, tmp_path):
    options = ("--model_args", f"pretrained={int4},dtype=float32", "--limit", 2, "--batch_size", 4)
    code, said = lm_eval("--model", "gptoss-int4", *options, "--tasks", "offline", "--apply_chat_template")
    assert code == 0, said
    rows = re.findall(r"^\| ?(?:- )?(\w+) *\|", said, re.MULTILINE)
    assert "offline" in rows and sum(row.startswith("gptoss_") for row in rows) == 9, said
    # tasks of the user's own stay reachable, by the option and by a file of settings
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"include_path: {tmp_path / 'configured'}\ndevice: cpu\n")
    for folder, words in (("own", ("--include_path", tmp_path / "own")), ("configured", ("--config", settings))):
        (tmp_path / folder).mkdir()
        config = suite.suite_config("gptoss_kinds") | {"task": f"{folder}_kinds"}
        (tmp_path / folder / f"{folder}_kinds.yaml").write_text(json.dumps(config))
        code, said = lm_eval("--model", "gptoss-streamed", *options[:4], "--tasks", f"{folder}_kinds", *words)
        assert code == 0 and re.search(rf"^\|{folder}_kinds *\|", said, re.MULTILINE), said


def test_refusals_are_one_message(int4, lm_eval):
    for words, reason in (
        (("--model_args", f"pretrained={int4},gptqmodel=True", "--tasks", "offline"), "gptqmodel: not known here"),
        (("--model_args", "pretrained=/no/where", "--tasks", "offline"), "/no/where: no such directory"),
        (("--model_args", f"pretrained={int4}", "--tasks", "hellaswag"), "needs the data set Rowan/hellaswag"),
    ):
        code, said = lm_eval("--model", "gptoss-int4", *words)
        assert code == 1 and reason in said and "Traceback" not in said, said


def test_help_says_what_is_added(lm_eval):
    code, said = lm_eval("--help")
    assert code == 0 and "gptoss-streamed" in said and "lm-eval" in said
