"""Whether a task's data can be had, before anything is computed, downloaded or even imported.

lm-eval's index of tasks takes 20 s to read and a download without a network minutes to fail. So without a network
(or with HF_HUB_OFFLINE) a task that is not packaged needs its data in the cache of `datasets` or of the hub; which
data that are is read from the task's own file. What this cannot tell (a group, a task of the user's own) is left to
`tasks.load_tasks`. Imports nothing heavy: the variables of the environment are those of huggingface_hub.
"""

import os
import re
import socket
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from gptoss_quantize.errors import InputError
from gptoss_quantize.eval import suite

PROBE_SECONDS = 1.0
ENDPOINT = "https://huggingface.co"
SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
# readers of files, which need no hub
READERS = ("json", "csv", "text", "parquet", "arrow", "pandas")
_DATASET = re.compile(r"""^["']?dataset_path["']?\s*:\s*["']?([^\s"'#]+)""", re.MULTILINE)
_INCLUDE = re.compile(r"""^["']?include["']?\s*:\s*["']?([^\s"'#]+)""", re.MULTILINE)


def why_offline() -> str | None:
    """Return why the hub cannot be asked, None where it answers a connection within a second (or its proxy does)."""
    for name in SWITCHES:
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name} is set"
    place = urlsplit(os.environ.get("HF_ENDPOINT") or ENDPOINT)
    proxy = getproxies().get(place.scheme)
    if proxy and not proxy_bypass(place.hostname or ""):
        place = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    host, port = place.hostname or "", place.port or (80 if place.scheme == "http" else 443)
    return None if _answers(host, port) else f"{host} does not answer"


def _answers(host: str, port: int) -> bool:
    found: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
        except OSError:
            return
        found.append(True)

    # a name that nobody resolves has a time limit of its own, which is longer
    thread = Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return bool(found)


def _task_file(name: str) -> Path | None:
    """Return lm-eval's file of a task where it is named like it; the whole index is too long to look through."""
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        return None
    top = Path(next(iter(spec.submodule_search_locations))) / "tasks"
    return next((Path(folder) / f"{name}.yaml" for folder, _, names in os.walk(top) if f"{name}.yaml" in names), None)


def _data_of(file: Path | None) -> str | None:
    """Return the data set that a task file names, or one that it includes; None where none does."""
    for _ in range(8):
        if file is None or not file.is_file():
            return None
        text = file.read_text(encoding="utf-8")
        if found := _DATASET.search(text):
            return found[1]
        included = _INCLUDE.search(text)
        file = file.parent / included[1] if included else None
    return None


def _place(variable: str, otherwise: Path) -> Path:
    return Path(os.environ.get(variable) or otherwise).expanduser()


def _home() -> Path:
    return _place("HF_HOME", _place("XDG_CACHE_HOME", Path("~/.cache")) / "huggingface")


def _cached(data: str | None) -> bool:
    """Return whether a data set (None: any) lies in the cache of the hub or of `datasets`."""
    caches = (
        (_place("HF_HUB_CACHE", _home() / "hub"), "datasets--{}", "--"),
        (_place("HF_DATASETS_CACHE", _home() / "datasets"), "{}", "___"),
    )
    for folder, pattern, slash in caches:
        wanted = pattern.format("*" if data is None else data.replace("/", slash))
        if any(path.is_dir() and path.name not in READERS for path in folder.glob(wanted)):
            return True
    return False


def check_reachable(names: Iterable[str], include_path: Sequence[str] | str | None = None) -> None:
    """Raise InputError for a task whose data are neither packaged nor cached, where there is no network.

    `include_path`: where tasks of the user's own lie; then names that lm-eval does not know may pass.
    """
    far = [name for name in names if name not in {suite.ALL, "none", *suite.suite_files()}]
    if not far or (why := why_offline()) is None:
        return
    for name in far:
        if name.startswith("gptoss_") and not include_path:
            known = ", ".join(suite.suite_files())
            raise InputError(f"--tasks {name}: no such task; expected offline, one of {known}, or a task of lm-eval")
        file = _task_file(name)
        data = _data_of(file)
        if data in READERS or _cached(data) or (file is None and include_path):
            continue
        what = f"needs the data set {data}" if data else "is no packaged task, so it needs data from the hub"
        raise InputError(
            f"--tasks {name}: {what}, and there is no network ({why}) and no copy in the cache "
            f"({_home()}); take the packaged tasks (--tasks offline), or run `lm_eval validate --tasks "
            f"{name}` once where there is a network and copy its cache here"
        )
