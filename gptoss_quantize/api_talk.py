"""The public functions that let a checkpoint speak: one answer (`generate`), or a conversation (`Conversation`)."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from gptoss_quantize.api_inputs import DTYPES, Place, at_least, known
from gptoss_quantize.calibration.chat import render_chat
from gptoss_quantize.calibration.text import load_tokenizer
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval.examples import GREEDY, Continuation, Sampling, ask, continuation, load_model
from gptoss_quantize.hub import resolve
from gptoss_quantize.machine import compute_dtype, pick_device
from gptoss_quantize.prompts import check_ids, check_prompt
from gptoss_quantize.talk import Piece, Pieces, Spoken, reader, speaks_harmony

PROBE = "what-an-assistant-says"


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model that can be asked, with what it reads and writes by."""

    path: Path
    model: Any
    tokenizer: PreTrainedTokenizerBase


def open_speaker(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, dtype: str, device: str) -> Speaker:
    """Return the model of a checkpoint on a device, whole in memory; int4 experts of ours stay packed."""
    place = pick_device(device)
    products = DTYPES[known("--dtype", dtype, DTYPES)] or compute_dtype(place)
    try:
        model = load_model(checkpoint, products).to(place)
    except torch.cuda.OutOfMemoryError:
        raise InputError(
            f"{checkpoint.path}: does not fit into the memory of {place}; run it on the processor (--device cpu)"
        ) from None
    return Speaker(checkpoint.path, model, tokenizer)


def chat_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a directory; InputError where it has no chat template."""
    tokenizer = load_tokenizer(path)
    if tokenizer.chat_template is None:
        raise InputError(f"{path}: its tokenizer has no chat template; continue text with generate --raw")
    return tokenizer


def pick_sampling(temperature: float, top_p: float, top_k: int, seed: int | None) -> Sampling:
    """Return how tokens are chosen; InputError for what is out of range, or would have no effect."""
    at_least(0, temperature=temperature, top_k=top_k, seed=seed)
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p {top_p}: expected more than 0, and at most 1")
    if not temperature and (top_p != 1 or top_k):
        raise InputError("--top-p and --top-k choose among tokens by chance; give --temperature too, such as 1")
    return Sampling(temperature, top_p, top_k, seed)


def generate(
    model: Place,
    prompt: str,
    *,
    max_new_tokens: int = 60,
    raw: bool = False,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    device: str = "auto",
    dtype: str = "bfloat16",
    on_text: Callable[[str], object] | None = None,
) -> str:
    """Return the answer of a checkpoint, by default the greedy one; int4 experts of ours stay packed in memory.

    Args:
        model: an int4 checkpoint of ours, or any gpt-oss directory or hub name.
        prompt: the user's message, in the chat template (whose date is fixed), or plain text when `raw`.
        max_new_tokens: how long the answer may be.
        raw: continue the prompt as text.
        temperature: 0 takes the likeliest token every time; 1 draws from the model's own distribution.
        top_p: draw only among the likeliest tokens that have this share together.
        top_k: draw only among so many of the likeliest tokens; 0 among all.
        seed: of the draws; without one they differ from call to call.
        device: auto, cpu or cuda.
        dtype: of activations and of what is not packed.
        on_text: called with each piece of the answer as soon as it is there; joined they are what is returned.
    """
    sampling = pick_sampling(temperature, top_p, top_k, seed)
    said = speak(model, prompt, max_new_tokens, raw=raw, sampling=sampling, on=(device, dtype), on_text=on_text)
    return said.text


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and how fast it came."""

    text: str
    made: Continuation


def speak(
    model: Place,
    prompt: str,
    max_new_tokens: int,
    *,
    raw: bool = False,
    sampling: Sampling = GREEDY,
    on: tuple[str, str] = ("auto", "bfloat16"),
    on_text: Callable[[str], object] | None = None,
) -> Answer:
    """Return what `generate` does, with its speed; `on` are device and dtype."""
    at_least(1, max_new_tokens=max_new_tokens)
    check_prompt(prompt)
    path = resolve(str(model))
    tokenizer = load_tokenizer(path)
    if raw and not prompt:
        raise InputError("the prompt is empty, and --raw adds nothing to it; give at least one word (--prompt)")
    if not raw and tokenizer.chat_template is None:
        raise InputError(f"{path}: its tokenizer has no chat template; continue the prompt as plain text with --raw")
    inputs = ask(prompt, tokenizer, "--prompt", raw=raw)
    checkpoint = Checkpoint(path)
    check_ids(inputs["input_ids"], checkpoint.config.vocab, f"{path}: the prompt")
    pieces, told = Pieces(tokenizer), on_text or (lambda text: None)

    def on_token(token: int) -> None:
        if text := pieces.add(token):
            told(text)

    device, dtype = on
    speaker = open_speaker(checkpoint, tokenizer, dtype, device)
    made = continuation(speaker.model, inputs, max_new_tokens, sampling=sampling, on_token=on_token)
    if text := pieces.rest():
        told(text)
    return Answer(str(tokenizer.decode(made.ids, skip_special_tokens=True)), made)


@dataclass(frozen=True, slots=True)
class Reply:
    """How an answer of a conversation came and ended."""

    said: Spoken
    prompt: int  # tokens of the whole conversation before it
    made: Continuation | None  # None where it was interrupted before it was whole
    stopped: bool  # by the user
    cut: bool  # by the number of tokens
    kept: bool  # False: there was no final answer, so the turn is taken back


