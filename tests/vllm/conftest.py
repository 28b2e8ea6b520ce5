"""Checkpoints for vLLM, and our own log-probabilities of the same tokens. Run by `make check-vllm`."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import gptoss_quantize as g
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip these tests where vLLM is not installed: it lives in an environment of its own."""
    if importlib.util.find_spec("vllm") is None:
        reason = "vllm is not installed here; `make check-vllm` runs these tests in an environment that has it"
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def checkpoint(tiny: Any) -> Any:
    """Return (source, group size, dense) -> a tiny int4 checkpoint; a source is a kind of `Tiny.path`, or "tied"."""

    def path(source: str = "bf16", group_size: int = 64, dense: str = "source") -> Path:
        dest = Path(tiny.root, f"vllm-{source}-{group_size}-{dense}")
        if dest.exists():
            return dest
        if source == "tied":
            origin = Path(tiny.root, "tied")
            tiny.build(origin, tie_word_embeddings=True)
        else:
            origin = tiny.path(source)
        job = Job(dest=dest, method="rtn-signed", recipe=RECIPES["rtn-signed"], group_size=group_size, dense=dense)
        quantize_checkpoint(Checkpoint(origin), job, None)
        return dest

    return path


@pytest.fixture(scope="session")
def ours() -> Any:
    """Return (path, prompts) -> our log-probabilities of every token but the first ones, in float32 or a dtype."""

    @torch.inference_mode()
    def log_probs(path: Path, prompts: list[list[int]], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        model = g.load(path, dtype=dtype)
        found = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            logits = model(ids).logits[0, :-1].float()
            found.append(torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None])[:, 0])
        return torch.cat(found)

    return log_probs
