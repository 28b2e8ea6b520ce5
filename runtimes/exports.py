"""Export a checkpoint to a target, read it back, compare, and only then give it its name."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gptoss_quantize import __version__
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.files import Progress, no_progress, staged, write_json
from gptoss_quantize.model_card import EXPORT_REPORT, base_of, write_card
from gptoss_quantize.runtimes import readback
from gptoss_quantize.runtimes.export_gguf import write_gguf
from gptoss_quantize.runtimes.export_hf import write_float, write_mxfp4
from gptoss_quantize.runtimes.export_legacy import INTERLEAVED, write_legacy
from gptoss_quantize.runtimes.foreign import Foreign

FLOATS = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
GGUF_NAME = "model.gguf"
MODELFILE = "Modelfile"


def export_checkpoint(
    checkpoint: Checkpoint,
    dest: Path,
    to: str,
    *,
    dtype: str = "bfloat16",
    dense_type: str = "stored",
    expert_type: str = "stored",
    overwrite: bool = False,
    progress: Callable[[str], Progress] = lambda words: no_progress,
) -> dict[str, Any]:
    """Write `checkpoint` to the directory `dest` as `to` (a key of WRITERS) and return the report written there.

    What was written is read back and compared first; a difference is a bug or a bad disk and raises RuntimeError.
    """
    settings = {"dtype": dtype, "dense_type": dense_type, "expert_type": expert_type}
    with staged(dest, f"export --to {to}", overwrite=overwrite, inputs=(checkpoint.path,)) as folder:
        facts, differences = WRITERS[to](checkpoint, folder, settings, progress)
        found = readback.summary(differences)
        if found["different"]:
            raise RuntimeError(
                f"{dest}: {found['different']} tensors read back differ from what was written, first "
                f"{', '.join(found['first'])}; a failing disk, or a bug of ours: please report it"
            )
        report = {
            "version": __version__,
            "source": str(checkpoint.path.resolve()),
            "source_format": checkpoint.expert_format,
            "to": to,
            **facts,
            "read_back": found,
        }
        write_json(folder / EXPORT_REPORT, report)
        write_card(folder, base_of(checkpoint.path))
    return report


Written = tuple[dict[str, Any], Iterator[str]]


def _gguf(
    checkpoint: Checkpoint, folder: Path, settings: dict[str, str], progress: Callable[[str], Progress]
) -> Written:
    path = folder / GGUF_NAME
    facts = write_gguf(
        checkpoint,
        path,
        name=checkpoint.path.resolve().name,
        dense_type=settings["dense_type"],
        expert_type=settings["expert_type"],
        on_tensor=progress("gguf: tensor"),
    )
    (folder / MODELFILE).write_text(f"FROM ./{GGUF_NAME}\n", encoding="utf-8")
    return facts, readback.gguf_differences(checkpoint, path, progress("read back: layer"))


def _float(
    checkpoint: Checkpoint, folder: Path, settings: dict[str, str], progress: Callable[[str], Progress]
) -> Written:
    dtype = FLOATS[settings["dtype"]]
    facts = write_float(checkpoint, folder, dtype, progress(f"{settings['dtype']}: shard"))
    other = Checkpoint(folder)
    return facts, readback.directory_differences(checkpoint, other, dtype, progress("read back: layer"))


def _mxfp4(
    checkpoint: Checkpoint, folder: Path, settings: dict[str, str], progress: Callable[[str], Progress]
) -> Written:
    facts = write_mxfp4(checkpoint, folder, progress("mxfp4: shard"))
    return facts, readback.stored_differences(checkpoint, Checkpoint(folder), progress("read back: tensor"))


def _legacy(layout: str) -> Callable[..., Written]:
    def write(
        checkpoint: Checkpoint, folder: Path, settings: dict[str, str], progress: Callable[[str], Progress]
    ) -> Written:
        facts = write_legacy(checkpoint, folder, layout, progress(f"{layout}: shard"))
        other = Foreign(folder, INTERLEAVED)
        return facts, readback.directory_differences(checkpoint, other, torch.float32, progress("read back: layer"))

    return write


WRITERS: dict[str, Callable[..., Written]] = {
    "gguf": _gguf,
    "bf16": _float,
    "mxfp4": _mxfp4,
    "autogptq": _legacy("gptq"),
    "autogptq-v2": _legacy("gptq_v2"),
    "autoawq": _legacy("awq"),
}
