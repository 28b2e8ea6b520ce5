"""Text in, tokens out: every kind of source, the packing, the hash, the packaged texts, every refusal."""

import gzip
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gptoss_quantize.calibration.sources import default_calibration_path, read_rows
from gptoss_quantize.calibration.text import DATE, TextSpec, load_following, load_tokenizer, load_tokens
from gptoss_quantize.errors import InputError

DOCUMENTS = [f"Document {i}: " + "the quick brown fox, ünïcode. " * (i + 1) for i in range(8)]
END = "<|endoftext|>"

# the shape of gpt-oss's template: a dated system message, a channel for `thinking`, <|return|> at the end
HARMONY = """{%- macro system() %}{{ "Current date: " + strftime_now("%Y-%m-%d") }}{% endmacro %}
{{- "<|start|>system<|message|>" }}{{ system() }}{{ "<|end|>" }}
{%- for message in messages %}
{%- if message.role not in ["user", "assistant"] %}{{ raise_exception("unknown role " + message.role) }}{% endif %}
{%- if "thinking" in message %}{{ "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}{% endif %}
{%- set channel = "<|channel|>final" if message.role == "assistant" else "" %}
{{- "<|start|>" + message.role + channel + "<|message|>" + message.content }}
{{- "<|return|>" if loop.last and message.role == "assistant" else "<|end|>" }}
{%- endfor %}"""  # noqa: E501
CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "thinking": "A sum.", "content": "It is 4."},
]
RENDERED = (
    f"<|start|>system<|message|>Current date: {DATE}<|end|><|start|>user<|message|>What is 2 + 2?<|end|>"
    "<|start|>assistant<|channel|>analysis<|message|>A sum.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>It is 4.<|return|>"
)


def make_tokenizer(*specials: str, **roles: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return PreTrainedTokenizerFast(tokenizer_object=inner, **roles)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(END, "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>")


@pytest.fixture(scope="module")
def harmony() -> PreTrainedTokenizerFast:
    made = make_tokenizer(END, "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>")
    made.chat_template = HARMONY
    return made


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def json_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ordered(source: Path | str, **options) -> TextSpec:
    """Return a spec for all of a text, in its order, uncut, in sequences of 8."""
    usual = {"source": str(source), "tokens": None, "seq_len": 8, "shuffle": False, "max_document": 10**6}
    return TextSpec(**usual | options)


def text_of(spec: TextSpec, tokenizer) -> str:
    return tokenizer.decode(load_tokens(spec, tokenizer).ids.flatten().tolist())


def assert_packed(spec: TextSpec, tokenizer, expected: str) -> None:
    """Compare the tokens with those of the expected text, up to the last whole sequence."""
    ids = tokenizer(expected)["input_ids"]
    assert load_tokens(spec, tokenizer).ids.flatten().tolist() == ids[: len(ids) // spec.seq_len * spec.seq_len]


# ---- kinds of sources


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "hf"])
def test_every_kind_of_table_gives_the_same_documents(kind: str, tmp_path: Path, tokenizer) -> None:
    source: Path | str = tmp_path / f"data.{kind}"
    rows = [{"id": i, "text": text} for i, text in enumerate(DOCUMENTS)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), source, row_group_size=3)
    elif kind == "hf":
        (tmp_path / "set").mkdir()
        json_lines(tmp_path / "set" / "train.jsonl", rows)
        source = f"hf:{tmp_path / 'set'}"
    else:
        plain = json_lines(tmp_path / "plain", rows).read_bytes()
        source.write_bytes(gzip.compress(plain) if kind.endswith("gz") else plain)
    tokens = load_tokens(ordered(source), tokenizer)
    assert tokens.documents == len(DOCUMENTS)
    assert tokens.source == str(source)
    assert_packed(ordered(source), tokenizer, END.join(DOCUMENTS))


