"""Rows in the shapes in which people keep their data, each with the exact text that the model sees."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from gptoss_quantize.calibration.text import TextSpec, Tokens, load_tokens

SPECIAL = ["<|endoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"]
HARMONY = Path(__file__).resolve().parents[1] / "data" / "harmony_tools.jinja"
SYSTEM = "<|start|>system<|message|>Date: 2025-08-05<|end|>"
ASKED = "<|start|>user<|message|>Q<|end|>"
ANSWERED = "<|start|>assistant<|channel|>final<|message|>A<|return|>"
THOUGHT = "<|start|>assistant<|channel|>analysis<|message|>T<|end|>"
PLAIN = SYSTEM + ASKED + ANSWERED
SHORT = "<|start|>developer<|message|>S<|end|>"
CALLED = '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"n": 1}<|call|>'
RESULT = '<|start|>functions.f to=assistant<|channel|>commentary<|message|>"R"<|end|>'
WITH_CALL = SYSTEM + ASKED + CALLED + RESULT + ANSWERED
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
TOOLS = f"<|start|>developer<|message|># Tools {json.dumps([TOOL])}<|end|>"
USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
OUTCOME = {"role": "tool", "content": "R"}


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}], **more}


@pytest.fixture(scope="module")
def harmony(tiny) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes and Harmony's special tokens, with its template."""
    return tiny.byte_tokenizer(*SPECIAL, eos_token="<|return|>", chat_template=HARMONY.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def json_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(source: Path | str, tokenizer, **options: Any) -> Tokens:
    usual = {"source": str(source), "tokens": None, "seq_len": 2, "shuffle": False}
    return load_tokens(TextSpec(**usual | options), tokenizer)


def documents(tokens: Tokens, tokenizer) -> list[str]:
    """Return the documents of tokens; the last character is missing where the sequences do not end with it."""
    return tokenizer.decode(tokens.ids.flatten().tolist()).split("<|endoftext|>")


def chatted(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages), **fields}


def aside(text: str, channel: str) -> dict[str, Any]:
    return {"role": "assistant", "channel": channel, "content": text}


def part(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}]


SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
CASES: dict[str, tuple[Any, str]] = {
    # ShareGPT
    "sharegpt": ({"conversations": SHAREGPT}, PLAIN),
    "sharegpt with a system turn": (
        {"conversations": [{"from": "system", "value": "S"}, *SHAREGPT]},
        SYSTEM + SHORT + ASKED + ANSWERED,
    ),
    "sharegpt with a system field": ({"system": "S", "conversations": SHAREGPT}, SYSTEM + SHORT + ASKED + ANSWERED),
    "sharegpt with the names of roles": (
        {"conversations": [{"from": "user", "value": "Q"}, {"from": "Assistant", "value": "A"}]},
        PLAIN,
    ),
    "sharegpt with calls": (
        {
            "tools": "[]",
            "conversations": [
                SHAREGPT[0],
                {"from": "function_call", "value": '{"name": "f", "arguments": {"n": 1}}'},
                {"from": "observation", "value": "R"},
                SHAREGPT[1],
            ],
        },
        WITH_CALL,
    ),
    "conversations with roles": ({"conversations": [USER, ANSWER]}, PLAIN),
    "a conversation without an object": ([USER, ANSWER], PLAIN),
    "a list per field": ({"messages": {"role": ["user", "assistant"], "content": ["Q", "A"]}}, PLAIN),
    # questions and answers
    "alpaca": ({"instruction": "Q", "input": "", "output": "A"}, PLAIN),
    "alpaca with null input": ({"instruction": "Q", "input": None, "output": "A"}, PLAIN),
    "alpaca with input and system": (
        {"instruction": "I", "input": "Q", "output": "A", "system": "S"},
        f"{SYSTEM}{SHORT}<|start|>user<|message|>I\n\nQ<|end|>{ANSWERED}",
    ),
    "alpaca with history": (
        {"instruction": "Q", "output": "A", "history": [["Q", "B"]]},
        f"{SYSTEM}{ASKED}<|start|>assistant<|channel|>final<|message|>B<|end|>{ASKED}{ANSWERED}",
    ),
    "dolly": (
        {"instruction": "I", "context": "Q", "response": "A", "category": "c"},
        f"{SYSTEM}<|start|>user<|message|>I\n\nQ<|end|>{ANSWERED}",
    ),
    "prompt and completion": ({"prompt": "Q", "completion": "A"}, PLAIN),
    "prompt and response": ({"prompt": "Q", "response": "A"}, PLAIN),
    "question and answer": ({"question": "Q", "answer": "A"}, PLAIN),
    "orca": ({"system_prompt": "S", "question": "Q", "response": "A"}, SYSTEM + SHORT + ASKED + ANSWERED),
    "prompt of messages": ({"prompt": [USER], "completion": [ANSWER]}, PLAIN),
    "prompt of messages as text": ({"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}, PLAIN),
    "prompt of messages, completion a text": ({"prompt": [USER], "completion": "A"}, PLAIN),
    "the chosen one": ({"prompt": "Q", "chosen": [USER, ANSWER], "rejected": [USER, USER]}, PLAIN),
    "the chosen one alone": ({"chosen": [USER, ANSWER], "rejected": []}, PLAIN),
    "with reasoning": ({"prompt": "Q", "completion": "A", "reasoning": "T"}, SYSTEM + ASKED + THOUGHT + ANSWERED),
    "a rendered prompt": ({"prompt": PLAIN[:-10], "completion": PLAIN[-10:]}, PLAIN),
    # messages as they are kept
    "messages as text": ({"messages": json.dumps([USER, ANSWER])}, PLAIN),
    "messages as Python writes them": ({"messages": str([USER, ANSWER])}, PLAIN),
    "parts": (chatted({"role": "user", "content": part("Q")}, {"role": "assistant", "content": part("A")}), PLAIN),
    "several parts": (chatted({"role": "user", "content": [*part("Q"), *part("")]}, ANSWER), PLAIN),
    "a part of thinking": (
        chatted(USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "T"}, *part("A")]}),
        SYSTEM + ASKED + THOUGHT + ANSWERED,
    ),
    "null messages, a text": ({"messages": None, "text": "plain"}, "plain"),
    "no messages, a text": ({"messages": [], "text": "plain"}, "plain"),
    "messages of nothing": ({"messages": [{"role": "user", "content": ""}], "text": "plain"}, "plain"),
    "both": (chatted(USER, ANSWER, text="not this"), PLAIN),
    "a rendered text in messages": ({"messages": PLAIN}, PLAIN),
    "text beside an answer": ({"instruction": "Q", "output": "A", "text": "as it was"}, "as it was"),
    # thinking, channels, roles
    "thinking": (chatted(USER, {**ANSWER, "thinking": "T"}), SYSTEM + ASKED + THOUGHT + ANSWERED),
    "reasoning_content": (chatted(USER, {**ANSWER, "reasoning_content": "T"}), SYSTEM + ASKED + THOUGHT + ANSWERED),
    "thinking of nothing": (chatted(USER, {**ANSWER, "thinking": ""}), PLAIN),
    "channels": (chatted(USER, aside("T", "analysis"), aside("A", "final")), SYSTEM + ASKED + THOUGHT + ANSWERED),
    "commentary": (chatted(USER, aside("T", "commentary"), ANSWER), SYSTEM + ASKED + THOUGHT + ANSWERED),
    "analysis twice": (
        chatted(USER, aside("T", "analysis"), aside("U", "analysis"), ANSWER),
        SYSTEM + ASKED + THOUGHT.replace("T", "T\n\nU") + ANSWERED,
    ),
    "analysis before a call": (
        chatted(USER, aside("T", "analysis"), call({"n": 1}), OUTCOME, ANSWER),
        SYSTEM + ASKED + THOUGHT + CALLED + RESULT + ANSWERED,
    ),
    "a recipient": (
        chatted(USER, {**aside('{"n": 1}', "commentary"), "recipient": "functions.f"}, OUTCOME, ANSWER),
        WITH_CALL,
    ),
    "developer": (chatted({"role": "developer", "content": "S"}, USER, ANSWER), SYSTEM + SHORT + ASKED + ANSWERED),
    "system and developer": (
        chatted({"role": "system", "content": "S"}, {"role": "developer", "content": "D"}, USER, ANSWER),
        SYSTEM + SHORT.replace("S", "S\n\nD") + ASKED + ANSWERED,
    ),
    # tools
    "a call": (chatted(USER, call({"n": 1}), OUTCOME, ANSWER), WITH_CALL),
    "arguments as text": (chatted(USER, call('{"n": 1}'), OUTCOME, ANSWER), WITH_CALL),
    "arguments as text of text": (chatted(USER, call(json.dumps('{"n": 1}')), OUTCOME, ANSWER), WITH_CALL),
    "arguments with nulls of other rows": (chatted(USER, call({"n": 1, "port": None}), OUTCOME, ANSWER), WITH_CALL),
    "a null in arguments as text": (
        chatted(USER, call('{"n": null}'), OUTCOME, ANSWER),
        WITH_CALL.replace('{"n": 1}', '{"n": null}'),
    ),
    "calls as text": (
        chatted(USER, {**call(None), "tool_calls": json.dumps(call({"n": 1})["tool_calls"])}, OUTCOME, ANSWER),
        WITH_CALL,
    ),
    "function_call": (
        chatted(
            USER,
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"n": 1}'}},
            {"role": "function", "name": "f", "content": "R"},
            ANSWER,
        ),
        WITH_CALL,
    ),
    "content and thinking in a call": (
        chatted(USER, call({"n": 1}, content="C", thinking="T"), OUTCOME, ANSWER),
        SYSTEM + ASKED + THOUGHT.replace("T", "T\n\nC") + CALLED + RESULT + ANSWERED,
    ),
    "two calls at once": (
        chatted(
            USER,
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "a", "function": {"name": "f", "arguments": {"n": 1}}},
                    {"id": "b", "function": {"name": "g", "arguments": {}}},
                ],
            },
            {"role": "tool", "tool_call_id": "b", "content": "second"},
            {"role": "tool", "tool_call_id": "a", "content": "R"},
            ANSWER,
        ),
        SYSTEM + ASKED + CALLED + RESULT
        + CALLED.replace("functions.f", "functions.g").replace('{"n": 1}', "{}")
        + RESULT.replace("functions.f", "functions.g").replace("R", "second") + ANSWERED,
    ),
    "an object as a result": (
        chatted(USER, call({"n": 1}), {"role": "tool", "content": {"k": 1}}, ANSWER),
        WITH_CALL.replace('"R"', json.dumps('{"k": 1}')),
    ),
    "no calls": (chatted(USER, {**ANSWER, "tool_calls": []}), PLAIN),
    "tools": (chatted(USER, ANSWER, tools=[TOOL]), SYSTEM + TOOLS + ASKED + ANSWERED),
    "tools as text": (chatted(USER, ANSWER, tools=json.dumps([TOOL])), SYSTEM + TOOLS + ASKED + ANSWERED),
    "tools as texts": (chatted(USER, ANSWER, tools=[json.dumps(TOOL)]), SYSTEM + TOOLS + ASKED + ANSWERED),
    "functions": (chatted(USER, ANSWER, functions=[TOOL["function"]]), SYSTEM + TOOLS + ASKED + ANSWERED),
    "tools with nulls of other rows": (
        chatted(USER, ANSWER, tools=[{**TOOL, "function": {**TOOL["function"], "strict": None}}]),
        SYSTEM + TOOLS + ASKED + ANSWERED,
    ),
    "parameters as text": (
        chatted(USER, ANSWER, tools=[{"type": "function", "name": "f", "parameters": '{"type": "object"}'}]),
        SYSTEM + TOOLS + ASKED + ANSWERED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_rendered_as_the_model_sees_it(name: str, tmp_path: Path, harmony) -> None:
    row, expected = CASES[name]
    # twice, so that the first one is whole whatever the length of a sequence
    tokens = load(json_lines(tmp_path / "a.jsonl", [row, row]), harmony)
    assert documents(tokens, harmony)[0] == expected
    assert tokens.documents == 2
    assert tokens.counts.conversations == (0 if "<|start|>" not in expected or "rendered" in name else 2)


@pytest.mark.parametrize("name", ["sharegpt", "alpaca", "parts", "a call", "tools as text", "channels", "thinking"])
@pytest.mark.parametrize("kind", ["parquet", "json", "hf"])
def test_every_kind_of_file_gives_the_same_text(name: str, kind: str, tmp_path: Path, harmony) -> None:
    row, expected = CASES[name]
    other = {key: value for key, value in CASES["prompt and completion"][0].items()}
    source: Path | str = tmp_path / f"a.{kind}"
    rows = [row, row, other]  # the other row gives each of them columns of null
    if kind == "json":
        source.write_text(json.dumps({"data": rows}), encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist([{**dict.fromkeys([*row, *other]), **r} for r in rows]), source)
    else:
        (tmp_path / "set").mkdir()
        filled = [{**dict.fromkeys([*row, *other]), **r} for r in rows]
        datasets.Dataset.from_list(filled).to_parquet(tmp_path / "set" / "train.parquet")
        source = f"hf:{tmp_path / 'set'}"
    assert documents(load(source, harmony), harmony)[:2] == [expected, expected]


def test_parquet_gives_structs_the_fields_of_other_rows_and_they_are_left_out(tmp_path: Path, harmony) -> None:
    rows = [chatted(USER, call({"n": 1}), OUTCOME, ANSWER), chatted(USER, call({"port": "x"}), OUTCOME, ANSWER)] * 2
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).to_json(tmp_path / "a.jsonl")
    assert '"port": null' in (tmp_path / "a.jsonl").read_text().replace(":null", ": null")
    for name in ("a.parquet", "a.jsonl"):
        found = documents(load(tmp_path / name, harmony), harmony)
        assert found[:2] == [WITH_CALL, WITH_CALL.replace('{"n": 1}', '{"port": "x"}')]


