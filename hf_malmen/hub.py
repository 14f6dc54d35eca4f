"""Folders -> repos on the Hub."""

from pathlib import Path

from huggingface_hub import HfApi

from .errors import CheckpointError
from .version import __version__

# Training checkpoints, pickles, and what stands between two states of a checkpoint.
_NOT_PUSHED = ["checkpoint-*/**", "*.bin", "*.pt", "*.pth", "*.pkl", "edits/.*/**", "logs/**", "runs/**"]


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
) -> str:
    """Upload a folder to a Hub repo, made if it does not exist. Pickles and training checkpoints stay here.

    Args:
        folder: with a `config.json` or `adapter_config.json`.
        repo_id: `owner/name`.
        private: whether a new repo is private; None takes the owner's default.
        token: access token; None takes the one that is logged in.
        commit_message: of the commit.
        create_pr: open a pull request instead of committing.
        revision: branch to commit to.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        CheckpointError: the folder holds nothing that can be loaded, or a change to it has begun and not ended.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise CheckpointError(f"{folder} has no config.json; expected an editor, an edit, an adapter or a checkpoint.")
    if (folder / "edits" / ".journal").exists():
        raise CheckpointError(f"A change to {folder} has begun and not ended. Run hf-malmen recover {folder} first.")
    api = HfApi(token=token, library_name="hf_malmen", library_version=__version__)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        create_pr=create_pr,
        revision=revision,
        ignore_patterns=_NOT_PUSHED,
    )
    return commit.pr_url if create_pr and commit.pr_url else commit.commit_url
