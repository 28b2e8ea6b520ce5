"""Texts to compare models on, as trees: passages of raw text, and the assistant's turns of conversations.

Raw text is packed into sequences of equal length (`calibration.text`); every token but the first of a sequence is
scored. Of a conversation, only what the assistant says is scored, given what the chat template puts before it: one
tree per assistant's turn, its context rendered with the opening of an answer, so that the model sees exactly what it
would see in use. For gpt-oss that is Harmony: channel, message and end markers of the turn are scored with it.

Rows are read, skipped and counted as for calibration (`calibration.rows`, `calibration.documents`). Of one
conversation as many turns are scored as a document may have tokens (`TextSpec.document_limit`), at least one; where
the text would not fill the budget so, that length is doubled until it does or no turn is left behind.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from gptoss_quantize.calibration.chat import left_out, render
from gptoss_quantize.calibration.documents import Counts, checked_left_out, read_documents
from gptoss_quantize.calibration.messages import RowError
from gptoss_quantize.calibration.rows import Conversation
from gptoss_quantize.calibration.sources import describe
from gptoss_quantize.calibration.text import TextSpec, load_tokens
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval.trees import Layout, Tree, lay_out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Text:
    """One text to compare models on."""

    name: str
    kind: str  # "raw" or "chat"
    trees: tuple[Tree, ...]
    sha256: str
    left_out: int  # assistant's turns that are longer than the model's positions
    counts: Counts = field(default_factory=Counts)  # what became of the rows; documents cut: turns left behind

    def layout(self) -> Layout:
        """Return the flat form of the trees."""
        return lay_out(self.trees)

    def record(self) -> dict[str, Any]:
        """Return what a report says about the text."""
        return {
            "name": self.name,
            "kind": self.kind,
            "sequences": len(self.trees),
            "tokens": sum(map(len, self.trees)),
            "scored_tokens": sum(len(branch) for tree in self.trees for branch in tree.branches),
            "turns_left_out": self.left_out,
            "sha256": self.sha256,
            **self.counts.record(),
        }


def load_text(spec: TextSpec, tokenizer: PreTrainedTokenizerBase, max_positions: int) -> Text:
    """Return the text that a spec stands for: conversations as chat where there is a template, all else raw."""
    if spec.chat_template and isinstance(_first(spec), Conversation):
        return _chat(spec, tokenizer, max_positions)
    tokens = load_tokens(spec, tokenizer)
    trees = [Tree((row[0],), (tuple(row[1:]),)) for row in tokens.ids.tolist()]
    return _text(spec, "raw", trees, 0, tokens.counts)


def _first(spec: TextSpec) -> str | Conversation | None:
    """Return the first row of a source that can be used: it says what the text is."""
    counts = Counts()
    rows = read_documents(spec.source, column=spec.column, prefer="messages", seed=None, counts=counts)
    return next((found for _, found in rows), None)


def _text(spec: TextSpec, kind: str, trees: list[Tree], left_out: int, counts: Counts) -> Text:
    content = json.dumps([[tree.context, tree.branches] for tree in trees]).encode()
    return Text(
        name=describe(spec.source),
        kind=kind,
        trees=tuple(trees),
        sha256=hashlib.sha256(content).hexdigest(),
        left_out=left_out,
        counts=counts,
    )


def assistant_turns(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, where: str
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (tokens before, tokens of the turn) for every assistant's message that follows another one."""
    messages = conversation.messages
    for k, message in enumerate(messages):
        if message["role"] != "assistant" or not k:
            continue
        before = render(replace(conversation, messages=messages[:k]), tokenizer, where, answer_next=True)
        whole = render(replace(conversation, messages=messages[: k + 1]), tokenizer, where)
        if not whole.startswith(before):
            raise InputError(
                f"{where}: message {k}: the chat template does not write the same beginning with and without the "
                "answer, so its tokens cannot be told apart; give the conversation as rendered text"
            )
        ids, context = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (whole, before))
        # a tokenizer may join the end of the context to the answer: what is joined belongs to the answer
        shared = next((i for i, (a, b) in enumerate(zip(ids, context, strict=False)) if a != b), len(context))
        if 0 < shared < len(ids):
            yield tuple(ids[:shared]), tuple(ids[shared:])


def _chat(spec: TextSpec, tokenizer: PreTrainedTokenizerBase, max_positions: int) -> Text:
    factor = 1
    while True:
        text = _chat_cut(spec, tokenizer, max_positions, factor)
        filled = spec.tokens is None or sum(map(len, text.trees)) >= spec.tokens
        if filled or not text.counts.cut or spec.max_document is not None:
            break
        factor *= 2
    text.counts.finish(spec.source)
    if not text.trees:
        raise InputError(f"{spec.source}: no assistant's answer to score; expected messages of user and assistant")
    return text


def _chat_cut(spec: TextSpec, tokenizer: PreTrainedTokenizerBase, max_positions: int, factor: int) -> Text:
    """Return conversations until the budget is met, of each the turns that `factor` times the usual length holds."""
    counts = Counts()
    limit = spec.document_limit(conversation=True, factor=factor)
    trees: list[Tree] = []
    have = too_long = 0
    seed = spec.seed if spec.shuffle else None
    documents = read_documents(spec.source, column=spec.column, prefer="messages", seed=seed, counts=counts)
    for row, found in documents:
        try:
            if isinstance(found, str):
                raise RowError("no list of messages, though the first record is one; split the file")
            checked_left_out(found, left_out(found, tokenizer, row.where), row.where, counts)
            turns, cut, longer = _limited(assistant_turns(found, tokenizer, row.where), limit, max_positions)
        except RowError as error:
            counts.skip(spec.source, row.where, str(error))
            continue
        too_long += longer
        counts.conversations += bool(turns)
        if cut:
            counts.cut, counts.cut_at = counts.cut + 1, limit
        trees.extend(Tree(context, (answer,)) for context, answer in turns)
        have += sum(len(context) + len(answer) for context, answer in turns)
        if spec.tokens is not None and have >= spec.tokens:
            break
    return _text(spec, "chat", trees, too_long, counts)


def _limited(
    turns: Iterator[tuple[tuple[int, ...], tuple[int, ...]]], limit: int | None, max_positions: int
) -> tuple[list[tuple[tuple[int, ...], tuple[int, ...]]], bool, int]:
    """Return (turns up to a number of tokens, whether some are left behind, how many are longer than the model's)."""
    kept: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    have = longer = 0
    for context, answer in turns:
        size = len(context) + len(answer)
        if size > max_positions:
            longer += 1
            continue
        if limit is not None and kept and have + size > limit:
            return kept, True, longer
        kept.append((context, answer))
        have += size
    return kept, False, longer
