"""The packaged tasks: multiple-choice questions that need no network, as lm-eval's configurations.

The suite is made by scripts/make_tasks.py (eval/data/NOTICE): files of one JSON object a line, and one configuration
that all tasks share. `offline` names all of them, `gptoss_NAME` one. The data lie in the package, so their absolute
paths are written into the tasks when they are asked for. Imports no torch: what cannot be had is said at once.
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from gptoss_quantize.errors import InputError

PREFIX = "gptoss_"
ALL = "offline"


def suite_files() -> dict[str, Path]:
    """Return task name -> data file of the packaged suite."""
    folder = Path(str(files("gptoss_quantize.eval") / "data" / "tasks"))
    found = {PREFIX + path.name.removesuffix(".jsonl"): path for path in sorted(folder.glob("*.jsonl"))}
    if not found:
        raise InputError(f"{folder}: the packaged task suite is missing; reinstall gptoss-quantize")
    return found


def suite_config(name: str) -> dict[str, Any]:
    """Return lm-eval's configuration of a packaged task, with the absolute path of its data."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(suite_files()[name])}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def suite_group() -> dict[str, Any]:
    """Return lm-eval's configuration of `offline`: all tasks, and their accuracy over all items."""
    return {
        "group": ALL,
        "task": list(suite_files()),
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
        "metadata": {"version": 1.0},
    }


def export(dest: Path) -> None:
    """Write the suite as YAML files for `lm_eval --include_path DEST --tasks offline` (or gptoss_...)."""
    dest.mkdir(parents=True, exist_ok=True)
    configs = {name: suite_config(name) for name in suite_files()} | {ALL: suite_group()}
    for name, config in configs.items():
        # JSON is YAML
        (dest / f"{name}.yaml").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def expand(names: Sequence[str]) -> list[str]:
    """Return task names with `offline` written out, each once."""
    out = [task for name in names for task in (suite_files() if name == ALL else (name,))]
    return list(dict.fromkeys(out))
