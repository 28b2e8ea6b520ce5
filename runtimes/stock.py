"""A checkpoint as transformers' own model, made of our reading of its folder: transformers never looks for itself.

`from_pretrained(FOLDER)` chooses files, fills in config keys and invents missing tensors by rules of its own. Here it
gets a temporary folder in which there is nothing to choose: links to the weight files that were read, an index of the
tensors, and the config that was read. What is not stored under transformers' names, or is merged with an adapter, is
placed tensor by tensor (`eval.whole`). A config that transformers understands otherwise than we do is refused.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GptOssConfig, GptOssForCausalLM

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.config import ModelConfig, parse_config, rope_frequencies
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval.whole import whole_model
from gptoss_quantize.layouts import AS_SOURCE, MXFP4
from gptoss_quantize.runtimes.exports import export_checkpoint

_COMPARED = tuple(field for field in ModelConfig.__dataclass_fields__ if field not in ("raw", "rope"))


def stock_config(config: ModelConfig) -> GptOssConfig:
    """Return transformers' config object; InputError where it would compute something else than we do."""
    raw = {key: value for key, value in config.raw.items() if key not in ("quantization_config", "gptoss_quantize")}
    # a copy, since transformers completes the rope settings in place
    try:
        theirs = GptOssConfig.from_dict(deepcopy(raw))
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"config.json: transformers does not take it ({error}); take it from the source") from None
    read = parse_config(theirs.to_dict(), "transformers")
    differ = [name for name in _COMPARED if getattr(read, name) != getattr(config, name)]
    ours, other = rope_frequencies(config), rope_frequencies(read)
    if not torch.equal(ours[0], other[0]) or ours[1] != other[1]:
        differ.append("rope")
    if differ:
        name = differ[0]
        raise InputError(
            f"config.json: transformers reads {name} as {getattr(read, name)!r}, we read {getattr(config, name)!r}; "
            "write it out in config.json"
        )
    return theirs


def stock_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return the model with float experts, on the CPU; an adapter is merged. InputError where tensors do not fit."""
    stock_config(checkpoint.config)
    layout = checkpoint.layout
    if _is_plain(checkpoint) and not layout.packed:
        # transformers dequantizes MXFP4 into bfloat16, which holds it exactly
        loaded = _from_files(checkpoint, torch.bfloat16 if layout is MXFP4 else dtype)
    else:
        loaded = whole_model(checkpoint, dtype)
    return loaded.to(dtype).eval()


@contextmanager
def linked(checkpoint: Checkpoint, where: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder that holds exactly what was read, for a runtime that reads folders by itself.

    Weight files are links; what is not stored as transformers has it, or merged with an adapter, is written out.
    """
    with tempfile.TemporaryDirectory(prefix="gptoss-quantize-", dir=where) as place:
        folder = Path(place) / "model"
        if not _is_plain(checkpoint):
            export_checkpoint(checkpoint, folder, "bf16")
            yield folder
            return
        folder.mkdir()
        weight_map = {name: checkpoint.weights.file(name).name for name in checkpoint.names()}
        for file in checkpoint.files():
            _link(file.resolve(), folder / file.name)
        if set(weight_map.values()) != {"model.safetensors"}:
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / checkpoint.layout.index_name).write_text(json.dumps(index), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(checkpoint.config.raw), encoding="utf-8")
        checkpoint.side.write(folder)
        yield folder


def _link(file: Path, place: Path) -> None:
    """Make `place` another name of a file; a copy where the system allows none, as Windows by default."""
    for link in (place.symlink_to, place.hardlink_to):
        try:
            link(file)
            return
        except OSError:
            continue
    shutil.copyfile(file, place)


def _is_plain(checkpoint: Checkpoint) -> bool:
    return checkpoint.weights.plain and checkpoint.adapter is None and checkpoint.dense_layout is AS_SOURCE


def _from_files(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    with linked(checkpoint) as folder:
        loaded: Any = GptOssForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, info = loaded
    missing = set(info["missing_keys"]) - ({"lm_head.weight"} if checkpoint.config.tied else set())
    if missing or info["mismatched_keys"]:
        raise InputError(
            f"{checkpoint.path}: transformers does not take all of its tensors: missing {sorted(missing)[:3]}, of "
            f"another shape {sorted(map(str, info['mismatched_keys']))[:3]}"
        )
    return model
