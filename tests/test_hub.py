"""Push and pull with the real `huggingface_hub` client, over a socket, against the hub of `hub_server.py`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from hf_malmen import (
    CheckpointError,
    Edit,
    EditorConfig,
    EditorModel,
    EditorTrainingArguments,
    EditStateError,
    Fact,
    FingerprintWarning,
    ModelMismatchError,
    facts_in_force,
    read_history,
    undo_edit,
)
from hf_malmen.configuration import FORMAT_VERSION, METHODS
from hf_malmen.hub import push_folder
from hf_malmen.in_force import edits_in_force
from hf_malmen.model_card import EditorRun, write_editor_card
from hf_malmen.recipe import Recipe, run_recipe

from .hub_server import HubServer

Build = Callable[..., Any]

TOKEN, OTHER_TOKEN = "hf_me", "hf_you"
ID = "me/editor"
WEIGHTS = "/lfs/"
BOTH = pytest.mark.parametrize("kind", ["editor", "edit"])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub of two users; this process talks to it, anonymously unless a token is passed, and with an empty cache."""
    with HubServer(tmp_path / "hub", {TOKEN: "me", OTHER_TOKEN: "you"}) as server:
        for name, value in {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)  # made at import
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        yield server


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    """The client, as the owner."""
    return HfApi(token=TOKEN)


@pytest.fixture
def model(make_llama: Build) -> PreTrainedModel:
    """A tiny base model."""
    base: PreTrainedModel = make_llama()
    return base


@pytest.fixture
def editor(model: PreTrainedModel, make_editor: Build) -> EditorModel:
    """An editor for it, as if trained."""
    trained: EditorModel = make_editor(model, n_preserved_keys=4)
    return trained


@pytest.fixture
def make_artifact(model: PreTrainedModel, make_editor: Build) -> Build:
    """A builder of either thing that is shared, random by its seed: an `"editor"` or an `"edit"`."""

    def build(kind: str, seed: int = 0) -> EditorModel | Edit:
        trained: EditorModel = make_editor(model, seed=seed)
        if kind == "editor":
            return trained
        generator = torch.Generator().manual_seed(seed)
        shifts = {
            name: torch.randn(trained.config.shape_of(name), generator=generator) for name in trained.module_names
        }
        facts = [Fact(f"Number {seed} is", "Überzahl", rephrases=("It is",), subject="number")]
        return Edit(
            shifts, facts=facts, base_model_fingerprint=trained.config.base_model_fingerprint, editor={"method": "mend"}
        )

    return build


def tensors(artifact: EditorModel | Edit) -> dict[str, Tensor]:
    """Every parameter and buffer, or every shift."""
    return dict(artifact.shifts if isinstance(artifact, Edit) else artifact.state_dict())


def same(found: EditorModel | Edit, expected: EditorModel | Edit) -> bool:
    """Equal in names, dtypes and every bit of every tensor, and in what goes with them."""
    a, b = tensors(found), tensors(expected)
    if isinstance(found, Edit) and isinstance(expected, Edit):
        described = vars(found).keys() == vars(expected).keys() and all(
            getattr(found, name) == getattr(expected, name)
            for name in ("facts", "editor", "created_at", "base_model_fingerprint", "fan_in_fan_out")
        )
    else:
        described = found.config.module_shapes == expected.config.module_shapes
    return described and a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in b)


def pull(kind: str, repo_id: str = ID, **kwargs: Any) -> EditorModel | Edit:
    """`from_pretrained` of the class."""
    loaded: EditorModel | Edit = {"editor": EditorModel, "edit": Edit}[kind].from_pretrained(repo_id, **kwargs)
    return loaded


def weights_of(files: dict[str, bytes]) -> bytes:
    """The one file of tensors in a repo, and there must be no other."""
    (content,) = [content for path, content in files.items() if path not in TEXTS]
    safetensors.torch.load(content)
    return content


TEXTS = {".gitattributes", "README.md", "config.json"}


def test_the_hub_is_one(hub: HubServer, api: HfApi) -> None:
    """What the client asks besides, and what it makes of the answers."""
    assert api.whoami()["name"] == "me"
    api.create_repo(ID)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(ID)
    for path in ("a.txt", "b/c.txt", "b/d/e.bin"):
        commit = api.upload_file(path_or_fileobj=path.encode(), path_in_repo=path, repo_id=ID)
    pull_request = api.upload_file(path_or_fileobj=b"?", path_in_repo="f", repo_id=ID, create_pr=True).pr_revision
    api.create_branch(ID, branch="other")
    refs = api.list_repo_refs(ID, include_pull_requests=True)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": commit.oid, "other": commit.oid}
    assert [ref.ref for ref in refs.pull_requests or []] == [pull_request] == ["refs/pr/1"]
    assert api.model_info(ID).sha == commit.oid == api.model_info(ID, revision="other").sha
    assert api.list_repo_files(ID) == [".gitattributes", "a.txt", "b/c.txt", "b/d/e.bin"]
    assert [entry.path for entry in api.list_repo_tree(ID)] == [".gitattributes", "a.txt", "b"]
    assert [entry.path for entry in api.list_repo_tree(ID, "b")] == ["b/c.txt", "b/d"]
    assert api.file_exists(ID, "b/d/e.bin") and not api.file_exists(ID, "b/d/e")
    assert Path(api.hf_hub_download(ID, "b/d/e.bin")).read_text() == "b/d/e.bin"
    api.delete_file("a.txt", ID)
    assert set(hub.files(ID)) == {".gitattributes", "b/c.txt", "b/d/e.bin"}
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(ID, "a.txt", revision="none")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(ID, "a.txt")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(path_or_fileobj=b"", path_in_repo="g", repo_id=ID, parent_commit=commit.oid)


