"""Names of models and what can be said of them without a file, OpenAI's two above all; imports no torch."""

from pathlib import Path

# layers and experts are all that differs between the two
SIZES = {"gpt-oss-20b": (24, 32), "gpt-oss-120b": (36, 128)}
HUB = {name: f"openai/{name}" for name in SIZES}
# tokens of context that both were made for: max_position_embeddings
POSITIONS = 131072


def has_hub_form(name: str | Path) -> bool:
    """Return whether a name that is no directory has the form owner/name."""
    return str(name).count("/") == 1 and not str(name).startswith((".", "/", "~"))


def published(name: str) -> str | None:
    """Return the published model that a name stands for: gpt-oss-20b, openai/gpt-oss-20b, 20b; None for others.

    A directory of that name is that directory.
    """
    if Path(name).is_dir():
        return None
    return next((size for size in SIZES if name.lower() in (size, HUB[size], size.rsplit("-", 1)[1])), None)
