"""What `verify` says of a file before any runtime: right 4-bit files pass, each wrong one is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.runtimes.agreement import AGREES, DISAGREES, SUSPECT
from gptoss_quantize.runtimes.check_file import check_file, perplexity, worst_expert
from gptoss_quantize.runtimes.verify import VerifyRequest


def request(tiny, path, baseline="bf16"):
    """Two sequences of text compared at four positions."""
    return VerifyRequest(
        checkpoint=Checkpoint(path),
        baseline=None if baseline is None else Checkpoint(tiny.path(baseline)),
        ids=tiny.ids(2, 64).clamp(5, 280),
        positions=[3, 20, 36, 63],
        texts=[],
    )


def rows_of(found):
    """what -> row."""
    return {row.what: row for row in found}


def test_right_files_pass(tiny, int4_path):
    for path in (int4_path(), int4_path(32), tiny.path("mxfp4")):
        row = rows_of(check_file(request(tiny, path)))["experts against the baseline's"]
        assert row.verdict == AGREES, row.note


def test_a_model_that_cannot_predict_is_suspect(tiny, int4_path):
    for baseline in ("bf16", None):
        found = rows_of(check_file(request(tiny, int4_path(), baseline)))
        who = "checkpoint" if baseline is None else "baseline"
        assert found[f"{who} predicts text"].verdict == SUSPECT
        assert "vocabulary of 300" in found[f"{who} predicts text"].note


def test_the_perplexity_is_that_of_the_next_tokens(tiny, int4_path):
    asked = request(tiny, int4_path())
    scores = torch.log_softmax(torch.randn(8, 300, generator=torch.Generator().manual_seed(1)), -1)
    loss = [-scores[4 * n + k, asked.ids[n, p + 1]] for n in range(2) for k, p in enumerate((3, 20, 36))]
    value, count = perplexity(asked, scores)
    assert count == 6 and value == pytest.approx(float(torch.stack(loss).mean().exp()), rel=1e-5)


def damaged(source: Path, dest: Path, change) -> Path:
    """A copy of an int4 checkpoint with some tensors changed in place."""
    shutil.copytree(source, dest)
    for file in dest.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    return dest


EXPERT = "model.layers.1.mlp.experts.2."


def one_expert_random(tensors):
    if EXPERT + "w13_weight_packed" in tensors:
        generator = torch.Generator().manual_seed(0)
        for part in ("w13", "w2"):
            packed = tensors[f"{EXPERT}{part}_weight_packed"]
            packed.copy_(torch.randint(-(2**31), 2**31 - 1, packed.shape, generator=generator).to(torch.int32))


def no_biases(tensors):
    for name in tensors:
        if name.startswith("model.layers.1.mlp.experts.") and name.endswith("_bias"):
            tensors[name].zero_()


def halves(tensors):
    for name in list(tensors):
        if name.startswith("model.layers.1.mlp.experts.") and ".w13_" in name:
            tensors[name] = torch.stack(tensors[name].chunk(2), 1).flatten(0, 1).contiguous()


def experts_exchanged(tensors):
    for part in (
        "w13_weight_packed",
        "w13_weight_scale",
        "w13_bias",
        "w2_weight_packed",
        "w2_weight_scale",
        "w2_bias",
    ):
        one, other = f"model.layers.0.mlp.experts.0.{part}", f"model.layers.0.mlp.experts.1.{part}"
        if one in tensors:
            tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()


@pytest.mark.parametrize("change", [one_expert_random, halves, experts_exchanged])
def test_a_wrong_file_disagrees_though_every_runtime_reads_it_alike(tiny, int4_path, tmp_path, change):
    path = damaged(int4_path(), tmp_path / "wrong", change)
    row = rows_of(check_file(request(tiny, path)))["experts against the baseline's"]
    assert row.verdict == DISAGREES, row.note
    assert ("layer 0" if change is experts_exchanged else "layer 1") in row.note


def test_lost_biases_of_one_layer_disagree(tiny, int4_path, tmp_path):
    found = rows_of(check_file(request(tiny, damaged(int4_path(), tmp_path / "wrong", no_biases))))
    assert found["biases"].verdict == DISAGREES and found["biases"].note.endswith("layer 1 gate_up, layer 1 down")
    assert "biases" not in rows_of(check_file(request(tiny, int4_path())))


def test_a_window_off_by_one_disagrees(tiny, int4_path, tmp_path):
    copy = Path(shutil.copytree(int4_path(), tmp_path / "window"))
    raw = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(raw | {"sliding_window": 15}), encoding="utf-8")
    row = rows_of(check_file(request(tiny, copy)))["config"]
    assert row.verdict == DISAGREES and row.note == "sliding_window is 15, the baseline's 16"


def test_an_adapter_of_the_checkpoint_is_told(tiny, int4_path, tmp_path):
    copy = Path(shutil.copytree(int4_path(), tmp_path / "tuned"))
    report = json.loads((copy / "quantization_report.json").read_text(encoding="utf-8"))
    report["settings"]["adapter"] = "/somewhere/adapter"
    (copy / "quantization_report.json").write_text(json.dumps(report), encoding="utf-8")
    row = rows_of(check_file(request(tiny, copy)))["adapter"]
    assert row.verdict == SUSPECT and "/somewhere/adapter" in row.note


def test_experts_with_hardly_a_token_are_not_the_worst():
    layers = [
        {"expert_error": [0.1, 0.9, None], "tokens": [50, 3, 0]},
        {"expert_error": [0.2, 0.1, 0.1], "tokens": [4, 9, 9]},
    ]
    assert worst_expert(layers) == (0.2, 1, 0)
