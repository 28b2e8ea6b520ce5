"""To the hub: a finished, checked checkpoint, file by file, and visible there only when all of it has arrived.

Large files are sent one after the other and are kept by the hub from then on under the hash of their content; the
repository changes in one commit at the end. So a push that was interrupted goes on where it stopped when the same
command is run again, and nobody downloads half a model. Sent are the weights that the index names, config, tokenizer,
licence, card and reports (without the directories of this machine); state of unfinished runs and strangers are not.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.config import read_json
from gptoss_quantize.errors import InputError
from gptoss_quantize.files import COPIED, Progress, checksum, no_progress, read_mark
from gptoss_quantize.hub import TRANSPORT_ERRORS
from gptoss_quantize.layouts import LAYOUTS
from gptoss_quantize.model_card import CARD, QUANTIZATION_REPORT, REPORTS, card_for_hub, hub_name
from gptoss_quantize.published import has_hub_form
from gptoss_quantize.terminal import others_quiet

SMALL = (*COPIED, "config.json", "Modelfile")
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt")
AGAIN = "run the same command again: what has arrived is not sent twice"
LOG_IN = (
    "log in with `hf auth login`, or set HF_TOKEN to a token with write permission (huggingface.co/settings/tokens)"
)


@dataclass(frozen=True, slots=True)
class Parcel:
    """What is sent: weights and small files by name, reports and card as they are to be read elsewhere."""

    weights: list[Path]
    small: list[Path]
    texts: dict[str, bytes]
    left: list[str]  # names in the folder that are not sent


def gather(
    folder: Path, repo: str, base: str | None = None, on_file: Callable[[int, int], None] = no_progress
) -> Parcel:
    """Return what is sent of a finished folder, all of it checked: every tensor's place, every shard's CRC-32.

    Raises InputError for a folder that is unfinished, damaged, or not written by us.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such directory; give what quantize, import or export wrote")
    mark = read_mark(folder)
    if folder.name.endswith(".partial") or (mark is not None and "files" not in mark):
        raise InputError(f"{folder}: an unfinished run; continue it with --resume, and push the result")
    reports = {name: read_json(folder / name) for name in REPORTS if (folder / name).is_file()}
    if (folder / "model.gguf").is_file():
        weights, index = [folder / "model.gguf"], list[Path]()
    else:
        weights, index = _weights(folder, foreign=mark is not None and mark["command"].startswith("export --to auto"))
    if not reports and mark is None and not read_json(folder / "config.json").get("gptoss_quantize"):
        raise InputError(
            f"{folder}: not written by gptoss-quantize (no mark, no report); push it with `hf upload {repo} {folder}`"
        )
    _check_sums(folder, weights, reports.get(QUANTIZATION_REPORT), on_file)
    small = [*index, *(folder / name for name in SMALL if (folder / name).is_file())]
    texts = {name: _public(folder / name, report) for name, report in reports.items()}
    texts[CARD] = card_for_hub(folder, repo, base).encode()
    sent = {path.name for path in (*weights, *small)} | texts.keys()
    left = sorted(p.name for p in folder.iterdir() if p.name not in sent and not p.name.startswith("."))
    return Parcel(weights, small, texts, left)


