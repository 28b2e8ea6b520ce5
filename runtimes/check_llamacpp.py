"""llama.cpp's predictions for a GGUF file: by xllamacpp (a wheel, the extra `llamacpp`) or a llama-server binary.

Both speak llama-server's protocol. For each position the prompt up to there is completed by one token, with the
log-probabilities of the whole vocabulary; the prompt's cache makes that one new token each time. They are the model's
own, taken before sampling, so the token that is forced (a plain letter, since an unfinished character or an end token
would come back without them) changes nothing.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gptoss_quantize.config import ModelConfig
from gptoss_quantize.errors import InputError
from gptoss_quantize.files import Progress, no_progress

START_SECONDS = 600


def available() -> bool:
    """Return whether xllamacpp can be imported here."""
    return importlib.util.find_spec("xllamacpp") is not None


def reference_rope(config: ModelConfig) -> dict[str, Any]:
    """Return the rope settings that llama.cpp computes with: YaRN's ramp rounded outwards to whole dimensions.

    gpt-oss says `truncate: false`; ggml_rope_yarn_corr_dims takes floor and ceil nevertheless, and GGUF has no field
    for it. Its logits are compared with a reference that does the same; what that costs is reported beside it.
    """
    return config.rope | {"truncate": True}


@contextmanager
def serve(path: Path, context: int, binary: Path | None) -> Iterator[str]:
    """Yield the address of a server for the file; it stops with the block."""
    threads = str(torch.get_num_threads())
    if binary is None:
        command = [sys.executable, "-P", "-m", "gptoss_quantize.runtimes.llamacpp_server", str(path)]
        command += [str(context), threads]
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [str(binary), "-m", str(path), "-c", str(context), "-t", threads, "--port", str(port)]
        command += ["--parallel", "1", "--no-warmup", "--swa-full", "-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    # the checkout's folders must not be on the path of the child either
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    output = subprocess.PIPE if binary is None else subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.DEVNULL, text=True, env=environment
        )
    except OSError as error:
        raise InputError(f"{command[0]}: cannot be run ({error}); give the path of a llama-server binary") from None
    try:
        if binary is None:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
        else:
            address = f"http://127.0.0.1:{port}"
            _wait(address, process)
        if not address:
            raise InputError(f"{path}: llama.cpp cannot load this file (the server ended with {process.wait()})")
        yield address
    finally:
        process.terminate()
        process.communicate()


def _wait(address: str, process: subprocess.Popen[str]) -> None:
    """Wait until a llama-server has loaded its model."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise InputError(
                f"llama-server ended with {process.returncode} before it was ready; run it by hand to see"
            )
        try:
            with urllib.request.urlopen(address + "/health"):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise InputError(f"llama-server was not ready after {START_SECONDS} s")


def post(address: str, path: str, body: dict[str, Any]) -> Any:
    """Return the answer of the server to a JSON request."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())
    except (urllib.error.URLError, ConnectionError, ValueError) as error:
        raise InputError(
            f"llama.cpp did not answer {path} ({error}); the model may be too large for the memory"
        ) from None


def log_probs(
    address: str, ids_NS: torch.Tensor, positions: list[int], vocab: int, on_position: Progress = no_progress
) -> torch.Tensor:
    """Return the log-probabilities [N * positions, V] that llama.cpp predicts after each position."""
    letter = post(address, "/tokenize", {"content": "a"})["tokens"][0]
    out = torch.full((len(ids_NS) * len(positions), vocab), float("-inf"))
    for n, row in enumerate(ids_NS.tolist()):
        for i, position in enumerate(positions):
            request = {
                "prompt": row[: position + 1],
                "n_predict": 1,
                "n_probs": vocab,
                "cache_prompt": True,
                "temperature": 0.0,
                "logit_bias": [[letter, 1000.0]],
            }
            answer = post(address, "/completion", request)
            try:
                entries = answer["completion_probabilities"][0]["top_logprobs"]
            except (KeyError, IndexError):
                raise InputError(
                    "llama.cpp gave no probabilities; a newer xllamacpp or llama-server is needed"
                ) from None
            place = n * len(positions) + i
            out[place, [entry["id"] for entry in entries]] = torch.tensor([entry["logprob"] for entry in entries])
            on_position(place + 1, len(out))
    # -infinity below the smallest float that JSON printed
    return out.clamp(min=-1e4)


def tokenizes_alike(address: str, texts: list[str], expected: list[list[int]]) -> int:
    """Return how many texts llama.cpp cuts into other tokens than Hugging Face's tokenizer did."""
    answers = (post(address, "/tokenize", {"content": text, "parse_special": True})["tokens"] for text in texts)
    return sum(answer != ids for answer, ids in zip(answers, expected, strict=True))
