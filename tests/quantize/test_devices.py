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


def test_bfloat16_codes_do_not_depend_on_the_number_of_threads(tiny, tmp_path):
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
