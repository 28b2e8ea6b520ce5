"""What a bug report needs: versions, processor, memory, cards, which kernel would run and why, where caches are.

Every part is asked for by itself, and a part that cannot be had says so instead of an answer: this is what people
run when something is broken, a library's installation for instance. Nothing is compiled and no network asked.
"""

import ctypes
import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from textwrap import wrap
from typing import Any

import psutil

from gptoss_quantize import __version__
from gptoss_quantize.units import gib

WIDTH = 80
DISTRIBUTION = "gptoss-quantize"
PACKAGES = (
    "torch", "transformers", "accelerate", "safetensors", "tokenizers", "huggingface_hub", "datasets", "pyarrow",
    "numpy", "gguf", "lm-eval", "triton", "vllm", "xllamacpp", "humming-kernels", "compressed-tensors", "peft",
)  # fmt: skip
# as /proc/cpuinfo calls them, x86 and Arm
FEATURES = {
    "avx2": "avx2", "avx512f": "avx512f", "avx512_vnni": "avx512_vnni", "avx512_bf16": "avx512_bf16",
    "amx_tile": "amx", "amx_bf16": "amx_bf16", "asimd": "neon", "bf16": "bf16", "sve": "sve",
}  # fmt: skip
VARIABLES = (
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY", "PYTHONSAFEPATH", "TRITON_CACHE_DIR", "TORCH_HOME",
)  # fmt: skip
# what a library that is missing, half installed or of another version raises
TROUBLE = (
    ImportError, OSError, RuntimeError, ValueError, AttributeError, KeyError, TypeError, AssertionError,
    subprocess.SubprocessError,
)  # fmt: skip


def report() -> dict[str, Any]:
    """Return all of it, plain data."""
    return {
        "gptoss-quantize": __version__,
        "installed at": str(Path(__file__).resolve().parent),
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "outside the versions that we take": _tried(outside_pins),
        "processor": _tried(processor),
        "memory": _tried(memory),
        "cards": _tried(cards),
        "kernels for packed experts": _tried(kernels),
        "C++ library": _tried(library),
        "caches": _tried(caches),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _tried(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except TROUBLE as error:
        return f"not to be had ({type(error).__name__}: {str(error).strip()[:200]})"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def outside_pins() -> list[str]:
    """Return what is installed in another version than pyproject.toml asks for, or is missing, in words."""
    parse = importlib.import_module("packaging.requirements").Requirement
    wrong = []
    for line in metadata.requires(DISTRIBUTION) or []:
        wanted = parse(line)
        needed = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        have = _version(wanted.name)
        if have is None and needed:
            wrong.append(f"{wanted.name} is missing ({wanted.specifier})")
        elif have is not None and not wanted.specifier.contains(have, prereleases=True):
            wrong.append(f"{wanted.name} {have} is not {wanted.specifier}")
    return sorted(set(wrong))


def processor() -> dict[str, Any]:
    """Return the processor's model, the features that kernels look at, and threads."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    if Path("/proc/cpuinfo").is_file():
        fields = [line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
        named = {name.strip(): value.strip() for name, _, value in reversed(fields)}
        model = named.get("model name", model)
        flags = set(named.get("flags", named.get("Features", "")).split())
    elif sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        model = subprocess.run(asked, check=True, capture_output=True, text=True, timeout=2).stdout.strip()
        flags = {"asimd"} if platform.machine() == "arm64" else set()
    return {
        "model": model,
        "features": [name for flag, name in FEATURES.items() if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads of torch": _tried(lambda: importlib.import_module("torch").get_num_threads()),
    }


def memory() -> dict[str, int]:
    """Return bytes: of the machine, and what this process may take of it (its control group's, if that is less)."""
    free = _tried(lambda: importlib.import_module("gptoss_quantize.machine").free_memory())
    whole = psutil.virtual_memory()
    return {"total": whole.total, "free": free if isinstance(free, int) else whole.available}


def cards() -> list[dict[str, Any]]:
    """Return the cards that torch sees."""
    torch = importlib.import_module("torch")
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(i)
        found.append(
            {
                "name": card.name,
                "memory": card.total_memory,
                "free": _tried(partial(_free_of, torch, i)),
                "compute capability": f"{card.major}.{card.minor}",
            }
        )
    return found


def _free_of(torch: Any, card: int) -> int:
    return int(torch.cuda.mem_get_info(card)[0])


def kernels() -> dict[str, str]:
    """Return which kernel packed experts would run in on each kind of device, and why."""
    torch = importlib.import_module("torch")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {device: _tried(partial(_kernel, device)) for device in devices}


def _kernel(device: str) -> str:
    native = importlib.import_module("gptoss_quantize.kernels.native")
    place = native.library()
    if device == "cpu" and place is not None and not place.is_file():
        return "not decided: the C++ library is compiled at first use"
    try:
        told = importlib.import_module("gptoss_quantize.kernels.experts_op").kernel_report
    except (ImportError, AttributeError):
        # a version without that operator
        if device != "cpu":
            return "plain torch, one expert at a time, slow: there is no other kernel"
        why = "C++ for SwiGLU" if native.available() else f"no C++ for SwiGLU: {native.problem()}"
        return f"plain torch, one expert unpacked at a time; {why}"
    return str(told(device))


def library() -> dict[str, Any]:
    """Return where the compiled C++ library lies, or will lie, and what stands in its way."""
    native = importlib.import_module("gptoss_quantize.kernels.native")
    place = native.library()
    if place is None:
        return {"file": None, "compiled": False, "problem": native.problem()}
    made = place.is_file()
    problem = ""
    if made:
        try:
            ctypes.CDLL(str(place))
        except OSError as error:
            problem = str(error)
    return {"file": str(place), "compiled": made, "problem": problem}


def caches() -> dict[str, str]:
    """Return the places where models and compiled code are kept."""
    constants = importlib.import_module("huggingface_hub.constants")
    ours = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptoss_quantize"
    return {"HF_HOME": str(constants.HF_HOME), "models": str(constants.HF_HUB_CACHE), "compiled": str(ours)}


def lines(found: dict[str, Any]) -> list[str]:
    """Return a report for people, a fact a line; words that do not fit into `WIDTH` columns go on below, indented."""
    out: list[str] = []
    for line in _facts(found):
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        # a path is not broken: it is there to be copied
        out += wrap(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return out


def _facts(found: dict[str, Any]) -> list[str]:
    out = []
    for name, value in found.items():
        if isinstance(value, dict):
            out.append(f"{name}:" + ("" if value else " none"))
            out.extend(f"  {key}: {_words(key, part)}" for key, part in value.items())
        elif isinstance(value, list):
            out.append(f"{name}:" + ("" if value else " none"))
            out.extend(f"  {_card(part) if isinstance(part, dict) else part}" for part in value)
        else:
            out.append(f"{name}: {value}")
    return out


def _words(key: str, value: Any) -> str:
    if key in ("total", "free", "memory") and isinstance(value, int):
        return gib(value)
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none of those that kernels look at"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value in (None, "") else str(value)


def _card(card: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_words(key, value)}" for key, value in card.items())
