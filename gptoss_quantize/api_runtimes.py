"""The public functions about runtimes: export, import, verify. `api` has all of them."""

from collections.abc import Sequence
from pathlib import Path

from gptoss_quantize import progress as steps
from gptoss_quantize.api_inputs import Place, Show, at_least, known, open_checkpoint, tell_notes, words
from gptoss_quantize.calibration.text import TextSpec, load_tokenizer, load_tokens
from gptoss_quantize.hub import resolve
from gptoss_quantize.prompts import check_ids
from gptoss_quantize.results import Verification, Written
from gptoss_quantize.runtimes import exports, imports
from gptoss_quantize.runtimes import verify as verification
from gptoss_quantize.runtimes.check_file import check_file
from gptoss_quantize.runtimes.export_gguf import TYPES as GGUF_TYPES
from gptoss_quantize.terminal import showing


def export(
    checkpoint: Place,
    out: Place,
    to: str = "gguf",
    *,
    dtype: str = "bfloat16",
    dense_type: str = "stored",
    expert_type: str = "stored",
    overwrite: bool = False,
    progress: Show = None,
) -> Written:
    """Write a checkpoint in another runtime's format, read it back and compare, bit for bit.

    Args:
        checkpoint: an int4 or MXFP4 checkpoint, or any gpt-oss directory or hub name.
        out: the directory to write; it must not exist, or be empty.
        to: gguf (llama.cpp, Ollama, LM Studio), bf16 (loads everywhere), mxfp4, autogptq, autogptq-v2 or autoawq.
        dtype: with bf16, that of the experts: bfloat16, float16 (exact) or float32.
        dense_type: with gguf, the type of attention, embedding and head: stored, bf16, f32 or q8_0.
        expert_type: the same for the experts; stored keeps codes and scales.
        overwrite: replace an earlier export at `out`.
    """
    known("--to", to, exports.WRITERS)
    known("--dtype", dtype, exports.FLOATS)
    for option, kind in (("--dense-type", dense_type), ("--expert-type", expert_type)):
        known(option, kind, GGUF_TYPES)
    with showing(progress) as show:
        report = exports.export_checkpoint(
            open_checkpoint(checkpoint),
            Path(out),
            to,
            dtype=dtype,
            dense_type=dense_type,
            expert_type=expert_type,
            overwrite=overwrite,
            progress=steps.phases(show),
        )
    return Written(Path(out), report)


def import_checkpoint(
    source: Place,
    out: Place,
    to: str = "int4",
    *,
    split: str = "detect",
    text: Place = "heldout",
    tokens: int = 1024,
    overwrite: bool = False,
    progress: Show = None,
) -> Written:
    """Rescue another tool's int4 checkpoint: find out which rows are the gate, and write it in our layout.

    Args:
        source: int4 gpt-oss of GPTQModel, llm-compressor, AutoRound, AutoAWQ, a directory or hub name.
        out: the directory to write; it must not exist, or be empty.
        to: int4 (ours, no rounding), or bf16, which also holds asymmetric codes.
        split: which rows gate_proj is: interleaved (the even ones), halves (the first half), or detect.
        text: what settles the split: heldout, a .txt, .jsonl or .parquet file, or hf:NAME.
        tokens: how many tokens of it.
        overwrite: replace an earlier import at `out`.
    """
    known("--to", to, ("int4", "bf16"))
    known("--split", split, ("detect", *imports.SPLITS))
    path = resolve(str(source))
    with showing(progress) as show:
        start = steps.phases(show)
        if split == "detect":
            spec = TextSpec(source=str(text), tokens=tokens, seq_len=128, shuffle=False)
            ids = load_tokens(spec, load_tokenizer(path)).ids
            decision = imports.detect_split(path, ids, start("likelihood under both readings: layer"))
        else:
            decision = {"split": split, "because": "--split", "metadata": None, "nll": None}
        on_shard = start("write: shard")
        report = imports.import_checkpoint(path, Path(out), decision, to=to, overwrite=overwrite, on_shard=on_shard)
    return Written(Path(out), report)


def verify(
    checkpoint: Place,
    baseline: Place | None = None,
    *,
    runtimes: str | Sequence[str] = verification.RUNTIMES,
    text: Place = "heldout",
    sequences: int = 4,
    seq_len: int = 256,
    positions: int = 16,
    llama_server: Place | None = None,
    exact: bool = False,
    work: Place | None = None,
    progress: Show = None,
) -> Verification:
    """Load a checkpoint in each runtime installed here and compare its predictions with ours.

    Args:
        checkpoint: int4, MXFP4 or float, a directory or hub name.
        baseline: the unquantized model, which shows each runtime's own noise; without it nothing is judged.
        runtimes: transformers, llama.cpp, vllm; one, several, or with commas between.
        text: heldout, a .txt, .jsonl or .parquet file, or hf:NAME.
        sequences: sequences of text, of `seq_len` tokens each.
        positions: positions compared in each, spread evenly, the last included.
        llama_server: a llama-server binary, instead of xllamacpp.
        exact: compare llama.cpp on F32 files too: nothing rounded, 4 bytes a weight.
        work: a directory for temporary exports, deleted at the end.
    """
    at_least(1, sequences=sequences, positions=positions)
    names = words(runtimes)
    for name in names:
        known("--runtime", name, verification.RUNTIMES)
    opened = open_checkpoint(checkpoint)
    tell_notes(progress, opened)
    tokenizer = load_tokenizer(opened.side)
    spec = TextSpec(source=str(text), tokens=sequences * seq_len, seq_len=seq_len, shuffle=False)
    ids = load_tokens(spec, tokenizer).ids
    check_ids(ids, opened.config.vocab, f"{checkpoint}: the text")
    with showing(progress) as show:
        asked = verification.VerifyRequest(
            checkpoint=opened,
            baseline=None if baseline is None else open_checkpoint(baseline),
            ids=ids,
            positions=verification.spread(seq_len, min(positions, seq_len)),
            texts=[str(tokenizer.decode(row)) for row in ids],
            work=None if work is None else Path(work),
            llama_server=None if llama_server is None else Path(llama_server),
            exact=exact,
            progress=steps.phases(show),
        )
        rows = [*check_file(asked), *verification.verify(asked, tuple(names))]
        return Verification([row.record() for row in rows])
