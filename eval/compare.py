"""Any number of checkpoints against their baseline: texts, tasks, experts, cost, examples; one record for a report.

Everything that takes time is kept in `DEST/cache/VERSION/MODEL/`, MODEL being the hash of the checkpoint's content,
under a name that says what it depends on (text, tasks, dtype, baseline). A run that was interrupted, or that has one
more candidate, computes what is missing. Tasks keep their answers block by block, the rest is kept when whole.
Models are streamed one after the other; at most the two that are compared layer by layer are open at the same time,
one layer each, so memory is that of quantizing.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from gptoss_quantize import __version__
from gptoss_quantize.calibration.sanity import suspicion
from gptoss_quantize.calibration.text import TextSpec, load_tokenizer
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval.divergence import PerToken, check_pair, compare_states, details, heads, summarize
from gptoss_quantize.eval.examples import EXAMPLE, answer, load_model, too_large
from gptoss_quantize.eval.experts import compare_experts
from gptoss_quantize.eval.identity import check_kinship, cost, fingerprint, pair_warnings
from gptoss_quantize.eval.paired import compare_answers, fallen
from gptoss_quantize.eval.tasks import TaskSettings, check_tasks, load_tasks, right_answers, run_tasks, task_model
from gptoss_quantize.eval.texts import Text, load_text
from gptoss_quantize.eval.trees import lay_out, predicting_states
from gptoss_quantize.eval.verdict import fell, furthest, judge, measured, sentence
from gptoss_quantize.files import write_json
from gptoss_quantize.machine import peak_rss_mib
from gptoss_quantize.source import Source, placed

SCHEMA = 1
# start(what, steps) tells that work begins and returns the function to call after each step
Start = Callable[[str, int], Callable[[], None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is compared, and how."""

    texts: tuple[TextSpec, ...]
    tasks: TaskSettings | None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"  # of texts, experts and tasks that choose; whole models (examples) are on the processor
    expert_tokens: int = 2048  # of the first text; 0 leaves the experts out
    noise_floor: bool = True
    prompts: tuple[str, ...] = ()
    new_tokens: int = 40
    margin: float = 0.02  # of accuracy, for the verdict


@dataclass(slots=True)
class Model:
    """One checkpoint, its name in the report, its hash, where its results are kept, and on which device it runs."""

    name: str
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    sha256: str
    cache: Path
    device: str = "cpu"

    @property
    def source(self) -> Source:
        """The checkpoint with its tensors on the device."""
        return placed(self.checkpoint, self.device)

    @property
    def kind(self) -> tuple[str, ...]:
        """What the kind of device adds to the keys of results: a card rounds differently."""
        return () if self.device == "cpu" else (self.device.partition(":")[0],)

    def kept(self, kind: str, *key: Any) -> Path:
        """Return the file of a result that depends on `key` and this model."""
        return self.cache / f"{kind}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"


def _quiet(what: str, steps: int) -> Callable[[], None]:
    return lambda: None


def remembered(path: Path, make: Callable[[], Any]) -> Any:
    """Return the JSON value kept in a file, or make it and keep it, with the seconds that it took."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    started = time.perf_counter()
    value = {"value": make(), "seconds": round(time.perf_counter() - started, 2)}
    write_json(path, value)
    # as it will be read next time: keys are strings, tuples are lists
    return json.loads(json.dumps(value))


def _keep_array(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the array kept in a file, or make and keep it."""
    path = path.with_suffix(".npy")
    if not path.exists():
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, make())
        temporary.replace(path)
    return np.asarray(np.load(path))


