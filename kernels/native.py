"""The C++ loops of native_*.cpp: compiled at first use, kept in the user's cache, called through ctypes.

Dependent column steps and fused elementwise passes are what torch runs badly on a CPU: each step is a dozen small
operations. The source has no dependency but a C++17 compiler and takes some seconds to compile; the file in the cache
is named by a hash of source, compiler, flags and processor. Without a compiler everything runs in torch, slower and
equal but for rounding; `problem` says why, and the quantization report says which it was.

Calls release Python's lock, so that threads can work on experts of their own.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

HEADER = Path(__file__).with_name("native.h")
FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fvisibility=hidden", "-fPIC")
LINK = ("-shared", "-pthread", "-ldl")
# loops of quantization: for the processor that compiles them; products: for every set, chosen among at run time
NATIVE = tuple(HEADER.with_name(name) for name in ("native_solve.cpp", "native_passes.cpp"))
EXPERTS, DOT = (HEADER.with_name(name) for name in ("native_experts.cpp", "native_dot.cpp"))
HEADERS = (HEADER, *(HEADER.with_name(f"native_{name}.h") for name in ("dot", "planes", "vectors")))
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
INSTRUCTION_SETS = {"portable": ()} | (
    {"avx2": ("-mavx2", "-mfma"), "avx512": _AVX512, "avx512vnni": (*_AVX512, "-mavx512vnni")}
    if platform.machine() in ("x86_64", "AMD64")
    else {}
)
# clang has no -march=native for Arm
_OWN_PROCESSOR = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
MAX_BLOCK = 128  # kMaxBlock of native_solve.cpp
_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}


def _compiler() -> str | None:
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _compile(compiler: str, scratch: Path) -> list[str]:
    """Compile every source into `scratch` and return the objects, without sets that the compiler does not know."""

    def one(source: Path, name: str, *flags: str) -> str:
        made = str(scratch / f"{name}.o")
        subprocess.run(
            [compiler, *FLAGS, *flags, "-c", str(source), "-o", made], check=True, capture_output=True, text=True
        )
        return made

    def isa(name: str, flags: tuple[str, ...]) -> str | None:
        try:
            return one(DOT, f"dot_{name}", f"-DISA={name}", *flags)
        except subprocess.CalledProcessError:
            if name == "portable":
                raise
            return None

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        native = [pool.submit(one, source, source.stem, _OWN_PROCESSOR) for source in NATIVE]
        dots = {name: pool.submit(isa, name, flags) for name, flags in INSTRUCTION_SETS.items()}
        made = {name: path for name, future in dots.items() if (path := future.result())}
        return [
            *(future.result() for future in native),
            *made.values(),
            one(EXPERTS, "experts", *(f"-DHAS_{name}" for name in made)),
        ]


def _build(compiler: str, make: bool = True) -> Path:
    """Return the compiled library, from the cache or made now; OSError or CalledProcessError where that fails."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    texts = [path.read_text(encoding="utf-8") for path in (*HEADERS, *NATIVE, EXPERTS, DOT)]
    key = "\0".join(
        [*texts, version, *FLAGS, *LINK, _OWN_PROCESSOR, str(INSTRUCTION_SETS), platform.machine(), _processor()]
    )
    name = f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptoss_quantize"
    if (cache / name).is_file() or not make:
        return cache / name
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch, name)
        objects = _compile(compiler, Path(scratch))
        subprocess.run([compiler, *objects, *LINK, "-o", str(made)], check=True, capture_output=True, text=True)
        made.replace(cache / name)
    return cache / name


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return (the library, "") or (None, why there is none)."""
    compiler = _compiler()
    if compiler is None:
        return None, "no C++ compiler found (c++, g++ or clang++)"
    try:
        return ctypes.CDLL(str(_build(compiler))), ""
    except subprocess.CalledProcessError as error:
        return None, f"{compiler} could not compile {HEADER.parent}: {error.stderr.strip()[-300:]}"
    except OSError as error:
        return None, f"{HEADER.parent} could not be compiled or loaded: {error}"


# the one switch for all of them, see `switched`
_SWITCH = {"on": True}


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Let the C++ loops be used or not while it lasts, in all threads: without them torch does all the work."""
    before, _SWITCH["on"] = _SWITCH["on"], on
    try:
        yield
    finally:
        _SWITCH["on"] = before