@pytest.mark.parametrize("kind", ["txt", "txt.gz"])
def test_plain_text_in_order_is_one_document_in_pieces(kind: str, tmp_path: Path, tokenizer) -> None:
    text = "\n\n".join(DOCUMENTS * 20)  # over 4 kB several times: read in pieces
    data = text.replace("\n", "\r\n").encode("utf-8-sig")
    path = tmp_path / f"text.{kind}"
    path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    assert len(list(read_rows(str(path), fields=("text",), column=None, seed=None))) > 3
    assert load_tokens(ordered(path), tokenizer).documents == 1
    assert_packed(ordered(path), tokenizer, text)


def test_plain_text_is_shuffled_by_passage(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"{i} " + "x" * 4096 for i in range(9)) + "\n", encoding="utf-8")
    found = re.findall(r"\d", text_of(ordered(path, shuffle=True, seed=3, seq_len=2), tokenizer))
    assert sorted(found) == list("012345678") != found
    assert load_tokens(ordered(path, shuffle=True), tokenizer).documents == 9


def test_text_without_any_line_end_is_read(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "text.txt"
    path.write_text("word " * 50_000, encoding="utf-8")
    assert load_tokens(ordered(path), tokenizer).tokens == 250_000


def test_text_that_begins_with_blank_lines_is_one_document(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n" * 5000 + DOCUMENTS[0], encoding="utf-8")
    assert load_tokens(ordered(path), tokenizer).documents == 1


def test_a_column_that_is_named_is_taken(tmp_path: Path, tokenizer) -> None:
    path = json_lines(tmp_path / "data.jsonl", [{"text": "no" * 9, "body": "yes " * 4}])
    assert text_of(ordered(path, column="body"), tokenizer) == "yes " * 4


def test_blank_records_are_passed_over(tmp_path: Path, tokenizer) -> None:
    rows = [{"text": ""}, {"text": " \n"}, {"text": None}, {"text": DOCUMENTS[0]}]
    path = json_lines(tmp_path / "data.jsonl", rows)
    path.write_text("\n" + path.read_text(encoding="utf-8") + "\n\n", encoding="utf-8")
    tokens = load_tokens(ordered(path), tokenizer)
    assert tokens.documents == 1


# ---- conversations


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations_are_rendered_with_the_chat_template(kind: str, tmp_path: Path, harmony) -> None:
    path = tmp_path / f"chat.{kind}"
    rows = [{"messages": CHAT, "text": "not this"}] * 2
    if kind == "parquet":  # gives the user's message a `thinking` of None, which must not reach the template
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        json_lines(path, rows)
    assert_packed(ordered(path), harmony, RENDERED + END + RENDERED)
    first = load_tokens(ordered(path), harmony).ids[0, 0]
    assert first == harmony.convert_tokens_to_ids("<|start|>")  # a special token, not its characters


def test_text_is_preferred_where_no_chat_template_is_wanted(tmp_path: Path, harmony) -> None:
    path = json_lines(tmp_path / "chat.jsonl", [{"messages": CHAT, "text": "this text"}])
    assert text_of(ordered(path, chat_template=False), harmony) == "this tex"
    joined = ordered(path, chat_template=False, column="messages")
    assert_packed(joined, harmony, "What is 2 + 2?\n\nA sum.\n\nIt is 4.")


# ---- packing, order, hash


def test_sequences_are_whole_and_the_budget_is_rounded_down(tmp_path: Path, tokenizer) -> None:
    path = json_lines(tmp_path / "data.jsonl", [{"text": text} for text in DOCUMENTS])
    tokens = load_tokens(TextSpec(source=str(path), tokens=115, seq_len=10, max_document=10**6), tokenizer)
    assert tokens.ids.shape == (11, 10)
    assert tokens.ids.dtype == torch.int64
    assert tokens.tokens == 110
    assert tokens.record() == {
        "source": str(path),
        "documents": tokens.documents,
        "sequences": 11,
        "seq_len": 10,
        "tokens": 110,
        "separator": END,
        "sha256": tokens.sha256,
        "conversations": 0,
        "documents_cut": 0,
        "cut_at": None,
        "rows_empty": 0,
        "rows_skipped": 0,
        "skipped": [],
        "messages_left_out": 0,
    }


def test_no_more_documents_are_read_than_needed(tmp_path: Path, tokenizer) -> None:
    path = json_lines(tmp_path / "data.jsonl", [{"text": text} for text in DOCUMENTS])
    path.write_text(path.read_text(encoding="utf-8") + "not json\n", encoding="utf-8")
    tokens = load_tokens(ordered(path, tokens=64), tokenizer)
    assert tokens.documents == 2 and tokens.counts.skipped == 0
    assert "line 9: not JSON" in load_tokens(ordered(path), tokenizer).counts.named[0]


def test_what_follows_is_the_rest_of_the_same_text(tmp_path: Path, tokenizer) -> None:
    path = json_lines(tmp_path / "data.jsonl", [{"text": text} for text in DOCUMENTS])
    spec = TextSpec(source=str(path), tokens=40, seq_len=8, seed=5, max_document=10**6)
    whole = load_tokens(replace(spec, tokens=None), tokenizer).ids
    first, more = load_tokens(spec, tokenizer), load_following(spec, tokenizer, 24)
    assert torch.equal(first.ids, whole[:5])
    assert torch.equal(more.ids, whole[5:8])
    assert more.sha256 not in (first.sha256, load_following(spec, tokenizer, 16).sha256)
    # only documents that it holds something of are counted
    assert load_following(spec, tokenizer, 10**6).documents == 8
    assert load_following(replace(spec, tokens=whole.numel() - 8), tokenizer, 8).documents == 1
    # fewer where the text ends, None where nothing is left
    assert torch.equal(load_following(spec, tokenizer, 10**6).ids, whole[5:])
    assert load_following(replace(spec, tokens=whole.numel()), tokenizer, 24) is None


def test_the_same_spec_gives_the_same_tokens_whatever_the_global_state(tmp_path: Path, tokenizer) -> None:
    path = json_lines(tmp_path / "data.jsonl", [{"text": text} for text in DOCUMENTS])
    spec = TextSpec(source=str(path), tokens=320, seq_len=16, seed=5)
    first = load_tokens(spec, tokenizer)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    again = load_tokens(spec, tokenizer)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])
    assert torch.equal(first.ids, again.ids)
    assert first.sha256 == again.sha256