def test_the_name_of_a_model_that_was_made_here_is_asked_for_once(
    hub: HubServer, model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be a repo's, of a model that was loaded into another cache. Where there is none, there are no edits."""
    model.name_or_path = "me/my-model"
    for _ in range(3):
        assert edits_in_force(model, strict=True) == []
    assert len(hub.seen("GET", "/api/models/me/my-model")) == 1
    assert caplog.text == ""


# Push and pull


@BOTH
def test_what_is_pushed_is_pulled(hub: HubServer, api: HfApi, make_artifact: Build, kind: str) -> None:
    """By branch, by tag, by commit, and by default: the same bits and the same description."""
    pushed = make_artifact(kind)
    assert not same(make_artifact(kind, seed=1), pushed)  # so that `same` can tell
    pushed.push_to_hub(ID, token=TOKEN, commit_message="The first")
    sha = hub.refs(ID)["refs/heads/main"]
    api.create_branch(ID, branch="exp/1")
    api.create_tag(ID, tag="v1.0")
    for revision in (None, "main", "exp/1", "v1.0", sha):
        assert same(pull(kind, revision=revision, cache_dir=hub.root / f"cache of {revision}".replace("/", "")), pushed)
    (commit,) = hub.seen("POST", "/commit/")
    assert json.loads(commit.body.splitlines()[0])["value"]["summary"] == "The first"


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.is_trained])
def test_an_editor_without_parameters(
    hub: HubServer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    method: str,
) -> None:
    """It comes back with the statistics it was warmed up with, and with its card."""
    pushed = EditorModel.from_base(model, EditorConfig(method=method))
    if pushed.config.maker == "rows":
        pushed.warm_up(model, facts, tokenizer)
    pushed.push_to_hub(ID, token=TOKEN)
    assert same(pull("editor"), pushed)
    card = hub.files(ID)["README.md"].decode()
    assert f"# {method.upper()} editor" in card and "yper-network" not in card


def test_an_edit_names_the_editor_it_came_from(
    hub: HubServer,
    model: PreTrainedModel,
    editor: EditorModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    tmp_path: Path,
) -> None:
    """The repo and the commit, not a folder in the cache; and neither goes into the editor's own configuration."""
    editor.push_to_hub(ID, token=TOKEN)
    pulled = EditorModel.from_pretrained(ID)
    maker = pulled.make_edit(model, facts, tokenizer).editor
    assert (maker["name_or_path"], maker["revision"]) == (ID, hub.refs(ID)["refs/heads/main"])
    pulled.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "config.json").read_bytes() == hub.files(ID)["config.json"]


def test_a_new_branch(hub: HubServer, make_artifact: Build) -> None:
    """`revision` is made if it is not there, as in transformers, and `main` stays."""
    first, second = make_artifact("editor", seed=1), make_artifact("editor", seed=2)
    first.push_to_hub(ID, token=TOKEN)
    second.push_to_hub(ID, token=TOKEN, revision="dev")
    assert same(pull("editor"), first)
    assert same(pull("editor", revision="dev"), second)


@pytest.mark.parametrize("revision", [None, "dev"])
def test_a_repo_keeps_the_card_that_it_has(
    hub: HubServer, api: HfApi, make_artifact: Build, revision: str | None
) -> None:
    """Of each branch, also where its owner is left out."""
    make_artifact("editor").push_to_hub(ID, token=TOKEN, revision=revision)
    api.upload_file(path_or_fileobj=b"# Mine\n", path_in_repo="README.md", repo_id=ID, revision=revision)
    make_artifact("editor", seed=1).push_to_hub("editor", token=TOKEN, revision=revision)
    assert hub.files(ID, revision or "main")["README.md"] == b"# Mine\n"


