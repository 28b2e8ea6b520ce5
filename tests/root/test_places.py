"""Where OUT may be: empty directories, links, mount points, read-only parents; and what a kill leaves there."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.files import MARK, check_begin, partial_of, put_mark, read_mark, staged
from gptoss_quantize.mounts import is_mount
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint

NOBODY = 65534
KINDS = ["empty", "tmpfs", "bind", "bind, parent read-only", "link to empty"]


@contextmanager
def mounted(*words: object) -> Iterator[None]:
    """Mount for as long as it lasts; skip where this is not permitted."""
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount is not permitted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(words[-1])], check=True)


@pytest.fixture
def place(tmp_path) -> Callable:
    """Return a context with an existing OUT of some kind, in a directory of its own."""

    @contextmanager
    def make(kind: str) -> Iterator[Path]:
        above = tmp_path / "above"
        out = above / "out [v1] ü"
        out.mkdir(parents=True)
        if kind == "tmpfs":
            with mounted("-t", "tmpfs", "tmpfs", out):
                yield out
        elif kind == "bind":
            # the same file system: device numbers do not tell it
            (tmp_path / "elsewhere").mkdir()
            with mounted("--bind", tmp_path / "elsewhere", out):
                assert out.stat().st_dev == above.stat().st_dev
                yield out
        elif kind == "bind, parent read-only":
            with mounted("--bind", above, above), mounted("-t", "tmpfs", "tmpfs", out), _read_only(above):
                yield out
        elif kind == "link to empty":
            (above / "link").symlink_to(out)
            yield above / "link"
        else:
            yield out

    return make


@contextmanager
def _read_only(path: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,bind,ro", str(path)], check=True)
    with pytest.raises(OSError, match="Read-only"):
        (path / "x").mkdir()
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,bind,rw", str(path)], check=True)


@pytest.fixture
def command(command, monkeypatch):
    """Return a function that runs a command line in this process: (exit code, stderr in one line)."""
    monkeypatch.setenv("COLUMNS", "400")

    def run(*words: object) -> tuple[int, str]:
        code, _, err = command(*words)
        return code, " ".join(err.split())

    return run


@pytest.fixture(scope="module")
def foreign(tiny, tmp_path_factory) -> Path:
    """Return another tool's file: what our own export writes of an int4 checkpoint."""
    home = tmp_path_factory.mktemp("foreign")
    int4 = home / "int4"
    job = Job(dest=int4, method="rtn", recipe=RECIPES["rtn"], dtype=torch.float32)
    quantize_checkpoint(Checkpoint(tiny.path()), job, None)
    from gptoss_quantize.runtimes.exports import export_checkpoint

    export_checkpoint(Checkpoint(int4), home / "gptq", "autogptq")
    return home / "gptq"


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_writes_there(tiny, tmp_path, place, command, foreign, kind):
    model = tiny.path()
    commands = {
        "quantize": ("quantize", model, None, "--method", "rtn"),
        "export": ("export", model, None, "--to", "bf16"),
        "import": ("import", foreign, None),
        "synthetic-model": ("synthetic-model", None, "--like", tiny.path("mxfp4") / "config.json", "--layers", 1),
    }
    for name, words in commands.items():
        with place(kind) as out:
            words = [out if word is None else word for word in words]
            code, err = command(*words)
            assert code == 0, err
            assert (out / "config.json").is_file()
            assert read_mark(out)["command"].startswith(name)
            assert set(read_mark(out)["files"]) == set(names(out))
            # it is taken now, and what helps depends on the command
            code, err = command(*words)
            assert code == 1 and "already exists" in err
            # ... and nothing is ever deleted through a link
            may = name != "synthetic-model" and kind != "link to empty"
            assert ("--overwrite" in err) == may
            if may:
                assert command(*words, "--overwrite")[0] == 0
                assert set(read_mark(out)["files"]) == set(names(out))
        subprocess.run(["rm", "-rf", str(tmp_path / "above"), str(tmp_path / "elsewhere")], check=True)


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_place_with_other_files_is_left_alone(tiny, place, command, kind):
    with place(kind) as out:
        assert is_mount(out) and partial_of(out) == out / ".partial"
        (out / "lost+found").mkdir()
        words = ("quantize", tiny.path(), out, "--method", "rtn")
        assert command(*words)[0] == 0
        (out / "thesis.tex").write_text("x")
        before = tiny.snapshot(out)
        assert "holds thesis.tex" in command(*words, "--overwrite")[1]
        # nothing to resume: said so, and that it is finished
        assert "nothing to resume" in (said := command(*words, "--resume")[1]) and "is finished" in said
        assert tiny.snapshot(out) == before
        (out / "thesis.tex").unlink()
        assert command(*words, "--overwrite")[0] == 0
        assert (out / "lost+found").is_dir()


