"""`env`: all that a bug report needs, at once, also where parts are broken."""

import json
import os
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import torch

import gptoss_quantize as gq
from gptoss_quantize import env
from gptoss_quantize.kernels import native

PARTS = [
    "gptoss-quantize", "installed at", "python", "system", "packages", "outside the versions that we take",
    "processor", "memory", "cards", "kernels for packed experts", "C++ library", "caches", "environment",
]  # fmt: skip
# as pip knows it: torch itself adds what it was built for (2.15.0+cu132), its wheel may leave that out
TORCH = metadata.version("torch")


def same_release(a: str, b: str) -> bool:
    """Whether two versions differ by what they were built for at most."""
    return a.partition("+")[0] == b.partition("+")[0]


def run(*words: str, code: str = "from gptoss_quantize.cli import main; main()", **changed: str):
    """Run `env` in a process with other variables and return it when it is done."""
    return subprocess.run(
        [sys.executable, "-P", "-c", code, "env", *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | changed,
    )


def test_the_facts_are_those_of_this_machine():
    found = env.report()
    assert list(found) == PARTS and found["gptoss-quantize"] == gq.__version__
    assert found["packages"]["torch"] == TORCH and same_release(TORCH, torch.__version__)
    assert "transformers" in found["packages"] and "pytest" not in found["packages"]
    assert found["memory"]["total"] == psutil.virtual_memory().total >= found["memory"]["free"] > 0
    assert len(found["cards"]) == torch.cuda.device_count()
    assert found["processor"]["threads of torch"] == torch.get_num_threads()
    if Path("/proc/cpuinfo").exists():
        flags = Path("/proc/cpuinfo").read_text()
        assert [name in found["processor"]["features"] for name in ("avx2", "avx512f", "avx512_bf16")] == [
            f" {name} " in flags.replace("\n", " ") for name in ("avx2", "avx512f", "avx512_bf16")
        ]
    assert json.loads(json.dumps(found)) == found


def test_the_library_is_the_one_that_is_used():
    if not native.available():
        pytest.skip(native.problem())
    found = env.report()
    assert found["C++ library"] == {"file": str(native.library()), "compiled": True, "problem": ""}
    assert str(native.library()) in Path("/proc/self/maps").read_text()


def test_the_command_is_quick_and_says_it_in_lines_or_json(tmp_path):
    done = run("--json", HF_HOME=str(tmp_path / "hf"), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == PARTS and done.stderr == "loading torch\ntry: gptoss-quantize plan 20b\n"
    assert found["caches"]["HF_HOME"] == str(tmp_path / "hf") == found["environment"]["HF_HOME"]
    assert found["processor"]["threads of torch"] == 1
    shown = env.lines(found)
    assert [line for line in shown if line.startswith("  torch: ")] == [f"  torch: {TORCH}"]
    assert all(any(line.startswith(f"{name}:") for line in shown) for name in PARTS)


def test_of_heavy_packages_it_imports_torch_alone():
    heavy = {"torch", "transformers", "datasets", "lm_eval", "matplotlib", "scipy", "pandas", "gguf", "tokenizers"}
    seen = f"sys.stderr.write('seen ' + ' '.join({heavy} & sys.modules.keys()))"
    code = f"import sys, atexit; atexit.register(lambda: {seen}); from gptoss_quantize.cli import main; main()"
    done = run(code=code)
    assert done.returncode == 0 and done.stderr.endswith("seen torch"), done.stderr


def test_nothing_is_compiled(tmp_path):
    if native.library() is None:
        pytest.skip(native.problem())
    done = run("--json", XDG_CACHE_HOME=str(tmp_path))
    found = json.loads(done.stdout)
    assert not list(tmp_path.rglob("*.so")) and found["C++ library"]["compiled"] is False
    assert found["C++ library"]["file"].startswith(str(tmp_path))
    assert found["kernels for packed experts"]["cpu"] == "not decided: the C++ library is compiled at first use"


def test_without_a_compiler(tmp_path):
    done = run("--json", PATH=str(tmp_path))
    found = json.loads(done.stdout)
    assert found["C++ library"]["compiled"] is False and "no C++ compiler" in found["C++ library"]["problem"]
    assert "no C++ compiler" in found["kernels for packed experts"]["cpu"]


@pytest.mark.parametrize("module", ["torch", "huggingface_hub", "packaging", "gptoss_quantize.kernels.native"])
def test_what_does_not_import_is_told_and_the_rest_is_there(module):
    code = f"""
import importlib.abc, sys
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise ImportError("libwonder.so.3: cannot open shared object file")
sys.meta_path.insert(0, Broken())
from gptoss_quantize.cli import main
main()
"""
    done = run("--json", code=code)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == PARTS and "libwonder" in done.stdout
    assert found["memory"]["free"] > 0 and found["packages"]["torch"] == TORCH


def test_versions_outside_ours_are_named(monkeypatch):
    assert env.outside_pins() == [] or all(" is not " in line or "missing" in line for line in env.outside_pins())
    real = metadata.version

    def version(name: str) -> str:
        if name == "accelerate":
            raise metadata.PackageNotFoundError(name)
        return {"torch": "2.12.1", "lm-eval": "0.3.0"}.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = env.outside_pins()
    assert any(line.startswith("torch 2.12.1 is not ") and ">=2.13" in line for line in found)
    # of an extra too, if it is there; what is not there of an extra is not missed
    assert any(line.startswith("lm-eval 0.3.0 is not ") for line in found)
    assert any(line.startswith("accelerate is missing (") for line in found)
    assert not [line for line in found if "mypy is missing" in line]


def test_another_kernel_is_asked(monkeypatch):
    if native.library() is None or not native.library().is_file():
        pytest.skip("the C++ library is not compiled here")
    module = types.ModuleType("gptoss_quantize.kernels.experts_op")
    module.kernel_report = lambda device: f"the kernel of {device}"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert env.kernels()["cpu"] == "the kernel of cpu"


def test_a_card_is_described():
    card = {"name": "Wonder 4090", "memory": 24 << 30, "free": 1 << 30, "compute capability": "8.9"}
    (line,) = [line for line in env.lines({"cards": [card]}) if "Wonder" in line]
    assert line == "  name Wonder 4090, memory 24.00 GiB, free 1.00 GiB, compute capability 8.9"