def open_models(
    baseline: Checkpoint, candidates: Mapping[str, Checkpoint], dest: Path, device: str = "cpu"
) -> list[Model]:
    """Return the models, baseline first, after every check that needs no computation; InputError names the misfit."""
    if not candidates:
        raise InputError("no candidate; expected at least one checkpoint to compare with the baseline")
    models: list[Model] = []
    vocabulary = None
    for name, checkpoint in {"baseline": baseline, **candidates}.items():
        tokenizer = load_tokenizer(checkpoint.side)
        own = tokenizer.get_vocab()
        if vocabulary is None:
            vocabulary = own
        elif own != vocabulary:
            differing = len(own.items() ^ vocabulary.items())
            raise InputError(
                f"{checkpoint.path}: its tokenizer differs from the baseline's in {differing} entries; the same text "
                "would be other tokens: copy tokenizer.json from the model that it was made from"
            )
        check_pair(baseline, checkpoint, torch.zeros(1, 1, dtype=torch.int64))
        check_kinship(baseline, checkpoint)
        sha256 = fingerprint(checkpoint)
        cache = dest / "cache" / __version__ / sha256[:16]
        cache.mkdir(parents=True, exist_ok=True)
        models.append(Model(name, checkpoint, tokenizer, sha256, cache, device))
    return models


def _states(model: Model, text: Text, dtype: torch.dtype, start: Start) -> torch.Tensor:
    """Return the predicting hidden states [P, D] of a model on a text, kept on disk."""
    what = f"{model.name}: text in {str(dtype).removeprefix('torch.')}"

    def run() -> np.ndarray:
        step = start(what, model.checkpoint.config.layers)
        return np.asarray(predicting_states(model.source, text.layout(), dtype, step).cpu().numpy())

    return torch.from_numpy(_keep_array(model.kept("states", text.sha256, str(dtype), *model.kind), run))


def token_level(base: Model, model: Model, text: Text, dtypes: tuple[torch.dtype, torch.dtype], start: Start) -> Any:
    """Return {"value": {"text", "summary", "details"}, "seconds"} of a model (second dtype) against the baseline."""
    layout = text.layout()

    def run() -> dict[str, Any]:
        states = [_states(m, text, dtype, start) for m, dtype in zip((base, model), dtypes, strict=True)]
        ours, theirs = heads(base.source, [model.source], list(dtypes))
        (tokens,) = compare_states(states[0], ours, [(states[1], theirs)], layout.target)
        return token_values(text, tokens, layout.owner)

    key = (base.sha256, text.sha256, *map(str, dtypes), *model.kind)
    return remembered(model.kept("tokens", *key), run)


def token_values(text: Text, tokens: PerToken, owner: torch.Tensor) -> dict[str, Any]:
    """Return what the report says about a model on one text."""
    return {"text": text.record(), "summary": summarize(tokens, owner), "details": details(tokens, owner)}


def task_level(model: Model, settings: TaskSettings, dtype: torch.dtype, start: Start) -> Any:
    """Return {"value": {task: results of `tasks.run_tasks`}, "seconds"}; answers are kept block by block."""

    def run() -> dict[str, Any]:
        lm = task_model(
            model.checkpoint,
            model.tokenizer,
            dtype=dtype,
            answers=model.cache / f"answers-{'-'.join((str(dtype).removeprefix('torch.'), *model.kind))}.jsonl",
            device=model.device,
            load_model=lambda: load_model(model.checkpoint, dtype),
            on_layer=lambda: None,
        )

        def begin(blocks: int) -> None:
            lm.on_layer = start(f"{model.name}: tasks", blocks * model.checkpoint.config.layers)

        lm.on_blocks = begin
        return run_tasks(lm, settings)

    return remembered(model.kept("tasks", asdict(settings), str(dtype), *model.kind), run)


def expert_level(
    base: Model, models: list[Model], text: Text, settings: Settings, start: Start
) -> dict[str, dict[str, Any]]:
    """Return {model: {"value": layers of `experts.compare_experts`, "seconds"}} on the first tokens of a text."""
    chosen, have = [], 0
    for tree in text.trees:
        if have and have + len(tree) > settings.expert_tokens:
            break
        chosen.append(tree)
        have += len(tree)
    key = (base.sha256, text.sha256, len(chosen), str(settings.dtype), *base.kind)
    missing = [model for model in models if not model.kept("experts", *key).exists()]
    if missing:
        step = start("experts, layer by layer", base.checkpoint.config.layers)
        started = time.perf_counter()
        layers = compare_experts(
            base.source, [model.source for model in missing], lay_out(chosen), settings.dtype, step
        )
        seconds = round((time.perf_counter() - started) / len(missing), 2)
        for model, entry in zip(missing, layers, strict=True):
            write_json(model.kept("experts", *key), {"value": entry, "seconds": seconds, "tokens": have})
    return {model.name: json.loads(model.kept("experts", *key).read_text(encoding="utf-8")) for model in models}


