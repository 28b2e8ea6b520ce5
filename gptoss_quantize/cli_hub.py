"""The command about the hub: push."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from gptoss_quantize import cli_early as early
from gptoss_quantize.cli_words import next_step, starting
from gptoss_quantize.terminal import console


def push(
    checkpoint: Annotated[Path, typer.Argument(help="What quantize, import or export wrote.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private, where it is made.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made where there is none.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub name of the base model, for the card; known where it came from the hub.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Delete weights of another model that are there, in the same commit.")
    ] = False,
) -> None:
    """Check CHECKPOINT, and send it to the hub; run again, an interrupted push goes on."""
    early.check_folder(checkpoint)
    starting()
    from gptoss_quantize import api

    done = api.push(
        checkpoint,
        repo,
        private=private,
        revision=revision,
        base_model=base_model,
        replace=replace,
        progress=True,
    )
    console.print(
        f"[bold]{escape(repo)}[/bold]: {len(done.files)} files, {done.url}", soft_wrap=True, highlight=False
    )
    if done.left:
        console.print(f"not sent, since not ours: {escape(', '.join(done.left))}", soft_wrap=True, highlight=False)
    next_step("chat", repo)


COMMANDS: dict[str, Callable[..., Any]] = {"push": push}
