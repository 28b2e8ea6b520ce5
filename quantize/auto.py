"""`--format auto`: MXFP4 where it holds every expert exactly, int4 otherwise.

Which of the two is known only when the last expert of the last layer was looked at, and a checkpoint has one format:
so float experts are read once before the work, up to the first that is off the grid. MXFP4 files need
no reading.
"""

from collections.abc import Callable
from dataclasses import replace

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.layouts import AUTO, INT4, MXFP4
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.mxfp4_values import has_moved
from gptoss_quantize.quantize.recipes import RECIPES


def settle_format(source: Checkpoint, job: Job, on_layer: Callable[[int], None] = lambda done: None) -> Job:
    """Return the job with the format that `auto` stands for here; a job with another format as it is.

    Where MXFP4 is exact, plain rounding changes nothing, so that calibration and polish have nothing to do.
    InputError for a source that is MXFP4 already.
    """
    if job.format != AUTO:
        return job
    if source.layout is MXFP4 and source.adapter is None:
        raise InputError(
            f"{source.path}: its experts are MXFP4 already, 4.25 bits: use that directory as it is; for hardware or "
            "runtimes without MXFP4 kernels, --format int4 (which loses something)"
        )
    as_int4 = replace(job, format=INT4.name)
    if not source.layout.source:
        return as_int4
    for layer in range(source.config.layers):
        if has_moved(source, layer):
            # in which layers else is found out as they are quantized
            return as_int4
        on_layer(layer + 1)
    return replace(
        job, format=MXFP4.name, group_size=MXFP4.group_sizes[0], method="rtn", recipe=RECIPES["rtn"], polish=0
    )