def _weights(folder: Path, *, foreign: bool) -> tuple[list[Path], list[Path]]:
    """Return (weight files, index files) of a directory; InputError where a tensor is missing or misshapen."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if foreign:
        # another tool's layout: its names are not ours to judge, its files are
        names = [name for index in indexes for name in read_json(index)["weight_map"].values()]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise InputError(f"{folder / (missing or ['index'])[0]}: missing; export it again")
        return sorted({folder / name for name in names}), indexes
    checkpoint = Checkpoint(folder)
    own = {layout.index_name for layout in LAYOUTS.values()}
    return sorted(checkpoint.files()), [index for index in indexes if index.name in own]


def _check_sums(
    folder: Path, weights: list[Path], report: dict[str, Any] | None, on_file: Callable[[int, int], None]
) -> None:
    """Raise InputError for a weight file that is not what the report says was written."""
    if report is None:
        return
    known = report.get("crc32") or {}
    for number, path in enumerate(weights, 1):
        if path.name not in known:
            raise InputError(
                f"{path}: not named in quantization_report.json, so it is not what quantize wrote; push a folder as "
                "it was written, or delete the report that does not belong to it"
            )
        if checksum(path) != known[path.name]:
            raise InputError(
                f"{path}: its CRC-32 is not the one in quantization_report.json: changed or damaged since it was "
                "written; quantize again, or copy it again from where it is whole"
            )
        on_file(number, len(weights))
    if gone := sorted(known.keys() - {path.name for path in weights}):
        raise InputError(f"{folder / gone[0]}: missing; it is in quantization_report.json; copy it again")


def _public(path: Path, report: dict[str, Any]) -> bytes:
    """Return a report without the directories of this machine: a hub name, or the last part of a path."""
    places = [report.get("source"), *(report.get("settings", {}).get(key) for key in ("source", "adapter"))]
    text = json.dumps(report, indent=1)
    for place in sorted({place for place in places if place}, key=len, reverse=True):
        text = text.replace(json.dumps(place)[1:-1], json.dumps(hub_name(f"{place}/") or Path(place).name)[1:-1])
    return text.replace(json.dumps(str(Path.home()))[1:-1] + "/", "~/").encode()


@contextmanager
def _in_words(repo: str) -> Iterator[None]:
    """Turn what the hub and the network answer into what to do about it."""
    try:
        yield
    except HFValidationError as error:
        raise InputError(f"{repo}: {str(error).splitlines()[0]}; give OWNER/NAME") from None
    except TRANSPORT_ERRORS as error:
        raise InputError(
            f"{repo}: {constants.ENDPOINT} cannot be reached ({type(error).__name__}: {error}); {AGAIN}"
        ) from None
    except HfHubHTTPError as error:
        status = None if error.response is None else error.response.status_code
        said = (getattr(error, "server_message", None) or str(error)).splitlines()[0]
        if status == 401:
            raise InputError(f"{repo}: the hub does not know the token ({said}); {LOG_IN}") from None
        if status in (403, 404):
            raise InputError(
                f"{repo}: the token may not write there ({said}); name a place of your own (`hf auth whoami`), or "
                "take a token with write permission"
            ) from None
        raise InputError(f"{repo}: the hub refused it ({status}: {said}); {AGAIN}") from None
    except (OSError, RuntimeError) as error:
        # huggingface_hub wraps what broke an upload
        raise InputError(f"{repo}: the upload broke off ({error.__cause__ or error}); {AGAIN}") from None


def check_target(repo: str) -> None:
    """Raise InputError for a name that is none, and where nobody is logged in; nothing is sent."""
    if not has_hub_form(repo) or not all(repo.split("/")):
        raise InputError(f"{repo}: expected OWNER/NAME, such as {'me/' + Path(repo).name if repo else 'me/model'}")
    if get_token() is None:
        raise InputError(f"{repo}: not logged in; {LOG_IN}")


def send(
    parcel: Parcel,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    replace: bool = False,
    on_file: Progress = no_progress,
) -> str:
    """Send a parcel and return the address of its commit.

    InputError, in plain words, for a name or token that the hub does not take, for other weights that are in the
    repository already (unless `replace`: they are deleted in the same commit), and for an upload that breaks off.
    """
    check_target(repo)
    api = HfApi()
    with _in_words(repo), others_quiet():
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        small = [CommitOperationAdd(path.name, str(path)) for path in parcel.small]
        small += [CommitOperationAdd(name, data) for name, data in parcel.texts.items()]
        names = {path.name for path in parcel.weights} | {add.path_in_repo for add in small}
        there = api.list_repo_files(repo, revision=revision)
        old = [name for name in there if name not in names and "/" not in name and _is_weights(name)]
        if old and not replace:
            raise InputError(
                f"{repo}: holds {len(old)} other file(s) of weights, first {old[0]}; two models in one repository "
                "are read differently by different programs: push to another name or --revision, or delete them in "
                "the same commit with --replace"
            )
        weights = []
        for number, path in enumerate(parcel.weights, 1):
            weights.append(CommitOperationAdd(path.name, str(path)))
            api.preupload_lfs_files(repo, additions=weights[-1:], revision=revision, free_memory=False)
            on_file(number, len(parcel.weights))
        operations: list[Any] = [*weights, *small, *(CommitOperationDelete(name) for name in old)]
        done = api.create_commit(
            repo, operations=operations, commit_message="Upload by gptoss-quantize", revision=revision
        )
    return str(done.commit_url)


def _is_weights(name: str) -> bool:
    return name.endswith(WEIGHTS) or name.endswith(".safetensors.index.json")
