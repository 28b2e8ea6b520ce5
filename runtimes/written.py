"""A checkpoint that was just quantized, opened once more: everything outside the experts must be the source's."""

from pathlib import Path

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.quantize.awq import FOLDED
from gptoss_quantize.quantize.polish import FINAL, NORMS
from gptoss_quantize.runtimes.readback import changed_outside_experts, summary


def check_written(source: Checkpoint, dest: Path, *, awq: bool, polished: bool) -> None:
    """Raise RuntimeError when a tensor outside the experts changed that the method does not change."""
    may_change = (FOLDED if awq else ()) + ((*NORMS, FINAL) if polished else ())
    changed = summary(changed_outside_experts(source, Checkpoint(dest), may_change))
    if changed["different"]:
        raise RuntimeError(
            f"{dest}: {changed['different']} tensors outside the experts are not the source's, first "
            f"{', '.join(changed['first'])}; a failing disk, or a bug of ours: please report it"
        )