def test_the_hash_follows_text_order_and_shape(tmp_path: Path, tokenizer) -> None:
    rows = [{"text": text} for text in DOCUMENTS]
    path = json_lines(tmp_path / "data.jsonl", rows)
    spec = {"tokens": 320, "seq_len": 16}
    hashes = {
        load_tokens(ordered(path, **spec), tokenizer).sha256,
        load_tokens(ordered(path, **spec, shuffle=True), tokenizer).sha256,
        load_tokens(ordered(path, **spec, shuffle=True, seed=1), tokenizer).sha256,
        load_tokens(ordered(path, tokens=320, seq_len=32), tokenizer).sha256,
        load_tokens(ordered(json_lines(path, [{"text": "document"}, *rows]), **spec), tokenizer).sha256,
    }
    assert len(hashes) == 5


@pytest.mark.parametrize(
    ("made", "separator"),
    [
        (make_tokenizer(END, "<e>", "<b>", eos_token="<e>", bos_token="<b>"), END),
        (make_tokenizer("<e>", "<b>", eos_token="<e>", bos_token="<b>"), "<e>"),
        (make_tokenizer("<b>", "<u>", bos_token="<b>", unk_token="<u>"), "<b>"),
        (make_tokenizer("<u>", unk_token="<u>"), None),
    ],
)
def test_documents_are_joined_by_the_separator_the_tokenizer_has(made, separator, tmp_path: Path) -> None:
    path = json_lines(tmp_path / "data.jsonl", [{"text": "abc"}, {"text": "defg"}, {"text": "hij"}])
    tokens = load_tokens(ordered(path, seq_len=2), made)
    assert tokens.separator == separator
    assert made.decode(tokens.ids.flatten().tolist()) == (separator or "").join(["abc", "defg", "hij"])