def example_level(model: Model, settings: Settings, start: Start) -> Any:
    """Return {"value": answers of `examples.answer`, "seconds", and "left_out": why there are none}."""
    kept = model.kept("examples", settings.prompts, settings.new_tokens, EXAMPLE.settings(), EXAMPLE.seed)
    reason = None
    if not settings.prompts:
        reason = "not asked for"
    elif not kept.exists():
        reason = too_large(model.checkpoint)
    if reason is not None:
        return {"value": [], "seconds": 0.0, "left_out": reason}

    def run() -> list[dict[str, Any]]:
        step = start(f"{model.name}: example answers", 1)
        found = answer(
            load_model(model.checkpoint, torch.bfloat16), model.tokenizer, settings.prompts, settings.new_tokens
        )
        step()
        return found

    return remembered(kept, run) | {"left_out": None}


def _paired(base: dict[str, Any], found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return (entry per task, comparison over all items of all tasks or None) from two runs of the same tasks."""
    ours, theirs = right_answers(base), right_answers(found)
    entries = {}
    for task, entry in found.items():
        if entry["prompts_sha256"] != base[task]["prompts_sha256"]:
            raise InputError(
                f"task {task}: its prompts differ between baseline and candidate, so their items cannot be paired; "
                "the checkpoints have different chat templates: give them the same chat_template.jinja"
            )
        paired = compare_answers({task: ours[task]}, {task: theirs[task]}) if task in ours else None
        entries[task] = {**entry, "right": _bits(entry["right"]), "paired": paired}
    return entries, compare_answers(ours, theirs) if ours else None


def suspect_texts(texts: list[dict[str, Any]], vocab: int) -> str | None:
    """Return why a baseline is suspect by its perplexity on raw text and on conversations, None where it is not."""
    found: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for text in texts:
        kind, value = text["text"]["kind"], text["summary"]["baseline_perplexity"]
        if value >= found.get(kind, 0):
            found[kind], tokens[kind] = value, text["summary"]["tokens"]
    return suspicion(found.get("raw"), tokens.get("raw", 0), vocab, chat=found.get("chat"))


def _bits(right: list[int] | None) -> str | None:
    """Return answers as a string of 0 and 1."""
    return None if right is None else "".join(map(str, right))


def _chance(results: dict[str, Any]) -> float | None:
    """Return the accuracy of guessing over all items, None where a task does not say."""
    known = [(entry["chance"], entry["items"]) for entry in results.values() if entry["right"] is not None]
    if not known or any(chance is None for chance, _ in known):
        return None
    return sum(chance * items for chance, items in known) / sum(items for _, items in known)


def compare(
    baseline: Checkpoint,
    candidates: Mapping[str, Checkpoint],
    settings: Settings,
    dest: Path,
    start: Start = _quiet,
) -> dict[str, Any]:
    """Return the record of a comparison (docs/report-json.md); results are kept below `dest` as they come.

    InputError, before any computation, for a candidate that is not the baseline's, for a text or task that cannot
    be had, and for a text that is not in the model's vocabulary.
    """
    started = time.perf_counter()
    models = open_models(baseline, candidates, dest, settings.device)
    base, others = models[0], models[1:]
    warnings = [words for model in others for words in pair_warnings(baseline, model.checkpoint, model.name)]
    texts = [load_text(spec, base.tokenizer, baseline.config.max_positions) for spec in settings.texts]
    for text in texts:
        check_pair(baseline, baseline, text.layout().ids[None])
    if settings.tasks is not None:
        check_tasks(load_tasks(settings.tasks), settings.tasks, base.tokenizer.chat_template is not None)
    dtype = settings.dtype
    noise: list[Any] = []
    if settings.noise_floor:
        other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
        noise = [token_level(base, base, text, (dtype, other), start) for text in texts]
    tokens = {m.name: [token_level(base, m, text, (dtype, dtype), start) for text in texts] for m in models}
    tasks = {m.name: task_level(m, settings.tasks, dtype, start) for m in models} if settings.tasks else {}
    experts: dict[str, dict[str, Any]] = {}
    if settings.expert_tokens and texts:
        experts = expert_level(base, others, texts[0], settings, start)
    examples = {m.name: example_level(m, settings, start) for m in models}
    entries = [_entry(m, tokens[m.name], tasks.get(m.name), experts.get(m.name), examples[m.name]) for m in models]
    base_tasks = tasks[base.name]["value"] if tasks else {}
    for entry in entries[1:]:
        entry["tasks"], entry["tasks_overall"] = _paired(base_tasks, entry["tasks"])
        level, reasons = judge(furthest(entry["texts"]), entry["tasks_overall"], settings.margin, _chance(base_tasks))
        pairs = {task: found["paired"] for task, found in entry["tasks"].items() if found["paired"] is not None}
        entry["tasks_fallen"] = fallen(pairs)
        alarms = [words] if (words := fell(entry["tasks_fallen"])) else []
        entry["verdict"] = {"level": level, "reasons": reasons, "alarms": alarms}
        entry["verdict"] |= {
            "measured": measured(entry, settings.margin),
            "sentence": sentence(entry, settings.margin),
        }
    for found in entries[0]["tasks"].values():
        found["right"] = _bits(found["right"])
    suspect = suspect_texts(entries[0]["texts"], baseline.config.vocab)
    return {
        "schema": SCHEMA,
        "version": __version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": _settings(settings),
        "baseline": entries[0],
        "candidates": entries[1:],
        "noise_floor": [entry["value"] for entry in noise],
        "noise_floor_dtypes": [str(dtype).removeprefix("torch."), "bfloat16 and float32 products, same weights"],
        "chance": _chance(base_tasks),
        "suspect": suspect,
        "warnings": warnings + ([f"baseline {baseline.path}: SUSPECT: {suspect}"] if suspect else []),
        "seconds": round(time.perf_counter() - started, 1),
        "machine": _machine(settings.device),
    }


def _entry(model: Model, tokens: list[Any], tasks: Any, experts: Any, examples: Any) -> dict[str, Any]:
    """Return one model's part of the record."""
    return {
        "name": model.name,
        "path": str(model.checkpoint.path),
        "sha256": model.sha256,
        "cost": cost(model.checkpoint),
        "texts": [entry["value"] for entry in tokens],
        "tasks": {} if tasks is None else tasks["value"],
        "tasks_overall": None,
        "tasks_fallen": [],
        "experts": None if experts is None else {"tokens": experts["tokens"], "layers": experts["value"]},
        "examples": examples["value"],
        "examples_left_out": examples["left_out"],
        "seconds": {
            "texts": sum(entry["seconds"] for entry in tokens),
            "tasks": 0.0 if tasks is None else tasks["seconds"],
            "experts": 0.0 if experts is None else experts["seconds"],
            "examples": examples["seconds"],
        },
    }


def _settings(settings: Settings) -> dict[str, Any]:
    """Return the settings as JSON has them."""
    return {
        "texts": [asdict(spec) for spec in settings.texts],
        "tasks": None if settings.tasks is None else asdict(settings.tasks),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "device": settings.device,
        "expert_tokens": settings.expert_tokens,
        "noise_floor": settings.noise_floor,
        "prompts": list(settings.prompts),
        "sampling": asdict(EXAMPLE),
        "new_tokens": settings.new_tokens,
        "margin": settings.margin,
    }


def _machine(device: str) -> dict[str, Any]:
    """Return where this was measured."""
    return {
        "card": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "peak_rss_mib": peak_rss_mib(),
    }
