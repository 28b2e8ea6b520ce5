"""README.md of what we write: what it is, of what it was made and how, how to run it, and what was measured.

Written with every checkpoint, from config.json and the report beside it, and the same for the same weights: neither
the directory's name nor the time it took is in it; commands say OUT, and in a repository its name. Results come
later, from `evaluate` or `compare` with `--model-card`, into a section of their own between two marks. The hub reads
the front matter (YAML; https://huggingface.co/docs/hub/model-cards). It names the base model only where that is on
the hub: a name that means nothing there would be a broken link. Local paths never get in.
"""

import json
import re
from pathlib import Path
from typing import Any

from gptoss_quantize import __version__
from gptoss_quantize.config import read_json
from gptoss_quantize.errors import InputError
from gptoss_quantize.files import add_to_mark, write_text

CARD = "README.md"
BEGIN, END = "<!-- results of gptoss-quantize -->", "<!-- end of results -->"
NOTHING = "Not measured yet: `gptoss-quantize compare OUT --baseline BASE --report REPORT --model-card`."
HERE = "OUT"
QUANTIZATION_REPORT, EXPORT_REPORT = REPORTS = ("quantization_report.json", "export_report.json")
LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt")
# the first words of a licence -> what the hub calls it
KNOWN_LICENCES = {"apache license": "apache-2.0", "mit license": "mit"}
FORMATS = {
    "int4": "int4 (symmetric, packed as compressed-tensors does)",
    "int3": "int3 (symmetric, in planes that only gptoss-quantize reads)",
    "int2": "int2 (symmetric, in planes that only gptoss-quantize reads)",
    "mixed": "int2 to int4, chosen for each projection (symmetric; only gptoss-quantize reads them)",
    "mxfp4": "MXFP4 (OpenAI's own layout)",
}
# no other runtime has such codes
BELOW = ("int3", "int2", "mixed")


def hub_name(path: str | Path) -> str | None:
    """Return owner/name of a path in the hub's cache, None for another."""
    found = re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]", str(path))
    return f"{found[1]}/{found[2]}" if found else None


