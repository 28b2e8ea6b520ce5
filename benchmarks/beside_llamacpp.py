"""Our int4 experts and llama.cpp on the same codes, the same machine, the same threads, in turn: tokens a second.

Usage: beside_llamacpp.py MODEL [--gguf FILE] [--threads 2] [--rounds 3] [--tokens 64] [--prompt 128] [--json F]

MODEL is an int4 directory of ours with a tokenizer. FILE is its export to GGUF (Q4_0, the same codes), made in
MODEL-gguf where it is not given. Both decode one sequence greedily after the same prompt of token ids; prompt and
decoding are timed apart, and the best of all rounds counts. Ours runs in transformers' `generate`; llama.cpp's
numbers are those of its own server (xllamacpp, its defaults: float16 cache).
"""

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import gptoss_quantize as gq

SERVER = """
import sys, xllamacpp
path, threads, context = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.verbosity = path, int(context), 1, -1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def served(path: Path, threads: int, context: int) -> Iterator[str]:
    """Run llama.cpp's server on a file and give its address."""
    command = [sys.executable, "-P", "-c", SERVER, str(path), str(threads), str(context)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield next(line.strip() for line in process.stdout if line.startswith("http"))
        finally:
            process.kill()


def theirs(address: str, ids: list[int], count: int) -> dict[str, float]:
    """Return llama.cpp's tokens per second of a prompt and of the tokens after it."""
    asked = {"prompt": ids, "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    data = json.dumps(asked).encode()
    request = urllib.request.Request(f"{address}/completion", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        timings = json.load(answer)["timings"]
    return {"prompt": timings["prompt_per_second"], "decode": timings["predicted_per_second"]}


def ours(model: Any, ids: list[int], count: int) -> dict[str, float]:
    """Return our tokens per second of a prompt and of the tokens after it."""
    prompt = torch.tensor([ids])
    settings = {"do_sample": False, "pad_token_id": 0}
    times = []
    for length in (1, count + 1):
        started = time.perf_counter()
        model.generate(prompt, max_new_tokens=length, min_new_tokens=length, **settings)
        times.append(time.perf_counter() - started)
    return {"prompt": len(ids) / times[0], "decode": count / (times[1] - times[0])}


def main() -> None:
    """Measure in turn, print the best of each and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--gguf", type=Path)
    for name, value in (("threads", 2), ("rounds", 3), ("tokens", 64), ("prompt", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.model.with_name(args.model.name + "-gguf")
    if not args.gguf and not folder.exists():
        gq.export(args.model, folder, to="gguf")
    file = args.gguf or next(folder.glob("*.gguf"))
    model = gq.load(args.model)
    model.generation_config.eos_token_id = None
    ids = torch.randint(0, 2000, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    best: dict[str, dict[str, float]] = {"ours": {}, "llama.cpp": {}}
    with torch.inference_mode(), served(file, args.threads, args.prompt + args.tokens + 8) as address:
        for _ in range(args.rounds + 1):  # the first reads the files
            for name, seen in (
                ("ours", ours(model, ids, args.tokens)),
                ("llama.cpp", theirs(address, ids, args.tokens)),
            ):
                best[name] = {key: max(value, best[name].get(key, 0.0)) for key, value in seen.items()}
    for name, row in best.items():
        print(f"{name:10} prompt {row['prompt']:8.1f} tokens/s, decode {row['decode']:7.2f} tokens/s")
    ratio = {key: best["llama.cpp"][key] / best["ours"][key] for key in ("prompt", "decode")}
    print(f"our time over llama.cpp's: prompt {ratio['prompt']:.2f}, decode {ratio['decode']:.2f}")
    if args.json:
        args.json.write_text(
            json.dumps(best | {"our time over llama.cpp's": ratio}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
