"""lm-eval's own command line with our models and the packaged tasks in it: `python -m gptoss_quantize.lm_eval`.

    python -m gptoss_quantize.lm_eval --model gptoss-int4 --model_args pretrained=OUT --tasks offline

All arguments are lm-eval's (0.4.13 has no plug-ins, so that `lm_eval` itself cannot find us). Added are the models
`gptoss-int4` (whole in memory) and `gptoss-streamed` (layer by layer), and the tasks `offline` and `gptoss_*`.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

from gptoss_quantize.cli_exits import one_message
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval import suite
from gptoss_quantize.eval.network import check_reachable


def run() -> None:
    """Run lm-eval's command line on `sys.argv`; InputError for what can be refused before anything is loaded."""
    if find_spec("lm_eval") is None:
        raise InputError("lm-eval is not installed; pip install 'gptoss-quantize[eval]'")
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    if not sys.argv[1:] or sys.argv[1:] in (["-h"], ["--help"]):
        print(f"{__doc__}\nWhat follows is lm-eval's own help.\n", flush=True)
    setup_logging()
    parser = HarnessCLI()
    args = parser.parse_args()
    names = [name for given in getattr(args, "tasks", None) or [] for name in given.split(",")]
    check_reachable(names, _given(args, "include_path") if hasattr(args, "include_path") else None)
    with tempfile.TemporaryDirectory(prefix="gptoss-quantize-") as folder:
        suite.export(Path(folder))
        if hasattr(args, "include_path"):
            args.include_path = [folder, *_given(args, "include_path")]
        if hasattr(args, "device"):
            # lm-eval's own default is cuda:0, whether there is one or not
            args.device = next(iter(_given(args, "device")), "auto")
        from gptoss_quantize.eval.lm_models import register

        register()
        with _suite_only(names):
            parser.execute(args)


def _given(args: argparse.Namespace, option: str) -> list[str]:
    """Return what the user gave for an option, with it or in the file that --config names; empty where nothing."""
    value = getattr(args, option)
    if value is None and getattr(args, "config", None):
        from lm_eval.config.evaluate_config import EvaluatorConfig

        value = EvaluatorConfig.load_yaml_config(args.config).get(option)
    return [] if value is None else [str(value)]


@contextmanager
def _suite_only(names: list[str]) -> Iterator[None]:
    """Leave lm-eval's own tasks unread where only ours are asked for: an index of 14,000 files, 20 s of work."""
    from lm_eval import tasks

    if not names or not set(names) <= {suite.ALL, *suite.suite_files()}:
        yield
        return
    with patch.object(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False)):
        yield


def main() -> None:
    """Run, with refused input as one message and exit code 1."""
    with one_message():
        run()


if __name__ == "__main__":
    main()
