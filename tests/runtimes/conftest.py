"""int4 checkpoints of the tiny model, made once in a session."""

from pathlib import Path
from typing import Any

import pytest

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint


@pytest.fixture(scope="session")
def int4_path(tiny: Any) -> Any:
    """Return group size -> directory of the tiny bf16 model with experts in int4, rounded to nearest."""

    def path(group_size: int = 64) -> Path:
        dest = tiny.root / f"int4-{group_size}"
        if not dest.exists():
            job = Job(dest=dest, method="rtn-signed", recipe=RECIPES["rtn-signed"], group_size=group_size)
            quantize_checkpoint(Checkpoint(tiny.path("bf16")), job, None)
        return Path(dest)

    return path
