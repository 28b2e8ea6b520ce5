"""The public function about the hub: push. Reading from there is everywhere: a model may be a hub name."""

from pathlib import Path

from gptoss_quantize import progress as steps
from gptoss_quantize.api_inputs import Place, Show
from gptoss_quantize.pushing import check_target, gather, send
from gptoss_quantize.results import Pushed
from gptoss_quantize.terminal import showing


def push(
    checkpoint: Place,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    base_model: str | None = None,
    replace: bool = False,
    progress: Show = None,
) -> Pushed:
    """Send a finished checkpoint or export to the hub; visible there when all of it has arrived, in one commit.

    Checked first: that every tensor is there, and every shard what was written (CRC-32 of the report). A push that
    was interrupted goes on where it stopped when it is called again. Needs a token: `hf auth login`, or HF_TOKEN.

    Args:
        checkpoint: a directory that quantize, import, export or save_pretrained wrote.
        repo: OWNER/NAME; made where there is none.
        private: make it private, where it is made.
        revision: the branch, made where there is none; main without it.
        base_model: hub name of the model that it was made of, for the card; known where that came from the hub.
        replace: delete weight files of another model that are in the repository, in the same commit.
        progress: as for `quantize`.
    """
    check_target(repo)
    with showing(progress) as show:
        start = steps.phases(show)
        parcel = gather(Path(checkpoint), repo, base_model, start("check: shard"))
        url = send(parcel, repo, private=private, revision=revision, replace=replace, on_file=start("upload: shard"))
    names = sorted([path.name for path in (*parcel.weights, *parcel.small)] + list(parcel.texts))
    return Pushed(repo, url, names, parcel.left)
