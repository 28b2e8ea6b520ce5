"""The demo: make a real model, quantize it by every method, measure, let it answer. Also models to measure with.

It has two acts. The first takes the quickest method as far as numbers and an answer, so that there is something to
see while the second does the others and writes the report.
"""

import gzip
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from gptoss_quantize import api
from gptoss_quantize.calibration.sources import default_calibration_path
from gptoss_quantize.calibration.text import load_tokenizer
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.demo.model import build_demo_model
from gptoss_quantize.demo.synthetic import build_synthetic_model
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval.examples import PROMPTS, answer, load_model
from gptoss_quantize.eval.report import spoken, spoken_speed
from gptoss_quantize.files import MARK, alone, check_dest, put_mark, read_mark, remove, write_json
from gptoss_quantize.progress import Progress, phases, silent

COMMAND = "demo"
RESULTS = "demo.json"
REPORT = ("report.html", "report.json")
# of the first act: held-out tokens, and the longest answer
FIRST_TOKENS = 1024
FIRST_ANSWER = 64


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
    put_mark(out, COMMAND, files=[RESULTS, RESULTS + ".tmp", *REPORT, MARK], folders=[*folders, *unfinished])


def variant(name: str) -> tuple[str, str]:
    """Return (method, format) of a name in the demo's list: `gptq` is int4, `gptq-int3` three bits."""
    method, _, bits = name.partition("-int")
    return method, f"int{bits or 4}"


def folder(name: str) -> str:
    """Return the directory below OUT that holds what a name in the demo's list stands for."""
    method, number_format = variant(name)
    return f"{number_format}-{method}"


def _first_act(model: Path, name: str, made: Path, progress: Progress) -> dict[str, Any]:
    """Return {"method", "result", "prompt", "answers"} of the first checkpoint: few tokens, one question."""
    found = api.evaluate({name: made}, model, tokens=FIRST_TOKENS, progress=progress).report
    answers = {}
    for who, path in (("unquantized", model), (name, made)):
        speaker, tokenizer = load_model(Checkpoint(path), torch.bfloat16), load_tokenizer(path)
        (said,) = answer(speaker, tokenizer, PROMPTS[:1], FIRST_ANSWER)
        answers[who] = spoken(said, FIRST_ANSWER)
    return {"method": name, "result": found["results"][name], "prompt": PROMPTS[0], "answers": answers}


def run_demo(  # noqa: PLR0913
    out: Path,
    *,
    methods: Sequence[str],
    tokens: int,
    eval_tokens: int,
    experts: int,
    wheel: Path | None,
    overwrite: bool = False,
    progress: Progress = silent,
    first: Callable[[dict[str, Any]], object] = lambda act: None,
) -> dict[str, Any]:
    """Make the demo model, quantize it by every method, compare all with it; store one record and return it.

    `methods` are names as `variant` reads them, the quickest first: `first` is called with what it gave, long before
    the others are done. Beside the record, OUT gets the report of the comparison.
    """
    started = time.perf_counter()
    made = {name: out / folder(name) for name in methods}
    model = out / "model"
    claim(out, [model.name, *(path.name for path in made.values())], overwrite=overwrite)
    with alone(out):
        facts = make_demo_model(model, experts=experts, experts_per_token=2, seed=0, wheel=wheel, progress=progress)
        reports = {}
        for name, path in made.items():
            method, number_format = variant(name)
            reports[name] = api.quantize(model, path, method, number_format, tokens=tokens, progress=progress).report
            if len(reports) == 1:
                act = _first_act(model, name, path, progress)
                act["seconds"] = round(time.perf_counter() - started, 1)
                first(act)
        with TemporaryDirectory() as scratch:
            compared = api.compare(
                made,
                model,
                scratch,
                tasks="none",
                profile="quick",
                text_tokens=eval_tokens,
                expert_tokens=0,
                examples=len(PROMPTS),
                command=f"gptoss-quantize demo {out}",
                progress=progress,
            ).report
            for name in REPORT:
                shutil.copyfile(Path(scratch) / name, out / name)
        record = _record(compared) | {
            "demo_model": facts,
            "reports": reports,
            "first": act,
            "total_seconds": round(time.perf_counter() - started, 1),
        }
        write_json(out / RESULTS, record)
    return record


def _record(compared: dict[str, Any]) -> dict[str, Any]:
    """Return what the demo's table and its last words need of a comparison, and how it was made."""
    models = {"unquantized": compared["baseline"], **{found["name"]: found for found in compared["candidates"]}}
    longest = compared["settings"]["new_tokens"]
    return {
        "results": {found["name"]: found["texts"][0]["summary"] for found in compared["candidates"]},
        "answers": {
            name: {said["prompt"]: spoken(said, longest) for said in found["examples"]}
            for name, found in models.items()
        },
        # of the answers, from each one's first token to its last
        "tokens_per_second": {name: spoken_speed(found) for name, found in models.items()},
        "text": compared["baseline"]["texts"][0]["text"],
        **{key: compared[key] for key in ("version", "created", "settings", "machine", "warnings")},
    }
