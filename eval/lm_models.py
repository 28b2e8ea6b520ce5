"""Our models under lm-eval's own command line: `gptoss-int4` whole in memory, `gptoss-streamed` layer by layer.

`gptoss-int4` is lm-eval's `hf` model on what our loader makes of a directory or hub name: int4 experts stay packed,
bf16 and MXFP4 directories are read as everywhere here, an adapter is merged. Batches, truncation and generation are
lm-eval's. `gptoss-streamed` is what `compare` runs: one layer in memory at a time, contexts shared by their answers.
Both see chat templates on the fixed date of `calibration.chat`, so the same item is the same tokens every day.

lm-eval 0.4.13 has no plug-ins: `register` must have been called, which `python -m gptoss_quantize.lm_eval` does.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models import MODEL_MAPPING
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from gptoss_quantize.adapter import Adapter
from gptoss_quantize.calibration.text import FIXED_DATE, load_tokenizer
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval.examples import load_model, too_large
from gptoss_quantize.eval.lm import Answer, Pair, StreamedLM
from gptoss_quantize.hub import resolve
from gptoss_quantize.machine import compute_dtype, fitting, pick_device
from gptoss_quantize.source import placed

log = logging.getLogger("lm_eval")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# what lm-eval's `hf` model does with a model that is loaded already; all else that it knows would be ignored there
PASSED_ON = (
    "max_batch_size", "max_length", "truncation", "logits_cache", "add_bos_token", "prefix_token_id", "softmax_dtype",
    "think_end_token", "enable_thinking", "chat_template_args",
)  # fmt: skip
OURS = ("pretrained", "revision", "peft", "dtype", "device", "batch_size")


def _check_options(given: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raise InputError for a model argument that would have no effect."""
    # lm-eval's command line adds this one by itself
    given.pop("trust_remote_code", None)
    if unknown := sorted(given.keys() - set(known)):
        raise InputError(
            f"--model_args {unknown[0]}: not known here; expected {', '.join((*OURS, *known))}. For lm-eval's own "
            "loaders take --model hf, which reads no int4 of ours"
        )


def _open(pretrained: str, revision: str | None, peft: str | None) -> Checkpoint:
    return Checkpoint(resolve(str(pretrained), revision), None if peft is None else Adapter.open(Path(peft)))


def _dtype(name: str, device: str) -> torch.dtype:
    if name not in {"auto", *DTYPES}:
        raise InputError(f"--model_args dtype={name}: expected auto, {', '.join(DTYPES)}")
    return DTYPES.get(name) or compute_dtype(device)


def _fixed(template: Any) -> Any:
    """Return a chat template (or several by name) that takes its date from us."""
    if isinstance(template, dict):
        return {name: _fixed(text) for name, text in template.items()}
    return FIXED_DATE + template if isinstance(template, str) and "strftime_now" in template else template


def _info(checkpoint: Checkpoint, dtype: torch.dtype, revision: str | None) -> dict[str, Any]:
    """Return what lm-eval writes beside its results."""
    return {
        "model_num_parameters": sum(int(torch.Size(shape).numel()) for shape in checkpoint.shapes().values()),
        "model_dtype": dtype,
        "model_revision": revision or "main",
        # a snapshot of the hub's cache is named by its commit
        "model_sha": checkpoint.path.name if checkpoint.path.parent.name == "snapshots" else "",
        "model_experts": checkpoint.expert_format,
    }


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep lm-eval from warning that a loaded model was given to it: that is the point."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