def test_default_source_is_the_packaged_calibration_text(tokenizer) -> None:
    path = default_calibration_path()
    assert path.name == "calibration.jsonl.gz"
    by_path = load_tokens(TextSpec(source=str(path)), tokenizer)
    assert by_path.sha256 == load_tokens(TextSpec(), tokenizer).sha256


# ---- tokenizer directories


def test_tokenizer_is_loaded_from_a_directory(tmp_path: Path, harmony) -> None:
    harmony.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    path = json_lines(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    assert load_tokens(ordered(path), loaded).sha256 == load_tokens(ordered(path), harmony).sha256


def test_directories_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(InputError, match=r"has no tokenizer\.json; copy"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}', encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer.json: not a tokenizer .*copy"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_with_a_broken_config_is_refused(tmp_path: Path, tokenizer) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="the tokenizer does not load"):
        load_tokenizer(tmp_path)


# ---- refusals: what, where, expected, remedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 100, "seq_len": 512}, r"100 tokens do not fill one sequence of 512; .*--tokens"),
        ({"tokens": 0}, "0 tokens do not fill"),
        ({"seq_len": 0}, "sequence length 0: expected at least 2"),
        ({"seed": -1}, "seed -1: expected 0 or more"),
    ],
)
def test_impossible_specs_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TextSpec(**options)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("data.jsonl", b"", "data.jsonl: the file is empty; expected text"),
        ("data.txt", b" \n\n", "data.txt: holds no text; expected at least one document"),
        ("data.jsonl", b'{"text": "caf\xe9"}\n', r"line 1: byte 0xe9 is not UTF-8; expected .*iconv"),
        ("data.txt", b"one\ntwo\ncaf\xe9\n", r"line 3: byte 0xe9 is not UTF-8; expected .*iconv"),
        ("data.jsonl", b'\n\n{"text": \n', r"line 3: not JSON .*expected one object per line"),
        ("data.jsonl", b"7\n", "line 1: a int; expected an object"),
        ("data.jsonl", b'{"body": "a"}\n', r"line 1: no column 'messages' or 'text'.*only \['body'\]; name"),
        ("data.jsonl", b'{"text": 7}\n', r"line 1: a int; expected a text .*--column"),
        ("data.jsonl", b'{"messages": ["hello"]}\n', "line 1: message 0: expected .*found 'hello'"),
        ("data.jsonl", b'{"messages": [{"role": "user"}]}\n', "line 1: message 0: has no content"),
        (
            "data.jsonl",
            b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}\n',
            "message 0: content is a list with a part of type 'text' without text; expected a text",
        ),
        (
            "data.jsonl",
            b'{"messages": [{"role": "poet", "content": "a"}]}\n',
            r"line 1: the chat template refuses the conversation \(unknown role poet\); .*correct or delete",
        ),
        ("data.doc", b"text", r"data.doc: not a kind of text .*\.parquet, hf:NAME"),
        ("data.parquet", b"text" * 9, "data.parquet: not a readable parquet file"),
        ("data.jsonl.gz", b"text" * 9, "data.jsonl.gz: not a whole gzip file"),
        ("data.txt.gz", gzip.compress(bytes(range(256)), mtime=0)[:40], "data.txt.gz: not a whole gzip file"),
        ("data.txt", b"only a few words", r"data.txt: 16 tokens in 1 .*, 64 are needed .*at most 16\)"),
        ("data.txt", b"few", r"data.txt: 3 tokens in 1 .*smaller --seq-len"),
    ],
)
def test_unusable_files_are_refused(name: str, data: bytes, message: str, tmp_path: Path, harmony) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as refusal:
        load_tokens(ordered(path, tokens=64), harmony)
    assert str(path) in str(refusal.value)


def test_conversations_without_a_chat_template_are_refused(tmp_path: Path, tokenizer) -> None:
    path = json_lines(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    with pytest.raises(InputError, match=r"line 1: .*no chat template.*chat_template.jinja.*--no-chat-template"):
        load_tokens(ordered(path), tokenizer)
