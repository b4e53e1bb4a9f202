"""Hub names to local directories: safetensors, configs and tokenizers only, resumable, never code."""

from __future__ import annotations

from pathlib import Path

from penstock.errors import ModelError

ALLOWED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja")
REFUSED = ("*/*", "*.py", "consolidated*")  # sub-folders hold other formats; `consolidated` is the same weights twice


def resolve(model: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The directory of a model: a local one as it is, or a hub name `owner/name` fetched into Hugging Face's cache.

    A download resumes where it was cut off; HF_HUB_OFFLINE uses the cache alone. Raises ModelError saying what to do.
    """
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:  # `~` where there is no home
        raise ModelError(f"{model}: {error}; name the directory without ~") from None
    if path.is_dir():
        if revision is not None:
            raise ModelError(f"revision {revision!r} is for hub names, but {path} is a local directory; leave it out")
        return path
    name = str(model)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"{model} is no directory; name an existing one, or a hub name like owner/name")
    return _download(name, revision, token)


def _download(name: str, revision: str | None, token: str | None) -> Path:
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            name, revision=revision, token=token, allow_patterns=list(ALLOWED), ignore_patterns=list(REFUSED)
        )
    except HFValidationError:
        raise ModelError(f"{name!r} is neither a directory nor a hub name like owner/name") from None
    except GatedRepoError:
        raise ModelError(f"{name} is gated: accept its licence on the hub, then pass token= or set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ModelError(f"{name} is no directory, nor a model of the hub (a private one needs token=)") from None
    except RevisionNotFoundError:
        raise ModelError(f"{name} has no revision {revision!r} on the hub; name a branch, tag or commit") from None
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{name} is no directory, and not, or not wholly, in the local cache, while the hub is off "
            f"(HF_HUB_OFFLINE) or out of reach ({_cause(error)}); go online once, or name a directory"
        ) from None
    except (HTTPError, OSError) as error:
        raise ModelError(f"{name} could not be fetched ({_cause(error)}); the next attempt resumes") from None
    return Path(folder)


def _cause(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]
