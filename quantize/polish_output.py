"""The polish of a checkpoint under construction: original model, text and written shards in, shards changed.

The original runs over the text once, layer by layer, before the first step. The moved values are written to one file
first, then into the shards; so a run that is killed in between ends the same when resumed.
"""

from collections.abc import Callable

import torch
from safetensors.torch import load_file

from gptoss_quantize.calibration.text import Tokens
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.files import save_tensors
from gptoss_quantize.model import hidden_states
from gptoss_quantize.quantize.output import POLISHED_NAME, Output
from gptoss_quantize.quantize.polish import FINAL, PolishSettings, Student, polish
from gptoss_quantize.shards import ShardFile


def polish_output(
    source: Checkpoint,
    output: Output,
    text: Tokens,
    dtype: torch.dtype,
    settings: PolishSettings,
    on_step: Callable[[int, float], None],
) -> None:
    """Polish the quantized layers in `output`; its state gets the report under "polish"."""
    if "polish" not in output.state:
        teacher = hidden_states(source, text.ids, dtype).to(dtype)
        student = student_of(source, output, dtype)
        report = polish(student, text.ids, teacher, settings, on_step) | {"text": text.record()}
        if report["kept"]:
            save_tensors(output.partial / POLISHED_NAME, moved(student))
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


def moved(student: Student) -> dict[str, torch.Tensor]:
    """Return every free tensor by its full name, in its stored dtype."""
    out: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(student.free):
        prefix = f"model.layers.{index}." if index < student.config.layers else ""
        out |= {prefix + name: free.value().detach().to(free.dtype) for name, free in layer.items()}
    return out
