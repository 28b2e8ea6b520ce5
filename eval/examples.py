"""A checkpoint loaded whole, asked, and its answers: of `generate` and `chat`, and the examples of a comparison."""

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from gptoss_quantize.calibration.text import render_chat
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.eval.whole import whole_model

LARGEST_SHARE = 0.5
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write two sentences about the sea.",
    "What is the difference between a dog and a wolf?",
)


def load_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Return the transformers model of a checkpoint, its adapter merged; our int4 experts stay packed in memory."""
    return whole_model(checkpoint, dtype)


def too_large(checkpoint: Checkpoint, share: float = LARGEST_SHARE, itemsize: int = 2) -> str | None:
    """Return why a checkpoint cannot be loaded whole, None where it fits a share (half) of the free memory.

    Everything else is streamed; only generation needs a whole model. Ours stay packed, others become dtypes of
    `itemsize` bytes.
    """
    shapes = checkpoint.shapes().values()
    parameters = sum(int(torch.Size(shape).numel()) for shape in shapes)
    stored = sum(path.stat().st_size for path in checkpoint.files())
    needed = stored if checkpoint.layout.packed else itemsize * parameters
    free = psutil.virtual_memory().available
    if needed <= share * free:
        return None
    return f"needs {needed / 2**30:.1f} GiB whole, {free / 2**30:.1f} GiB are free"


def ask(prompt: str, tokenizer: PreTrainedTokenizerBase, where: str, *, raw: bool) -> Any:
    """Return the inputs of a prompt, [1, S] each: a user's turn in the chat template, or plain text when `raw`.

    The template sees the fixed date of `calibration.text`, so the same prompt is the same tokens every day.
    """
    if raw:
        return tokenizer(prompt, return_tensors="pt")
    text = render_chat([{"role": "user", "content": prompt}], tokenizer, where, answer_next=True)
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else by chance."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int | None = None

    def settings(self) -> dict[str, Any]:
        """Return what transformers' generate calls it."""
        if not self.temperature:
            return {"do_sample": False}
        # all named: what is left out would come from the model's own configuration, or be a default of 50
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }


GREEDY = Sampling()
# of example answers: the likeliest token every time ends in loops with small models, which says little about either
EXAMPLE = Sampling(temperature=0.3, top_p=0.9, seed=0)


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model added to a prompt, and how fast."""

    ids: torch.Tensor  # [N], with the token that ended it
    read: int  # tokens of the prompt that the model had to read: those that were not in the cache
    read_seconds: float  # until the first token
    seconds: float  # from the first token to the last

    @property
    def read_speed(self) -> float:
        """Return the tokens per second of the prompt."""
        return self.read / self.read_seconds if self.read_seconds else 0.0

    @property
    def speed(self) -> float | None:
        """Return the tokens per second of the answer; None for an answer of one token, which takes no step."""
        return (len(self.ids) - 1) / self.seconds if len(self.ids) > 1 and self.seconds else None


class _EachToken(StoppingCriteria):
    """Hands each token on as soon as it is chosen, notes when, and stops where that says so.

    A streamer of transformers would be told later: after the decision whether to stop.
    """

    def __init__(self, on_token: Callable[[int], object]):
        self._on_token = on_token
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        token = int(input_ids[0, -1])
        self.times.append(time.perf_counter())
        stop = self._on_token(token) is True
        return torch.full((len(input_ids),), stop, dtype=torch.bool, device=input_ids.device)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw from a seed while it lasts, and leave the caller's random numbers as they were; nothing without one."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.inference_mode()
def continuation(
    model: Any,
    inputs: Any,
    new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    on_token: Callable[[int], object] = lambda token: None,
    cache: Any = None,
    stops: Sequence[int] = (),
) -> Continuation:
    """Return what a model adds to a prompt of [1, S] ids.

    `on_token` is called with each id at once; True ends the answer there. `cache` is a transformers cache of the
    prompt's first tokens, fewer than all, and holds all but the last token afterwards. `stops` are ids that end an
    answer beside those that the model names.
    """
    told, watched = model.generation_config, _EachToken(on_token)
    ends = told.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    # the keyword was renamed within the versions of transformers that we take
    keyword = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    extra: dict[str, Any] = {} if cache is None else {keyword: cache}
    if stops:
        extra["eos_token_id"] = sorted({*ends, *stops})
    if told.pad_token_id is None and (ends or stops):
        extra["pad_token_id"] = [*ends, *stops][0]
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    known, asked = 0 if cache is None else cache.get_seq_length(), inputs["input_ids"].shape[1]
    with _seeded(sampling.seed, model.device):
        started = time.perf_counter()
        ids: torch.Tensor = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            stopping_criteria=StoppingCriteriaList([watched]),
            **sampling.settings(),
            **extra,
        )
    first, last = (watched.times or [started])[0], (watched.times or [started])[-1]
    return Continuation(ids[0, asked:].cpu(), asked - known, first - started, last - first)


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: tuple[str, ...], new_tokens: int
) -> list[dict[str, Any]]:
    """Return {"prompt", "answer", "tokens", "seconds", "answer_seconds"} per prompt, in the chat template if any.

    Each is drawn from the same seed, so that a model gives the same answers every time.
    """
    out = []
    for prompt in prompts:
        inputs = ask(prompt, tokenizer, "an example", raw=tokenizer.chat_template is None)
        started = time.perf_counter()
        made = continuation(model, inputs, new_tokens, sampling=EXAMPLE)
        out.append(
            {
                "prompt": prompt,
                "answer": str(tokenizer.decode(made.ids, skip_special_tokens=True)),
                "tokens": len(made.ids),
                "seconds": round(time.perf_counter() - started, 3),
                # from the first token to the last: the speed of speaking, without the reading of the prompt
                "answer_seconds": round(made.seconds, 4),
            }
        )
    return out
