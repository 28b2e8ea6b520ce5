"""What can be refused at once: options that contradict each other, places and files, before torch is imported.

The libraries take seconds to import and a model minutes to read; a mistake in the command line is answered in the
first tenth of a second of it. Nothing here is checked less where the work is done: these are the same refusals,
sooner. The facts about formats are those of `layouts` and `quantize.scales` (a test compares them).
"""

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gptoss_quantize.atomic import remedy_for
from gptoss_quantize.errors import InputError
from gptoss_quantize.files import check_utf8
from gptoss_quantize.published import POSITIONS, has_hub_form, published
from gptoss_quantize.quantize.recipes import FORMATS, RECIPES, check_recipe, check_size, override
from gptoss_quantize.units import parse_size

PACKAGED_TEXTS = ("default", "heldout")


def alone() -> bool:
    """Return whether this is the only process of a run; of several, the first looks at OUT, and tells the others."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


# ---- options


def check_quantize(
    *, method: str, recipe: list[str], target: str, group_size: int | None, dense: str, polish: int
) -> None:
    """Raise InputError for options of `quantize` that contradict each other, whatever the model."""
    changed, facts = override(RECIPES[method], recipe), FORMATS[target]
    if group_size is not None and group_size not in facts.groups:
        known = " or ".join(map(str, sorted(facts.groups)))
        remedy = f"use {known}" if len(facts.groups) > 1 else "leave --group-size away"
        raise InputError(f"format {target} has groups of {known}, not {group_size}; {remedy}")
    check_recipe(method, changed, target)
    if polish and not changed.calibrated:
        raise InputError(f"--polish needs a method that looks at calibration text; {method} does not, use gptq")
    if dense not in facts.dense or (dense != "source" and polish):
        if dense in facts.dense:
            raise InputError(f"--dense {dense} and --polish do not go together; leave one of them out")
        raise InputError(f"--dense {dense} and --format {target} do not go together; leave one of them out")


def check_numbers(*, memory: str | None = None, device: str = "auto") -> None:
    """Raise InputError for a size or a device that is none."""
    if memory is not None:
        parse_size(memory, "--memory")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise InputError(f"--device {device}: expected auto, cpu or cuda")
    if device.startswith("cuda") and (version := _torch_for_processors()):
        raise InputError(f"--device {device}: torch {version} sees no CUDA device; use --device cpu")


def _torch_for_processors() -> str | None:
    """Return the version of a torch that was built without CUDA and ROCm, without importing it; None for others."""
    found = find_spec("torch")
    facts = Path(found.origin or "").with_name("version.py") if found is not None else None
    if facts is None or not facts.is_file():
        return None
    said = dict(
        re.findall(r"^(\w+)(?:\s*:[^=\n]*)?\s*=\s*(.+?)\s*$", facts.read_text(encoding="utf-8"), re.MULTILINE)
    )
    if not said.keys() >= {"cuda", "hip", "__version__"} or {said["cuda"], said["hip"]} != {"None"}:
        return None
    return said["__version__"].strip("'\"")


def check_sizes(size: str | None, fit: str | None, context: int | None, *, free: bool) -> None:
    """Raise InputError for a size that is none, and for one that does not go with the other options."""
    for option, value in (("--size", size), ("--fit", fit)):
        if value is not None:
            parse_size(value, option)
    check_size(size, fit, context, free=free)


def check_export(to: str, dtype: str, dense_type: str, expert_type: str) -> None:
    """Raise InputError for options of `export` that say nothing about the target that is asked for."""
    if to != "bf16" and dtype != "bfloat16":
        raise InputError(f"--dtype {dtype} is for --to bf16; with --to {to} leave it out")
    for option, value in (("--dense-type", dense_type), ("--expert-type", expert_type)):
        if to != "gguf" and value != "stored":
            raise InputError(f"{option} {value} is for --to gguf; with --to {to} leave it out")


# ---- what is read


def check_input(model: str | Path, adapter: Path | None = None, revision: str | None = None, what: str = "") -> None:
    """Raise InputError for a model or an adapter that is not there, or is something else; a hub name may pass."""
    name, path = f"{what} {model}".strip(), Path(model).expanduser()
    if not exists(path):
        if not has_hub_form(model):
            raise InputError(f"{name}: no such directory, and not a hub name of the form owner/name; check the path")
    else:
        _check_folder(name, path)
        if revision is not None:
            raise InputError(
                f"{name}: --revision {revision} is for hub models, this is a local directory; leave it out"
            )
    if adapter is not None and not exists(adapter) and has_hub_form(adapter):
        return
    if adapter is not None and not exists(adapter / "adapter_config.json"):
        base = " (it holds a whole model: give that as MODEL)" if exists(adapter / "config.json") else ""
        raise InputError(
            f"{adapter}: no adapter_config.json{base}; expected the directory that PEFT's save_pretrained wrote"
        )


def check_folder(path: Path) -> None:
    """Raise InputError for a directory that is not there; a hub name will not do."""
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; give what quantize, import or export wrote")


def _check_folder(name: str, path: Path) -> None:
    """Raise InputError for a path that holds no model, with what it seems to be instead."""
    check_utf8(path)
    if not path.is_dir():
        kind = "a GGUF file" if path.suffix == ".gguf" else "a file"
        raise InputError(
            f"{name}: is {kind}, not a directory; expected a Hugging Face gpt-oss directory with config.json and "
            "*.safetensors"
        )
    try:
        names = set(os.listdir(path))
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error}); change its permissions, or run as its owner") from None
    if "config.json" in names:
        return
    what = "no such file; expected a Hugging Face gpt-oss directory with it"
    if "adapter_config.json" in names:
        what = (
            "no such file: this is a LoRA adapter; give the model that it was trained on, and this directory with "
            "--adapter"
        )
    elif len(below := [n for n in names if (path / n / "config.json").is_file()]) == 1:
        what = f"no such file, but {below[0]}/ has one; give that directory"
    elif any(n.endswith(".gguf") for n in names):
        what = "no such file: this holds GGUF files; expected the Hugging Face directory that they were made from"
    raise InputError(f"{path / 'config.json'}: {what}")


def check_plan(model: str, context: int | None) -> None:
    """Raise InputError for a model that is not there, and for more context than a published one was made for."""
    if not published(model):
        check_input(model)
    elif context is not None and context > POSITIONS:
        raise InputError(f"--context {context}: {model} was made for {POSITIONS} tokens; ask for that many or fewer")


def check_once(candidates: list[Path]) -> None:
    """Raise InputError for a candidate that is named twice."""
    if len({path.resolve() for path in candidates}) != len(candidates):
        raise InputError("a candidate is named twice; give every checkpoint once")


def check_text(source: str, tokens: int | None = None, seq_len: int | None = None) -> None:
    """Raise InputError for a text file that is not there, and for a budget below one sequence."""
    if tokens is not None and seq_len is not None and tokens < seq_len:
        raise InputError(
            f"{tokens} tokens do not fill one sequence of {seq_len}; expected at least as many "
            "tokens as a sequence is long: more --tokens, or a smaller --seq-len"
        )
    # a word without an ending may be the name of a data set: who reads it knows what to say
    if source not in PACKAGED_TEXTS and not source.startswith("hf:") and Path(source).suffix:
        if not exists(Path(source)):
            raise InputError(f"{source}: no such file; check the path (relative to {Path.cwd()})")
        if not os.access(source, os.R_OK):
            raise InputError(f"{source}: not readable (Permission denied); change its permissions")


def exists(path: Path) -> bool:
    """Return whether something is there; InputError for a path that the system cannot even look for."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        return False
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)[:200]}: cannot be looked at ({_reason(error)}); check the path") from None
    return True


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


# ---- what is written


def check_file(path: Path | None, option: str) -> None:
    """Raise InputError where a file of results could not be written."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{option} {path}: expected a file in an existing directory; make the directory first")
    if not os.access(path if exists(path) else path.parent, os.W_OK):
        raise InputError(f"{option} {path}: may not be written; change its permissions, or choose another place")


def check_report(path: Path, option: str) -> None:
    """Raise InputError for a directory of results that is a file, or could not be made."""
    if exists(path) and not path.is_dir():
        raise InputError(f"{path}: is a file; give a directory for the report ({option})")
    above = next(place for place in (path.absolute(), *path.absolute().parents) if exists(place))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path}: cannot be made in {above}; choose another place")


def write_file(path: Path | None, value: Any) -> None:
    """Write results as JSON where a file was asked for."""
    if path is None:
        return
    try:
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}); {remedy_for(error)}") from None
