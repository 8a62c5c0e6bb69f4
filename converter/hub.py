"""Models of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from halfturn.error import Error


def download(repo: str, wanted: Sequence[str]) -> Path:
    """The folder in the hub's own cache that has the files of "owner/name" whose names match `wanted`. Raises Error."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repo, allow_patterns=list(wanted)))
    except HFValidationError:
        raise Error(f"{repo} does not exist as a folder or file here, and it can't be a hub id (owner/model)") from None
    except GatedRepoError:
        raise Error(f"{repo} is gated: accept its licence on huggingface.co and log in with `hf auth login`") from None
    except RepositoryNotFoundError:
        raise Error(f"{repo} is neither a folder here nor on the Hugging Face hub; check the spelling") from None
    except LocalEntryNotFoundError:
        raise Error(f"{repo} is not a folder here, and the Hugging Face hub can't be reached to download it") from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Error(f"{repo} could not be downloaded from the Hugging Face hub: {reason}") from None
