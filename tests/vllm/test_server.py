"""vLLM's server on an int4 checkpoint as a real process, asked by the `openai` client; and by lm-eval.

The checkpoint is the tiny model's, or the demo model's where GPTOSS_DEMO names its directory.
"""

import asyncio
import json
import os
import signal
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from gptoss_quantize.calibration.text import load_tokenizer
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.eval.suite import expand
from gptoss_quantize.eval.tasks import TaskSettings, run_tasks, task_model

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def path(checkpoint):
    """The checkpoint that is served."""
    return Path(os.environ.get("GPTOSS_DEMO") or checkpoint())


@pytest.fixture(scope="module")
def server(path, serve, tmp_path_factory):
    """A server that answers."""
    length = json.loads((path / "config.json").read_text())["max_position_embeddings"]
    with serve(path, tmp_path_factory.mktemp("server") / "log", min(512, length)) as found:
        yield found


@pytest.fixture
def client(server):
    """A client of the server."""
    return openai.OpenAI(base_url=server.url(), api_key="none", max_retries=0)


PROMPT = "The sea was calm, and the lighthouse keeper"


def test_a_completion_is_what_our_model_says(client, path, greedy):
    tokenizer = load_tokenizer(path)
    ids = tokenizer(PROMPT)["input_ids"]
    expected = tokenizer.decode(greedy(path, ids, 12), skip_special_tokens=True)
    answer = client.completions.create(model="ours", prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.choices[0].text == expected
    assert answer.usage.prompt_tokens == len(ids)


MESSAGES = [{"role": "user", "content": "Tell me of the sea."}]


def test_chat_goes_through_the_chat_template(client, path, greedy):
    # neither OpenAI's chat format, nor its parser of thoughts, which answers 501 without it
    tokenizer = load_tokenizer(path)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    expected = tokenizer.decode(greedy(path, ids, 8), skip_special_tokens=True)
    answer = client.chat.completions.create(
        model="ours", messages=MESSAGES, max_tokens=8, temperature=0, extra_body={"return_token_ids": True}
    )
    assert answer.prompt_token_ids == ids
    assert (answer.choices[0].message.content or "") == expected


def test_streaming_chat_gives_the_same_text_in_pieces(client):
    asked = {"model": "ours", "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(pieces) == whole and sum(map(bool, pieces)) > 4


def test_streaming_gives_the_same_text_in_pieces(client):
    asked = {"model": "ours", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)]
    assert "".join(pieces) == whole and len(pieces) > 4


def test_eight_clients_at_once_get_what_each_gets_alone(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=server.url(), api_key="none") as many:

            async def one(number):
                asked = {"model": "ours", "prompt": f"{PROMPT} counted {number}", "max_tokens": 12, "temperature": 0}
                return (await many.completions.create(**asked)).choices[0].text

            together = await asyncio.gather(*map(one, range(8)))
            return together, [await one(number) for number in range(8)]

    together, alone = asyncio.run(ask())
    assert together == alone and len(set(alone)) > 1


def test_a_prompt_that_is_too_long_is_a_clean_400(client):
    with pytest.raises(openai.BadRequestError, match=r"context length|maximum"):
        client.completions.create(model="ours", prompt=PROMPT * 200, max_tokens=4)
    assert client.completions.create(model="ours", prompt=PROMPT, max_tokens=1).choices


def running(server):
    """How many requests the engine works on, by its metrics."""
    with urllib.request.urlopen(server.url("/metrics")) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


def test_a_cancelled_request_leaves_the_engine(client, server):
    asked = {"model": "ours", "prompt": PROMPT, "max_tokens": 60, "temperature": 0}
    stream = client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    for _ in range(100):
        if not running(server):
            break
        time.sleep(0.1)
    assert running(server) == 0
    assert client.completions.create(model="ours", prompt=PROMPT, max_tokens=1).choices


def test_lm_eval_answers_each_item_as_compare_does(server, path):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    tokenizer = load_tokenizer(path)
    settings = TaskSettings(names=tuple(expand(["offline"])), limit=6)
    ours = run_tasks(
        task_model(
            Checkpoint(path),
            tokenizer,
            dtype=torch.float32,
            answers=None,
            load_model=None,
            on_layer=lambda: None,
        ),
        settings,
    )
    served = run_tasks(
        LocalCompletionsAPI(
            model="ours",
            base_url=server.url("/v1/completions"),
            tokenizer=str(path),
            tokenizer_backend="huggingface",
            num_concurrent=4,
            max_length=server.length,
        ),
        settings,
    )
    assert len(ours) == 9
    for task, found in ours.items():
        assert served[task]["prompts_sha256"] == found["prompts_sha256"]
        assert served[task]["right"] == found["right"], task
        assert served[task]["metrics"]["acc,none"] == found["metrics"]["acc,none"]


def test_it_stops_cleanly(server):
    # last: the server is gone afterwards
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=60) == 0, server.log.read_text(errors="replace")[-2000:]
    assert "Traceback" not in server.log.read_text(errors="replace")
