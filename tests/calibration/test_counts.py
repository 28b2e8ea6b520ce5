"""What is skipped, counted, named and cut, and when a run stops."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from gptoss_quantize.calibration.text import TextSpec, Tokens, load_tokens
from gptoss_quantize.errors import InputError

SPECIAL = ["<|endoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"]
HARMONY = Path(__file__).resolve().parents[1] / "data" / "harmony_tools.jinja"
USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
OUTCOME = {"role": "tool", "content": "R"}


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}], **more}


@pytest.fixture(scope="module")
def harmony(tiny) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes and Harmony's special tokens, with its template."""
    return tiny.byte_tokenizer(*SPECIAL, eos_token="<|return|>", chat_template=HARMONY.read_text(encoding="utf-8"))


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


BAD = {
    "no known field": ({"id": 7}, "no column 'messages' or 'text'.*only \\['id'\\].*--column"),
    "no answer": ({"question": "Q", "answers": {"text": ["A"]}}, "a question without an answer"),
    "null answer": ({"instruction": "Q", "output": None}, "a question without an answer"),
    "no question": ({"output": "A"}, "an answer without a question"),
    "no role": (chatted({"content": "Q"}), "message 0: expected"),
    "an unknown role": (chatted(USER, {"role": "poet", "content": "O"}, ANSWER), "does not write the role 'poet'"),
    "refused": (chatted(USER, {"role": "assistant", "content": "<|channel|>analysis"}), "refuses .*channel tags"),
    "an image": (chatted({"role": "user", "content": [{"type": "image_url"}]}), "message 0: .*type 'image_url'"),
    "a number": (chatted({"role": "user", "content": 5}), "message 0: content is a int"),
    "broken arguments": (chatted(USER, call('{"n": ')), "message 1: the arguments of a tool call: not JSON"),
    "arguments of a list": (chatted(USER, call("[1]")), "arguments of a tool call are a list"),
    "broken tools": (chatted(USER, ANSWER, tools="[{"), "tools: not JSON"),
    "a tool without a name": (chatted(USER, ANSWER, tools=[{"a": 1}]), "a tool without a name"),
    "analysis at the end": (chatted(USER, aside("T", "analysis")), "ends with analysis"),
    "analysis before a user": (chatted(aside("T", "analysis"), USER, ANSWER), "message 1: no answer after"),
    "half a pair": ({"text": "\ud800"}, "surrogate"),
    "half a pair in a message": (chatted(USER, {"role": "assistant", "content": "\ud800"}), "surrogate"),
    "a result without a call": (chatted(USER, OUTCOME), "tool role without a call"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_skipped_counted_and_named(name: str, tmp_path: Path, harmony) -> None:
    row, reason = BAD[name]
    path = json_lines(tmp_path / "a.jsonl", [{"text": "first"}, row, {"text": "last"}])
    tokens = load(path, harmony)
    assert documents(tokens, harmony)[0] == "first" and tokens.documents == 2
    record = tokens.record()
    assert record["rows_skipped"] == 1 and len(record["skipped"]) == 1
    assert f"1 row skipped ({path}: line 2: " in tokens.line()
    with pytest.raises(InputError, match=f"line 1: .*{reason}"):
        load(json_lines(tmp_path / "b.jsonl", [row]), harmony)


def test_null_and_empty_rows_are_no_fault(tmp_path: Path, harmony) -> None:
    empty = [None, {}, [], "", {"text": None}, {"text": float("nan")}, {"messages": []}, {"messages": "[]"}]
    empty += [{"conversations": None}, {"instruction": None, "output": None}]
    tokens = load(json_lines(tmp_path / "a.jsonl", [*empty * 9, {"text": "some"}]), harmony)
    assert tokens.documents == 1 and tokens.counts.empty == 90 and tokens.counts.skipped == 0
    with pytest.raises(InputError, match="holds no text"):
        load(json_lines(tmp_path / "b.jsonl", empty), harmony)


@pytest.mark.parametrize(("good", "bad", "stops"), [(38, 2, False), (37, 3, True), (1, 1, False), (0, 1, True)])
def test_many_bad_rows_stop_the_run_and_the_first_are_named(
    good: int, bad: int, stops: bool, tmp_path: Path, harmony
) -> None:
    path = json_lines(tmp_path / "a.jsonl", [*[{"text": "good"}] * good, *[{"id": 1}] * bad])
    if not stops:
        assert load(path, harmony).counts.skipped == bad
        return
    with pytest.raises(InputError, match=rf"{bad} of the {good + bad} rows read cannot be used") as refusal:
        load(path, harmony)
    for line in range(good + 1, good + 1 + min(bad, 3)):
        assert f"{path}: line {line}: no column" in str(refusal.value)


def test_a_file_of_bad_rows_is_given_up_early(tmp_path: Path, harmony) -> None:
    rows = [*[{"id": 1}, {"text": "good"}] * 20, *[{"id": 1}] * 10_000]
    with pytest.raises(
        InputError, match=r"51 of the 71 rows read .*\n.*line 1: .*\n.*line 3: .*\n.*line 5: .*\n.*48 more"
    ):
        load(json_lines(tmp_path / "a.jsonl", rows), harmony)


# ---- long documents


def test_one_endless_conversation_does_not_take_the_budget(tmp_path: Path, harmony) -> None:
    long = chatted(*[USER, ANSWER] * 3000)
    path = json_lines(tmp_path / "a.jsonl", [long, *[chatted(USER, {**ANSWER, "content": "A" * 900})] * 60])
    tokens = load(path, harmony, tokens=16_384, seq_len=128)
    found = documents(tokens, harmony)
    assert len(harmony(found[0])["input_ids"]) == 2048  # an eighth
    assert tokens.documents == len(found) > 14
    assert tokens.record()["documents_cut"] == 1 and tokens.record()["cut_at"] == 2048
    assert "1 cut at 2,048 tokens" in tokens.line() and f"{len(found)} conversations" in tokens.line()


def test_one_endless_text_does_not_take_the_budget(tmp_path: Path, harmony) -> None:
    path = json_lines(tmp_path / "a.jsonl", [{"text": "long " * 100_000}, *[{"text": "short " * 100}] * 40])
    tokens = load(path, harmony, tokens=16_384, seq_len=128)
    assert len(documents(tokens, harmony)[0]) == 4096 and tokens.documents > 20  # a quarter
    assert load(path, harmony, tokens=2048, seq_len=128).counts.cut_at == 1024
    assert load(path, harmony, tokens=16_384, seq_len=128, max_document=700).counts.cut_at == 700


def test_the_cut_is_raised_where_the_text_would_not_fill_the_budget(tmp_path: Path, harmony) -> None:
    from gptoss_quantize.calibration.text import load_following

    path = json_lines(tmp_path / "a.jsonl", [{"text": "x" * 9000}, {"text": "y" * 9000}])
    tokens = load(path, harmony, tokens=8192, seq_len=64)
    assert [len(d) for d in documents(tokens, harmony)] == [4096, 4095]  # and the separator
    assert tokens.counts.cut_at == 4096
    spec = TextSpec(source=str(path), tokens=8192, seq_len=64, shuffle=False)
    assert load_following(spec, harmony, 64) is None
    whole = load(path, harmony, tokens=16_384, seq_len=64)
    assert whole.documents == 2 and whole.counts.cut_at == 8192
    with pytest.raises(InputError, match="18001 tokens in 2 document"):
        load(path, harmony, tokens=32_768, seq_len=64)
