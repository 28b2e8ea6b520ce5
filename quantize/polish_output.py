"""The polish of a checkpoint under construction: original's hidden states and written shards in, shards changed.

The teacher costs nothing: calibration has left the original model's final hidden states on disk. The moved values
are written to one file first, then into the shards; so a run that is killed in between ends the same when resumed.
"""

from collections.abc import Callable

import torch
from safetensors.torch import load_file

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.model import batches, rms_norm
from gptoss_quantize.quantize.output import POLISHED_NAME, Output
from gptoss_quantize.quantize.polish import FINAL, PolishSettings, Student, polish
from gptoss_quantize.shards import ShardFile


def polish_output(
    source: Checkpoint,
    output: Output,
    ids_NS: torch.Tensor,
    dtype: torch.dtype,
    settings: PolishSettings,
    on_step: Callable[[int, float], None],
) -> None:
    """Polish the quantized layers in `output`; its state gets the report under "polish"."""
    if "polish" not in output.state:
        student = student_of(source, output, dtype)
        report = polish(student, ids_NS, _teacher(source, output, ids_NS, dtype), settings, on_step)
        if report["kept"]:
            output.write_file(output.partial / POLISHED_NAME, moved(student))
        output.state["polish"] = report
        output.save_state()
    # the file is gone when only the last rename was missing
    if not output.state["polish"]["kept"] or not (output.partial / POLISHED_NAME).exists():
        return
    values = load_file(output.partial / POLISHED_NAME)
    for number in range(1, output.shards + 1):
        names = [n for n in values if output.state["weight_map"][n] == output.shard_name(number)]
        output.change_shard(number, {name: values[name] for name in names})


def student_of(source: Checkpoint, output: Output, dtype: torch.dtype) -> Student:
    """Return the model in the written shards."""
    files: dict[int, ShardFile] = {}

    def layer(index: int) -> dict[str, torch.Tensor]:
        if index not in files:
            files[index] = ShardFile(output.partial / output.shard_name(index + 2))
        prefix = f"model.layers.{index}."
        return {name.removeprefix(prefix): files[index].read(name) for name in files[index].tensors}

    return Student(
        config=source.config,
        layer=layer,
        final_norm=source.dense(FINAL),
        embedding=source.dense("model.embed_tokens.weight"),
        head=source.head().to(dtype),
        dtype=dtype,
    )


def _teacher(source: Checkpoint, output: Output, ids_NS: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the original model's normed final hidden states [N, S, D] on the calibration text."""
    sequences, positions = ids_NS.shape
    stored = output.hidden(source.config.layers, (sequences, positions, source.config.hidden))
    norm = source.dense(FINAL)
    teacher = torch.empty(sequences, positions, source.config.hidden, dtype=dtype)
    for batch in batches(sequences, positions):
        teacher[batch] = rms_norm(stored.read(batch), norm, source.config.rms_eps).to(dtype)
    return teacher


def moved(student: Student) -> dict[str, torch.Tensor]:
    """Return every free tensor by its full name, in bfloat16 as stored."""
    out: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(student.free):
        prefix = f"model.layers.{index}." if index < student.config.layers else ""
        out |= {prefix + name: free.value().detach().to(torch.bfloat16) for name, free in layer.items()}
    return out
