"""`generate`: text as it comes, whatever bytes its tokens are made of; sampling; how it is seen from a pipe."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import gptoss_quantize as gq
from gptoss_quantize.talk import Pieces

SCRIPTED = Path(__file__).with_name("scripted_model.py")
WORDS = "naïve — 漢字 🎉, ok"
SPEED = r"prompt: (\d+) tokens, [\d.]+ tokens/s; answer: (\d+) tokens(, [\d.]+ tokens/s)?"


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny.path("bf16"))


def pieces_of(tokenizer, ids: list[int]) -> tuple[list[str], str]:
    """Return what each token gave, and what was left."""
    pieces = Pieces(tokenizer)
    return [pieces.add(i) for i in ids], pieces.rest()


# ---- pieces


def test_a_character_comes_with_its_last_byte(tokenizer):
    ids = tokenizer(WORDS)["input_ids"]
    given_out, rest = pieces_of(tokenizer, ids)
    assert "".join(given_out) == WORDS and rest == ""
    # more bytes than characters: some tokens complete none
    assert given_out.count("") == len(WORDS.encode()) - len(WORDS) > 5
    for i in range(len(ids)):
        whole = tokenizer.decode(ids[: i + 1]).rstrip("\N{REPLACEMENT CHARACTER}")
        assert "".join(given_out[: i + 1]) == whole


def test_half_a_character_at_the_end_is_told(tokenizer):
    ids = tokenizer("a🎉")["input_ids"][:-1]
    given_out, rest = pieces_of(tokenizer, ids)
    assert "".join(given_out) == "a" and rest == "\N{REPLACEMENT CHARACTER}" == tokenizer.decode(ids)[1:]


def test_special_tokens_are_no_text(tokenizer):
    marks = tokenizer.convert_tokens_to_ids(["<|start|>", "<|end|>"])
    ids = [marks[0], *tokenizer("sea")["input_ids"], marks[1], *tokenizer(" é")["input_ids"]]
    given_out, rest = pieces_of(tokenizer, ids)
    assert "".join(given_out) + rest == "sea é"


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 295), max_size=24))
def test_pieces_joined_are_the_text(tokenizer, ids):
    given_out, rest = pieces_of(tokenizer, ids)
    assert "".join(given_out) + rest == tokenizer.decode(ids, skip_special_tokens=True)


# ---- gq.generate


def greedy(model, ids: list[int], new: int) -> list[int]:
    """Return what argmax adds, by whole forward passes without any cache."""
    out = list(ids)
    with torch.inference_mode():
        for _ in range(new):
            out.append(int(model(torch.tensor([out])).logits[0, -1].argmax()))
            if out[-1] == model.config.eos_token_id:
                break
    return out[len(ids) :]


def test_generate_is_greedy_and_tells_each_piece(tiny, tokenizer):
    path, told = tiny.path("float32"), []
    text = gq.generate(path, "The sea", raw=True, max_new_tokens=24, dtype="float32", on_text=told.append)
    model = tiny.model().float().eval()
    assert text == tokenizer.decode(greedy(model, tokenizer("The sea")["input_ids"], 24), skip_special_tokens=True)
    assert "".join(told) == text and len(told) > 5 and all(told)


def test_sampling(tiny):
    path = tiny.path("float32")
    asked = {"raw": True, "max_new_tokens": 12, "dtype": "float32"}

    def draw(**how) -> str:
        return gq.generate(path, "The sea", **asked, **how)

    before = torch.random.get_rng_state()
    found = [draw(temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert found[0] == found[1] != found[2]
    likeliest = draw()
    assert draw(seed=3) == likeliest != found[0]
    assert draw(temperature=1.0, seed=1, top_k=1) == draw(temperature=1.0, seed=1, top_p=1e-6) == likeliest
    assert draw(temperature=1e-4, seed=1) == likeliest


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"temperature": -1}, "--temperature -1: expected at least 0"),
        ({"temperature": 1, "top_p": 0}, "--top-p 0: expected more than 0"),
        ({"temperature": 1, "top_p": 1.5}, "--top-p 1.5"),
        ({"temperature": 1, "top_k": -1}, "--top-k -1"),
        ({"top_p": 0.9}, "give --temperature too"),
        ({"top_k": 4}, "give --temperature too"),
        ({"device": "tpu"}, "--device tpu"),
    ],
)
def test_refused(tiny, how, words):
    with pytest.raises(gq.InputError, match=re.escape(words)):
        gq.generate(tiny.path("bf16"), "x", **how)


# ---- the command in a pipe


@pytest.fixture
def started(tiny, tokenizer, tmp_path):
    """Return a function that starts `generate` with a slow model that says WORDS, its stdout a pipe."""
    marks = tokenizer.convert_tokens_to_ids(["<|start|>", "<|end|>"])
    ids = [marks[0], *tokenizer(WORDS)["input_ids"], marks[1]]

    def start(pause: float, *more: str) -> subprocess.Popen:
        (tmp_path / "script.json").write_text(json.dumps({"answers": [ids], "pause": pause}))
        words = ["generate", str(tiny.path("bf16")), "--prompt", "hi", *more]
        # empty: as if it were not set, so that only our own flushing is seen
        environment = os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": ""}
        return subprocess.Popen(
            [sys.executable, SCRIPTED, tmp_path / "script.json", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )

    start.tokens = len(ids)
    return start


def test_text_arrives_while_it_is_made(started):
    pause = 0.1
    process = started(pause, "--device", "cpu")
    first = process.stdout.read1(64)
    seen = time.monotonic()
    rest, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert first and first.decode() in WORDS and len(first) < 8
    # the rest of the tokens took their time after it
    assert time.monotonic() - seen > pause * started.tokens / 2
    assert (first + rest).decode() == WORDS + "\n"
    speed, following = err.decode().splitlines()
    assert following.startswith("try: gptoss-quantize chat ")
    found = re.fullmatch(SPEED, speed)
    # the end of text counts: it was made like any other token
    assert found and int(found[2]) == started.tokens + 1 and found[3], err.decode()
    assert 0 < float(found[3].split()[1]) < 1 / pause


def test_interrupted(started):
    process = started(0.3)
    first = process.stdout.read1(64)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err.decode()
    assert (first + rest).decode().endswith("\n") and (first + rest).decode().rstrip("\n") in WORDS
