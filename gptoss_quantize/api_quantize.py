"""Beside `api.quantize`: the size that is asked for, and what is shown while it works."""

from dataclasses import dataclass
from typing import Any

from gptoss_quantize.api_inputs import Show, at_least
from gptoss_quantize.api_inputs import size as bytes_of
from gptoss_quantize.calibration.sanity import first_look
from gptoss_quantize.calibration.text import Tokens
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.config import ModelConfig
from gptoss_quantize.progress import Progress
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.mixing import chosen_words
from gptoss_quantize.quantize.recipes import check_size
from gptoss_quantize.runtimes.memory import size_to_fit
from gptoss_quantize.terminal import tell
from gptoss_quantize.units import gib


@dataclass(frozen=True, slots=True)
class SizeAsked:
    """How large the weight files may be: by their own size, or by the card that is to hold them."""

    size: int | str | None
    fit: int | str | None
    context: int | None

    def check(self, format: str, dense: str) -> None:
        """Raise InputError where it does not go with what else was asked for."""
        at_least(1, context=self.context)
        check_size(self.size, self.fit, self.context, free=(format, dense) == ("int4", "source"))

    def bytes(self, config: ModelConfig) -> int | None:
        """Return the bytes, None where nothing was asked for."""
        if self.fit is not None:
            return size_to_fit(config, bytes_of(self.fit, "--fit"), self.context)
        return None if self.size is None else bytes_of(self.size, "--size")


@dataclass(frozen=True, slots=True)
class Watching:
    """What a run tells of itself as it goes."""

    progress: Show
    show: Progress
    source: Checkpoint
    job: Job
    text: Tokens | None
    first: bool  # whether this process is the one that speaks

    def layer(self, index: int) -> None:
        """A layer is done; -1: the first begins."""
        form = self.job.format if self.job.size is None else f"within {gib(self.job.size)},"
        phase = f"{self.job.method} {form} group {self.job.group_size}: layer"
        self.show(phase, index + 1, self.source.config.layers)

    def step(self, number: int, kl: float) -> None:
        """A step of the polish is done."""
        self.show(f"polish: step (KL {kl:.4f})", number, self.job.polish)

    def sensed(self, done: int) -> None:
        """The sensitivity of a layer is measured."""
        self.show("what do fewer bits lose? layer", done, self.source.config.layers)

    def chosen(self, record: dict[str, Any]) -> None:
        """Bits are chosen for a size."""
        if self.first:
            tell(self.progress, chosen_words(record))

    def look(self) -> dict[str, Any] | None:
        """Return what the source makes of a little text, after saying so where that is suspect."""

        def tried(index: int) -> None:
            self.show("can it predict text? layer", index + 1, self.source.config.layers)

        found = first_look(self.source, self.text, self.job.products, tried)
        if found is not None and found["suspect"]:
            tell(self.progress, f"{self.source.path}: {found['suspect']}", alarm=True)
        return found
