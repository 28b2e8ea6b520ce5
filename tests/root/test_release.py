"""What is published: addresses that are written into a release, workflows, Dockerfiles."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "https://example.org/me/gptoss-quantize"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
needs_checkout = pytest.mark.skipif(
    not (ROOT / ".github").is_dir(), reason="the wheel's tests run beside no .github and docker folders"
)


@pytest.fixture
def fresh(tmp_path) -> Path:
    """Return a checkout with what the script reads."""
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/for_pypi.py", tmp_path / "scripts")
    return tmp_path


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", str(folder / "scripts/for_pypi.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_release_has_absolute_links(fresh):
    done = run(fresh, REPOSITORY, f"v{VERSION}")
    assert done.returncode == 0, done.stderr
    readme = (fresh / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", readme)
    assert len(links) > 15 and all(link.startswith(("https://", "#")) for link in links)
    # each leads to a file that is there
    for link in links:
        if link.startswith(REPOSITORY):
            kind, tag, path = link.removeprefix(REPOSITORY + "/").split("/", 2)
            assert tag == f"v{VERSION}" and (ROOT / path.partition("#")[0]).exists(), link
            assert kind == ("raw" if path.endswith(".svg") else "blob")
    urls = tomllib.loads((fresh / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    assert urls["Documentation"].startswith(REPOSITORY)
    again = run(fresh, REPOSITORY, f"v{VERSION}")
    assert again.returncode != 0 and "already" in again.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [((REPOSITORY, "v9.9.9"), f"tag v{VERSION}"), (("example.org", f"v{VERSION}"), "Usage"), ((), "Usage")],
)
def test_what_is_wrong_changes_nothing(fresh, words, said):
    before = (fresh / "README.md").read_text(encoding="utf-8")
    done = run(fresh, *words)
    assert done.returncode != 0 and said in done.stderr
    assert (fresh / "README.md").read_text(encoding="utf-8") == before


@needs_checkout
def test_workflows_call_what_is_there():
    ci, release = (yaml.safe_load((ROOT / f".github/workflows/{n}.yml").read_text()) for n in ("ci", "release"))
    assert [s["run"] for s in ci["jobs"]["test"]["steps"] if "run" in s] == [".ci/run"]
    # nothing is published that failed
    assert release["jobs"]["build"]["needs"] == "test"
    assert [s["run"] for s in release["jobs"]["test"]["steps"] if "run" in s] == [".ci/run"]
    steps = release["jobs"]["build"]["steps"]
    runs = [step["run"] for step in steps if "run" in step]
    # addresses before the build, the check after it
    assert runs[0].split() == [
        "python",
        "scripts/for_pypi.py",
        '"$GITHUB_SERVER_URL/$GITHUB_REPOSITORY"',
        '"$GITHUB_REF_NAME"',
    ]
    assert runs.index("python -m build") < runs.index("twine check --strict dist/*")
    assert release["jobs"]["publish"]["needs"] == "build"
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}


@needs_checkout
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_dockerfiles_install_what_there_is(name):
    text = (ROOT / f"docker/{name}.Dockerfile").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r"/src\[([a-z,]+)\]", text)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    version = tuple(map(int, re.search(r"FROM python:(\d+)\.(\d+)", text).groups()))
    assert f"Programming Language :: Python :: {version[0]}.{version[1]}" in project["classifiers"]
    assert "/src/constraints.txt" in text and "USER user" in text
    assert (ROOT / "constraints.txt").is_file() and importlib.util.find_spec("gptoss_quantize")
    assert 'ENTRYPOINT ["gptoss-quantize"]' in text and "gptoss-quantize" in project["scripts"]
