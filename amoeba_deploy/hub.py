"""Uploading a derived model to the Hugging Face hub."""

from __future__ import annotations

import sys
from pathlib import Path

from amoeba_deploy.errors import BadInput
from amoeba_deploy.progress import Progress

_REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.py")
"""What an upload removes of earlier ones: a reader would take stale weights in one file for those in shards."""


def check_name(repository: str) -> None:
    """Raise BadInput where a name cannot be that of a repository, before any work is done for it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise BadInput(f"'{repository}' is not the name of a repository; write org/name") from None


def upload(folder: Path, repository: str, progress: Progress) -> str:
    """Upload every file of a folder as one commit, and make the repository where there is none; returns its address.

    Who uploads is whom ``hf auth login`` or HF_TOKEN says.

    Raises:
        BadInput: the name is not that of a repository, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    try:
        if progress.quiet or not sys.stderr.isatty():
            disable_progress_bars()
        api = HfApi(library_name="amoeba-deploy")
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            commit_message="Upload a subnet cut by Amoeba",
            delete_patterns=list(_REPLACED),
        )
    except Exception as error:  # the hub's answers, and whatever the network library of the client raises
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BadInput(
            f"{folder}: is written and was not uploaded to {repository} ({reason}); see 'hf auth login', then "
            f"'hf upload {repository} {folder}'"
        ) from None
    return str(url)
