"""Texts to compare models on, as trees: passages of raw text, and the assistant's turns of conversations.

Raw text is packed into sequences of equal length (`calibration.text`); every token but the first of a sequence is
scored. Of a conversation, only what the assistant says is scored, given what the chat template puts before it: one
tree per assistant's turn, its context rendered with the opening of an answer, so that the model sees exactly what it
would see in use. For gpt-oss that is Harmony: channel, message and end markers of the turn are scored with it.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from gptoss_quantize.calibration.sources import describe, read_records
from gptoss_quantize.calibration.text import TextSpec, checked_messages, load_tokens, render_chat
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
        }


def load_text(spec: TextSpec, tokenizer: PreTrainedTokenizerBase, max_positions: int) -> Text:
    """Return the text that a spec stands for: conversations as chat where there is a template, all else raw."""
    first = next(iter(read_records(spec.source, column=spec.column, prefer="messages", seed=None)), None)
    if first is not None and isinstance(first.value, list) and spec.chat_template:
        trees, left_out = _chat(spec, tokenizer, max_positions)
        return _text(spec, "chat", trees, left_out)
    ids = load_tokens(spec, tokenizer).ids.tolist()
    return _text(spec, "raw", [Tree((row[0],), (tuple(row[1:]),)) for row in ids], 0)


def _text(spec: TextSpec, kind: str, trees: list[Tree], left_out: int) -> Text:
    content = json.dumps([[tree.context, tree.branches] for tree in trees]).encode()
    return Text(
        name=describe(spec.source),
        kind=kind,
        trees=tuple(trees),
        sha256=hashlib.sha256(content).hexdigest(),
        left_out=left_out,
    )


def assistant_turns(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return (tokens before, tokens of the turn) for every assistant's message that follows another one."""
    turns = []
    for k, message in enumerate(messages):
        if message["role"] != "assistant" or not k:
            continue
        before = render_chat(messages[:k], tokenizer, where, answer_next=True)
        whole = render_chat(messages[: k + 1], tokenizer, where)
        if not whole.startswith(before):
            raise InputError(
                f"{where}: message {k}: the chat template does not write the same beginning with and without the "
                "answer, so its tokens cannot be told apart; give the conversation as rendered text"
            )
        ids, context = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (whole, before))
        # a tokenizer may join the end of the context to the answer: what is joined belongs to the answer
        shared = next((i for i, (a, b) in enumerate(zip(ids, context, strict=False)) if a != b), len(context))
        if 0 < shared < len(ids):
            turns.append((tuple(ids[:shared]), tuple(ids[shared:])))
    return turns


def _chat(spec: TextSpec, tokenizer: PreTrainedTokenizerBase, max_positions: int) -> tuple[list[Tree], int]:
    trees: list[Tree] = []
    have = left_out = 0
    seed = spec.seed if spec.shuffle else None
    for record in read_records(spec.source, column=spec.column, prefer="messages", seed=seed):
        if not isinstance(record.value, list):
            raise InputError(f"{record.where}: no list of messages, though the first record is one; split the file")
        for context, answer in assistant_turns(checked_messages(record.value, record.where), tokenizer, record.where):
            if len(context) + len(answer) > max_positions:
                left_out += 1
                continue
            trees.append(Tree(context, (answer,)))
            have += len(trees[-1])
        if spec.tokens is not None and have >= spec.tokens:
            break
    if not trees:
        raise InputError(f"{spec.source}: no assistant's answer to score; expected messages of user and assistant")
    return trees, left_out
