"""Which tasks can be had without a network: switches, a connection, the caches, and task files of lm-eval."""

import socket
import time
from threading import Event

import pytest

from gptoss_quantize.errors import InputError
from gptoss_quantize.eval import network


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in (*network.SWITCHES, "HF_ENDPOINT", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed(listening):
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"http://127.0.0.1:{server.getsockname()[1]}"
    return place


def test_a_hub_that_answers_is_asked_later(listening, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", listening)
    assert network.why_offline() is None
    network.check_reachable(["hellaswag", "offline", "nonsense"])


@pytest.mark.parametrize("switch", network.SWITCHES)
def test_switches(listening, monkeypatch, switch):
    monkeypatch.setenv("HF_ENDPOINT", listening)
    monkeypatch.setenv(switch, "0")
    assert network.why_offline() is None
    monkeypatch.setenv(switch, "1")
    assert network.why_offline() == f"{switch} is set"


def test_a_proxy_stands_for_the_hub(listening, closed, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    assert network.why_offline() == "hub.invalid does not answer"
    monkeypatch.setenv("http_proxy", listening)
    assert network.why_offline() is None
    monkeypatch.setenv("http_proxy", closed.removeprefix("http://"))
    assert "127.0.0.1 does not answer" in str(network.why_offline())


def test_a_name_that_nobody_resolves_costs_a_second(monkeypatch):
    answered = Event()

    def late(*args, **kwargs):
        answered.wait(60)
        raise OSError("no such name")

    monkeypatch.setattr(network.socket, "create_connection", late)
    start = time.perf_counter()
    assert network.why_offline() is not None
    assert time.perf_counter() - start < 30
    answered.set()


def refused(name: str, *words: str) -> None:
    with pytest.raises(InputError) as error:
        network.check_reachable([name])
    assert not [word for word in words if word not in str(error.value)], error.value


def test_tasks_whose_data_are_not_here(closed, monkeypatch, home):
    monkeypatch.setenv("HF_ENDPOINT", closed)
    refused(
        "hellaswag", "--tasks hellaswag: needs the data set Rowan/hellaswag", "127.0.0.1 does not answer", str(home)
    )
    # by way of what its file includes
    refused("arc_challenge", "the data set allenai/ai2_arc", "lm_eval validate --tasks arc_challenge")
    refused("mmlu", "--tasks mmlu: is no packaged task")
    refused("nonsense", "--tasks nonsense: is no packaged task")
    network.check_reachable(["offline", "gptoss_kinds", "none"])
    # a task of the user's own may have data of its own
    network.check_reachable(["mine"], include_path="tasks")


@pytest.mark.parametrize("place", ["hub/datasets--Rowan--hellaswag", "datasets/Rowan___hellaswag"])
def test_tasks_whose_data_are_cached(closed, monkeypatch, home, place):
    monkeypatch.setenv("HF_ENDPOINT", closed)
    (home / "datasets" / "json").mkdir(parents=True)
    refused("mmlu", "is no packaged task")
    (home / place).mkdir(parents=True)
    network.check_reachable(["hellaswag"])
    refused("gsm8k", "openai/gsm8k")
    # what a group needs is not known, so it is left to lm-eval
    network.check_reachable(["mmlu"])
