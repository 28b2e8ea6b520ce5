"""The demo: make a real model, quantize it by every method, measure, let it answer. Also models to measure with."""

import gzip
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptoss_quantize import api
from gptoss_quantize.api_talk import speak
from gptoss_quantize.calibration.sources import default_calibration_path
from gptoss_quantize.demo.model import build_demo_model
from gptoss_quantize.demo.synthetic import build_synthetic_model
from gptoss_quantize.errors import InputError
from gptoss_quantize.files import MARK, alone, check_dest, put_mark, read_mark, remove, write_json
from gptoss_quantize.progress import Progress, phases, silent

COMMAND = "demo"
RESULTS = "demo.json"
PROMPT = "What is the capital of France, and what is it known for?"
# the longest answer in tokens
ANSWER = 48


def make_demo_model(
    dest: Path,
    *,
    experts: int,
    experts_per_token: int,
    seed: int,
    wheel: Path | None,
    mxfp4: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the demo model and return facts about it."""
    return build_demo_model(
        dest,
        sample_text=sample_text(),
        experts=experts,
        experts_per_token=experts_per_token,
        seed=seed,
        wheel=wheel,
        mxfp4=mxfp4,
        progress=phases(progress)("demo model: layer"),
    )


def make_synthetic_model(
    dest: Path, *, like: str, layers: int | None, seed: int, progress: Progress = silent
) -> dict[str, Any]:
    """Write a model of true shape with random weights and return facts about it."""
    show = phases(progress)(f"synthetic {like}: layer")
    return build_synthetic_model(dest, like=like, sample_text=sample_text(), layers=layers, seed=seed, progress=show)


def sample_text() -> str:
    """Return the packaged calibration text as one string."""
    with gzip.open(default_calibration_path(), "rt", encoding="utf-8") as file:
        return "\n\n".join(json.loads(line)["text"] for line in file)


def claim(out: Path, folders: Sequence[str], *, overwrite: bool) -> None:
    """Make OUT an empty directory with our mark, which names all that the demo is going to put there.

    InputError, and nothing deleted, for a directory that holds anything: with `overwrite` an earlier demo gives way,
    if nothing else is in it.
    """
    check_dest(out, overwrite=overwrite)
    if out.is_dir() and any(out.iterdir()):
        if (read_mark(out) or {}).get("command") != COMMAND:
            raise InputError(f"{out}: was not written by `demo`, which does not replace it; choose another directory")
        with alone(out):
            remove(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be created ({error}); choose another place to write to") from None
    # an interrupted demo leaves what it was at unfinished, which is ours too
    unfinished = [f"{name}.partial" for name in folders]
    put_mark(out, COMMAND, files=[RESULTS, RESULTS + ".tmp", MARK], folders=[*folders, *unfinished])


def run_demo(
    out: Path,
    *,
    methods: Sequence[str],
    tokens: int,
    eval_tokens: int,
    experts: int,
    wheel: Path | None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Make the demo model, quantize it by every method, evaluate all against it; store one record and return it."""
    started = time.perf_counter()
    made = {method: out / f"int4-{method}" for method in methods}
    model = out / "model"
    claim(out, [model.name, *(path.name for path in made.values())], overwrite=overwrite)
    with alone(out):
        facts = make_demo_model(model, experts=experts, experts_per_token=2, seed=0, wheel=wheel, progress=progress)
        reports = {
            method: api.quantize(model, path, method, tokens=tokens, progress=progress).report
            for method, path in made.items()
        }
        record = api.evaluate(made, model, tokens=eval_tokens, progress=progress).report
        best = min(methods, key=lambda name: record["results"][name]["kl_mean"])
        said = {
            name: speak(path, PROMPT, ANSWER, on=("cpu", "auto"))
            for name, path in (("unquantized", model), (best, made[best]))
        }
        record |= {
            "demo_model": facts,
            "reports": reports,
            "answers": {name: answer.text for name, answer in said.items()},
            # of the first answer of a model just loaded, without the reading of the question
            "tokens_per_second": {name: answer.made.speed for name, answer in said.items()},
            "total_seconds": round(time.perf_counter() - started, 1),
        }
        write_json(out / RESULTS, record)
    return record
