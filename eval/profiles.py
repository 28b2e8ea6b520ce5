"""What a comparison is asked for: names of its candidates, and how much is measured where nobody says it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gptoss_quantize.calibration.text import TextSpec
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval.compare import Settings
from gptoss_quantize.eval.examples import PROMPTS
from gptoss_quantize.eval.suite import expand
from gptoss_quantize.eval.tasks import TaskSettings


@dataclass(frozen=True, slots=True)
class Profile:
    """How much is measured where no option says it."""

    items: int | None  # of all tasks together, at least; None: every item
    text_tokens: int
    expert_tokens: int
    prompts: int
    new_tokens: int


PROFILES: dict[str, Profile] = {"quick": Profile(300, 2048, 1024, 1, 64), "full": Profile(None, 8192, 2048, 3, 80)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Options of a comparison; None takes what the profile says."""

    texts: Sequence[str]
    tasks: Sequence[str]  # names, `offline` for the packaged ones; empty for none
    profile: str = "full"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    text_tokens: int | None = None
    seq_len: int = 512
    column: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    margin: float = 2.0  # points of accuracy
    expert_tokens: int | None = None
    examples: int | None = None

    def settings(self) -> Settings:
        """Return the settings that the profile and the options make together."""
        if self.profile not in PROFILES:
            raise InputError(f"unknown profile {self.profile!r}; known: {', '.join(PROFILES)} (--profile)")
        profile, names = PROFILES[self.profile], expand(list(self.tasks))
        limit = self.limit
        if limit is None and profile.items is not None and names:
            limit = max(1, -(-profile.items // len(names)))
        tasks = TaskSettings(
            names=tuple(names),
            limit=limit,
            num_fewshot=self.num_fewshot,
            apply_chat_template=self.apply_chat_template,
        )
        budget = self.text_tokens or max(profile.text_tokens, self.seq_len)
        return Settings(
            texts=tuple(
                TextSpec(source=source, column=self.column, tokens=budget, seq_len=self.seq_len, shuffle=False)
                for source in self.texts
            ),
            tasks=tasks if names else None,
            dtype=self.dtype,
            device=self.device,
            expert_tokens=profile.expert_tokens if self.expert_tokens is None else self.expert_tokens,
            prompts=PROMPTS[: profile.prompts if self.examples is None else self.examples],
            new_tokens=profile.new_tokens,
            margin=self.margin / 100,
        )


def name_candidates(candidates: str | Path | Sequence[str | Path] | Mapping[str, str | Path]) -> dict[str, Path]:
    """Return name -> path: names as given, or the directory's, or the whole path where two are alike."""
    if isinstance(candidates, Mapping):
        return {name: Path(path) for name, path in candidates.items()}
    paths = [Path(candidates)] if isinstance(candidates, str | Path) else [Path(path) for path in candidates]
    names = [path.resolve().name for path in paths]
    if len({path.resolve() for path in paths}) != len(paths):
        raise InputError("a candidate is named twice; give every checkpoint once")
    return {
        str(path) if names.count(name) > 1 or name == "baseline" else name: path
        for name, path in zip(names, paths, strict=True)
    }