class Conversation:
    """Messages and answers, and what the model has already read of them.

    The cache of keys and values is kept between turns as far as the tokens of the next prompt are those that it
    was made of; what comes after (thinking that a template leaves out of earlier turns) is read again. It holds all
    positions of all layers, those with a window too: a windowed cache could not be cut back.
    """

    def __init__(
        self,
        speaker: Speaker,
        *,
        system: str | None = None,
        max_new_tokens: int = 2048,
        sampling: Sampling = GREEDY,
    ):
        self.speaker, self.sampling, self.max_new_tokens = speaker, sampling, max_new_tokens
        self._head = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, Any]] = list(self._head)
        self.stops = turn_ends(speaker.tokenizer, str(speaker.path))
        self._read: list[int] = []
        # typed as anything: transformers' layers may be of kinds that this model has none of
        self._cache: Any = DynamicCache()
        self._answers = 0
        self._speaking = self._stopping = False

    def reset(self) -> None:
        """Forget what was said, but for the system prompt."""
        self.messages = list(self._head)

    def save(self, file: Path) -> None:
        """Write the conversation as one row of JSON, which --calibration and --text take (.jsonl)."""
        file.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n", encoding="utf-8")

    def interrupt(self) -> None:
        """End the answer that is being made: after its next token; before its first at once, by KeyboardInterrupt."""
        if not self._speaking or self._stopping:
            raise KeyboardInterrupt
        self._stopping = True

    def ask(self, text: str, on_piece: Callable[[Piece], object]) -> Reply:
        """Add a message and return the answer, whose pieces are handed on as they come.

        InputError where the conversation has become too long for the model; nothing is added to it then.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self._tokens(asked)
        check_ids(torch.tensor(ids), self.speaker.model.config.vocab_size, f"{self.speaker.path}: the conversation")
        room = self.speaker.model.config.max_position_embeddings - len(ids)
        if room < 1:
            raise InputError(
                f"the conversation has {len(ids)} tokens, and the model takes fewer than "
                f"{self.speaker.model.config.max_position_embeddings}; begin a new one (/reset)"
            )
        said, words = Spoken(), reader(self.speaker.tokenizer, ids)
        new: list[int] = []

        def hand_on(pieces: list[Piece]) -> None:
            for piece in pieces:
                said.add(piece)
                on_piece(piece)

        def on_token(token: int) -> bool:
            self._speaking = True
            new.append(token)
            hand_on(words.add(token))
            return words.done or self._stopping

        made, stopped = None, False
        try:
            made = self._continue(ids, min(self.max_new_tokens, room), on_token)
        except KeyboardInterrupt:
            stopped = True
        finally:
            stopped, self._speaking, self._stopping = stopped or self._stopping, False, False
            self._trim([*ids, *new])
        hand_on(words.rest())
        ended = words.done or (new and new[-1] in {*self.stops, *_ends(self.speaker.model)})
        kept = bool(said.content.strip())
        if kept:
            thinking = {"thinking": said.thinking} if said.thinking.strip() else {}
            self.messages = [*asked, {"role": "assistant", "content": said.content, **thinking}]
        return Reply(said, len(ids), made, stopped, not ended and not stopped, kept)

    def _tokens(self, messages: list[dict[str, Any]]) -> list[int]:
        tokenizer = self.speaker.tokenizer
        text = render_chat(messages, tokenizer, str(self.speaker.path), answer_next=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _continue(self, ids: list[int], new_tokens: int, on_token: Callable[[int], bool]) -> Continuation:
        same = next((i for i, (a, b) in enumerate(zip(ids, self._read, strict=False)) if a != b), None)
        # the last token is always read: its output is the first answer
        self._cut(min(len(self._read) if same is None else same, len(ids) - 1))
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        sampling, self._answers = self.sampling, self._answers + 1
        if sampling.seed is not None:
            sampling = Sampling(
                sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed + self._answers - 1
            )
        return continuation(
            self.speaker.model,
            inputs,
            new_tokens,
            sampling=sampling,
            on_token=on_token,
            cache=self._cache,
            stops=self.stops,
        )

    def _trim(self, tokens: list[int]) -> None:
        """Note which tokens the cache holds: an interrupted step has reached some layers only."""
        layers = [layer for layer in self._cache.layers if layer.is_initialized]
        lengths = [part.shape[-2] for layer in layers for part in (layer.keys, layer.values)]
        whole = min(lengths, default=0) if len(layers) == self.speaker.model.config.num_hidden_layers else 0
        self._read = tokens
        self._cut(min(whole, len(tokens)))

    def _cut(self, length: int) -> None:
        """Keep the first `length` tokens in the cache."""
        self._read = self._read[:length]
        if not length:
            self._cache = DynamicCache()
            return
        # not crop: what its argument means has changed between versions
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def _ends(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])


def turn_ends(tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    """Return the tokens that end an assistant's turn in a chat template, which a model's own list may lack.

    None of Harmony's: its <|end|> ends a message, and `Channels` knows which is the last.
    """
    if speaks_harmony(tokenizer):
        return []
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    _, found, after = render_chat(turns, tokenizer, where).partition(PROBE)
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    mark = tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
    return [ids[0]] if mark is not None and mark.special else []
