"""Sizes as people write them: 12GiB, 16 GB, 800MiB."""

import re

from gptoss_quantize.errors import InputError

GIB = 1 << 30
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]I?)?B?\s*", re.IGNORECASE)


def parse_size(text: str, option: str) -> int:
    """Return bytes for a size such as 12GiB or 16GB; InputError names the option for anything else."""
    match = _SIZE.fullmatch(text)
    # 400 digits are infinite as a float
    size = float(match[1]) * _UNITS[(match[2] or "").upper()] if match else 0.0
    if not 1 <= size < float("inf"):
        raise InputError(f"{option} {text!r}: expected a size such as 12GiB or 16GB")
    if match and not re.search("[A-Za-z]", text):
        raise InputError(f"{option} {text}: has no unit; write {match[1]}GiB if that is what you mean")
    return int(size)


def gib(size: float) -> str:
    """Return bytes as GiB with two digits."""
    return f"{size / GIB:.2f} GiB"
