"""Text in, token ids out: `load_tokens(spec, tokenizer)` gives the sequences that a model is run on.

Documents are shuffled by seed, tokenized one after the other until the budget is met, joined into one stream
with the tokenizer's document separator between them, and cut into sequences of equal length. Nothing is
padded, so every position is a real token. Evaluation uses the same function with shuffle=False.

The separator is `<|endoftext|>` where the tokenizer has it: this is what stands between documents in the
training text of gpt-oss, and of most others. The eos token of a chat model is not: for gpt-oss it is
`<|return|>`, which ends an assistant's turn. Without `<|endoftext|>` it is eos, then bos, then nothing.

Conversations (`messages`) are rendered with the tokenizer's chat template: Harmony for gpt-oss, including the
`thinking` of a message. Harmony's system message states the current date, which would give other tokens every
day; here the template always sees the same date. Special tokens that are written out in a text are read as
such, so conversations may also come as text that was rendered before.

The SHA-256 of the ids goes into reports: equal hashes mean the same tokens in the same sequences.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gptoss_quantize.calibration.sources import Record, describe, read_records
from gptoss_quantize.errors import InputError
from gptoss_quantize.tokenizer_files import SideFiles, default_template, dump_config, side_files

DATE = "2025-08-05"
# a macro in front hides the function of this name that transformers gives to templates; a function passed as
# a variable would not arrive, since variables are reduced to plain data
FIXED_DATE = "{% macro strftime_now(format) %}" + DATE + "{% endmacro %}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """Which text, how much of it, and in which order.

    source: default (the packaged calibration text), heldout (the packaged evaluation text), a .txt, .jsonl or
    .parquet file (the first two also gzipped), or hf:NAME[:CONFIG][@SPLIT].
    column: the column that holds the text or the messages; without it, `messages` or `text`.
    tokens: the budget, rounded down to whole sequences; None takes all of the text.
    chat_template: whether messages are rendered with the chat template; without, their contents are joined.
    """

    source: str = "default"
    column: str | None = None
    tokens: int | None = 32_768
    seq_len: int = 512
    seed: int = 0
    chat_template: bool = True
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise InputError(f"sequence length {self.seq_len}: expected at least 2 tokens (--seq-len)")
        if self.tokens is not None and self.tokens < self.seq_len:
            raise InputError(
                f"{self.tokens} tokens do not fill one sequence of {self.seq_len}; expected at least as many "
                "tokens as a sequence is long: more --tokens, or a smaller --seq-len"
            )
        if self.seed < 0:
            raise InputError(f"seed {self.seed}: expected 0 or more (--seed)")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """Packed sequences [N, seq_len] and what they were made of."""

    ids: torch.Tensor
    sha256: str
    source: str
    documents: int
    separator: str | None

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def record(self) -> dict[str, str | int | None]:
        """Return what a report says about the text."""
        return {
            "source": self.source,
            "documents": self.documents,
            "sequences": self.ids.shape[0],
            "seq_len": self.ids.shape[1],
            "tokens": self.tokens,
            "separator": self.separator,
            "sha256": self.sha256,
        }


def load_tokenizer(model: str | Path | SideFiles) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint (its directory, or its files as `Checkpoint.side`); never asks the network."""
    remedy = "copy tokenizer.json, tokenizer_config.json and chat_template.jinja from the original model there"
    if not isinstance(model, SideFiles):
        if not Path(model).is_dir():
            raise InputError(f"{model}: no such directory; expected a checkpoint with its tokenizer")
        model = side_files(Path(model))
    folder, file = model.path, model.files.get("tokenizer.json")
    if file is None:
        raise InputError(f"{folder}: has no tokenizer.json; {remedy}")
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises nothing narrower
        raise InputError(f"{file}: not a tokenizer ({error}); {remedy}") from error
    default_template(model.template, folder)
    try:
        with model.staged() as place:
            if (folder / "config.json").is_file():
                dump_config(place)
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: the tokenizer does not load ({error}); {remedy}") from error
    tokenizer.name_or_path = str(file.parent)
    return tokenizer