def killed(work: Callable[[], object], at: int) -> bool:
    """Run work in a child that is killed before its rename number `at` out of .partial; return whether it was."""
    pid = os.fork()
    if not pid:
        count = 0

        def watch(event: str, args: tuple) -> None:
            nonlocal count
            last = event == "os.rmdir" and str(args[0]).endswith("/.partial")
            if last or (event == "os.rename" and Path(str(args[0])).parent.name == ".partial" and "tmp" not in
                        Path(str(args[0])).suffix):  # fmt: skip
                if count == at or (last and at < 0):
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        try:
            torch.set_num_threads(1)
            sys.addaudithook(watch)
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("replacing", [False, True], ids=["empty", "replacing"])
@pytest.mark.parametrize("at", [0, 3, 9, -1])
def test_killed_while_files_move_up(tiny, tmp_path, place, at, replacing):
    """At the first file, in the middle, near the end, and when only the empty directory is left."""

    def run(dest: Path, **options) -> None:
        job = Job(dest=dest, method="rtn", recipe=RECIPES["rtn"], dtype=torch.float32, **options)
        quantize_checkpoint(Checkpoint(tiny.path()), job, None)

    run(tmp_path / "whole")
    wanted = {
        n: v for n, v in tiny.snapshot(tmp_path / "whole").items() if n.endswith((".safetensors", "config.json"))
    }
    with place("tmpfs") as out:
        if replacing:
            run(out)
        assert killed(lambda: run(out, overwrite=replacing), at)
        if at < 0:
            # all is there; what is left is an empty directory, which stops nobody
            assert (out / "config.json").exists()
            with pytest.raises(InputError, match="is finished"):
                run(out, resume=True)
            run(out, overwrite=True)
        else:
            assert (out / ".partial").is_dir() and not (out / MARK).exists()
            with pytest.raises(InputError, match=r"an unfinished `quantize`; continue it with --resume"):
                run(out)
            with pytest.raises(InputError, match=r"unfinished `quantize`; continue it with `quantize --resume`"):
                check_begin(out, "export", overwrite=False)
            run(out, resume=True)
        assert set(read_mark(out)["files"]) == set(names(out))
        found = tiny.snapshot(out)
        assert {n: found[n] for n in wanted} == wanted


def test_an_export_that_was_killed_there_is_dropped_with_overwrite(tmp_path, place):
    def run(overwrite: bool) -> None:
        with staged(out, "export --to bf16", overwrite=overwrite) as folder:
            for name in ("a.safetensors", "b.safetensors", "config.json"):
                (folder / name).write_text(name)

    with place("tmpfs") as out:
        assert killed(lambda: run(False), 1)
        assert names(out) == [".partial", "a.safetensors"]
        with pytest.raises(InputError, match=r"unfinished `export --to bf16`; drop it with --overwrite"):
            run(False)
        run(True)
        assert names(out) == [MARK, "a.safetensors", "b.safetensors", "config.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user to become")
@pytest.mark.parametrize("kind", ["parent of another", "sticky parent"])
def test_an_empty_directory_of_ones_own_in_anothers(kind):
    """As in a container: /out belongs to the user, / does not; no rename can replace it."""
    with tempfile.TemporaryDirectory() as name:
        above = Path(name)
        above.chmod(0o755 if kind == "parent of another" else 0o1777)
        out = above / "out"
        out.mkdir()
        # sticky, and of a third user: who may write in it, but not rename it
        os.chown(out, NOBODY if kind == "parent of another" else 1234, -1)
        out.chmod(0o777)

        def work() -> None:
            with staged(out, "export", overwrite=False) as folder:
                (folder / "config.json").write_text("{}")

        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.setuid(NOBODY)
                work()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert names(out) == [MARK, "config.json"]


def test_links(tmp_path):
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("")
    (tmp_path / "link").symlink_to("taken")
    for name, target in (("dangling", "nowhere"), ("link", "taken")):
        with pytest.raises(InputError, match=f"already exists and is a link to {target}; choose another name$"):
            check_begin(tmp_path / name, "quantize", overwrite=False)


def test_remedies_of_a_place_are_those_of_the_command(tmp_path):
    ours, thesis, partial = tmp_path / "ours", tmp_path / "thesis", tmp_path / "new.partial"
    for path in (ours, thesis, partial):
        path.mkdir()
    put_mark(ours, "quantize", files=[MARK])
    (thesis / "thesis.tex").write_text("")
    # --overwrite is offered where it exists, and where it would do it
    for dest, overwrite, words in (
        (ours, False, "already exists; choose another name or pass --overwrite"),
        (ours, None, "already exists; choose another name"),
        (thesis, False, f"and was not written by gptoss-quantize (no {MARK} in it); choose another name"),
    ):
        with pytest.raises(InputError) as error:
            check_begin(dest, "x", overwrite=overwrite)
        assert str(error.value).endswith(words)
    # an empty directory is nobody's work
    check_begin(tmp_path / "new", "quantize", overwrite=False)
    put_mark(partial, "demo-model")
    with pytest.raises(InputError, match="unfinished `demo-model`; delete it, or choose another name"):
        check_begin(tmp_path / "new", "demo-model", overwrite=None)
    with pytest.raises(InputError, match="was left by `demo-model`, not by quantize"):
        check_begin(tmp_path / "new", "quantize", overwrite=False, resume=True)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "free some space and run the same command again"),
        (errno.EACCES, "change its permissions and run the same command again, or choose another place"),
        (errno.EROFS, "or choose another place to write to"),
        (errno.EIO, "check the disk"),
    ],
)
def test_why_a_write_failed_decides_what_helps(tmp_path, monkeypatch, number, words):
    from gptoss_quantize.atomic import going_on, write_json

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match=words):
        write_json(tmp_path / "x.json", {})
    with going_on("run the same command with --resume"), pytest.raises(InputError, match="writing failed"):
        write_json(tmp_path / "x.json", {})
