"""Any number of checkpoints against their baseline on one text: perplexity, divergence and agreement."""

import time
from collections.abc import Mapping
from typing import Any

import torch

from gptoss_quantize.calibration.sanity import suspicion
from gptoss_quantize.calibration.text import TextSpec, load_tokenizer, load_tokens
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval.divergence import evaluate
from gptoss_quantize.eval.identity import pair_warnings
from gptoss_quantize.progress import Progress, counter, silent


def fidelity(
    baseline: Checkpoint,
    candidates: Mapping[str, Checkpoint],
    text: TextSpec,
    dtype: torch.dtype,
    progress: Progress = silent,
    device: str = "cpu",
) -> dict[str, Any]:
    """Return {"text", "suspect", "warnings", "dtype", "device", "seconds", "results": {name: summary}}.

    All candidates are measured on the baseline's tokens; `device` is where the models run.
    """
    tokenizer = load_tokenizer(baseline.side)
    tokens = load_tokens(text, tokenizer)
    for name, candidate in candidates.items():
        if load_tokenizer(candidate.side).get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"{name}: its tokenizer differs from the baseline's, and the same text is not the same tokens: copy "
                "tokenizer.json from the model that it was made from"
            )
    started = time.perf_counter()
    step = counter(progress, "evaluate: layer", baseline.config.layers * (1 + len(candidates)))
    results = evaluate(baseline, list(candidates.values()), tokens.ids, dtype, step, device)
    first = results[0]
    suspect = suspicion(first["baseline_perplexity"], first["tokens"], baseline.config.vocab)
    warnings = [words for name, candidate in candidates.items() for words in pair_warnings(baseline, candidate, name)]
    return {
        "text": tokens.record(),
        "suspect": suspect,
        "warnings": warnings + ([f"baseline {baseline.path}: SUSPECT: {suspect}"] if suspect else []),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "seconds": round(time.perf_counter() - started, 1),
        "results": dict(zip(candidates, results, strict=True)),
    }
