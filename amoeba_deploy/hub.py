"""Uploading a derived model to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from amoeba_deploy.errors import BadInput


def upload(folder: Path, repository: str) -> str:
    """Upload every file of a folder as one commit, and make the repository where there is none; returns its address.

    Who uploads is whom ``hf auth login`` or HF_TOKEN says.

    Raises:
        BadInput: the name is not that of a repository, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        api = HfApi(library_name="amoeba-deploy")
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Upload a subnet cut by Amoeba")
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(
            f"{folder}: is written and was not uploaded to {repository} ({reason}); see 'hf auth login', then "
            f"'hf upload {repository} {folder}'"
        ) from None
    return str(url)