def load_tokens(spec: TextSpec, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Return the packed sequences that a spec stands for; the same spec gives the same ids everywhere."""
    wanted = None if spec.tokens is None else spec.tokens // spec.seq_len * spec.seq_len
    stream, documents, separator = _stream(spec, tokenizer, 0, wanted)
    have, needed = len(stream), wanted or spec.seq_len
    if have < needed:
        raise InputError(_too_little(spec, have, documents, needed))
    ids = stream[: wanted or have // spec.seq_len * spec.seq_len].reshape(-1, spec.seq_len)
    return _tokens(spec, ids, documents, separator)


def load_following(spec: TextSpec, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Tokens | None:
    """Return the sequences of the same text that follow those of `load_tokens`, up to `tokens` tokens.

    None where not even one sequence is left. `spec.tokens` must be a number.
    """
    if spec.tokens is None:
        raise ValueError("nothing follows all of the text")
    start = spec.tokens // spec.seq_len * spec.seq_len
    rest, documents, separator = _stream(spec, tokenizer, start, start + max(tokens, spec.seq_len))
    count = min(len(rest), tokens) // spec.seq_len
    return _tokens(spec, rest[: count * spec.seq_len].reshape(count, -1), documents, separator) if count else None


def _stream(
    spec: TextSpec, tokenizer: PreTrainedTokenizerBase, start: int, wanted: int | None
) -> tuple[torch.Tensor, int, tuple[str, int] | None]:
    """Return (ids from `start` on of documents until `wanted` are there, documents of these, separator).

    `wanted` None takes all of the text.
    """
    separator = _document_separator(tokenizer)
    pieces = [torch.empty(0, dtype=torch.int64)]
    have = documents = before = 0
    for record, text in _texts(spec, tokenizer):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        # the first piece of a text may be blank, and then it is not here
        if not record.continued or not documents:
            before = documents if have <= start else before
            ids = [separator[1], *ids] if separator and documents else ids
            documents += 1
        pieces.append(torch.tensor(ids, dtype=torch.int64))
        have += len(ids)
        if wanted is not None and have >= wanted:
            break
    return torch.cat(pieces)[start:], documents - before, separator


def _tokens(spec: TextSpec, ids: torch.Tensor, documents: int, separator: tuple[str, int] | None) -> Tokens:
    return Tokens(
        ids=ids,
        sha256=_hash(ids),
        source=describe(spec.source),
        documents=documents,
        separator=separator[0] if separator else None,
    )


def _too_little(spec: TextSpec, have: int, documents: int, needed: int) -> str:
    if not documents:
        return f"{spec.source}: holds no text; expected at least one document that is not blank"
    most = have // spec.seq_len * spec.seq_len
    fewer = f"fewer --tokens (at most {most})" if most else "a smaller --seq-len with fewer --tokens"
    return (
        f"{spec.source}: {have} tokens in {documents} document(s), {needed} are needed "
        f"({needed // spec.seq_len} sequences of {spec.seq_len}); give more text, or ask for {fewer}"
    )


def _hash(ids: torch.Tensor) -> str:
    """Return the SHA-256 of the shape and the ids, as little-endian 64-bit integers."""
    digest = hashlib.sha256(json.dumps(list(ids.shape)).encode())
    digest.update(ids.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _document_separator(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int] | None:
    # asked by name in the added vocabulary: convert_tokens_to_ids answers with the unknown token's id
    if (end_of_text := tokenizer.get_added_vocab().get("<|endoftext|>")) is not None:
        return "<|endoftext|>", end_of_text
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token, tokenizer.eos_token_id
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token, tokenizer.bos_token_id
    return None


def _texts(spec: TextSpec, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Record, str]]:
    """Yield the records that hold text, each with its text; blank ones are passed over."""
    prefer = "messages" if spec.chat_template else "text"
    seed = spec.seed if spec.shuffle else None
    for record in read_records(spec.source, column=spec.column, prefer=prefer, seed=seed):
        value = record.value
        if isinstance(value, list) and value:
            value = _conversation(value, spec, tokenizer, record.where)
        if value is None or value == []:
            continue
        if not isinstance(value, str):
            raise InputError(
                f"{record.where}: a {type(value).__name__}; expected a text or a list of messages; "
                "name the column that holds them (--column)"
            )
        if value and (record.continued or not value.isspace()):
            yield record, value


def _conversation(value: list[Any], spec: TextSpec, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """Return a conversation as the model sees it, or its contents alone where no template is asked for."""
    messages = checked_messages(value, where)
    if not spec.chat_template:
        return "\n\n".join(m[key] for m in messages for key in ("thinking", "content") if m.get(key))
    return render_chat(messages, tokenizer, where)


def checked_messages(value: list[Any], where: str) -> list[dict[str, Any]]:
    """Return the messages of a conversation without empty fields; InputError names the one that is none."""
    return [_message(message, f"{where}: message {i}") for i, message in enumerate(value)]


def render_chat(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str, *, answer_next: bool = False
) -> str:
    """Return a conversation in the tokenizer's chat template, with the opening of an answer where asked for."""
    if tokenizer.chat_template is None:
        raise InputError(
            f"{where}: holds a conversation, and the tokenizer has no chat template to render it with; "
            "put the model's chat_template.jinja beside tokenizer.json, or join the contents without one "
            "(--no-chat-template)"
        )
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = FIXED_DATE + template
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=answer_next
            )
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: the chat template refuses the conversation ({error}); expected roles and fields "
            "that the template knows; correct or delete the record"
        ) from error


def _message(message: Any, where: str) -> dict[str, Any]:
    """Return a message without empty fields; parquet gives every message every field, None where unset."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(f'{where}: expected {{"role": ..., "content": ...}}, found {str(message)[:80]!r}')
    kept = {key: value for key, value in message.items() if value is not None}
    for key in ("content", "thinking"):
        if not isinstance(kept.get(key, ""), str):
            raise InputError(f"{where}: {key} is a {type(kept[key]).__name__}; expected a text")
    if not kept.keys() & {"content", "thinking", "tool_calls"}:
        raise InputError(f"{where}: has no content; expected a text under 'content'")
    return kept