def available() -> bool:
    """Return whether the C++ loops can and may be used on this machine; compiles them if nobody has."""
    return _SWITCH["on"] and _load()[0] is not None


class Codes(Protocol):
    """What the loops need to know of a grid (`kernels.grids.Grid`)."""

    @property
    def low(self) -> int: ...
    @property
    def high(self) -> int: ...
    @property
    def loops(self) -> str | None: ...


def handles(grid: Codes, group: int) -> bool:
    """Return whether the loops of native_solve.cpp know a grid and take groups of this size."""
    return grid.loops in ("integers", "halves") and group % 16 == 0 and group <= MAX_BLOCK


def _check(grid: Codes, group: int, columns: int, width: int) -> None:
    """Raise ValueError for what the C++ side would read or write past the end of."""
    if not handles(grid, group) or columns % group or not 0 < width <= MAX_BLOCK:
        raise ValueError(
            f"native kernels: {columns} columns in groups of {group}, {width} at a time, on a grid with "
            f"{grid.loops} loops; they take multiples of 16 up to {MAX_BLOCK} that divide the columns"
        )


def problem() -> str:
    """Return why the C++ loops cannot be used, or "" if they can."""
    return _load()[1]


def library() -> Path | None:
    """Return where the compiled library lies, or is going to lie, and compile nothing; None without a compiler."""
    compiler = _compiler()
    return None if compiler is None else _build(compiler, make=False)


def _function(name: str, dtype: torch.dtype | None = None) -> Callable[..., None]:
    library, why = _load()
    if library is None:
        raise RuntimeError(f"native kernels: {why}")
    function = getattr(library, name if dtype is None else f"{name}_{_SUFFIX[dtype]}")
    function.restype = None
    return function


def _at(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Return the address of a tensor's data, which the C++ side takes as contiguous."""
    if tensor is None:
        return ctypes.c_void_p(0)
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"native kernels take contiguous CPU tensors, not {tensor.device} {tensor.stride()}")
    return ctypes.c_void_p(tensor.data_ptr())