class _Ours(TemplateLM):
    """What both models add: a missing template is refused, a forgotten one told, and who they are."""

    tokenizer: Any
    where: Path
    rendered = False
    _facts: dict[str, Any]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template that is applied; InputError where there is none."""
        if chat_template:
            self._check_template()
        return super().chat_template(chat_template)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return generated texts."""
        self._check_generation()
        return list(super().generate_until(requests, disable_tqdm=disable_tqdm))

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes beside its results."""
        return self._facts

    def _check_template(self) -> None:
        self.rendered = True
        if self.tokenizer.chat_template is None:
            raise InputError(
                f"{self.where}: its tokenizer has no chat template; put the model's chat_template.jinja beside "
                "tokenizer.json, or leave --apply_chat_template out"
            )

    def _check_generation(self) -> None:
        if not self.rendered and self.tokenizer.chat_template is not None:
            log.warning(
                "%s is a chat model, and generates text outside its chat template: add --apply_chat_template "
                "(GSM8K of gpt-oss-20b: 0.30 without, 0.90 with)",
                self.where,
            )


class PackedLM(_Ours, HFLM):
    """lm-eval's `hf` model on a checkpoint as our loader makes it, whole in memory.

    `pretrained`: a directory or hub name: int4 of ours (experts stay packed), bf16, fp16, fp32 or MXFP4 (become
    `dtype`). `peft`: a LoRA adapter of a float or MXFP4 one. `dtype`: auto is what the device multiplies fastest.
    InputError for what cannot be loaded, does not fit into memory, or an option without effect.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        peft: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        **options: Any,
    ):
        _check_options(options, PASSED_ON)
        place = pick_device(device or "auto")
        products = _dtype(dtype, place)
        checkpoint = _open(pretrained, revision, peft)
        if why := too_large(checkpoint, share=1.0, itemsize=products.itemsize):
            raise InputError(f"{checkpoint.path}: {why}; run it layer by layer (--model gptoss-streamed)")
        tokenizer = load_tokenizer(checkpoint.side)
        tokenizer.chat_template = _fixed(tokenizer.chat_template)
        model = load_model(checkpoint, products).to(place)
        self.where, self._facts = checkpoint.path, _info(checkpoint, products, revision)
        with _without_warnings():
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **options)


class StreamedModel(_Ours, StreamedLM):
    """What `compare` runs, as a model of lm-eval: layer by layer on a device, text generated whole on the processor.

    `batch_size` is that of generation; log-probabilities are computed in blocks of 32,768 tokens. dtype auto is
    float32, as in `compare`.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        peft: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        **options: Any,
    ):
        _check_options(options, ())
        place = pick_device(device or "auto")
        checkpoint = _open(pretrained, revision, peft)
        products = torch.float32 if dtype == "auto" else _dtype(dtype, place)
        self.where, self._facts = checkpoint.path, _info(checkpoint, products, revision)
        super().__init__(
            checkpoint,
            load_tokenizer(checkpoint.side),
            dtype=products,
            load_model=self._whole,
            batch_size=batch_size,
            on_layer=self._step,
            on_blocks=self._begin,
        )
        self.source, self._place = placed(checkpoint, place), place
        self._bar: Any = None

    def score(self, pairs: list[Pair]) -> list[Answer]:
        """Return (log-probability, greedy) per pair; InputError where a layer does not fit on the card."""
        with fitting(self._place, "take dtype=bfloat16 in --model_args"):
            return super().score(pairs)

    def _whole(self) -> Any:
        if why := too_large(self.checkpoint, share=1.0, itemsize=self.dtype.itemsize):
            raise InputError(f"{self.where}: a task generates text, which needs the whole model, and it {why}")
        return load_model(self.checkpoint, self.dtype)

    def _begin(self, blocks: int) -> None:
        self._bar = tqdm(total=blocks * self.checkpoint.config.layers, desc="layers", file=sys.stderr)

    def _step(self) -> None:
        self._bar.update()
        if self._bar.n == self._bar.total:
            self._bar.close()


MODELS: dict[str, Callable[..., Any]] = {"gptoss-int4": PackedLM, "gptoss-streamed": StreamedModel}


def register() -> None:
    """Make `lm_eval.simple_evaluate(model="gptoss-int4", ...)` and lm-eval's command line find our models."""
    # lm-eval registers its own only while none is registered
    assert MODEL_MAPPING
    for name, model in MODELS.items():
        model_registry.register(name, target=model)
