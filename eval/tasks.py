"""Tasks through lm-eval: the packaged offline suite, any other task of lm-eval, and the answers item by item.

`eval.suite` has the packaged tasks; `gptoss_quantize.lm_eval` is lm-eval's own command line with the same tasks and
our models in it.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partialmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from gptoss_quantize.errors import InputError
from gptoss_quantize.eval.suite import suite_config, suite_files
from gptoss_quantize.source import placed

# what every item of a task is measured by: the first that the task has and that is right or wrong
BINARY_METRICS = ("acc", "exact_match", "acc_norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSettings:
    """How lm-eval asks."""

    names: tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False


def _need_lm_eval() -> None:
    if find_spec("lm_eval") is None:
        raise InputError(
            "tasks need lm-eval, which is not installed; pip install 'gptoss-quantize[eval]', or leave tasks out "
            "(--tasks none)"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's and datasets' own progress bars and notes off the screen; their warnings and errors stay."""
    import datasets  # noqa: PLC0415
    from tqdm import tqdm  # noqa: PLC0415

    logger = logging.getLogger("lm_eval")
    level, shown = logger.level, tqdm.__init__
    bars = datasets.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    tqdm.__init__ = partialmethod(shown, disable=True)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        tqdm.__init__ = shown
        if bars:
            datasets.enable_progress_bars()


@cache
def _manager(suite_only: bool) -> Any:
    """Return lm-eval's task manager; the index of all its tasks takes seconds to read, and the suite needs none."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    return TaskManager(include_defaults=not suite_only)


def load_tasks(settings: TaskSettings) -> dict[str, str]:
    """Return task name -> output type of everything asked for; InputError for what cannot be run here.

    A group of lm-eval gives all of its tasks. Data that is neither packaged nor in the cache needs a network.
    """
    _need_lm_eval()
    suite = suite_files()
    with _quiet():
        manager = _manager(all(name in suite for name in settings.names))
        kinds: dict[str, str] = {}
        for name in settings.names:
            if name not in suite and name not in manager.all_tasks:
                raise InputError(
                    f"--tasks {name}: no such task; expected `offline`, one of {', '.join(suite)}, or a name that "
                    "`lm_eval ls tasks` lists"
                )
            try:
                loaded = manager.load([suite_config(name) if name in suite else name])["tasks"]
            except (OSError, ValueError, RuntimeError, ImportError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise InputError(
                    f"--tasks {name}: its data cannot be loaded ({type(error).__name__}: {reason}); it needs the hub "
                    f"or its cache: run `lm_eval validate --tasks {name}` once where there is a network and copy "
                    "~/.cache/huggingface here, or take the packaged suite (--tasks offline)"
                ) from error
            kinds |= {task: str(loaded[task].get_config("output_type")) for task in loaded}
    return kinds


def check_tasks(kinds: dict[str, str], settings: TaskSettings, has_template: bool) -> None:
    """Raise InputError for a generation task without a chat template: chat models answer nothing sensible then."""
    generating = sorted(name for name, kind in kinds.items() if kind == "generate_until")
    if settings.apply_chat_template and not has_template:
        raise InputError(
            "--apply-chat-template: the baseline's tokenizer has no chat template; put the model's "
            "chat_template.jinja beside tokenizer.json, or leave the option out"
        )
    if generating and not settings.apply_chat_template:
        raise InputError(
            f"{', '.join(generating)}: generates text, which a chat model does in its own template only (GSM8K of "
            "gpt-oss-20b: 0.30 without, 0.90 with); add --apply-chat-template, or leave the task out"
        )


def run_tasks(lm: Any, settings: TaskSettings) -> dict[str, dict[str, Any]]:
    """Return per task what lm-eval found, and the answers item by item.

    {"metrics": lm-eval's own numbers, "metric": the one that `right` holds, "right": list of 0/1 in the order of
    the items (None where no metric is binary), "items": n, "chance": accuracy of guessing (None where it is not a
    choice), "prompts_sha256": hash of all prompts and targets}.
    """
    from lm_eval import simple_evaluate  # noqa: PLC0415

    suite = suite_files()
    # lm-eval notes the commit of the directory that one stands in; outside a repository git complains in our bars
    with _quiet(), patch("lm_eval.evaluator.get_git_commit_hash", lambda: None, create=True):
        found = simple_evaluate(
            model=lm,
            tasks=[suite_config(name) if name in suite else name for name in settings.names],
            limit=settings.limit,
            num_fewshot=settings.num_fewshot,
            apply_chat_template=settings.apply_chat_template,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=_manager(all(name in suite for name in settings.names)),
        )
    return {task: _answers(found["results"][task], samples) for task, samples in found["samples"].items()}


def _answers(metrics: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    first = {sample["filter"] for sample in samples[:1]}
    rows = sorted((s for s in samples if s["filter"] in first), key=lambda s: s["doc_id"])
    names = [n for n in BINARY_METRICS if n in rows[0] and all(float(r[n]) in (0.0, 1.0) for r in rows)]
    digest = hashlib.sha256("".join(r["prompt_hash"] + r["target_hash"] for r in rows).encode())
    return {
        "metrics": {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)},
        "metric": names[0] if names else None,
        "right": [int(r[names[0]]) for r in rows] if names else None,
        "items": len(rows),
        "chance": sum(1 / len(r["resps"]) for r in rows) / len(rows) if len(rows[0]["resps"]) > 1 else None,
        "prompts_sha256": digest.hexdigest(),
    }


def right_answers(results: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return {task: bool [n]} of the tasks whose items are right or wrong."""
    return {
        task: np.array(found["right"], dtype=bool) for task, found in results.items() if found["right"] is not None
    }


def task_model(
    checkpoint: Any,
    tokenizer: Any,
    *,
    dtype: torch.dtype,
    answers: Path | None,
    load_model: Callable[[], Any] | None,
    on_layer: Callable[[], None],
    on_blocks: Callable[[int], None] = lambda count: None,
    device: str = "cpu",
) -> Any:
    """Return a checkpoint as an lm-eval model; `answers` is the file that keeps what was computed.

    `device` is where log-probabilities are computed; `load_model` decides where text is generated.
    """
    _need_lm_eval()
    from gptoss_quantize.eval.lm import Answers, StreamedLM  # noqa: PLC0415

    lm = StreamedLM(
        checkpoint,
        tokenizer,
        dtype=dtype,
        answers=Answers(answers),
        load_model=load_model,
        on_layer=on_layer,
        on_blocks=on_blocks,
    )
    lm.source = placed(checkpoint, device)
    return lm
