"""Cards and threads: what is chosen, and what does not change the result."""

import pytest
import torch

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.machine import pick_device
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint


def test_a_card_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [pick_device(device) for device in ("cuda", "cuda:0", "cuda:1")] == ["cuda", "cuda:0", "cuda:1"]
    for device in ("cuda:2", "cuda:x", "cuda:-1"):
        with pytest.raises(InputError, match=rf"--device {device}: torch sees 2 card\(s\), cuda:0 is the first"):
            pick_device(device)


def products_depend_on_threads() -> bool:
    """Return whether torch's own bfloat16 products round otherwise with two threads, as with AMX tiles.

    There oneDNN divides the inner dimension among threads (docs/lab-notes.md).
    """
    generator, before, found = torch.Generator().manual_seed(0), torch.get_num_threads(), []
    x, w = (torch.randn(rows, 576, generator=generator).bfloat16() for rows in (2048, 1536))
    y = torch.randn(1024, 320, generator=generator).bfloat16()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((torch.nn.functional.linear(x, w), y.T @ y))
    finally:
        torch.set_num_threads(before)
    return not all(map(torch.equal, *found))


def test_bfloat16_codes_do_not_depend_on_the_number_of_threads(tiny, tmp_path):
    """Of what is ours, nothing does; of torch's bfloat16 products some do on processors with AMX."""
    if products_depend_on_threads():
        pytest.skip("torch's bfloat16 products depend on the number of threads on this processor")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            recipe, options = RECIPES["awq+gptq"], {"device": "cpu", "dtype": torch.bfloat16}
            job = Job(dest=tmp_path / str(threads), method="awq+gptq", recipe=recipe, **options)
            quantize_checkpoint(Checkpoint(tiny.path("bf16")), job, tiny.tokens(40))
            files = tiny.snapshot(job.dest)
            files.pop("quantization_report.json")
            found.append(files)
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
