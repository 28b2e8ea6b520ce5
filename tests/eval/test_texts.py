"""Raw text and conversations as trees: what is scored, and what stands before it."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from gptoss_quantize.calibration.messages import messages_of
from gptoss_quantize.calibration.rows import Conversation
from gptoss_quantize.calibration.text import DATE, TextSpec, load_tokens
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval.texts import assistant_turns, load_text

HARMONY = Path(__file__).resolve().parents[1] / "data" / "harmony.jinja"
SPECIAL = ["<|endoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"]
CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "thinking": "A sum.", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "thinking": "Again.", "content": "It is 6."},
]
SYSTEM = (
    f"<|start|>system<|message|>You are ChatGPT.\nCurrent date: {DATE}\n# Valid channels: analysis, final.<|end|>"
)


@pytest.fixture(scope="module")
def harmony(tiny) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes and Harmony's special tokens, with its template."""
    return tiny.byte_tokenizer(*SPECIAL, eos_token="<|return|>", chat_template=HARMONY.read_text(encoding="utf-8"))


def write(path: Path, rows: list) -> TextSpec:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TextSpec(source=str(path), tokens=None, seq_len=8, shuffle=False)


def test_the_assistants_turns_are_scored_in_what_stands_before_them(harmony):
    first, second = (
        tuple(map(harmony.decode, turn)) for turn in assistant_turns(Conversation(messages_of(CHAT)), harmony, "here")
    )
    question = "<|start|>user<|message|>What is 2 + 2?<|end|>"
    assert first[0] == f"{SYSTEM}{question}<|start|>assistant"
    thought = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"
    assert first[1] == thought.format("A sum.", "It is 4.")
    # the thinking of the first turn is gone when the second is answered, and its end marker is another
    before = "<|start|>assistant<|channel|>final<|message|>It is 4.<|end|><|start|>user<|message|>And 3 + 3?<|end|>"
    assert second[0] == f"{SYSTEM}{question}{before}<|start|>assistant"
    assert second[1] == thought.format("Again.", "It is 6.")


def test_a_file_of_conversations_is_chat(harmony, tmp_path):
    text = load_text(write(tmp_path / "chat.jsonl", [{"messages": CHAT}, {"messages": CHAT[:2]}]), harmony, 1000)
    assert text.kind == "chat" and len(text.trees) == 3 and text.left_out == 0
    assert text.trees[0] == text.trees[2]
    record = text.record()
    assert record["scored_tokens"] == sum(len(tree.branches[0]) for tree in text.trees)
    assert record["sequences"] == 3


def test_a_turn_beyond_the_models_positions_is_left_out_and_counted(harmony, tmp_path):
    spec = write(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    lengths = [len(tree) for tree in load_text(spec, harmony, 1000).trees]
    text = load_text(spec, harmony, max(lengths) - 1)
    assert len(text.trees) == 1 and text.left_out == 1 and text.record()["turns_left_out"] == 1


def test_raw_text_scores_all_but_the_first_token_of_a_sequence(harmony, tmp_path):
    spec = write(tmp_path / "raw.jsonl", [{"text": "A calm sea, and a lighthouse."}])
    text = load_text(spec, harmony, 1000)
    ids = load_tokens(spec, harmony).ids
    assert text.kind == "raw"
    assert [tree.context + tree.branches[0] for tree in text.trees] == [tuple(row) for row in ids.tolist()]
    assert text.record()["scored_tokens"] == ids.shape[0] * 7


def test_the_hash_names_the_tokens(harmony, tmp_path):
    one, same, other = (
        load_text(write(tmp_path / f"{i}.jsonl", [{"text": text}]), harmony, 1000)
        for i, text in enumerate(["A calm sea.", "A calm sea.", "A calm bay."])
    )
    assert one.sha256 == same.sha256 != other.sha256


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": CHAT[:1]}], "no assistant's answer to score"),
        (
            [{"messages": [{"role": "poet", "content": "O"}, *CHAT[1:2]]}],
            "refuses the conversation .*unknown role poet",
        ),
        ([{"messages": CHAT}, *[{"messages": "plain"}] * 2], "line 2: no list of messages"),
    ],
)
def test_conversations_that_cannot_be_scored_are_refused(harmony, tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        load_text(write(tmp_path / "chat.jsonl", rows), harmony, 1000)


def test_rows_of_other_shapes_are_chat_and_bad_ones_are_counted(harmony, tmp_path):
    shapes = [
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"instruction": "Q", "input": "", "output": "A"},
        {"messages": json.dumps([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}])},
    ]
    text = load_text(write(tmp_path / "chat.jsonl", [*shapes, {"id": 1}]), harmony, 1000)
    assert text.kind == "chat" and len(text.trees) == 3
    assert text.trees[0] == text.trees[1] == text.trees[2]
    record = text.record()
    assert (record["conversations"], record["rows_skipped"]) == (3, 1)
    assert "line 4: no column" in record["skipped"][0]


def test_one_endless_conversation_does_not_take_the_budget(harmony, tmp_path):
    spec = replace(
        write(tmp_path / "chat.jsonl", [{"messages": CHAT * 100}, *[{"messages": CHAT}] * 50]), tokens=16384
    )
    text = load_text(spec, harmony, 10**6)
    longest = spec.document_limit(conversation=True)
    assert text.record()["documents_cut"] == 1 and text.record()["cut_at"] == longest == 2048
    trees = iter(text.trees)
    first = 0
    for tree in trees:
        if tree.context == text.trees[0].context and first:
            break  # the second conversation
        first += len(tree)
    assert longest / 2 < first <= longest
    assert text.record()["conversations"] > 15
    # alone, it fills the budget
    alone = load_text(
        replace(write(tmp_path / "one.jsonl", [{"messages": CHAT * 100}]), tokens=16384), harmony, 10**6
    )
    assert sum(map(len, alone.trees)) >= 16384


def test_the_tools_of_a_row_stand_before_every_answer(harmony, tmp_path):
    made = copy.deepcopy(harmony)
    made.chat_template = "{{ tools|tojson if tools else '' }}" + harmony.chat_template
    tools = [{"type": "function", "function": {"name": "f"}}]
    text = load_text(write(tmp_path / "chat.jsonl", [{"messages": CHAT, "tools": json.dumps(tools)}]), made, 10_000)
    assert len(text.trees) == 2
    assert all(made.decode(tree.context).startswith(json.dumps(tools)) for tree in text.trees)


def test_a_template_that_writes_another_beginning_is_refused(harmony, tmp_path):
    odd = copy.deepcopy(harmony)
    odd.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match="does not write the same beginning"):
        list(assistant_turns(Conversation(messages_of(CHAT)), odd, "here"))
