"""Keep the checkout root off sys.path: our folders are named kernels, eval, ... and must never be top-level."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the maker of tiny gpt-oss checkpoints (tests/tiny.py), each kind built once in a session."""
    # loaded here: with --import-mode=importlib test folders are not on sys.path
    spec = importlib.util.spec_from_file_location("tiny_gpt_oss", Path(__file__).with_name("tiny.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Tiny(tmp_path_factory.mktemp("tiny"))