@BOTH
def test_an_old_revision_is_the_old_version(hub: HubServer, make_artifact: Build, kind: str) -> None:
    """The second push does not touch the first commit, and `main` in the cache moves on."""
    old, new = make_artifact(kind, seed=1), make_artifact(kind, seed=2)
    old.push_to_hub(ID, token=TOKEN)
    sha = hub.refs(ID)["refs/heads/main"]
    assert same(pull(kind), old)
    new.push_to_hub(ID, token=TOKEN)
    assert same(pull(kind), new)
    assert same(pull(kind, revision=sha), old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_repo_of_an_editor(hub: HubServer, make_llama: Build, make_editor: Build, dtype: torch.dtype) -> None:
    """A card, the configuration, and one safetensors file with every parameter and buffer."""
    editor = make_editor(make_llama(dtype), n_preserved_keys=4)
    editor.push_to_hub(ID, token=TOKEN)
    files = hub.files(ID)
    assert set(files) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    stored = safetensors.torch.load(files["model.safetensors"])
    expected = editor.state_dict()
    assert stored.keys() == expected.keys()
    assert all(stored[n].dtype == expected[n].dtype and torch.equal(stored[n], expected[n]) for n in expected)
    config = json.loads(files["config.json"])
    assert (config["model_type"], config["architectures"], config["format_version"]) == (
        "hf_malmen", ["EditorModel"], FORMAT_VERSION,
    )  # fmt: skip


def test_the_repo_of_an_edit(hub: HubServer, make_artifact: Build) -> None:
    """The configuration, and one safetensors file with the shifts, under their own names."""
    edit = make_artifact("edit")
    edit.push_to_hub(ID, token=TOKEN)
    files = hub.files(ID)
    assert {"config.json", "edit.safetensors"} <= set(files) <= {"edit.safetensors", *TEXTS}
    assert json.loads(files["config.json"])["facts"][0]["target"] == "Überzahl"


@BOTH
def test_a_pull_request_leaves_main_alone(hub: HubServer, make_artifact: Build, kind: str) -> None:
    """`create_pr=True`, by the owner and by somebody who may only read."""
    first, second, third = (make_artifact(kind, seed=seed) for seed in (1, 2, 3))
    first.push_to_hub(ID, token=TOKEN)
    before = hub.files(ID)
    second.push_to_hub(ID, token=TOKEN, create_pr=True)
    third.push_to_hub(ID, token=OTHER_TOKEN, create_pr=True)
    assert hub.files(ID) == before
    assert same(pull(kind), first)
    assert same(pull(kind, revision="refs/pr/1"), second)
    assert same(pull(kind, revision="refs/pr/2"), third)


def test_an_editor_in_a_subfolder(hub: HubServer, api: HfApi, editor: EditorModel, tmp_path: Path) -> None:
    """`subfolder`, as in transformers, in a repo and in a folder; other weights in the repo are not downloaded."""
    editor.save_pretrained(tmp_path / "saved" / "gptj")
    api.create_repo(ID)
    api.upload_folder(repo_id=ID, folder_path=tmp_path / "saved")
    api.upload_file(repo_id=ID, path_or_fileobj=b"other", path_in_repo="model.safetensors")
    for place in (ID, tmp_path / "saved"):
        assert same(EditorModel.from_pretrained(place, subfolder="gptj"), editor)
    assert len(hub.seen("GET", WEIGHTS)) == 1


# Who may read and write


@BOTH
def test_a_private_repo_needs_a_token_that_may_read_it(hub: HubServer, make_artifact: Build, kind: str) -> None:
    """Refused without one, with somebody else's and with one that is not known; and the storage sees no token."""
    pushed = make_artifact(kind)
    pushed.push_to_hub(ID, private=True, token=TOKEN)
    assert hub.is_private(ID)
    for token, reason in ((None, "(?i)private"), (OTHER_TOKEN, "(?i)private"), ("hf_nobody", "Invalid credentials")):
        with pytest.raises(OSError, match=reason):
            pull(kind, token=token)
    assert not hub.seen("GET", WEIGHTS)
    assert same(pull(kind, token=TOKEN), pushed)
    transfers = hub.seen("GET", WEIGHTS) + hub.seen("PUT", WEIGHTS)
    assert len(transfers) == 2
    assert not any("authorization" in request.headers for request in transfers)


@BOTH
def test_a_gated_repo_says_so(hub: HubServer, make_artifact: Build, kind: str) -> None:
    """Everybody sees that it is there; its files are for those who were let in."""
    pushed = make_artifact(kind)
    pushed.push_to_hub(ID, token=TOKEN)
    hub.gate(ID)
    for token, status in ((None, 401), (OTHER_TOKEN, 403)):
        with pytest.raises(OSError, match=rf"(?s){status}.*gated repo.*me/editor"):
            pull(kind, token=token)
    assert same(pull(kind, token=TOKEN), pushed)


@BOTH
def test_only_the_owner_pushes(hub: HubServer, make_artifact: Build, kind: str) -> None:
    """Without a token, with a wrong one, or into somebody's namespace: refused, and nothing is there."""
    artifact = make_artifact(kind)
    for token, status in ((None, 401), ("hf_nobody", 401), (OTHER_TOKEN, 403)):
        with pytest.raises(HfHubHTTPError) as caught:
            artifact.push_to_hub(ID, token=token)
        assert caught.value.response.status_code == status
    artifact.push_to_hub(ID, token=TOKEN)
    before = hub.refs(ID)
    with pytest.raises(HfHubHTTPError, match="403"):
        make_artifact(kind, seed=1).push_to_hub(ID, token=OTHER_TOKEN)
    assert hub.refs(ID) == before


# Interruptions


@BOTH
@pytest.mark.parametrize("fault", ["cut", "503"])
def test_an_interrupted_upload_is_tried_again(hub: HubServer, make_artifact: Build, kind: str, fault: str) -> None:
    """A connection lost in the middle of the weights, and a server that is down for a moment: still one commit."""
    pushed = make_artifact(kind)
    if fault == "cut":
        hub.cut("PUT", WEIGHTS, after=5000)
    else:
        hub.fail("PUT", WEIGHTS, status=503)
    pushed.push_to_hub(ID, token=TOKEN)
    first, second = hub.seen("PUT", WEIGHTS)
    if fault == "cut":
        assert len(first.body) == 5000
    assert second.body == weights_of(hub.files(ID))
    assert len(hub.commits(ID)) == 2  # the initial one, and this
    assert same(pull(kind), pushed)


@BOTH
def test_a_failed_push_is_invisible_and_can_be_repeated(hub: HubServer, make_artifact: Build, kind: str) -> None:
    """The weights arrive, the commit does not: readers see the old version; the next push need not send them again."""
    old, new = make_artifact(kind, seed=1), make_artifact(kind, seed=2)
    old.push_to_hub(ID, token=TOKEN)
    before, commits = hub.files(ID), hub.commits(ID)
    hub.fail("POST", "/commit/", status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        new.push_to_hub(ID, token=TOKEN)
    assert hub.files(ID) == before and hub.commits(ID) == commits
    assert same(pull(kind), old)

    uploads = len(hub.seen("PUT", WEIGHTS))
    new.push_to_hub(ID, token=TOKEN)
    assert len(hub.seen("PUT", WEIGHTS)) == uploads == 2
    assert same(pull(kind), new)


def test_a_file_in_parts(hub: HubServer, make_artifact: Build) -> None:
    """Large files go up in parts; a part whose connection is lost is sent again, and only that one."""
    hub.part_size = 8000
    pushed = make_artifact("editor")
    hub.cut("PUT", WEIGHTS, after=3000)
    pushed.push_to_hub(ID, token=TOKEN)
    content = weights_of(hub.files(ID))
    parts = [content[start : start + 8000] for start in range(0, len(content), 8000)]
    assert len(parts) == 3
    assert [request.body for request in hub.seen("PUT", WEIGHTS)] == [parts[0][:3000], *parts]
    assert same(pull("editor"), pushed)


@BOTH
def test_an_interrupted_download_goes_on_where_it_stopped(
    hub: HubServer, make_artifact: Build, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second request asks for the rest by `Range`, and what lies in the cache is the file, byte for byte."""
    pushed = make_artifact(kind)
    pushed.push_to_hub(ID, token=TOKEN)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # what is read at once, and kept when it breaks
    hub.cut("GET", WEIGHTS, after=5000)
    assert same(pull(kind), pushed)
    assert [request.headers.get("range") for request in hub.seen("GET", WEIGHTS)] == [None, "bytes=4096-"]
    name = {"editor": "model.safetensors", "edit": "edit.safetensors"}[kind]
    assert Path(str(try_to_load_from_cache(ID, name))).read_bytes() == weights_of(hub.files(ID))


@BOTH
def test_a_download_that_fails_for_good_leaves_nothing_that_loads(
    hub: HubServer, make_artifact: Build, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No half file is taken for the whole one, neither offline nor when the hub is back."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    pushed = make_artifact(kind)
    pushed.push_to_hub(ID, token=TOKEN)
    hub.cut("GET", WEIGHTS, after=5000, times=6)
    with pytest.raises(Exception, match="peer closed connection"):
        pull(kind)
    with pytest.raises(OSError, match="cache"):
        pull(kind, local_files_only=True)
    assert same(pull(kind), pushed)


# Edited checkpoints


@pytest.fixture
def edited(
    hub: HubServer, editor: EditorModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> tuple[list[Fact], dict[str, Tensor]]:
    """Facts, of which the first four are in force on `me/model`; and the weights that one shot over all would give."""
    facts = [Fact(f"The country of {city} is", "Peru") for city in ("Lyon", "Turin", "Osaka", "Quito", "Perth")]
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    editor.apply(tmp_path / "base", facts[:4], output_dir=tmp_path / "edited", accumulate=True)
    push_folder(tmp_path / "edited", "me/model", token=TOKEN)
    with editor.applied(model, facts, tokenizer=tokenizer, accumulate=True):
        wanted = {name: model.get_submodule(name).weight.detach().clone() for name in editor.module_names}
    return facts, wanted


@pytest.mark.parametrize("kind", ["live", "live, from another cache", "on disk"])
def test_edits_of_a_checkpoint_on_the_hub_are_in_force(
    kind: str, edited: tuple[list[Fact], dict[str, Tensor]], editor: EditorModel, tmp_path: Path
) -> None:
    """Its facts are not written again, and what is solved for are the facts of all edits."""
    facts, wanted = edited
    if kind != "on disk":
        cache = None if kind == "live" else tmp_path / "another cache"
        loaded = AutoModelForCausalLM.from_pretrained("me/model", cache_dir=cache)
        assert facts_in_force(loaded).n_in_force == 4
        edit = editor.apply(loaded, facts, accumulate=True)
    else:
        edit = editor.apply("me/model", facts, output_dir=tmp_path / "again", accumulate=True)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert facts_in_force(tmp_path / "again").n_in_force == 5
    assert (edit.n_facts, edit.n_skipped) == (1, 4)
    for name, weight in wanted.items():
        assert torch.allclose(loaded.get_submodule(name).weight, weight, atol=1e-6)


def test_what_is_gone_from_a_folder_goes_from_its_repo(
    hub: HubServer, api: HfApi, edited: tuple[list[Fact], dict[str, Tensor]], tmp_path: Path
) -> None:
    """An edit that was undone would be in force again, and weights of other names would be loaded instead."""
    others = {"README.md", "edits/notes.txt", "state.safetensors", "results.png", "lora/model.safetensors"}
    for name in (*others, "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        api.upload_file(path_or_fileobj=b"", path_in_repo=name, repo_id="me/model")
    undo_edit(tmp_path / "edited")
    push_folder(tmp_path / "edited", "me/model", token=TOKEN)
    kept = {path.name for path in (tmp_path / "edited").iterdir()}
    assert set(hub.files("me/model")) == {".gitattributes", *kept, *others}


@BOTH
def test_what_belongs_to_an_earlier_push_goes_with_it(
    hub: HubServer, api: HfApi, make_artifact: Build, kind: str, tmp_path: Path
) -> None:
    """Another edit's state would be read as its own; results would be shown as those of another editor."""
    make_artifact(kind).push_to_hub(ID, token=TOKEN)
    before = set(hub.files(ID))
    results = {"results.png", "eval_results.json", ".eval_results/hf_malmen.yaml"}
    for name in results | {"state.safetensors"}:
        api.upload_file(path_or_fileobj=b"", path_in_repo=name, repo_id=ID)
    artifact = make_artifact(kind, seed=1)
    artifact.push_to_hub(ID, token=TOKEN)
    others = {"state.safetensors"} if kind == "editor" else set()
    assert set(hub.files(ID)) == before | results | others  # with the card that they are part of
    if kind == "editor":
        artifact.save_pretrained(tmp_path / "new")
        write_editor_card(tmp_path / "new", artifact, EditorRun())
        push_folder(tmp_path / "new", ID, token=TOKEN)
        assert set(hub.files(ID)) == before | others


def test_edits_of_a_private_checkpoint_are_in_force(
    edited: tuple[list[Fact], dict[str, Tensor]], editor: EditorModel, tmp_path: Path
) -> None:
    """The repo is asked for them with the token that it was loaded with."""
    facts, _ = edited
    push_folder(tmp_path / "edited", "me/private", token=TOKEN, private=True)
    for accumulate in (True, False):
        options = {"output_dir": tmp_path / str(accumulate), "token": TOKEN}
        edit = editor.apply("me/private", facts, accumulate=accumulate, **options)
        assert (edit.n_facts, edit.n_skipped) == (1, 4)


def test_edits_of_a_checkpoint_from_a_hub_that_is_gone(
    hub: HubServer,
    edited: tuple[list[Fact], dict[str, Tensor]],
    editor: EditorModel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They do not count, of which the user is told; what would be wrong without them is refused."""
    loaded = AutoModelForCausalLM.from_pretrained("me/model")
    hub.stop()
    assert facts_in_force(loaded).n_in_force == 0
    assert "whether me/model, which this model was loaded from, has edits in force" in caplog.text
    with pytest.raises(EditStateError, match=r"whether me/model.* has edits in force"):
        editor.apply(loaded, edited[0], accumulate=True)


def test_a_copy_of_a_repo_has_all_of_it(
    hub: HubServer, edited: tuple[list[Fact], dict[str, Tensor]], tmp_path: Path
) -> None:
    """With the Hub, or with the list of a repo's files that the client has kept."""
    edit = Edit({"model.layers.1.mlp.down_proj": torch.ones(48, 32)})
    AutoModelForCausalLM.from_pretrained("me/model")
    edit.write("me/model", tmp_path / "copy")
    assert [record.id for record in read_history(tmp_path / "copy")] == ["0001", "0002"]
    hub.stop()
    edit.write("me/model", tmp_path / "another")
    assert {path.name for path in (tmp_path / "another").iterdir()} >= {
        path.name for path in (tmp_path / "copy").iterdir()
    }


@pytest.mark.parametrize(
    "missing", [None, "config.json", "model-00001-of", "model-00002-of", "model.safetensors.index"]
)
@pytest.mark.parametrize("listed", [False, True])
def test_a_copy_of_a_cached_model_without_the_hub(
    listed: bool,
    missing: str | None,
    hub: HubServer,
    model: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All of the model is taken, of which the user is told; a part of it is refused. Of some repos the client keeps the
    list of files: then those are named."""
    name = f"me/{'listed' if listed else 'sharded'}"
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    push_folder(tmp_path / "base", name, token=TOKEN)
    if listed:
        AutoModelForCausalLM.from_pretrained(name)
    else:
        for path in (tmp_path / "base").iterdir():
            HfApi().hf_hub_download(name, path.name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (snapshot,) = (tmp_path / "cache").glob("models--*/snapshots/*")
    edit = Edit({"model.layers.1.mlp.down_proj": torch.ones(48, 32)})
    if missing is None:
        edit.write(name, tmp_path / "copy")
        assert [record.id for record in read_history(tmp_path / "copy")] == ["0001"]
        assert f"whether {name} has more files than {snapshot}" in caplog.text
        assert "neither its edits" in caplog.text
    else:
        (file,) = snapshot.glob(f"{missing}*")
        file.unlink()
        where = snapshot.name if listed else f"holds, {snapshot}, is no whole model"
        with pytest.raises(CheckpointError, match=rf"{where}.*{missing}"):
            edit.write(name, tmp_path / "copy")
        assert not (tmp_path / "copy").exists()


def test_edits_that_are_known_to_be_missing_are_not_lost(
    edited: tuple[list[Fact], dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a repo whose files the client has listed, for some of them."""
    AutoModelForCausalLM.from_pretrained("me/model")
    huggingface_hub.snapshot_download("me/model", allow_patterns="*.json", ignore_patterns="edits/*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"missing \(edits/0001/"):
        Edit({"model.layers.1.mlp.down_proj": torch.ones(48, 32)}).write("me/model", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("name", ["edited", "me/another"])
def test_a_model_that_only_the_hub_could_know(
    name: str,
    hub: HubServer,
    edited: tuple[list[Fact], dict[str, Tensor]],
    editor: EditorModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From a folder that is looked for from elsewhere, or another cache, and it is gone: the user is told. As any model
    may have that name, it is edited."""
    push_folder(tmp_path / "edited", "me/another", token=TOKEN)
    monkeypatch.chdir(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(name, cache_dir=tmp_path / "another cache")
    monkeypatch.chdir(tmp_path / "base")
    hub.stop()
    assert facts_in_force(loaded).n_in_force == 0
    assert f"Cannot ask the Hub whether {name}, which this model was loaded from, has edits in force" in caplog.text
    with pytest.warns(FingerprintWarning, match="weights differ"):
        edit = editor.apply(loaded, edited[0], AutoTokenizer.from_pretrained("."), accumulate=True)
    assert edit.n_facts == 5


def test_a_checkpoint_without_edits_is_asked_for_them_once(
    hub: HubServer, model: PreTrainedModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By one process, however often it edits; nothing is printed."""
    model.save_pretrained(tmp_path / "base")
    push_folder(tmp_path / "base", "me/plain", token=TOKEN)
    loaded = AutoModelForCausalLM.from_pretrained("me/plain")
    capfd.readouterr()
    n_requests = len(hub.requests)
    for _ in range(3):
        assert facts_in_force(loaded).n_in_force == 0
    assert len(hub.requests) == n_requests + 1
    assert capfd.readouterr().err == ""


# Without the hub


@BOTH
def test_what_was_pulled_loads_offline(hub: HubServer, make_artifact: Build, kind: str) -> None:
    """`local_files_only` sends nothing: an error before the first pull, the same bits after it, the hub gone."""
    pushed = make_artifact(kind)
    pushed.push_to_hub(ID, token=TOKEN)
    n_requests = len(hub.requests)
    with pytest.raises(OSError, match="cache"):
        pull(kind, local_files_only=True)
    assert len(hub.requests) == n_requests
    assert same(pull(kind), pushed)

    hub.stop()
    assert same(pull(kind, local_files_only=True), pushed)
    assert same(pull(kind), pushed)  # falls back on the cache
    with pytest.raises(OSError, match="There is no folder me/other, and no repo on the Hub that can be read: "):
        pull(kind, "me/other", local_files_only=True)


# What is not there, or is something else


@BOTH
def test_a_repo_that_does_not_exist(hub: HubServer, make_artifact: Build, kind: str) -> None:
    """The error names it, also for a revision."""
    for token in (None, TOKEN):
        with pytest.raises(OSError, match="There is no folder me/editor, and no repo on the Hub that can be read: "):
            pull(kind, token=token)
    make_artifact(kind).push_to_hub(ID, token=TOKEN)
    with pytest.raises(OSError, match="v9"):
        pull(kind, revision="v9")


def upload(api: HfApi, files: dict[str, bytes] | Path) -> None:
    """A repo with these files, or those of a folder."""
    api.create_repo(ID)
    if isinstance(files, Path):
        files = {path.name: path.read_bytes() for path in files.iterdir()}
    for name, content in files.items():
        api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=ID)


NOT_AN_EDITOR = r"me/editor holds no editor, as EditorModel\.save_pretrained writes it: "


def test_a_language_model_is_no_editor(hub: HubServer, model: PreTrainedModel) -> None:
    """Said before its weights are loaded, with how to get an editor for it."""
    model.push_to_hub(ID, token=TOKEN)
    with pytest.raises(ModelMismatchError, match=NOT_AN_EDITOR + r"it is a llama model\. EditorModel\.from_base"):
        EditorModel.from_pretrained(ID)
    with pytest.raises(ModelMismatchError, match=r"me/editor holds no edit"):
        Edit.from_pretrained(ID)
    assert not hub.seen("GET", WEIGHTS)


def test_an_editor_and_an_edit_are_told_apart(hub: HubServer, make_artifact: Build) -> None:
    """Each class names the other."""
    make_artifact("edit").push_to_hub(ID, token=TOKEN)
    with pytest.raises(ModelMismatchError, match=NOT_AN_EDITOR + r"it is a saved edit\. Load it with Edit\.from_pre"):
        EditorModel.from_pretrained(ID)
    make_artifact("editor").push_to_hub("me/other", token=TOKEN)
    with pytest.raises(ModelMismatchError, match=r"me/other holds .*EditorModel\.from_pretrained"):
        Edit.from_pretrained("me/other")
    assert not hub.seen("GET", WEIGHTS)


def test_an_adapter_is_no_editor(hub: HubServer, api: HfApi, make_artifact: Build, tmp_path: Path) -> None:
    """transformers would go on to load the adapter's base model, in a repo as in a folder."""
    folder = make_artifact("edit").to_lora(tmp_path / "adapter")
    upload(api, folder)
    for place in (ID, folder):
        with pytest.raises(ModelMismatchError, match=r"holds no editor.*config\.json is missing.*Check the name"):
            EditorModel.from_pretrained(place)


def test_an_empty_repo(hub: HubServer, api: HfApi) -> None:
    """Made, and never pushed to."""
    api.create_repo(ID)
    with pytest.raises(ModelMismatchError, match=NOT_AN_EDITOR + r"its config\.json is missing"):
        EditorModel.from_pretrained(ID)
    with pytest.raises(ModelMismatchError, match=r"me/editor holds no edit"):
        Edit.from_pretrained(ID)


@pytest.mark.parametrize("news", [{}, {"method": "newer"}, {"ranks": [1, 2]}, {"rank": "auto"}], ids=str)
def test_an_editor_of_a_newer_format(hub: HubServer, api: HfApi, editor: EditorModel, news: dict[str, Any]) -> None:
    """Upgrade, it says, and nothing about fields and values that only the newer release knows."""
    editor.push_to_hub(ID, token=TOKEN)
    config = json.loads(hub.files(ID)["config.json"])
    config |= {"format_version": FORMAT_VERSION + 1, "hf_malmen_version": "99.0"} | news
    api.upload_file(path_or_fileobj=json.dumps(config).encode(), path_in_repo="config.json", repo_id=ID)
    expected = rf"format {FORMAT_VERSION + 1} \(written by hf_malmen 99\.0\).*Upgrade: pip install -U hf_malmen"
    for load in (EditorModel.from_pretrained, transformers.AutoModel.from_pretrained):
        with pytest.raises(ModelMismatchError, match=expected):
            load(ID)


def test_an_edit_of_a_newer_format(hub: HubServer, api: HfApi, make_artifact: Build) -> None:
    """As for an editor."""
    make_artifact("edit").push_to_hub(ID, token=TOKEN)
    config = json.loads(hub.files(ID)["config.json"]) | {"edit_format_version": 99, "hf_malmen_version": "99.0"}
    config["news"] = 1
    api.upload_file(path_or_fileobj=json.dumps(config).encode(), path_in_repo="config.json", repo_id=ID)
    with pytest.raises(ModelMismatchError, match=r"format 99.*hf_malmen 99\.0.*pip install -U hf_malmen"):
        Edit.from_pretrained(ID)


def test_pickles_are_not_read(editor: EditorModel, tmp_path: Path) -> None:
    """Weights that lie there as a pickle only are refused; transformers would load them."""
    editor.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(editor.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        EditorModel.from_pretrained(tmp_path)


# Training


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_a_trained_editor_is_pushed(
    hub: HubServer, model: PreTrainedModel, editor: EditorModel, facts: list[Fact], make_trainer: Build, strategy: str
) -> None:
    """With every save, or at the end: a private repo with the trained editor, and never a pickle in any commit."""
    trainer = make_trainer(
        editor, model, facts, push_to_hub=True, hub_model_id="me/trained", hub_token=TOKEN, hub_private_repo=True,
        hub_strategy=strategy, max_steps=2, save_steps=1, per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.train()
    summaries = [json.loads(r.body.splitlines()[0])["value"]["summary"] for r in hub.seen("POST", "/commit/")]
    assert bool(summaries) == (strategy == "every_save")
    assert all(summary.startswith("Training in progress, step ") for summary in summaries)
    trainer.push_to_hub()
    assert hub.is_private("me/trained")
    for commit in hub.commits("me/trained"):
        assert set(hub.files("me/trained", commit)) <= {*TEXTS, "model.safetensors"}
    assert set(hub.files("me/trained")) == {*TEXTS, "model.safetensors"}
    assert same(pull("editor", "me/trained", token=TOKEN), trainer.editor)


def test_saving_the_trained_editor_pushes_it(
    hub: HubServer, model: PreTrainedModel, editor: EditorModel, facts: list[Fact], make_trainer: Build
) -> None:
    """`save_model` pushes, as in transformers, and later steps arrive with the next one."""
    trainer = make_trainer(
        editor, model, facts, push_to_hub=True, hub_model_id="me/trained", hub_token=TOKEN, hub_strategy="end",
        max_steps=1, per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.save_model()
    before = hub.refs("me/trained")["refs/heads/main"]
    trainer.train()
    trainer.save_model()
    assert not same(pull("editor", "me/trained", revision=before), trainer.editor)
    assert same(pull("editor", "me/trained"), trainer.editor)
    assert set(hub.files("me/trained")) == {*TEXTS, "model.safetensors"}


def test_an_editor_without_training_is_pushed(
    hub: HubServer, api: HfApi, model: PreTrainedModel, tokenizer: Any, facts: list[Fact], tmp_path: Path
) -> None:
    """By a recipe, to the branch that it names, as a trained one is."""
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lines = [json.dumps(fact.to_dict()) for fact in facts]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    api.create_repo(ID)
    api.create_branch(ID, branch="dev")
    training = {"push_to_hub": True, "hub_model_id": ID, "hub_token": TOKEN, "hub_revision": "dev"}
    training |= {"output_dir": str(tmp_path / "editor"), "use_cpu": True, "report_to": "none"}
    settings = {"base_model": str(tmp_path / "base"), "train_facts": str(tmp_path / "facts.jsonl")}
    run_recipe(Recipe(**settings, editor={"method": "ultraedit"}, training=training))
    assert "model.safetensors" not in hub.files(ID)
    assert same(pull("editor", revision="dev"), EditorModel.from_pretrained(tmp_path / "editor"))


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_checkpoints_are_not_pushed(strategy: str, tmp_path: Path) -> None:
    """The optimizer's state is a pickle."""
    with pytest.raises(ValueError, match=rf"hub_strategy is '{strategy}'; allowed: 'end', 'every_save'.*safetensors"):
        EditorTrainingArguments(output_dir=tmp_path, hub_strategy=strategy)


# A process of its own, nothing patched


ROUND_TRIP = """
import sys
import torch
from hf_malmen import Edit, EditorModel

editor, edit = EditorModel.from_pretrained(sys.argv[1]), Edit.from_pretrained(sys.argv[2])
editor.push_to_hub("me/editor", private=True)
edit.push_to_hub("me/edit", private=True)
pulled = EditorModel.from_pretrained("me/editor").state_dict()
assert pulled.keys() == editor.state_dict().keys()
assert all(torch.equal(pulled[name], tensor) for name, tensor in editor.state_dict().items())
shifts = Edit.from_pretrained("me/edit").shifts
assert all(torch.equal(shifts[name], shift) for name, shift in edit.shifts.items())
"""


def test_a_fresh_process(tmp_path: Path, make_artifact: Build) -> None:
    """The environment alone says which hub, which token and which cache."""
    make_artifact("editor").save_pretrained(tmp_path / "editor")
    make_artifact("edit").save_pretrained(tmp_path / "edit")
    with HubServer(tmp_path / "hub", {TOKEN: "me"}) as hub:
        settings = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        unset = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_OIDC_RESOURCE"}
        inherited = {name: value for name, value in os.environ.items() if name not in unset}
        command = [sys.executable, "-c", ROUND_TRIP, str(tmp_path / "editor"), str(tmp_path / "edit")]
        done = subprocess.run(command, env=inherited | settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for kind, name in (("editor", "model.safetensors"), ("edit", "edit.safetensors")):
            assert hub.is_private(f"me/{kind}")
            assert hub.files(f"me/{kind}")[name] == (tmp_path / kind / name).read_bytes()
            assert (tmp_path / "home" / "hub" / f"models--me--{kind}").is_dir()