def _json_or_none(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _licence(folder: Path) -> str | None:
    for name in LICENCES:
        if (folder / name).is_file():
            head = " ".join((folder / name).read_text(encoding="utf-8", errors="replace")[:400].lower().split())
            return next((known for words, known in KNOWN_LICENCES.items() if words in head), None)
    return None


def front_matter(base: str | None, licence: str | None, tags: list[str]) -> list[str]:
    """Return the lines of YAML that the hub reads; JSON strings are YAML strings."""
    lines = ["---"]
    if base is not None:
        lines += [f"base_model: {json.dumps(base)}", "base_model_relation: quantized"]
    if licence is not None:
        lines.append(f"license: {licence}")
    lines += ["library_name: transformers", "pipeline_tag: text-generation", f"tags: {json.dumps(tags)}", "---"]
    return lines


def base_of(folder: Path) -> str | None:
    """Return the hub name of the model that a folder was made of, as far as the folder can tell; else None."""
    report = _report(folder)
    source = report.get("settings", {}).get("source") or report.get("source")
    return hub_name(folder) or (hub_name(source) if source else None)


def _report(folder: Path) -> dict[str, Any]:
    return next((found for file in REPORTS if (found := _json_or_none(folder / file)) is not None), {})


def _made(report: dict[str, Any], marker: dict[str, Any]) -> list[str]:
    settings = report.get("settings", {})
    kind, group, bits = marker["format"], marker.get("group_size"), report.get("expert_bits_per_weight")
    lines = [f"* tool: gptoss-quantize {__version__}"]
    about = (f", group size {group}" if group else "") + (f", {bits:.2f} bits per weight" if bits else "")
    lines.append(f"* experts: {FORMATS.get(kind, kind)}{about}")
    lines.append(f"* everything else: {'int8' if marker.get('dense') == 'int8' else 'as in the base'}")
    if method := marker.get("method"):
        polish = f", {settings['polish']} steps of polish" if settings.get("polish") else ""
        lines.append(f"* method: {method}{polish}")
    if (text := report.get("calibration")) is not None:
        lines.append(f"* calibration: {_nameless(text['source'])}, {' x '.join(map(str, text['shape']))} tokens")
    if settings.get("adapter"):
        lines.append(f"* adapter merged while reading: {_nameless(settings['adapter'])}")
    if recipe := settings.get("recipe"):
        lines.append("* settings: " + ", ".join(f"{key} {value}" for key, value in recipe.items()))
    if changed := report.get("changed"):
        lines.append(f"* changed after that, and saved: {len(changed)} tensor(s), first {changed[0]}")
    if report.get("suspect"):
        lines += ["", f"**Warning:** the model that this was made of {report['suspect']}"]
    return lines


def _nameless(place: str) -> str:
    """Return a place without the directories of the machine that it was on."""
    return Path(place).name if place.startswith(("/", "~", ".")) or "\\" in place else place


def _block(title: str, language: str, *lines: str) -> list[str]:
    return [f"{title}:", "", f"```{language}", *lines, "```", ""]


def _use(name: str, marker: dict[str, Any]) -> list[str]:
    kind = marker["format"]
    if kind == "gguf":
        return _block("llama.cpp", "sh", "llama-server -m model.gguf") + _block(
            "Ollama", "sh", "ollama create my-gpt-oss -f Modelfile"
        )
    if kind in ("int4", *BELOW):
        code = ["import gptoss_quantize  # pip install gptoss-quantize", f'model = gptoss_quantize.load("{name}")']
    else:
        code = [
            "from transformers import AutoModelForCausalLM",
            f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        ]
    lines = _block("Transformers", "python", *code) + _block("A terminal", "sh", f"gptoss-quantize chat {name}")
    if kind in BELOW:
        return lines
    export = f"gptoss-quantize export {name} gguf --to gguf"
    lines += _block("llama.cpp, Ollama, LM Studio", "sh", export, "llama-server -m gguf/model.gguf")
    if kind != "int4":
        return lines + _block("vLLM", "sh", f"vllm serve {name}")
    # our plugin (docs/vllm.md): without it vLLM drops the experts' biases on most cards, and reads no 8-bit attention
    return lines + _block("vLLM", "sh", "pip install 'gptoss-quantize[vllm]'", f"vllm serve {name}")


def model_card(folder: Path, name: str = HERE, base: str | None = None) -> str:
    """Return the card of a finished checkpoint or export, results left open; `base` is a hub name.

    Raises InputError for a folder that holds neither config.json nor a report of ours.
    """
    config, report = _json_or_none(folder / "config.json") or {}, _report(folder)
    if not any((folder / file).is_file() for file in ("config.json", *REPORTS)):
        raise InputError(f"{folder}: neither config.json nor a report in it; a model card says what these say")
    marker = {"format": report.get("to", "float")} | (config.get("gptoss_quantize") or {})
    base, kind = base or base_of(folder), marker["format"]
    tags = ["gpt_oss", "gptoss-quantize", kind] + (["compressed-tensors"] if kind == "int4" else [])
    source = report.get("settings", {}).get("source") or report.get("source")
    of = base or (_nameless(source) if source else "a gpt-oss model")
    how = f"with its experts in {FORMATS[kind]}" if kind in FORMATS else f"exported as {kind}"
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
    lines = [*front_matter(base, _licence(folder), tags), "", f"# {Path(of).name}, {kind}", ""]
    lines += [f"{of} {how}: {size / 2**30:.2f} GiB.", ""]
    lines += ["## How it was made", "", *_made(report, marker), "", "## Use", "", *_use(name, marker)]
    lines += ["## Results", "", BEGIN, NOTHING, END, ""]
    if found := [file for file in (*LICENCES, "NOTICE", "USAGE_POLICY") if (folder / file).is_file()]:
        lines += [
            "## Licence",
            "",
            f"That of the base model: {', '.join(f'[{file}]({file})' for file in found)}.",
            "",
        ]
    return "\n".join(lines)


def write_card(folder: Path, base: str | None = None) -> None:
    """Write README.md of a folder that we write; nothing is replaced that stands there."""
    if not (folder / CARD).exists():
        write_text(folder / CARD, model_card(folder, base=base))
        add_to_mark(folder, CARD)


def put_results(folder: Path, lines: list[str]) -> Path:
    """Put results into the card of a finished checkpoint, in place of earlier ones; return the card's path.

    A card that somebody wrote anew, without our two marks, gets them at its end. The rest stays as it is.
    """
    path = folder / CARD
    write_card(folder)
    text = path.read_text(encoding="utf-8")
    section = "\n".join([BEGIN, *lines, END])
    start, end = text.find(BEGIN), text.find(END)
    if 0 <= start < end:
        text = text[:start] + section + text[end + len(END) :]
    else:
        text = text.rstrip("\n") + f"\n\n## Results\n\n{section}\n"
    write_text(path, text)
    return path


def card_for_hub(folder: Path, repo: str, base: str | None = None) -> str:
    """Return the card of a folder as it stands in a repository: commands name that instead of OUT.

    What was measured, and what somebody wrote into the card, stays. `base` is the base model's name on the hub.
    """
    write_card(folder)
    text = (folder / CARD).read_text(encoding="utf-8")
    here, there = model_card(folder), model_card(folder, repo, base)
    # both are made of the same facts, so their bodies differ in lines that name something, line by line
    pairs = zip(_body(here), _body(there), strict=True)
    changes = {old: new for old, new in pairs if old != new}
    lines = [changes.get(line, line) for line in text.split("\n")]
    if base is not None and lines[0] == "---":
        end = lines.index("---", 1)
        kept = [line for line in lines[1:end] if not line.startswith(("base_model:", "base_model_relation:"))]
        lines = ["---", *front_matter(base, None, [])[1:3], *kept, *lines[end:]]
    return "\n".join(lines)


def _body(card: str) -> list[str]:
    """Return the lines of a card below its front matter."""
    lines = card.split("\n")
    return lines[lines.index("---", 1) + 1 :]