def _i64(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def _grid(grid: Codes) -> list[ctypes.c_int64]:
    return _i64(grid.low, grid.high, grid.loops == "halves")


def gptq_block(  # noqa: PLR0913 - the C function's own arguments
    low: int,
    high: int,
    coupling_EKK: torch.Tensor,
    state_EKN: torch.Tensor,
    delta_EKN: torch.Tensor,
    codes_EKN: torch.Tensor,
    scale_EGN: torch.Tensor,
    order_EK: torch.Tensor,
    grid: Codes,
) -> None:
    """Quantize columns low..high-1 (visiting order) in place: writes delta and the int8 codes; see quantize.solve."""
    E, K, N = state_EKN.shape
    function = _function("gptq_block", state_EKN.dtype)
    group = K // scale_EGN.shape[1]
    _check(grid, group, K, high - low)
    for e in range(E):
        arrays = (coupling_EKK[e], state_EKN[e], delta_EKN[e], codes_EKN[e], scale_EGN[e], order_EK[e])
        function(*_i64(low, high - low, K, N), *map(_at, arrays), *_i64(group), *_grid(grid))


def refine_block(
    low: int,
    high: int,
    hessian_EKK: torch.Tensor,
    state_EKN: torch.Tensor,
    delta_EKN: torch.Tensor,
    codes_EKN: torch.Tensor,
    scale_EGN: torch.Tensor,
    grid: Codes,
) -> None:
    """Refit the scale of the group low..high-1, then descend over its codes, in place; see quantize.solve.refine."""
    E, K, N = state_EKN.shape
    _check(grid, K // scale_EGN.shape[1], K, high - low)
    function = _function("refine_block", state_EKN.dtype)
    for e in range(E):
        arrays = (hessian_EKK[e], state_EKN[e], delta_EKN[e], codes_EKN[e], scale_EGN[e, low // (high - low)])
        function(*_i64(low, high - low, K, N), *map(_at, arrays), *_grid(grid))


def search_scale(
    weight_ENK: torch.Tensor,
    importance_EK: torch.Tensor,
    group: int,
    ratios: tuple[float, ...],
    extra_ENGA: torch.Tensor | None,
    grid: Codes,
) -> torch.Tensor:
    """Return the best refitted scale per group [E, N, G], not yet rounded; see quantize.scales.searched_scale."""
    E, N, K = weight_ENK.shape
    _check(grid, group, K, group)
    scale_ENG = weight_ENK.new_empty(E, N, K // group)
    ratio = torch.tensor(ratios, dtype=weight_ENK.dtype)
    function = _function("search_scale", weight_ENK.dtype)
    extras = 0 if extra_ENGA is None else extra_ENGA.shape[-1]
    for e in range(E):
        extra = None if extra_ENGA is None else extra_ENGA[e]
        inputs = (
            _at(weight_ENK[e]),
            _at(importance_EK[e]),
            _at(ratio),
            *_i64(len(ratios)),
            _at(extra),
            *_i64(extras),
        )
        function(*_i64(N, K, group), *inputs, *_i64(grid.low, grid.high), _at(scale_ENG[e]))
    return scale_ENG


_ROWS = 256


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="native")


def _over_rows(rows: int, call: Callable[[int, int], None]) -> None:
    """Run call(first row, rows) for parts of the rows on as many threads as torch uses; not for none.

    The parts do not depend on the number of threads, so neither do sums over them.
    """
    parts = [(start, min(_ROWS, rows - start)) for start in range(0, rows, _ROWS)]
    threads = min(torch.get_num_threads(), len(parts))
    if threads <= 1:
        for part in parts:
            call(*part)
        return
    list(_pool(threads).map(lambda part: call(*part), parts))


def takes(tensor: torch.Tensor, *dtypes: torch.dtype) -> bool:
    """Return whether the elementwise passes below can work on a tensor: on a CPU, of such a dtype, and compiled."""
    return tensor.dtype in dtypes and tensor.device.type == "cpu" and available()


def swiglu(gate_up_TR: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    """Return kernels.experts.swiglu [T, F] of bfloat16 or float32 rows [T, 2F], gates then ups."""
    T, R = gate_up_TR.shape
    out_TF = gate_up_TR.new_empty(T, R // 2)
    function = _function("swiglu", gate_up_TR.dtype)

    def part(start: int, rows: int) -> None:
        where = _at(gate_up_TR[start]), ctypes.c_float(limit), ctypes.c_float(alpha), _at(out_TF[start])
        function(*_i64(rows, R // 2), *where)

    _over_rows(T, part)
    return out_TF


def swiglu_slope(gate_up_TR: torch.Tensor, slope_TF: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    """Return kernels.experts.swiglu_slope [T, 2F] of bfloat16 rows [T, 2F], gates then ups."""
    T, R = gate_up_TR.shape
    out_TR = torch.empty_like(gate_up_TR)
    slope_TF = slope_TF.contiguous()
    function = _function("swiglu_slope", torch.bfloat16)

    def part(start: int, rows: int) -> None:
        where = _at(gate_up_TR[start]), _at(slope_TF[start])
        function(*_i64(rows, R // 2), *where, ctypes.c_float(limit), ctypes.c_float(alpha), _at(out_TR[start]))

    _over_rows(T, part)
    return out_TR


def dequantize(packed_RW: torch.Tensor, scale_RG: torch.Tensor) -> torch.Tensor:
    """Return the bfloat16 weights [R, C] of int32 words [R, C/8] and bfloat16 scales [R, G], rounded once."""
    R, groups = scale_RG.shape
    columns = packed_RW.shape[1] * 8
    packed_RW, scale_RG = packed_RW.contiguous(), scale_RG.contiguous()
    out_RC = torch.empty(R, columns, dtype=torch.bfloat16)
    _by_groups("dequantize", columns // groups, columns, packed_RW, scale_RG, out_RC)
    return out_RC


def scale_gradient(packed_RW: torch.Tensor, slope_RC: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the sum over each group of codes times a bfloat16 gradient of the weights: float32 [R, G]."""
    R, columns = slope_RC.shape
    packed_RW, slope_RC = packed_RW.contiguous(), slope_RC.contiguous()
    out_RG = torch.empty(R, groups)
    _by_groups("scale_gradient", columns // groups, columns, packed_RW, slope_RC, out_RG)
    return out_RG


def _by_groups(name: str, group: int, columns: int, *arrays: torch.Tensor) -> None:
    """Run a function of (rows, columns, group, arrays) over parts of the rows that all arrays share."""
    function = _function(name, torch.bfloat16)
    _over_rows(
        len(arrays[0]), lambda start, rows: function(*_i64(rows, columns, group), *(_at(a[start]) for a in arrays))
    )


@dataclass(slots=True)
class Centred:
    """One block of tokens, ready for the products of calibration.moments."""

    scaled: torch.Tensor  # [T, K] bfloat16, (x - shift) * sqrt(weight)
    plain: torch.Tensor | None  # [T, K] bfloat16, x - shift; None without an original
    gap: torch.Tensor | None  # [T, K] bfloat16, (original - x) * weight; None without an original
    sum: torch.Tensor  # [K] float32, sum of weight * (x - shift)
    gap_sum: torch.Tensor  # [K] float32, sum of gap


def centre(
    x_TK: torch.Tensor, original_TK: torch.Tensor | None, weight_T: torch.Tensor, shift_K: torch.Tensor
) -> Centred:
    """Return a block of bfloat16 inputs centred and weighted, in one pass; weights and shift in float32."""
    T, K = x_TK.shape
    root_T = weight_T.sqrt()
    scaled = torch.empty_like(x_TK)
    plain, gap = (None, None) if original_TK is None else (torch.empty_like(x_TK), torch.empty_like(x_TK))
    sums: dict[int, torch.Tensor] = {}
    function = _function("centre_bf16")

    def part(start: int, rows: int) -> None:
        total = torch.zeros(2, K)
        sums[start] = total
        inputs = [_at(None if t is None else t[start]) for t in (x_TK, original_TK, weight_T, root_T)]
        outputs = [_at(None if t is None else t[start]) for t in (scaled, plain, gap)]
        function(*_i64(rows, K), *inputs, _at(shift_K), *outputs, _at(total[0]), _at(total[1]))

    _over_rows(T, part)
    # in the order of the rows, whichever thread was first
    total = torch.stack([sums[start] for start in sorted(sums)]).sum(0)
    return Centred(scaled, plain, gap, total[0], total[1])


def _share_work(call: Callable[[int, int], None]) -> None:
    """Run call(i, n) for i = 0..n-1, n as many threads as torch uses; each does every n-th piece of the work."""
    threads = torch.get_num_threads()
    list(_pool(threads).map(lambda first: call(first, threads), range(threads)))


def has_products() -> bool:
    """Return whether `add_product` works here: the processor multiplies bfloat16 with float32 sums (AVX512-BF16)."""
    return available() and bool(_load()[0].has_products())  # type: ignore[union-attr]


class Pairs:
    """A bfloat16 matrix [T, K] packed for `add_product`."""

    def __init__(self, x_TK: torch.Tensor):
        T, K = x_TK.shape
        self.pairs, self.columns = -(-T // 2), K
        self.packed = torch.empty(-(-K // 16), self.pairs, 16, dtype=torch.int32)
        function = _function("pack_pairs")
        arguments = (*_i64(T, K), _at(x_TK))
        _share_work(lambda first, step: function(*arguments, *_i64(first, step), _at(self.packed)))


def add_product(left: Pairs, right: Pairs, out_KK: torch.Tensor) -> None:
    """Add left^T right to a float32 matrix [K, K]; with left is right only the upper triangle is sure to be right."""
    if left.pairs != right.pairs or left.columns != right.columns or out_KK.shape != (left.columns, left.columns):
        raise ValueError(f"native kernels: {left.packed.shape} by {right.packed.shape} into {tuple(out_KK.shape)}")
    function, symmetric = _function("add_product"), int(left is right)
    arguments = (*_i64(left.pairs, left.columns), _at(left.packed), _at(right.packed))
    _share_work(lambda first, step: function(*arguments, *_i64(first, step, symmetric), _at(out_KK)))


def round_signed(weight_NK: torch.Tensor, fold_K: torch.Tensor, group: int, grid: Codes) -> torch.Tensor:
    """Return bfloat16 [N, K]: weight * fold rounded with the signed full-range scale, over fold; see quantize.awq."""
    N, K = weight_NK.shape
    _check(grid, group, K, group)
    out_NK = torch.empty(N, K, dtype=torch.bfloat16)
    function = _function("round_signed")

    def part(start: int, rows: int) -> None:
        function(*_i64(rows, K, group, grid.low, grid.high), _at(weight_NK[start]), _at(fold_K), _at(out_NK[start]))

    _over_rows(N, part)
    return out_NK
