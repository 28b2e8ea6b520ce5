"""What goes wrong in a long run, done to a short one: afterwards the same command ends with the same bits.

Each test is a row of docs/faults.md; the damage that a checkpoint is refused for before any work is in
tests/root/test_checkpoint.py and test_shards.py, that to an unfinished run in test_output.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptoss_quantize.calibration.text import TextSpec, load_tokenizer, load_tokens
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def quantize(source, dest, tokens, on_layer=lambda index: None, **options):
    job = Job(dest=dest, method="gptq", recipe=RECIPES["gptq"], device="cpu", dtype=torch.float32, **options)
    return quantize_checkpoint(Checkpoint(source), job, tokens, on_layer)


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "out"
    quantize(tiny.path("mxfp4"), path, tiny.tokens(8))
    return files(tiny, path)


def files(tiny, path):
    """Everything but the report, which has times."""
    return {name: data for name, data in tiny.snapshot(path).items() if name != "quantization_report.json"}


def test_killed_at_random_moments(tiny, tmp_path):
    # scripts/faults.py with three kills instead of twenty
    script = [sys.executable, "-P", str(ROOT / "scripts" / "faults.py"), str(tmp_path)]
    options = ["--model", str(tiny.path("mxfp4")), "--kills", "3", "--tokens", "512"]
    done = subprocess.run([*script, *options], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "faults.json").read_text())
    assert record["kills"] == sum(record["killed"].values()) == 3
    assert record["different_files"] == record["left_behind"] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["faults.json", "killed", "undisturbed"]


def stopped_after(layer):
    """Return a callback that interrupts a run after a layer."""

    def stop(index: int) -> None:
        if index == layer:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize(("number_format", "layer"), [("int3", 0), ("int2", 1)])
def test_resumed_below_four_bits(tiny, tmp_path, number_format, layer):
    source, tokens, options = tiny.path("bf16"), tiny.tokens(8), {"format": number_format, "group_size": 32}
    quantize(source, tmp_path / "whole", tokens, **options)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", tokens, stopped_after(layer), **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="format"):
        quantize(source, tmp_path / "out", tokens, resume=True, group_size=32)
    quantize(source, tmp_path / "out", tokens, resume=True, **options)
    assert Checkpoint(tmp_path / "out").expert_format == number_format
    assert files(tiny, tmp_path / "out") == files(tiny, tmp_path / "whole")


@pytest.mark.parametrize("place", ["the first shard", "hidden states", "a layer's shard"])
def test_disk_full(tiny, tmp_path, undisturbed, full_disk, place):
    # no file may grow beyond what lies between the sizes of these three
    out, tokens, source = tmp_path / "out", tiny.tokens(8), tiny.path("mxfp4")
    sizes = [len(data) for name, data in sorted(undisturbed.items()) if name.endswith(".safetensors")]
    hidden = tokens.tokens * 192 * 4
    assert sizes[0] + 1000 < hidden < sizes[1] - 1000
    left, name = {
        "the first shard": (sizes[0] // 2, "00001-of-00004"),
        "hidden states": (hidden - 1000, "hidden-0.bin"),
        "a layer's shard": (sizes[1] - 1000, "00002-of-00004"),
    }[place]
    with full_disk(left), pytest.raises(InputError, match=rf"{name}.*writing failed .*File too large.* --resume"):
        quantize(source, out, tokens)
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    quantize(source, out, tokens, resume=True)
    assert files(tiny, out) == undisturbed


# the files of which no size tells them apart: these are led to a device that is always full
INDEX = "gptoss-int4.safetensors.index.json"
LED_AWAY = ("state.json.tmp", "hidden-0.bin", "tokenizer.json", f"{INDEX}.tmp", "config.json.tmp")


@pytest.mark.parametrize("name", LED_AWAY)
def test_no_space_left_for_a_file(tiny, tmp_path, undisturbed, name):
    out, tokens, source = tmp_path / "out", tiny.tokens(8), tiny.path("mxfp4")
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, tokens, on_layer=stopped_after(0))
    place = tmp_path / "out.partial" / name
    place.unlink(missing_ok=True)
    place.symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"writing failed .*No space left on device.* --resume"):
        quantize(source, out, tokens, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    place.unlink()
    quantize(source, out, tokens, resume=True)
    assert files(tiny, out) == undisturbed


def test_source_that_changes_between_layers(tiny, tmp_path, undisturbed):
    model, out, tokens = tiny.copy("mxfp4", tmp_path / "model"), tmp_path / "out", tiny.tokens(8)
    shard = sorted(model.glob("*.safetensors"))[-1]
    whole, stat = shard.read_bytes(), shard.stat()

    def change(index: int) -> None:
        if index == 0:
            shard.write_bytes(whole[:-1] + b"\x01")
            os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))

    with pytest.raises(InputError, match=f"{shard.name}: the file changed while it was being read"):
        quantize(model, out, tokens, on_layer=change)
    with pytest.raises(InputError, match=f"cannot resume, the run has changed: source_files was .*{shard.name}"):
        quantize(model, out, tokens, resume=True)
    # the file that the run began with is put back
    shard.write_bytes(whole)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    quantize(model, out, tokens, resume=True)
    # the model card names its source's folder, which is another one here
    assert files(tiny, out) | {"README.md": b""} == undisturbed | {"README.md": b""}


def test_calibration_text_that_changed(tiny, tmp_path):
    text, out, source = tmp_path / "text.txt", tmp_path / "out", tiny.path("mxfp4")
    before = "\n\n".join(f"Part {i}. " + tiny.text * 3 for i in range(30))

    def tokens_of(content: str):
        text.write_text(content)
        return load_tokens(TextSpec(source=str(text), tokens=512, seq_len=64), load_tokenizer(source))

    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, tokens_of(before), on_layer=stopped_after(0))
    with pytest.raises(InputError, match=r"cannot resume, the run has changed: calibration was '[0-9a-f]{64}', is"):
        quantize(source, out, tokens_of(before.replace("lighthouse", "harbour")), resume=True)
    quantize(source, out, tokens_of(before), resume=True)
    assert out.is_dir()


@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_hidden_states_that_are_gone(tiny, tmp_path, damage):
    out, tokens = tmp_path / "out", tiny.tokens(8)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny.path("mxfp4"), out, tokens, on_layer=stopped_after(1))
    hidden = tmp_path / "out.partial" / "hidden-0.bin"
    if damage == "deleted":
        hidden.unlink()
    else:
        os.truncate(hidden, hidden.stat().st_size - 4)
    with pytest.raises(
        InputError, match=r"hidden-0\.bin: ends early; the run cannot be resumed, start with --overwrite"
    ):
        quantize(tiny.path("mxfp4"), out, tokens, resume=True)
    assert not out.exists()


def test_two_runs_at_once(tiny, tmp_path):
    out, tokens, refused = tmp_path / "out", tiny.tokens(4), []

    def second(index: int) -> None:
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match=r"out\.partial: another process is writing it; wait for its end"):
                quantize(tiny.path("mxfp4"), out, tokens, **options)
            refused.append(index)

    quantize(tiny.path("mxfp4"), out, tokens, on_layer=second)
    assert refused == [0, 0, 1, 1, 2, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