@pytest.mark.parametrize("name", ["sharegpt", "messages as text", "parts", "a conversation without an object"])
def test_a_named_column_may_hold_any_shape(name: str, tmp_path: Path, harmony) -> None:
    row, expected = CASES[name]
    inner = row if isinstance(row, list) else next(iter(row.values()))
    for value in (inner, json.dumps(inner) if isinstance(inner, list) else inner, {"messages": inner}):
        path = json_lines(tmp_path / "a.jsonl", [{"mine": value, "messages": "no", "text": "no"}] * 2)
        assert documents(load(path, harmony, column="mine"), harmony)[0] == expected


def test_a_named_column_keeps_the_tools_of_its_row(tmp_path: Path, harmony) -> None:
    path = json_lines(tmp_path / "a.jsonl", [{"mine": [USER, ANSWER], "tools": [TOOL]}] * 2)
    assert documents(load(path, harmony, column="mine"), harmony)[0] == SYSTEM + TOOLS + ASKED + ANSWERED


def test_a_text_that_looks_like_json_stays_a_text(tmp_path: Path, harmony) -> None:
    text = json.dumps([USER, ANSWER])
    assert documents(load(json_lines(tmp_path / "a.jsonl", [{"text": text}] * 2), harmony), harmony)[0] == text
    code = "[x for x in y]"
    path = json_lines(tmp_path / "b.jsonl", [{"messages": code}, {"messages": '{"a": 1}'}, {"messages": "x"}])
    assert documents(load(path, harmony), harmony)[:2] == [code, '{"a": 1}']


def test_what_the_template_does_not_write_is_counted_and_named(tmp_path: Path, harmony) -> None:
    late = chatted(USER, {"role": "system", "content": "LATE"}, ANSWER)
    tokens = load(json_lines(tmp_path / "a.jsonl", [chatted(USER, ANSWER), late, late]), harmony)
    assert tokens.documents == 3
    assert tokens.record()["messages_left_out"] == 2
    assert "2 messages that the chat template does not write" in tokens.line()
    assert "line 2: message 1, system" in tokens.line()


def test_without_a_template_contents_are_joined(tmp_path: Path, harmony) -> None:
    path = json_lines(tmp_path / "a.jsonl", [{"conversations": SHAREGPT}, {"instruction": "Q", "output": "A"}] * 2)
    assert documents(load(path, harmony, chat_template=False), harmony)[:2] == ["Q\n\nA", "Q\n\nA"]
