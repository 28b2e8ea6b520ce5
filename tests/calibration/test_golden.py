"""The tokens of packaged and plain texts: they must stay what they are, since checkpoints were made from them."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from gptoss_quantize.calibration.text import TextSpec, load_tokens

DOCUMENTS = [f"Document {i}: " + "the quick brown fox, ünïcode. " * (i + 1) for i in range(8)]
SPECIAL = ["<|endoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"]


@pytest.fixture(scope="module")
def tokenizer(tiny) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes."""
    return tiny.byte_tokenizer(*SPECIAL)


# computed with the code before rows were looked at: the tokens of checkpoints that exist must not change
@pytest.mark.parametrize(
    ("options", "sha256"),
    [
        ({}, "720080bc15a8b62e99856b7abb2fdcae0ba8fd13a1bb86ea7be97b7d600ffb20"),
        ({"seed": 1}, "fad44072eb99910968667b0428cd89d28ffb6955f5382508b0393f3470f8fe39"),
        # documents longer than the whole budget: packaged texts are not cut
        ({"tokens": 2048, "seq_len": 128}, "7a67b15736f29b66469c2fc97dee62dd4148f8727d547a176c387f05a02aaebe"),
        (
            {"source": "heldout", "shuffle": False, "tokens": 10240},
            "7ed3bb3f694424b7bff21e867569014f6c7abb431f05e5b3c1e360b8726a7f57",
        ),
    ],
)
def test_packaged_texts_give_the_same_tokens_for_ever(options: dict, sha256: str, tokenizer) -> None:
    assert load_tokens(TextSpec(**options), tokenizer).sha256 == sha256


@pytest.mark.parametrize(
    ("name", "shuffle", "sha256"),
    [
        ("a.jsonl", False, "bff6df0014da7e3bb001f858582eae6af8605d42ff5b854268f633ff8addf516"),
        ("a.jsonl", True, "70092ae2c19119a8c019f6c27d184313adadb9ed783bc18132d91c5d8761ede4"),
        ("a.txt", False, "31625300affcdfc8c2b5f6ee9aa7daa1465bfdcef857498066a7a01b3aae33de"),
        ("a.txt", True, "147c77f949314026633acb94de2abe162612c4320721784465ad69b07f71dfa2"),
    ],
)
def test_plain_files_give_the_same_tokens_for_ever(
    name: str, shuffle: bool, sha256: str, tmp_path: Path, tokenizer
) -> None:
    rows = [{"id": i, "text": text} for i, text in enumerate(DOCUMENTS * 5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "a.txt").write_text("\n\n".join(DOCUMENTS * 40), encoding="utf-8")
    spec = TextSpec(source=str(tmp_path / name), tokens=4096, seq_len=64, shuffle=shuffle)
    assert load_tokens(spec, tokenizer).sha256 == sha256
