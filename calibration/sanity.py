"""Can this model predict text at all? Asked of a thousand tokens before hours of work, and of every baseline.

A model whose weights were read in the wrong order, filled with random numbers or lost answers as if it knew nothing,
and everything downstream is then measured against noise. `suspicion` has the rules, docs/verdicts.md their numbers:

    raw text       perplexity above half of the vocabulary: worse than a coin thrown between guessing and the truth
    conversation   perplexity above `TIMES_COUNTING` times what counting the words of this very text gives: a model
                   that learned its own chat format is far below (raw text is no measure there: a chat model may
                   give it a perplexity of hundreds)
    both           raw text above `TIMES_CHAT` times the conversation: text that is none, or a tokenizer of another
                   model

`look` streams the model once over ~1,000 tokens, so its cost is one pass over the weights and two floating-point
operations per active weight and token: about as much as rounding to nearest takes, and a small part of what a
calibrated method does. It computes on the processor, and changes nothing that is written but the report.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gptoss_quantize.calibration.chat import render_chat
from gptoss_quantize.calibration.text import TextSpec, Tokens, load_tokenizer, load_tokens
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.model import hidden_states, logits

VOCABULARY_SHARE = 0.5
TIMES_COUNTING = 4.0
TIMES_CHAT = 1000.0
LOOK_TOKENS = 1024
LOOK_LENGTH = 256
HEAD_ROWS = 128
CONVERSATION = (
    (
        "What is the capital of France, and what is it known for?",
        "The capital of France is Paris. It is known for the Eiffel Tower, its museums such as the Louvre, "
        "its cafes, and its long history as a centre of art, fashion and food.",
    ),
    (
        "Why is the sky blue?",
        "Sunlight is made of many colors. When it passes through the air, blue light is scattered in all "
        "directions more than red light, because its waves are shorter. That is why the sky looks blue during "
        "the day.",
    ),
    (
        "How do I boil an egg?",
        "Put the egg in a pot and cover it with water. Bring the water to a boil, then turn off the heat, "
        "cover the pot, and wait for about ten minutes. Cool the egg in cold water before you peel it.",
    ),
    (
        "Name three animals that can fly.",
        "Three animals that can fly are birds, bats and butterflies. Birds and bats have two wings, and "
        "butterflies have four.",
    ),
    (
        "What should I do when it rains?",
        "Take an umbrella or a coat with you when you go outside, wear good shoes, and be careful on the "
        "road. You can also stay at home, read a book, or watch a film with your family.",
    ),
)


def counting(ids: torch.Tensor) -> float:
    """Return the perplexity of the best prediction that knows only how often each token of this text comes."""
    counts = torch.unique(ids, return_counts=True)[1].double()
    share = counts / counts.sum()
    return float(torch.exp(-(share * share.log()).sum()))


def suspicion(
    raw: float | None, tokens: int, vocab: int, *, chat: float | None = None, chat_counting: float | None = None
) -> str | None:
    """Return why perplexities are those of a model that cannot predict text, None where they are sane.

    `raw` and `chat` are perplexities on plain text (of so many tokens) and in the model's chat template,
    `chat_counting` what `counting` gives for the latter; what is None was not measured.
    """
    most = VOCABULARY_SHARE * vocab
    tail = "it cannot predict text; check where its weights and config.json come from before trusting any number"
    for kind, value in (("text", raw), ("its own chat format", chat)):
        if value is not None and not value <= most:
            count = f" ({tokens} tokens)" if kind == "text" else ""
            return f"perplexity {value:.3g} on {kind}{count}, above half of its vocabulary of {vocab}: {tail}"
    if chat is not None and chat_counting is not None and not chat <= TIMES_COUNTING * chat_counting:
        return (
            f"perplexity {chat:.3g} in its own chat format, where counting this text's words gives "
            f"{chat_counting:.0f}: {tail}"
        )
    if raw is not None and chat is not None and not raw <= TIMES_CHAT * chat:
        return (
            f"perplexity {raw:.3g} on this text and {chat:.3g} in its own chat format: the text is none that the "
            "model knows, or its tokenizer is another model's"
        )
    return None


def _chat_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a short conversation in the model's template, [] where it has none or refuses."""
    if tokenizer.chat_template is None:
        return []
    turns = [
        {"role": role, "content": text}
        for pair in CONVERSATION
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    try:
        text = render_chat(turns, tokenizer, "the conversation of gptoss_quantize.calibration.sanity")
    except InputError:
        return []
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def look(
    source: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    ids_NS: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    on_layer: Callable[[int], None] = lambda index: None,
) -> dict[str, Any]:
    """Return what the model makes of the first thousand tokens of a text [N, S] and of a short conversation.

    {"tokens", "perplexity", "chat_perplexity" (None without a template), "vocabulary", "suspect": None or why}.
    """
    vocab = source.config.vocab
    chat = [token for token in _chat_ids(tokenizer) if token < vocab]
    length = min(LOOK_LENGTH, ids_NS.shape[1], len(chat) or LOOK_LENGTH)
    rows = ids_NS[:, : ids_NS.shape[1] // length * length].reshape(-1, length)
    rows = rows[: max(1, LOOK_TOKENS // length - bool(chat))]
    ids = torch.cat((rows, torch.tensor(chat[:length])[None])) if chat else rows
    hidden = hidden_states(source, ids, dtype, on_layer)
    loss = _losses(hidden, source.head().to(dtype), ids)
    raw = math.exp(min(700.0, float(loss[: len(rows)].mean())))
    of_chat = math.exp(min(700.0, float(loss[len(rows) :].mean()))) if chat else None
    chat_counting = counting(ids[-1]) if chat else None
    return {
        "tokens": ids.numel(),
        "perplexity": raw,
        "chat_perplexity": of_chat,
        "vocabulary": vocab,
        "suspect": suspicion(raw, rows.numel(), vocab, chat=of_chat, chat_counting=chat_counting),
    }


@torch.inference_mode()
def _losses(hidden_NSD: torch.Tensor, head_VD: torch.Tensor, ids_NS: torch.Tensor) -> torch.Tensor:
    """Return -log p of every next token, float64 [N, S - 1], a few rows of logits at a time."""
    states, target = hidden_NSD[:, :-1].flatten(0, 1), ids_NS[:, 1:].flatten()
    parts = []
    for rows, following in zip(states.split(HEAD_ROWS), target.split(HEAD_ROWS), strict=True):
        scores = logits(rows, head_VD).double()
        parts.append(torch.logsumexp(scores, -1) - scores.gather(1, following[:, None]).squeeze(1))
    return torch.cat(parts).view(len(ids_NS), -1)


def first_look(
    source: Checkpoint, tokens: Tokens | None, dtype: torch.dtype, on_layer: Callable[[int], None]
) -> dict[str, Any] | None:
    """Return what a source makes of the first thousand `tokens` (or of the packaged text), before it is quantized.

    {"untried": why} where a method that needs no text has no tokenizer either; None where the tokens do not fit.
    """
    try:
        tokenizer = load_tokenizer(source.side)
        packaged = TextSpec(tokens=LOOK_TOKENS, seq_len=LOOK_LENGTH)
        ids = load_tokens(packaged, tokenizer).ids if tokens is None else tokens.ids
    except InputError as error:
        if tokens is not None:
            raise
        return {"suspect": None, "untried": str(error)}
    if int(ids.max()) >= source.config.vocab:
        return None
    return look(source, tokenizer, ids, dtype, on_layer)
