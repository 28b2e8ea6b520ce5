"""The checkpoint under construction: whole or absent, resumable, and never deleting what is not ours."""

import json
import os
import resource
import shutil
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptoss_quantize.errors import InputError
from gptoss_quantize.files import COPIED, MARK, put_mark, read_mark, staged, write_json
from gptoss_quantize.quantize.output import REPORT_NAME, HiddenFile, Output
from gptoss_quantize.tokenizer_files import side_files

STEM = "gptoss-int4"
SETTINGS = {"source": "/nowhere/model", "adapter": None, "method": "rtn", "recipe": {"damping": 0.003}}


def begin(dest: Path, *, settings=SETTINGS, resume=False, overwrite=False) -> Output:
    return Output(dest, 2, settings, stem=STEM, resume=resume, overwrite=overwrite)


def refused(call, *words: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


@contextmanager
def full_disk(left: int):
    """Let no file grow beyond some bytes, for as long as it lasts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    for name in (*COPIED, "README.md", "model.safetensors"):
        (path / name).write_text(name)
    return path


def test_from_begin_to_end(tmp_path, source):
    out = tmp_path / "sub" / "out"
    output = begin(out)
    output.note(output.write_shard(1, {"a": torch.arange(4)}))
    output.hidden(0, (1, 2, 3)).write(slice(0, 1), torch.ones(1, 2, 3))
    output.note(output.write_shard(2, {"b": torch.ones(3, dtype=torch.bfloat16), "c": torch.ones(4, 2).T}))
    output.save_state()
    assert not out.exists()
    assert (tmp_path / "sub" / "out.partial" / "state.json").exists()
    output.finish(side_files(source), {"model_type": "x"}, {"schema": 1})
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    shards = {"gptoss-int4-00001-of-00002.safetensors", "gptoss-int4-00002-of-00002.safetensors"}
    assert {p.name for p in out.iterdir()} == shards | {
        f"{STEM}.safetensors.index.json",
        "config.json",
        REPORT_NAME,
        "README.md",
        MARK,
        *COPIED,
    }
    assert read_mark(out)["files"] == sorted(p.name for p in out.iterdir())
    index = json.loads((out / f"{STEM}.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": min(shards), "b": max(shards), "c": max(shards)}
    assert index["metadata"]["total_size"] == 4 * 8 + 3 * 2 + 8 * 4
    assert torch.equal(load_file(out / max(shards))["c"], torch.ones(2, 4))
    assert json.loads((out / "config.json").read_text()) == {"model_type": "x"}
    assert all((out / name).read_text() == name for name in COPIED)


def test_hidden_file_is_written_and_read_by_slices(tmp_path):
    hidden = torch.randn(5, 3, 4)
    file = HiddenFile(tmp_path / "h", (5, 3, 4))
    for part in (slice(3, 5), slice(0, 2), slice(2, 3)):
        file.write(part, hidden[part])
    file.flush()
    assert torch.equal(file.read(slice(0, 5)), hidden)
    assert torch.equal(HiddenFile(tmp_path / "h", (5, 3, 4)).read(slice(1, 4)), hidden[1:4])
    (tmp_path / "h").write_bytes((tmp_path / "h").read_bytes()[:-1])
    refused(lambda: file.read(slice(4, 5)), str(tmp_path / "h"), "ends early", "--overwrite")


def test_json_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    with full_disk(100):
        refused(lambda: write_json(path, {"a": "x" * 200}), str(path), "writing failed", "ulimit -f")
    assert json.loads(path.read_text()) == {"a": 1}


# ---- where it may be written


def test_taken_name(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("")
    # --overwrite would refuse it too: no remedy
    refused(lambda: begin(tmp_path / "out"), str(tmp_path / "out"), "already exists and was not written by gptoss-")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["notes", "out"]


def test_an_empty_directory_is_free(tmp_path, source):
    (tmp_path / "out").mkdir()
    finished(tmp_path / "out", source, 3)
    assert value_of(tmp_path / "out") == 3


@pytest.mark.parametrize("kind", ["other files", "more files", "a folder", "file", "link", "dangling link"])
def test_overwrite_deletes_only_our_own(tmp_path, kind):
    out = tmp_path / "out"
    (tmp_path / "ours").mkdir()
    put_mark(tmp_path / "ours", "quantize", files=[REPORT_NAME, MARK])
    if kind == "other files":
        out.mkdir()
        # a report does not make it ours
        (out / REPORT_NAME).write_text("{}")
        (out / "thesis.tex").write_text("")
    elif kind in ("more files", "a folder"):
        shutil.copytree(tmp_path / "ours", out)
        (out / "thesis").mkdir() if kind == "a folder" else (out / "thesis.safetensors").write_text("")
    elif kind == "file":
        out.write_text("")
    else:
        out.symlink_to("ours" if kind == "link" else "nowhere")
    refused(lambda: begin(out), "already exists")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    words = {"more files": ["thesis.safetensors"], "a folder": ["thesis"], "other files": [MARK]}.get(kind, [])
    refused(lambda: begin(out, overwrite=True), str(out), *words, "does not delete it", "move it away yourself")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["out.partial", "out.replaced"])
def test_neighbours_of_the_user_are_not_deleted(tmp_path, source, name):
    finished(tmp_path / "out", source, 1)
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("x")
    refused(lambda: begin(tmp_path / "out", overwrite=True), name, "does not delete it")
    assert (tmp_path / name / "thesis.tex").read_text() == "x"
    assert value_of(tmp_path / "out") == 1


@pytest.mark.parametrize("place", ["model", ".", "..", "/", "sub/../model"])
def test_overwrite_never_deletes_the_source(tmp_path, monkeypatch, place):
    model = tmp_path / "model"
    model.mkdir()
    put_mark(model, "quantize", files=[MARK])
    monkeypatch.chdir(model if place in (".", "..") else tmp_path)
    for name in ("source", "adapter"):
        settings = {"source": None, name: str(model)}
        refused(lambda s=settings: begin(Path(place), settings=s, overwrite=True), f"holds the input {model}")
        refused(lambda s=settings: begin(Path(place), settings=s), "holds the input", "choose another place")
    assert [p.name for p in tmp_path.rglob("*")] == ["model", MARK]


def test_source_that_is_named_like_a_partial(tmp_path):
    model = tmp_path / "out.partial"
    model.mkdir()
    settings = SETTINGS | {"source": str(model)}
    refused(lambda: begin(tmp_path / "out", settings=settings, overwrite=True), "holds the input", "out.partial")
    assert model.exists()


@pytest.mark.parametrize("parent", ["file", "/proc/nowhere"])
def test_target_that_cannot_be_written(tmp_path, parent):
    (tmp_path / "file").write_text("")
    refused(lambda: begin(tmp_path / parent / "out"), "out.partial: cannot be written", "choose another place")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---- unfinished runs


def unfinished(dest: Path) -> Output:
    output = begin(dest)
    output.note(output.write_shard(1, {"a": torch.arange(4)}))
    output.state["layers"].append({"x": 1.5})
    output.save_state()
    return output


def test_unfinished_run_needs_a_decision(tmp_path, tiny):
    unfinished(tmp_path / "out")
    before = tiny.snapshot(tmp_path)
    refused(lambda: begin(tmp_path / "out"), "out.partial: an unfinished `quantize`", "--resume", "--overwrite")
    refused(lambda: begin(tmp_path / "out", resume=True, overwrite=True), "contradict", "give one of them")
    assert tiny.snapshot(tmp_path) == before
    assert begin(tmp_path / "out", resume=True).state["layers"] == [{"x": 1.5}]
    assert begin(tmp_path / "out", overwrite=True).state["layers"] == []
    assert [p.name for p in (tmp_path / "out.partial").iterdir()] == [MARK]


def test_nothing_to_resume(tmp_path):
    refused(lambda: begin(tmp_path / "out", resume=True), "nothing to resume", "run without --resume")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "gptq"}, "method was 'rtn', is 'gptq'"),
        ({"recipe": {"damping": 0.01}}, "recipe was {'damping': 0.003}, is {'damping': 0.01}"),
        ({"source": "/elsewhere"}, "source was '/nowhere/model', is '/elsewhere'"),
        ({"new": 3}, "new was None, is 3"),
    ],
    ids=str,
)
def test_resume_with_a_changed_option(tmp_path, tiny, change, words):
    unfinished(tmp_path / "out")
    before = tiny.snapshot(tmp_path)
    call = lambda: begin(tmp_path / "out", settings=SETTINGS | change, resume=True)  # noqa: E731
    refused(call, "out.partial: cannot resume", words, "Use the same command, or start again with --overwrite")
    assert tiny.snapshot(tmp_path) == before


@pytest.mark.parametrize("damage", ["deleted", "truncated", "replaced", "one bit"])
def test_resume_with_a_damaged_shard(tmp_path, damage):
    output = unfinished(tmp_path / "out")
    shard = output.partial / output.shard_name(1)
    if damage == "deleted":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "one bit":
        whole = bytearray(shard.read_bytes())
        whole[-3] ^= 4
        shard.write_bytes(whole)
    else:
        Output(tmp_path / "x", 2, SETTINGS, stem=STEM, resume=False, overwrite=False).write_shard(
            1, {"b": torch.ones(1)}
        )
        shutil.copy(tmp_path / "x.partial" / shard.name, shard)
    refused(lambda: begin(tmp_path / "out", resume=True), str(shard), "changed since", "again with --overwrite")


def test_resume_with_an_unreadable_state(tmp_path):
    output = unfinished(tmp_path / "out")
    (output.partial / "state.json").write_text("{")
    refused(lambda: begin(tmp_path / "out", resume=True), "state.json: unreadable", "--overwrite")


def test_resume_before_the_first_state_starts_over(tmp_path):
    output = begin(tmp_path / "out")
    output.note(output.write_shard(1, {"a": torch.arange(4)}))
    state = begin(tmp_path / "out", resume=True).state
    assert (state["weight_map"], state["layers"]) == ({}, [])


# ---- the disk is full


@pytest.mark.parametrize("size", [100, 20000])
def test_full_disk_leaves_no_half_shard(tmp_path, size):
    output = unfinished(tmp_path / "out")
    before = {p.name for p in output.partial.iterdir()}
    with full_disk(size):
        refused(
            lambda: output.write_shard(2, {"b": torch.ones(10000)}),
            output.shard_name(2),
            "writing failed",
            "ulimit -f",
        )
    assert {p.name for p in output.partial.iterdir()} == before
    assert "b" not in output.state["weight_map"]
    # and the run goes on from there
    begin(tmp_path / "out", resume=True).write_shard(2, {"b": torch.ones(10000)})


def test_full_disk_under_hidden_states(tmp_path):
    hidden = begin(tmp_path / "out").hidden(0, (4, 100, 100))
    with full_disk(50000):
        refused(lambda: hidden.write(slice(0, 4), torch.ones(4, 100, 100)), "hidden-0.bin", "writing failed")


def test_full_disk_at_the_end(tmp_path, source):
    output = unfinished(tmp_path / "out")
    (source / "tokenizer.json").write_text("x" * 50000)
    with full_disk(20000):
        refused(
            lambda: output.finish(side_files(source), {}, {}),
            "tokenizer.json",
            "writing failed",
            "run the same command again",
        )
    assert not (tmp_path / "out").exists()
    begin(tmp_path / "out", resume=True).finish(side_files(source), {}, {})
    assert (tmp_path / "out" / "tokenizer.json").stat().st_size == 50000


# ---- replacing an older checkpoint


def finished(dest: Path, source: Path, value: int, **options) -> None:
    output = begin(dest, **options)
    output.note(output.write_shard(1, {"a": torch.tensor([value])}))
    output.finish(side_files(source), {}, {})


def value_of(dest: Path) -> int:
    return int(load_file(dest / "gptoss-int4-00001-of-00002.safetensors")["a"])


def test_the_old_checkpoint_stays_until_the_new_one_is_whole(tmp_path, source):
    out = tmp_path / "out"
    finished(out, source, 1)
    output = begin(out, overwrite=True)
    output.note(output.write_shard(1, {"a": torch.tensor([2])}))
    assert value_of(out) == 1
    output.finish(side_files(source), {}, {})
    assert value_of(out) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_what_an_interrupted_replacement_left_does_not_stop_the_next(tmp_path, source):
    out = tmp_path / "out"
    finished(out, source, 1)
    shutil.copytree(out, tmp_path / "out.replaced")
    finished(out, source, 2, overwrite=True)
    assert value_of(out) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_resume_remembers_overwrite_after_the_state_is_gone(tmp_path, source, monkeypatch):
    """Killed between the state's deletion and the last rename: the run that was to replace OUT still is."""
    out = tmp_path / "out"
    finished(out, source, 1)
    output = begin(out, overwrite=True)
    output.note(output.write_shard(1, {"a": torch.tensor([2])}))
    report = {"settings": SETTINGS, "layers": [], "crc32": output.state["crc32"], "bytes": 8, "polish": None}
    report |= {"source_is_mxfp4": False, "seconds_by_phase": {}, "seconds": 1, "peak_rss_mib": 1, "memory": {}}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            output.finish(side_files(source), {}, report)
    assert not (output.partial / "state.json").exists()
    assert value_of(out) == 1
    begin(out, resume=True).finish(side_files(source), {}, report)
    assert value_of(out) == 2


def test_an_export_does_not_delete_an_unfinished_run(tmp_path):
    unfinished(tmp_path / "out")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(InputError, match="unfinished `quantize`"), staged(tmp_path / "out", "x", overwrite=False):
        pass
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_shards_have_the_permissions_of_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        output = unfinished(tmp_path / "out")
        assert stat.S_IMODE((output.partial / output.shard_name(1)).stat().st_mode) == 0o644
        os.umask(0o077)
        output.write_shard(2, {"b": torch.ones(1)})
        assert stat.S_IMODE((output.partial / output.shard_name(2)).stat().st_mode) == 0o600
    finally:
        os.umask(old)
