"""From what the user typed to a directory: a local path, or a hub name fetched without what we do not need."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from gptoss_quantize.atomic import remedy_for
from gptoss_quantize.errors import InputError
from gptoss_quantize.published import has_hub_form

# huggingface_hub 1 speaks through httpx, huggingface_hub 2 through httpx2
TRANSPORT_ERRORS = tuple(import_module(name).TransportError for name in ("httpx", "httpx2") if find_spec(name))

# weights, config, tokenizer, licence; not OpenAI's original/ and metal/ copies of the same weights
ALLOW = ["*.safetensors", "*.json", "*.jinja", "*.txt", "LICENSE*", "USAGE_POLICY*"]
IGNORE = ["original/*", "metal/*"]


def resolve(model: str, revision: str | None = None) -> Path:
    """Return the directory of a model: `model` itself if it exists, else a hub snapshot (or its offline cache).

    InputError when it is neither, or when the hub cannot be reached and the cache does not have it.
    """
    path = Path(model).expanduser()
    if path.exists():
        if revision is not None:
            raise InputError(
                f"{model}: --revision {revision} is for hub models, this is a local directory; leave it out"
            )
        return path
    if not has_hub_form(model):
        raise InputError(f"{model}: no such directory, and not a hub name of the form owner/name; check the path")
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=ALLOW, ignore_patterns=IGNORE))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, *TRANSPORT_ERRORS) as error:
        raise InputError(
            f"{model}: not in the cache ({constants.HF_HUB_CACHE}) and the hub cannot be reached "
            f"({type(error).__name__}); download it where there is a network, or give a local directory"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(
            f"{model}: the hub refuses it ({str(error).splitlines()[0]}); check the name and --revision, and log in "
            "with `hf auth login` where the model asks for it"
        ) from None
    except OSError as error:
        raise InputError(
            f"{model}: the download failed ({error}); {remedy_for(error)}. The cache is {constants.HF_HUB_CACHE}; "
            "HF_HOME moves it"
        ) from None
