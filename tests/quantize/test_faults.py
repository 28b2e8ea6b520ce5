"""What goes wrong in a long run, done to a short one: afterwards the same command ends with the same bits.

Each test is a row of docs/faults.md; the damage that a checkpoint is refused for before any work is in
tests/root/test_checkpoint.py and test_shards.py, that to an unfinished run in test_output.py.
"""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptoss_quantize import api
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.quantize import output
from gptoss_quantize.quantize.output import HiddenFile
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import Job, quantize_checkpoint

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
    script = [sys.executable, "-P", str(ROOT / "benchmarks" / "faults.py"), str(tmp_path)]
    options = ["--model", str(tiny.path("mxfp4")), "--kills", "3", "--tokens", "512"]
    done = subprocess.run([*script, *options], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "faults.json").read_text())
    assert record["kills"] == sum(record["killed"].values()) == 3
    assert record["different_files"] == record["left_behind"] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["faults.json", "killed", "undisturbed"]


# what fails, and at which of its calls: shards (outer, then layers), hidden states, state.json and other JSON
WRITES = {
    "a layer's shard": ("save_file", 3),
    "the first shard": ("save_file", 1),
    "the state": ("json.dump", 2),
    "the index": ("json.dump", 5),
    "hidden states": ("os.fsync", 2),
    "the tokenizer": ("shutil.copyfile", 1),
}


@pytest.mark.parametrize(("target", "count"), WRITES.values(), ids=WRITES)
def test_disk_full_at_any_file(tiny, tmp_path, monkeypatch, undisturbed, target, count):
    out, tokens = tmp_path / "out", tiny.tokens(8)
    owner, _, name = target.rpartition(".")
    module = getattr(output, owner) if owner else output
    real, calls = getattr(module, name), []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        with pytest.raises(InputError, match=r"writing failed .*No space left on device.* --resume"):
            quantize(tiny.path("mxfp4"), out, tokens)
    assert len(calls) == count
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    quantize(tiny.path("mxfp4"), out, tokens, resume=True)
    assert files(tiny, out) == undisturbed


@pytest.mark.parametrize("count", [1, 4])
def test_disk_full_under_hidden_states(tiny, tmp_path, monkeypatch, undisturbed, count):
    out, tokens, calls = tmp_path / "out", tiny.tokens(8), []
    place = HiddenFile._place

    def full(self, part):
        calls.append(1)
        if len(calls) == count:
            raise InputError(f"{self.path}: writing failed (No space left on device)")
        return place(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(HiddenFile, "_place", full)
        with pytest.raises(InputError, match="writing failed"):
            quantize(tiny.path("mxfp4"), out, tokens)
    quantize(tiny.path("mxfp4"), out, tokens, resume=True)
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
    assert files(tiny, out) == undisturbed


def test_calibration_text_that_changed(tiny, tmp_path, monkeypatch):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("\n\n".join(f"Part {i}. " + tiny.text * 3 for i in range(30)))

    def run(**options) -> None:
        asked = {"calibration": text, "tokens": 512, "seq_len": 64, "device": "cpu", "dtype": "float32"}
        api.quantize(tiny.path("mxfp4"), out, **asked | options)

    with monkeypatch.context() as patch:
        patch.setattr(output.Output, "write_shard", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run()
    (tmp_path / "out.partial").exists()
    stop = output.Output.save_state
    with monkeypatch.context() as patch:
        seen = []

        def save(self):
            stop(self)
            seen.append(1)
            if len(seen) == 2:
                raise KeyboardInterrupt

        patch.setattr(output.Output, "save_state", save)
        with pytest.raises(KeyboardInterrupt):
            run(resume=True)
    before = text.read_text()
    text.write_text(before.replace("lighthouse", "harbour"))
    with pytest.raises(InputError, match=r"cannot resume, the run has changed: calibration was '[0-9a-f]{64}', is"):
        run(resume=True)
    text.write_text(before)
    run(resume=True)
    assert out.is_dir()


@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_hidden_states_that_are_gone(tiny, tmp_path, damage):
    out, tokens = tmp_path / "out", tiny.tokens(8)

    def stop(index: int) -> None:
        if index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny.path("mxfp4"), out, tokens, on_layer=stop)
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
