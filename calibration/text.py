"""Text in, token ids out: `load_tokens(spec, tokenizer)` gives the sequences that a model is run on.

Documents are shuffled by seed, tokenized one after the other until the budget is met, joined into one stream
with the tokenizer's document separator between them, and cut into sequences of equal length. Nothing is
padded, so every position is a real token. Evaluation uses the same function with shuffle=False.

The separator is `<|endoftext|>` where the tokenizer has it: this is what stands between documents in the
training text of gpt-oss, and of most others. The eos token of a chat model is not: for gpt-oss it is
`<|return|>`, which ends an assistant's turn. Without `<|endoftext|>` it is eos, then bos, then nothing.

Rows are looked at before anything is rendered (`calibration.rows`); conversations are rendered with the tokenizer's
chat template on a fixed date (`calibration.chat`): Harmony for gpt-oss, including the `thinking` of a message.
Special tokens that are written out in a text are read as such, so conversations may also come as text that was
rendered before. Rows that cannot be used are skipped and counted (`calibration.documents`).

No document takes the whole budget: of a conversation at most an eighth of it is used, of any other row's text a
quarter, in small budgets 1,024 tokens or half of it, and at least one sequence (or what `max_document` says).
Where the text would not fill the budget so, both lengths are doubled until it does, or until nothing is cut. Text
files (cut at blank lines already, or one document on purpose) and the packaged texts are not cut, nor is anything
when all of a text is asked for.

The SHA-256 of the ids goes into reports: equal hashes mean the same tokens in the same sequences.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gptoss_quantize.calibration.chat import DATE, FIXED_DATE, joined_contents, left_out, render, render_chat
from gptoss_quantize.calibration.documents import Counts, checked_left_out, read_documents
from gptoss_quantize.calibration.messages import RowError
from gptoss_quantize.calibration.rows import Conversation
from gptoss_quantize.calibration.sources import Row, describe
from gptoss_quantize.errors import InputError
from gptoss_quantize.tokenizer_files import SideFiles, default_template, dump_config, side_files

__all__ = [
    "DATE",
    "FIXED_DATE",
    "TextSpec",
    "Tokens",
    "load_following",
    "load_tokenizer",
    "load_tokens",
    "render_chat",
]
CONVERSATION_SHARE, TEXT_SHARE = 8, 4  # of the budget of tokens, one part in so many
DOCUMENT = 1024  # tokens that a document may have in any budget of twice as many


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """Which text, how much of it, and in which order.

    source: default (the packaged calibration text), heldout (the packaged evaluation text), a .txt, .jsonl, .json or
    .parquet file (all but the last also gzipped), or hf:NAME[:CONFIG][@SPLIT].
    column: the column that holds the text or the messages, in any shape; without it, what `calibration.rows` finds.
    tokens: the budget, rounded down to whole sequences; None takes all of the text.
    chat_template: whether messages are rendered with the chat template; without, their contents are joined.
    max_document: tokens at which the document of a row is cut; None: an eighth of `tokens` for a conversation, a
    quarter for a text; at least 1,024 (or half of `tokens`, if that is less), and at least `seq_len`.
    """

    source: str = "default"
    column: str | None = None
    tokens: int | None = 32_768
    seq_len: int = 512
    seed: int = 0
    chat_template: bool = True
    shuffle: bool = True
    max_document: int | None = None

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
        if self.max_document is not None and self.max_document < 1:
            raise InputError(f"documents of {self.max_document} tokens: expected at least 1")

    def document_limit(self, *, conversation: bool, factor: int = 1) -> int | None:
        """Return at how many tokens a document is cut; `factor` is how far the default length is raised."""
        if self.max_document is not None or self.tokens is None:
            return self.max_document
        share = self.tokens // (CONVERSATION_SHARE if conversation else TEXT_SHARE)
        return factor * max(self.seq_len, share, min(DOCUMENT, self.tokens // 2))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """Packed sequences [N, seq_len] and what they were made of."""

    ids: torch.Tensor
    sha256: str
    source: str
    documents: int
    separator: str | None
    counts: Counts = field(default_factory=Counts)

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def record(self) -> dict[str, Any]:
        """Return what a report says about the text."""
        return {
            "source": self.source,
            "documents": self.documents,
            "sequences": self.ids.shape[0],
            "seq_len": self.ids.shape[1],
            "tokens": self.tokens,
            "separator": self.separator,
            "sha256": self.sha256,
            **self.counts.record(),
        }

    def line(self) -> str:
        """Return one line about the text for a screen: how much of what was used, and what was not."""
        conversations = f" ({self.counts.conversations:,} conversations)" if self.counts.conversations else ""
        documents = "1 document" if self.documents == 1 else f"{self.documents:,} documents"
        used = f"{self.tokens:,} tokens from {documents}{conversations} of {self.source}"
        return "; ".join(filter(None, [used, self.counts.line()]))


def load_tokenizer(model: str | Path | SideFiles) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint, a directory or `Checkpoint.side`; never asks the network."""
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        # transformers reads config.json for it as well
        raise InputError(
            f"{folder}: the tokenizer does not load ({error}); correct tokenizer_config.json or config.json, "
            f"whichever is meant, or {remedy}"
        ) from error
    tokenizer.name_or_path = str(file.parent)
    return tokenizer


