"""Windows and macOS by source: everything imports and works without what only Linux or Unix has.

Neither system was at hand. What can be shown here is that no module needs what they lack: a process in which those
modules and functions are gone imports all of ours, quantizes, goes on after an interruption, and loads.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import Timeout

from gptoss_quantize import atomic
from gptoss_quantize.errors import InputError
from gptoss_quantize.files import alone, publish
from gptoss_quantize.runtimes.stock import _link

# of Python's library, not on Windows; posix_fallocate, sched_getaffinity and the like are not on macOS either
MODULES = ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog")
FUNCTIONS = (
    "posix_fallocate", "posix_fadvise", "sched_getaffinity", "sched_setaffinity", "memfd_create",
    "getgid", "statvfs", "mkfifo", "fork", "forkpty",
)  # fmt: skip
WITHOUT = f"""
import importlib, multiprocessing, os, pkgutil, subprocess, sys
if {{gone}}:
    # libraries of others that ask the system's name, not the module, take what they need first
    import torch, transformers, datasets, lm_eval, matplotlib.figure, triton, filelock, psutil, huggingface_hub
    for name in {MODULES}:
        sys.modules[name] = None
    for name in {FUNCTIONS}:
        if hasattr(os, name):
            delattr(os, name)
"""
EVERYTHING = """
count = 0
# in a checkout they do not lie below one another
for part in ("", ".demo", ".kernels", ".calibration", ".quantize", ".eval", ".runtimes"):
    package = importlib.import_module("gptoss_quantize" + part)
    for found in pkgutil.iter_modules(package.__path__):
        # the plugin's inner modules need vLLM
        inner = found.name.startswith("vllm_") and found.name not in ("vllm_plugin", "vllm_rules", "vllm_split")
        if found.name != "__main__" and not inner:
            importlib.import_module(f"{package.__name__}.{found.name}")
            count += 1
print("imported", count)
"""
WORK = """
from pathlib import Path
from gptoss_quantize import InputError, load, quantize
from gptoss_quantize.files import alone
source, text, out = sys.argv[1:]
def stop(phase, done, total):
    if "layer" in phase and "gptq" in phase and done == 1:
        partial = Path(out).with_name("out.partial")
        again = "from pathlib import Path; from gptoss_quantize.files import alone; alone(Path(%r)).__enter__()"
        if {gone}:
            again = "import sys; sys.modules['fcntl'] = None; " + again
        told = subprocess.run([sys.executable, "-P", "-c", again % str(partial)], capture_output=True, text=True)
        print("second:", "another process is writing it" in told.stderr)
        raise KeyboardInterrupt
settings = {"calibration": text, "tokens": 512, "memory": "1.2GiB", "device": "cpu"}
try:
    quantize(source, out, progress=stop, **settings)
except KeyboardInterrupt:
    pass
quantize(source, out, resume=True, **settings)
print("loaded", type(load(out, device="cpu")).__name__)
"""


def run(code: str, *args: str, gone: bool = True) -> str:
    code = (WITHOUT + code).replace("{gone}", str(gone))
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", code, *args],
        capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_module_imports_without_them():
    # more than a handful, so that an empty walk is seen
    assert int(run(EVERYTHING).split()[1]) > 120


def test_what_is_gone_is_gone():
    with pytest.raises(AssertionError, match="fcntl"):
        run("import fcntl")
    with pytest.raises(AssertionError, match="posix_fallocate"):
        run("os.posix_fallocate")


def test_quantize_resume_and_load_without_them(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The sea was calm that night and the ship lay still. " * 200)
    source = str(tiny.path("bf16"))
    said = {
        gone: run(WORK, source, str(text), str(tmp_path / name / "out"), gone=gone)
        for gone, name in ((True, "without"), (False, "with"))
    }
    assert said[True] == said[False] == "second: True\nloaded PackedGptOssForCausalLM\n"
    one, other = (
        {
            n: d
            for n, d in tiny.snapshot(tmp_path / name / "out").items()
            if n.endswith((".safetensors", "index.json"))
        }
        for name in ("without", "with")
    )
    assert one == other and one


@pytest.mark.parametrize("lacking", [["symlink_to"], ["symlink_to", "hardlink_to"]])
def test_a_system_without_links_copies(tmp_path, monkeypatch, lacking):
    def refuse(*args):
        raise OSError(1314, "A required privilege is not held by the client")

    for name in lacking:
        monkeypatch.setattr(Path, name, refuse)
    (tmp_path / "one").write_bytes(b"weights")
    _link(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == b"weights" and not (tmp_path / "other").is_symlink()


def test_an_empty_directory_gives_way_on_windows_too(tmp_path, monkeypatch):
    rename = Path.rename

    def windows(self, target):
        if Path(target).exists():
            raise FileExistsError(183, "Cannot create a file when that file already exists", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", windows)
    for name in ("out.partial", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "out.partial" / "weights").write_text("1")
    publish(tmp_path / "out.partial", tmp_path / "out")
    assert (tmp_path / "out" / "weights").read_text() == "1"
    assert not (tmp_path / "out.partial").exists()


def test_a_lock_of_others_is_not_taken_for_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)
    with pytest.raises(Timeout), alone(tmp_path):
        raise Timeout("of the hub's cache")
    # released: it can be had again, by one at a time
    with alone(tmp_path), pytest.raises(InputError, match="another process is writing it"), alone(tmp_path):
        pass
