"""Names to directories: local first, then the hub or its offline cache, and only the files that are needed."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects

from gptoss_quantize import hub
from gptoss_quantize.api import open_checkpoint
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def cached(tiny, tmp_path) -> Path:
    """Lay a checkpoint out as the hub's cache does: links from a snapshot to blobs, and a ref by name."""
    folder = tmp_path / "cache" / "models--owner--tiny"
    snapshot, blobs = folder / "snapshots" / COMMIT, folder / "blobs"
    for path in (snapshot, blobs, folder / "refs"):
        path.mkdir(parents=True)
    for i, file in enumerate(tiny.path("bf16").iterdir()):
        (blobs / str(i)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    (folder / "refs" / "main").write_text(COMMIT)
    return snapshot


def refused(call, *words: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


def test_local_directory_wins(tiny, cached, tmp_path, monkeypatch):
    assert hub.resolve(str(tiny.path("bf16"))) == tiny.path("bf16")
    (tmp_path / "owner" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("owner/tiny") == Path("owner/tiny")
    refused(lambda: hub.resolve("owner/tiny", "v1"), "owner/tiny: --revision v1", "local directory", "leave it out")


def test_home_is_expanded(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/model") == tmp_path / "model"


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_offline_cache(cached, revision):
    assert hub.resolve("owner/tiny", revision) == cached
    checkpoint = open_checkpoint("owner/tiny", revision=revision)
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.expert(0, 0).gate_up.shape == (640, 192)


def test_incomplete_cache_is_refused(cached):
    (cached / "model-00003-of-00005.safetensors").unlink()
    refused(lambda: open_checkpoint("owner/tiny"), "model-00003-of-00005.safetensors", "missing", "download it again")


@pytest.mark.parametrize(("name", "revision"), [("owner/unknown", None), ("owner/tiny", "v2")])
def test_offline_and_not_cached(cached, name, revision):
    refused(
        lambda: hub.resolve(name, revision),
        f"{name}: not in the cache ({constants.HF_HUB_CACHE})",
        "cannot be reached",
        "give a local directory",
    )


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./nowhere", "/no/where", "~/nowhere", "../nowhere/x", ""])
def test_neither_directory_nor_hub_name(name, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    if name:
        refused(lambda: hub.resolve(name), f"{name}: no such directory", "owner/name", "check the path")
    else:
        # the empty path is the current directory, which Checkpoint refuses
        assert hub.resolve(name) == Path()


@pytest.mark.parametrize("name", ["owner/bad name", "owner/-x", "owner/a..b"])
def test_bad_hub_name(name):
    refused(lambda: hub.resolve(name), f"{name}: the hub refuses it", "check the name")


RESPONSE = SimpleNamespace(headers={}, request=None, status_code=404)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RepositoryNotFoundError("404: no repository\nmore", response=RESPONSE),
            ("refuses it (404: no repo", "login"),
        ),
        (RevisionNotFoundError("404: no revision", response=RESPONSE), ("404: no revision", "--revision")),
        (GatedRepoError("403: gated", response=RESPONSE), ("403: gated", "hf auth login")),
        (HfHubHTTPError("500: server", response=RESPONSE), ("500: server", "check the name")),
        (hub.TRANSPORT_ERRORS[-1]("connection lost"), ("cannot be reached (TransportError)", "local directory")),
        (OSError(28, "No space left on device"), ("No space left", "HF_HOME")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_the_hub(monkeypatch, error, words):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    refused(lambda: hub.resolve("owner/model"), "owner/model: ", *words)


def test_what_is_downloaded(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **kwargs: asked.update(kwargs) or str(tmp_path))
    assert hub.resolve("openai/gpt-oss-20b", "v1") == tmp_path
    assert asked["revision"] == "v1"
    wanted = [
        "LICENSE",
        "USAGE_POLICY",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00000-of-00002.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    other = [
        ".gitattributes",
        "README.md",
        "metal/model.bin",
        "original/config.json",
        "original/dtypes.json",
        "original/model.safetensors",
    ]
    patterns = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}
    assert sorted(filter_repo_objects(wanted + other, **patterns)) == wanted
