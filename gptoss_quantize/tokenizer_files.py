"""Tokenizer, chat template, generation settings and licence of a model: chosen once, handed to all that need them.

transformers' rule is the rule: chat_template.jinja (with additional_chat_templates/) counts before the template
inside tokenizer_config.json, and chat_template.json is for processors only. gguf's vocabulary reader has another
order, so nothing reads a user's folder directly: `SideFiles.write` puts the chosen files into a folder in which
there is one template in one place. An adapter's own tokenizer and template count before the base's.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoss_quantize.config import read_json
from gptoss_quantize.errors import InputError
from gptoss_quantize.files import COPIED, TOKENIZER, write_json, writing

CONFIG_NAME, JINJA_NAME, MORE_NAME = "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"
_PROCESSORS = "chat_template.json"
# one, or several by name: "default" is rendered, others only on request ("tool_use" where tools are given)
Template = str | dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFiles:
    """What lies beside the weights of the model in `path`: file name -> where it is taken from, and the template."""

    path: Path
    files: Mapping[str, Path]
    template: Template | None
    notes: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Copy all files, with the template in one place only."""
        for name, source in self.files.items():
            if name != JINJA_NAME:
                with writing(folder / name):
                    shutil.copyfile(source, folder / name)
        self._write_template(folder)

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """Yield a temporary folder with the files, as `write` leaves them."""
        with tempfile.TemporaryDirectory(prefix="gptoss-quantize-") as place:
            folder = Path(place)
            self.write(folder)
            yield folder

    def _write_template(self, folder: Path) -> None:
        source = self.files.get(CONFIG_NAME)
        settings = {} if source is None else _settings(source)
        inside = settings.pop("chat_template", None)
        jinja = self.files.get(JINJA_NAME)
        if isinstance(self.template, str) and not (jinja is None and _as_template(inside) == self.template):
            with writing(folder / JINJA_NAME):
                (folder / JINJA_NAME).write_text(self.template, encoding="utf-8", newline="")
            if inside is not None and _as_template(inside) != self.template:
                write_json(folder / CONFIG_NAME, settings)
        elif self.template is None and inside is not None:
            write_json(folder / CONFIG_NAME, settings)
        elif isinstance(self.template, dict) and _as_template(inside) != self.template:
            listed = [{"name": name, "template": text} for name, text in self.template.items()]
            write_json(folder / CONFIG_NAME, settings | {"chat_template": listed})


def _settings(path: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, empty where it is none: whoever needs the tokenizer is told so when it loads."""
    try:
        return read_json(path)
    except InputError:
        return {}


def _as_template(value: Any) -> Template | None:
    """Return the `chat_template` of tokenizer_config.json, which may be a list of named ones."""
    if isinstance(value, list):
        return {str(entry["name"]): str(entry["template"]) for entry in value if {"name", "template"} <= entry.keys()}
    return value if isinstance(value, str | dict) else None


def _read_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}); copy it from the source again") from None


def chat_template(folder: Path) -> tuple[Template | None, list[str]]:
    """Return (the template that transformers takes from a folder, notes on others that it passes over)."""
    notes: list[str] = []
    found: dict[str, str] = {}
    if (folder / JINJA_NAME).is_file():
        found["default"] = _read_text(folder / JINJA_NAME)
    for path in sorted((folder / MORE_NAME).glob("*.jinja")):
        found[path.stem] = _read_text(path)
    settings = _settings(folder / CONFIG_NAME)
    inside = _as_template(settings.get("chat_template"))
    chosen: Template | None = found["default"] if found.keys() == {"default"} else (found or None)
    if chosen is None:
        if inside is None and (folder / _PROCESSORS).is_file():
            notes.append(
                f"{folder}: {_PROCESSORS} is for processors, and transformers' tokenizers do not read it: the "
                f"model has no chat template; to use it, put its text into {JINJA_NAME}"
            )
        return inside, notes
    if inside is not None and inside != chosen:
        notes.append(
            f"{folder}: {JINJA_NAME if 'default' in found else MORE_NAME} and {CONFIG_NAME} hold different chat "
            "templates; the file counts, as in transformers"
        )
    return chosen, notes


def _same_file(one: Path | None, other: Path | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.read_bytes() == other.read_bytes()


def side_files(path: Path, adapter: Path | None = None) -> SideFiles:
    """Return the files beside a model's weights; an adapter's own tokenizer and template win, and notes say so."""
    files = {name: path / name for name in COPIED if (path / name).is_file()}
    template, notes = chat_template(path)
    if adapter is None:
        return SideFiles(path=path, files=files, template=template, notes=tuple(notes))
    if (adapter / "tokenizer.json").is_file():
        own = {name: adapter / name for name in TOKENIZER if (adapter / name).is_file()}
        if not all(_same_file(files.get(name), own.get(name)) for name in ("tokenizer.json", CONFIG_NAME)):
            notes.append(f"{adapter}: the adapter's own tokenizer is used, not the base's")
        files = {name: file for name, file in files.items() if name not in TOKENIZER} | own
    its, more = chat_template(adapter)
    if its is not None:
        notes = [note for note in notes if "chat template" not in note] + more
        if its != template:
            notes.append(f"{adapter}: the adapter's own chat template is used, not the base's")
        template = its
        for name in (JINJA_NAME, _PROCESSORS):
            files.pop(name, None)
        if (adapter / JINJA_NAME).is_file():
            files[JINJA_NAME] = adapter / JINJA_NAME
    return SideFiles(path=path, files=files, template=template, notes=tuple(notes))


def default_template(template: Template | None, where: Path) -> str | None:
    """Return the text that is rendered without tools; InputError for several templates and no default."""
    if not isinstance(template, dict):
        return template
    if "default" not in template:
        raise InputError(
            f"{where}: has the chat templates {', '.join(sorted(template))}, and none is the default; name the "
            f"right one {JINJA_NAME}"
        )
    return template["default"]


def dump_config(folder: Path, model_type: str = "gpt_oss") -> None:
    """Write the little of config.json that transformers' AutoTokenizer looks at."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
