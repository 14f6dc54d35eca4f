"""Folders -> repos on the Hub, and what the cache and the repo of a loaded model hold."""

import glob
import math
import re
import time
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from .errors import CheckpointError
from .model_card import HUB_RESULTS_FILE, PLOT_FILE, RESULTS_FILE
from .records import CARD_FILE, EDITS_FOLDER, ID_PATTERN, SHIFTS_FILE
from .shards import INDEX_FILE, SINGLE_FILE, parse_json
from .state import STATE_FILE
from .version import __version__

# The second one is the base of all errors of the network library, of which the client has used more than one.
HUB_ERRORS: tuple[type[Exception], ...] = (OSError, HfHubHTTPError.__bases__[0])
_TIMEOUT = 10  # seconds that the Hub has to answer a question that is no download
_PATIENCE = 60  # seconds after which it is asked again
# What came of asking the Hub for the edits of a loaded checkpoint, so that it is asked once. Keys: the path of the
# checkpoint's configuration in the cache, or `endpoint/repo@commit` where the cache has none. Values: the folder of its
# copy in the cache, None where there is none; or when asking failed, and how.
_answers: dict[str, Path | None] = {}
_failed: dict[str, tuple[float, Exception]] = {}
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

    What an earlier push has left there and the folder no longer has is deleted in the same commit: weights of other
    names, edits that were undone, the state and the results of others. Other files of the repo stay.

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
    repo_id = ensure_repo(repo_id, private=private, token=token, revision=revision)
    outdated = _outdated(folder, api.list_repo_files(repo_id, revision=revision))
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        create_pr=create_pr,
        revision=revision,
        ignore_patterns=list(_NOT_PUSHED),  # as the client adds to it
        delete_patterns=[glob.escape(file) for file in outdated] or None,
    )
    return commit.pr_url if create_pr and commit.pr_url else commit.commit_url


def ensure_repo(
    repo_id: str, *, private: bool | None = None, token: str | bool | None = None, revision: str | None = None
) -> str:
    """Make a Hub repo, and a branch of it, where they do not exist.

    Args:
        repo_id, private, token, revision: as in `push_folder`; a `repo_id` without an owner is the token's owner's.

    Returns:
        The whole id, `owner/name`.
    """
    api = HfApi(token=token, library_name="hf_malmen", library_version=__version__)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def _outdated(folder: Path, files: Iterable[str]) -> list[str]:
    """Those of a repo's files that would be taken for part of a folder, and are none of it."""
    patterns = []
    if _has_weights(folder):
        patterns += [r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", rf"{EDITS_FOLDER}/{ID_PATTERN}/.+"]
    if (folder / SHIFTS_FILE).is_file():
        patterns.append(re.escape(STATE_FILE))
    if _is_editor(folder) and (folder / CARD_FILE).is_file():  # else the card in the repo stays, which shows them
        patterns += map(re.escape, (PLOT_FILE, RESULTS_FILE, HUB_RESULTS_FILE))
    ours = re.compile("|".join(patterns) or r"(?!)")
    return [file for file in files if ours.fullmatch(file) and not (folder / file).is_file()]


def _has_weights(folder: Path) -> bool:
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()


def _is_editor(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and parse_json(path.read_bytes(), path).get("model_type") == "hf_malmen"


def cached_checkpoint(repo_id: str, commit: str | None, token: str | bool | None = None) -> Path | None:
    """The cache's copy of a checkpoint that was loaded from the Hub, with the edits that its repo has.

    Loading a model leaves those on the Hub. It is asked for them once, if it answers. Of a model that was loaded into
    another place, by `cache_dir`, the weights come too if there are edits, as what these changed is read from both.

    Args:
        repo_id: `owner/name`.
        commit: that the model was loaded at; None takes that of the main branch.
        token: access token; None takes the one that is logged in.

    Returns:
        Its folder; None if there is no such repo, or its checkpoint is not in the cache and has no edits.

    Raises:
        OSError, HTTPError (`HUB_ERRORS`): the Hub cannot be asked.
    """
    api = HfApi(token=token, library_name="hf_malmen", library_version=__version__)
    cached = _cached_config(repo_id, commit)
    asked = cached or f"{api.endpoint}/{repo_id}@{commit}"
    if asked in _answers:
        return _answers[asked]
    failed_at, error = _failed.get(asked, (-math.inf, None))
    if error is not None and time.monotonic() < failed_at + _PATIENCE:
        raise error
    try:
        info = api.model_info(repo_id, revision=Path(cached).parent.name if cached else commit, timeout=_TIMEOUT)
        found = _cached_config(repo_id, info.sha)
        if any(file.rfilename.startswith(f"{EDITS_FOLDER}/") for file in info.siblings or []):
            patterns = [f"{EDITS_FOLDER}/*"]
            if found is None or not _has_weights(Path(found).parent):
                patterns += ["config.json", "model*.safetensors*"]
            snapshot_download(repo_id, revision=info.sha, allow_patterns=patterns, token=token)
            found = _cached_config(repo_id, info.sha)
    except HUB_ERRORS as error:
        if cached is None and isinstance(error, RepositoryNotFoundError):  # the name of a model that was made here
            found = None
        else:
            _failed[asked] = time.monotonic(), error
            raise
    _answers[asked] = Path(found).parent if found else None
    return _answers[asked]


def cached_commit(repo_id: str, revision: str | None = None) -> str | None:
    """The commit of a repo that was just loaded from the Hub; None for a folder."""
    found = None if Path(repo_id).exists() else _cached_config(repo_id, revision)
    return None if found is None else Path(found).parent.name


def _cached_config(repo_id: str, revision: str | None) -> str | None:
    try:
        found = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    except HFValidationError:  # it was a folder, which is gone
        return None
    return found if isinstance(found, str) else None
