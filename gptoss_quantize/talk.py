"""From the tokens of an answer to what a person reads: text as it comes, and the channels of Harmony.

A token is not a text: a character may be spread over several, and some tokens are marks of the chat format.
`Pieces` gives out text as soon as its bytes are whole. `Channels` follows Harmony, the format of gpt-oss,

    <|start|>assistant<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>

and says which channel each piece of text belongs to; `Plain` does the same for formats that have only one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from transformers import PreTrainedTokenizerBase

FINAL, ANALYSIS, COMMENTARY = "final", "analysis", "commentary"
START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
RETURN, CALL = "<|return|>", "<|call|>"
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# what stands before <|message|> is a role, a channel, a recipient and a type: more than this is no header
LONGEST_HEADER = 40


class Pieces:
    """Text from tokens, one by one; joined, the pieces are what decoding all tokens at once gives."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # tokens before `given` are given out; those from `start` on are decoded with them, for some decoders treat
        # the first token of a text differently
        self._start = self._given = 0

    def _decoded(self, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[self._start : end], skip_special_tokens=True))

    def add(self, token: int) -> str:
        """Return the text that a token completes; nothing where a character has begun and not ended."""
        self._ids.append(token)
        text = self._decoded(len(self._ids))
        return "" if text.endswith(UNFINISHED) else self._give(text)

    def rest(self) -> str:
        """Return what is left when no token follows: bytes that are no character, as replacement characters."""
        return self._give(self._decoded(len(self._ids)))

    def _give(self, text: str) -> str:
        before = len(self._decoded(self._given))
        if len(text) > before:
            self._start, self._given = self._given, len(self._ids)
        return text[before:]


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer."""

    text: str
    channel: str = FINAL
    recipient: str | None = None  # the tool that it is addressed to


class Reader(Protocol):
    """What tells the parts of an answer apart."""

    @property
    def done(self) -> bool:
        """Return whether the answer is over, whatever the model would add."""

    def add(self, token: int) -> list[Piece]:
        """Return what a token completes."""

    def rest(self) -> list[Piece]:
        """Return what is left when no token follows."""


class Plain:
    """The reader of chat formats without channels: all of an answer is final."""

    done = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._pieces = Pieces(tokenizer)

    def add(self, token: int) -> list[Piece]:
        """Return what a token completes."""
        return _pieces(self._pieces.add(token))

    def rest(self) -> list[Piece]:
        """Return what is left when no token follows."""
        return _pieces(self._pieces.rest())


def _pieces(text: str, channel: str = FINAL, recipient: str | None = None) -> list[Piece]:
    return [Piece(text, channel, recipient)] if text else []


@dataclass
class Channels:
    """The reader of Harmony. `opening` are the prompt's tokens, whose last header the answer continues."""

    tokenizer: PreTrainedTokenizerBase
    opening: Sequence[int] = ()
    done: bool = False
    _channel: str = FINAL
    _recipient: str | None = None
    _header: list[int] | None = None  # None inside a message
    _body: Pieces | None = None
    _marks: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        added = self.tokenizer.get_added_vocab()
        self._marks = {added[mark]: mark for mark in (START, CHANNEL, MESSAGE, END, RETURN, CALL) if mark in added}
        ids = list(self.opening)
        starts = [i for i, token in enumerate(ids) if self._marks.get(token) == START]
        self._header = []
        for token in ids[starts[-1] :] if starts else []:
            self.add(token)

    def add(self, token: int) -> list[Piece]:
        """Return what a token completes."""
        mark = self._marks.get(token)
        if mark == START:
            left = self.rest()
            self._header = []
            return left
        if mark == MESSAGE and self._header is not None:
            self._begin(self._header_text())
            return []
        if mark in (END, RETURN, CALL):
            left = self.rest()
            self.done = self.done or mark != END or self._channel == FINAL
            return left
        if self._body is not None:
            return _pieces(self._body.add(token), self._channel, self._recipient)
        if self._header is not None:
            self._header.append(token)
            if len(self._header) > LONGEST_HEADER:
                return self._headless()
        return []

    def rest(self) -> list[Piece]:
        """Return what is left when no token follows."""
        body, self._body = self._body, None
        if body is not None:
            return _pieces(body.rest(), self._channel, self._recipient)
        left = self._headless() if self._header is not None else []
        self._header = self._body = None
        return left

    def _header_text(self) -> str:
        return str(self.tokenizer.decode(self._header or [], skip_special_tokens=False))

    def _begin(self, header: str) -> None:
        role, marked, told = header.partition(CHANNEL)
        named = re.match(r"\s*([\w-]+)", told)
        recipient = re.search(r"\bto=([^\s<]+)", header)
        self._channel = named[1] if marked and named else FINAL
        self._recipient = recipient[1] if recipient else None
        # a model that goes on as the user has said all it had to
        self.done = self.done or (role.split() or ["assistant"])[0] != "assistant"
        self._header, self._body = None, Pieces(self.tokenizer)

    def _headless(self) -> list[Piece]:
        """Return as final what a model wrote where a header should be: one that does not know the format."""
        text = self._header_text()
        if CHANNEL in text or not (text := text.removeprefix("assistant")):
            return []
        self._channel, self._recipient, self._header, self._body = FINAL, None, None, Pieces(self.tokenizer)
        return _pieces(text)


def reader(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = ()) -> Reader:
    """Return the reader of a tokenizer's chat format, for an answer to the tokens of `prompt`."""
    return Channels(tokenizer, prompt) if speaks_harmony(tokenizer) else Plain(tokenizer)


def speaks_harmony(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer's chat template writes channels, with marks that are tokens."""
    marks = {START, CHANNEL, MESSAGE, END} <= tokenizer.get_added_vocab().keys()
    return marks and CHANNEL in str(tokenizer.chat_template)


@dataclass
class Spoken:
    """The pieces of an answer put together."""

    content: str = ""
    thinking: str = ""
    called: set[str] = field(default_factory=set)  # tools that it wanted

    def add(self, piece: Piece) -> None:
        """Add a piece; thinking is analysis and commentary, as in calibration's messages."""
        if piece.recipient is not None:
            self.called.add(piece.recipient)
        elif piece.channel == FINAL:
            self.content += piece.text
        else:
            self.thinking += piece.text
