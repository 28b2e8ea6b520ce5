"""What this machine is and has: the device and dtype to compute in, free memory, and how memory is given back."""

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from gptoss_quantize.errors import InputError


def pick_device(device: str) -> str:
    """Return the device to compute on; auto is cuda where there is one. InputError for one that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch {torch.__version__} sees no CUDA device; use --device cpu")
    if device != "cpu" and not device.startswith("cuda"):
        raise InputError(f"--device {device}: expected auto, cpu or cuda")
    number = device.removeprefix("cuda").removeprefix(":")
    if device != "cpu" and number and not (number.isdigit() and int(number) < torch.cuda.device_count()):
        raise InputError(f"--device {device}: torch sees {torch.cuda.device_count()} card(s), cuda:0 is the first")
    return device


@contextmanager
def fitting(device: str, remedy: str) -> Iterator[None]:
    """Raise InputError with a remedy where the memory of a card does not hold what is done meanwhile."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise InputError(f"--device {device}: does not fit into its memory; {remedy}, or --device cpu") from None


def compute_dtype(device: str) -> torch.dtype:
    """Return the dtype that matrix products run fastest in: bfloat16 where the hardware multiplies it natively."""
    if device.startswith("cuda"):
        return torch.bfloat16
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return torch.float32
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


def free_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that this process may take: the system's, or its control `group`'s where that is less."""
    free = psutil.virtual_memory().available
    try:
        limit, used, stat = (
            (group / name).read_text(encoding="utf-8") for name in ("memory.max", "memory.current", "memory.stat")
        )
        if limit.strip() != "max":
            # files in the system's cache are counted as used, and given up when memory is wanted
            lines = dict(line.split() for line in stat.splitlines())
            cached = int(lines.get("inactive_file", 0)) + int(lines.get("active_file", 0))
            free = min(free, int(limit) - max(0, int(used) - cached))
    except (OSError, ValueError):
        return free
    return max(0, free)


def peak_rss_mib() -> int | None:
    """Return the process's peak resident memory in MiB since its start; None where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 1024
    except OSError:
        if sys.platform == "darwin":
            import resource  # noqa: PLC0415

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20  # bytes there
        peak = getattr(psutil.Process().memory_info(), "peak_wset", None)  # Windows
        return None if peak is None else peak >> 20
    return None


def reuse_memory() -> None:
    """Tell glibc to keep freed arrays for the next ones, in one arena for all threads.

    By default every large array is mapped and unmapped, and the system clears its pages anew each time: measured on
    gpt-oss-20b's shape, 65,000 pages and a fifth of the solve's time per expert, and no less memory at the peak.
    """
    arena_max, mmap_threshold, trim_threshold = -8, -3, -1
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((arena_max, 1), (mmap_threshold, 1 << 30), (trim_threshold, (1 << 31) - 1)):
            libc.mallopt(option, value)


def release_memory() -> None:
    """Give freed memory back to the system (glibc keeps it otherwise: measured, 1.2 GiB of 1.7 on the demo model)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Clock:
    """Seconds per phase, added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time that the block takes under `phase`; on a card, of what it has asked for too."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