def load_tokens(spec: TextSpec, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Return the packed sequences that a spec stands for; the same spec gives the same ids everywhere."""
    wanted = None if spec.tokens is None else spec.tokens // spec.seq_len * spec.seq_len
    needed = wanted or spec.seq_len
    stream = _filled(spec, tokenizer, needed, wanted)
    have = len(stream.ids)
    if have < needed:
        raise InputError(_too_little(spec, have, len(stream.documents), needed))
    return stream.tokens(spec, 0, (wanted or have) // spec.seq_len)


def load_following(spec: TextSpec, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Tokens | None:
    """Return the sequences of the same text that follow those of `load_tokens`, up to `tokens` tokens.

    None where not even one sequence is left. `spec.tokens` must be a number.
    """
    if spec.tokens is None:
        raise ValueError("nothing follows all of the text")
    start = spec.tokens // spec.seq_len * spec.seq_len
    # what `load_tokens` needs decides where documents are cut, here too
    stream = _filled(spec, tokenizer, start, start + max(tokens, spec.seq_len))
    count = min(len(stream.ids) - start, tokens) // spec.seq_len
    return stream.tokens(spec, start, count) if count > 0 else None


@dataclass(slots=True)
class _Stream:
    """Documents in a row: ids [n] int64, and of each its first id, whether it is a conversation, and was cut."""

    ids: torch.Tensor
    documents: list[tuple[int, bool, bool]]
    counts: Counts
    separator: tuple[str, int] | None

    def tokens(self, spec: TextSpec, start: int, sequences: int) -> Tokens:
        """Return sequences from a place on, with the count of the documents that they hold something of."""
        ids = self.ids[start : start + sequences * spec.seq_len].reshape(sequences, spec.seq_len)
        ends = [at for at, *_ in self.documents[1:]] + [len(self.ids)]
        used = [d for d, end in zip(self.documents, ends, strict=True) if end > start and d[0] < start + ids.numel()]
        self.counts.conversations = sum(conversation for _, conversation, _ in used)
        self.counts.cut = sum(cut for *_, cut in used)
        return Tokens(
            ids=ids,
            sha256=_hash(ids),
            source=describe(spec.source),
            documents=len(used),
            separator=self.separator[0] if self.separator else None,
            counts=self.counts,
        )


def _filled(spec: TextSpec, tokenizer: PreTrainedTokenizerBase, needed: int, wanted: int | None) -> _Stream:
    """Return documents until `wanted` ids are there (None: all), cut as short as gives the `needed` ones."""
    factor = 1
    while True:
        stream = _stream(spec, tokenizer, wanted, factor)
        cut = any(cut for *_, cut in stream.documents)
        if len(stream.ids) >= needed or not cut or spec.max_document is not None:
            stream.counts.finish(spec.source)
            return stream
        factor *= 2


def _stream(spec: TextSpec, tokenizer: PreTrainedTokenizerBase, wanted: int | None, factor: int) -> _Stream:
    separator = _document_separator(tokenizer)
    counts = Counts()
    pieces = [torch.empty(0, dtype=torch.int64)]
    documents: list[tuple[int, bool, bool]] = []
    have = 0
    for row, text, conversation in _texts(spec, tokenizer, counts):
        limit = None if row.whole else spec.document_limit(conversation=conversation, factor=factor)
        ids, cut = _tokenized(text, tokenizer, limit)
        if cut:
            counts.cut_at = max(limit or 0, counts.cut_at or 0)
        # the first piece of a text may be blank, and then it is not here
        if not row.continued or not documents:
            ids = [separator[1], *ids] if separator and documents else ids
            documents.append((have, conversation, cut))
        pieces.append(torch.tensor(ids, dtype=torch.int64))
        have += len(ids)
        if wanted is not None and have >= wanted:
            break
    return _Stream(torch.cat(pieces), documents, counts, separator)


def _tokenized(text: str, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> tuple[list[int], bool]:
    """Return the ids of a text and whether they were cut at a limit."""
    # no token is 64 characters on average: the far end of an endless document need not be tokenized
    near = text if limit is None else text[: 64 * limit]
    ids: list[int] = tokenizer(near, add_special_tokens=False, verbose=False)["input_ids"]
    if limit is None or (len(ids) <= limit and near == text):
        return ids, False
    return ids[:limit], True


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


def _texts(spec: TextSpec, tokenizer: PreTrainedTokenizerBase, counts: Counts) -> Iterator[tuple[Row, str, bool]]:
    """Yield (row, its text, whether that is a conversation) of the rows that hold text."""
    prefer = "messages" if spec.chat_template else "text"
    seed = spec.seed if spec.shuffle else None
    for row, found in read_documents(spec.source, column=spec.column, prefer=prefer, seed=seed, counts=counts):
        if isinstance(found, str):
            yield row, found, False
            continue
        try:
            text = rendered(found, spec, tokenizer, row.where, counts)
        except RowError as error:
            counts.skip(spec.source, row.where, str(error))
            continue
        if text and not text.isspace():
            yield row, text, True


def rendered(
    conversation: Conversation, spec: TextSpec, tokenizer: PreTrainedTokenizerBase, where: str, counts: Counts
) -> str:
    """Return a conversation as the model sees it, or its contents alone where no template is asked for."""
    if spec.chat_template:
        text = render(conversation, tokenizer, where)
        checked_left_out(conversation, left_out(conversation, tokenizer, where), where, counts)
    else:
        text = joined_contents(conversation)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("half of a surrogate pair, which is no text") from error
    return text
