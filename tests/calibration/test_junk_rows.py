"""Whatever a row holds, it is a text, a conversation, empty, or skipped with a reason: nothing else comes out."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from gptoss_quantize.calibration.messages import RowError
from gptoss_quantize.calibration.rows import FIELDS, Conversation, document
from gptoss_quantize.calibration.sources import read_rows
from gptoss_quantize.calibration.text import TextSpec, load_tokens
from gptoss_quantize.errors import InputError

HARMONY = Path(__file__).resolve().parents[1] / "data" / "harmony.jinja"
KEYS = (
    "role", "from", "content", "value", "text", "parts", "type", "thinking", "reasoning_content", "channel",
    "tool_calls", "function_call", "function", "name", "arguments", "parameters", "recipient", "id", "tool_call_id",
)  # fmt: skip
WORDS = ("user", "assistant", "system", "developer", "tool", "human", "gpt", "function_call", "analysis", "[]", "{}",
         '[{"role": "user"}]', "[1", "", " ", "text", "functions.f", "\ud800", "<|start|>")  # fmt: skip
leaves = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.sampled_from(WORDS) | st.text(max_size=5)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
messages = st.lists(st.dictionaries(st.sampled_from(KEYS), values, max_size=4) | values, max_size=4)
rows = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), values | messages, max_size=4) | values
NAMES = ("a.json", "a.jsonl", "a.json.gz")
few = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def harmony(tiny) -> PreTrainedTokenizerFast:
    return tiny.byte_tokenizer("<|start|>", eos_token="<|start|>", chat_template=HARMONY.read_text(encoding="utf-8"))


def check(found: Any) -> None:
    if found is None:
        return
    if isinstance(found, str):
        assert found.strip()
        return
    assert isinstance(found, Conversation) and found.messages
    for message in found.messages:
        assert isinstance(message["role"], str)
        assert message.keys() & {"content", "thinking", "tool_calls"}
        assert all(isinstance(message.get(key, ""), str) for key in ("content", "thinking"))
        for call in message.get("tool_calls", []):
            assert isinstance(call["function"]["arguments"], dict)
    assert all(isinstance(tool["function"]["name"], str) for tool in found.tools or [])


@few
@given(row=rows, column=st.none() | st.sampled_from(FIELDS), prefer=st.sampled_from(["messages", "text"]))
def test_a_row_is_one_of_four_things(row: Any, column: str | None, prefer: str) -> None:
    try:
        check(document(row, column, prefer))
    except RowError as error:
        assert str(error)


@settings(few, max_examples=150)
@given(junk=st.lists(rows, max_size=5), shuffle=st.booleans())
def test_a_file_of_junk_is_tokens_or_a_refusal(junk: list, shuffle: bool, tmp_path_factory, harmony) -> None:
    path = tmp_path_factory.mktemp("junk") / "a.jsonl"
    lines = [{"text": "good"} if i % 2 else row for i, row in enumerate(junk * 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*lines, {"text": "good"}]), encoding="utf-8")
    spec = TextSpec(source=str(path), tokens=None, seq_len=2, shuffle=shuffle)
    try:
        tokens = load_tokens(spec, harmony)
    except InputError as error:
        assert "cannot be used" in str(error)
    else:
        record = tokens.record()
        assert record["documents"] + record["rows_skipped"] + record["rows_empty"] >= len(lines) + 1


@settings(few, max_examples=200)
@given(
    data=st.binary(max_size=60) | st.text('[]{}",:\n ab1', max_size=40).map(str.encode),
    name=st.sampled_from(NAMES),
)
def test_a_file_of_bytes_is_rows_or_a_refusal(data: bytes, name: str, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(data)
    try:
        found = list(read_rows(str(path), fields=FIELDS, column=None, seed=0))
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert all(row.error is not None or row.where for row in found)


def test_nesting_without_end_is_a_reason(harmony) -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(RowError):
        document({"messages": [{"role": "user", "content": "a", "more": deep}]})
