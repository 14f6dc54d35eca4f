"""A model hub on 127.0.0.1 that speaks the part of the Hub's HTTP protocol that `huggingface_hub` uses for models.

Repos live in a folder, one snapshot a commit:

    repos/<owner>/<name>/<commit sha>/...    lfs/<sha256 of the content>

As on the Hub, weights go to and come from a storage of another origin (here another port), which sees no tokens; and
whoever may not read a repo is not told that it exists. Uploads by `hf_xet` are not offered: set `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


@dataclass
class Request:
    """One request, as it arrived."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)


@dataclass
class Answer:
    """What goes back. A `dict` or `list` is sent as JSON."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def content(self) -> bytes:
        """The body in bytes."""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


class Refused(Exception):
    """The request is answered with an error, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer({"error": message}, status, named | headers)


@dataclass
class Fault:
    """What goes wrong with the next requests of a kind: a status, or a connection that ends after some bytes."""

    method: str
    path: str  # a regular expression, searched in the path
    times: int
    status: int | None = None
    after: int | None = None


@dataclass
class Repo:
    """One model repo; `refs` maps full names, such as `refs/heads/main`, to commits."""

    owner: str
    folder: Path
    private: bool
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)

    def ref(self, revision: str) -> str | None:
        """Full name of a branch, a tag or a pull request."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in names if name in self.refs), None)

    def commit(self, revision: str) -> str:
        """Sha of a branch, a tag, a pull request or a commit."""
        ref = self.ref(revision)
        if ref is not None:
            return self.refs[ref]
        if re.fullmatch(r"[0-9a-f]{40}", revision) and (self.folder / revision).is_dir():
            return revision
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, sha: str) -> dict[str, bytes]:
        """{path: content} of a commit."""
        snapshot = self.folder / sha
        return {str(p.relative_to(snapshot)): p.read_bytes() for p in sorted(snapshot.rglob("*")) if p.is_file()}

    def add_commit(self, ref: str, parent: str | None, summary: str, files: Mapping[str, bytes]) -> str:
        """Write a snapshot, and only then move `ref` to it: no reader sees half a commit."""
        tree = sorted((path, hashlib.sha256(content).hexdigest()) for path, content in files.items())
        sha = hashlib.sha1(json.dumps([parent, summary, tree]).encode()).hexdigest()
        staging = self.folder / "staging"
        for path, content in files.items():
            (staging / path).parent.mkdir(parents=True, exist_ok=True)
            (staging / path).write_bytes(content)
        if (self.folder / sha).exists():
            shutil.rmtree(staging)
        else:
            staging.rename(self.folder / sha)
        self.refs[ref] = sha
        return sha


class HubServer:
    """The hub; a context manager that starts and stops it.

    Args:
        root: where the repos are kept.
        tokens: {token: user}. A user owns, and alone writes to, the repos in the namespace of that name.
        part_size: uploads of more bytes are asked for in parts of this size; None asks for one part always.

    Attributes:
        requests: every request, in order, those that went wrong on purpose too.
    """

    def __init__(self, root: Path, tokens: Mapping[str, str], part_size: int | None = None) -> None:
        self.root, self.tokens, self.part_size = root, dict(tokens), part_size
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._repos: dict[str, Repo] = {}
        self._lock = threading.Lock()
        (root / "lfs").mkdir(parents=True)
        handler = type("Handler", (_Handler,), {"hub": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def start(self) -> "HubServer":
        """Listen."""
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Go offline: from now on connections are refused."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # What tests arrange and look at

    def fail(self, method: str, path: str, *, status: int = 503, times: int = 1) -> None:
        """Answer the next `times` requests that match with an error."""
        self._faults.append(Fault(method, path, times, status=status))

    def cut(self, method: str, path: str, *, after: int, times: int = 1) -> None:
        """End the connection of the next `times` requests that match, `after` bytes into the body on its way."""
        self._faults.append(Fault(method, path, times, after=after))

    def gate(self, repo_id: str) -> None:
        """Let only the owner read the files."""
        self._repos[repo_id].gated = True

    def refs(self, repo_id: str) -> dict[str, str]:
        """{full name of a ref: commit}."""
        return dict(self._repos[repo_id].refs)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """{path: content}."""
        repo = self._repos[repo_id]
        return repo.files(repo.commit(revision))

    def commits(self, repo_id: str) -> set[str]:
        """Every commit of the repo, on whatever branch."""
        return {snapshot.name for snapshot in self._repos[repo_id].folder.iterdir()}

    def is_private(self, repo_id: str) -> bool:
        """Whether only its owner sees the repo."""
        return self._repos[repo_id].private

    def seen(self, method: str, path: str) -> list[Request]:
        """The requests of this method whose path matches the regular expression."""
        return [request for request in self.requests if request.method == method and re.search(path, request.path)]

    # Who asks, and what may they do

    def _user(self, request: Request) -> str | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def _writer(self, request: Request) -> str:
        user = self._user(request)
        if user is None:
            raise Refused(401, "Invalid username or password.")
        return user

    def _repo(self, request: Request, repo_id: str, *, write: bool = False) -> Repo:
        user, repo = self._user(request), self._repos.get(repo_id)
        if repo is None or (repo.private and user != repo.owner):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and self._writer(request) != repo.owner:
            raise Refused(403, f"You don't have the rights to write to {repo_id}")
        return repo

    # Repos

    def _whoami(self, request: Request) -> Answer:
        user = self._writer(request)
        return Answer({"type": "user", "name": user, "fullname": user, "orgs": [], "auth": {"type": "access_token"}})

    def _create_repo(self, request: Request) -> Answer:
        user, asked = self._writer(request), request.json
        owner = asked.get("organization") or user
        repo_id = f"{owner}/{asked['name']}"
        if owner != user:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        body = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self._repos:
            return Answer(body | {"error": "You already created this model repo"}, 409)
        repo = Repo(owner, self.root / "repos" / repo_id, private=asked.get("visibility") == "private")
        repo.folder.mkdir(parents=True)
        repo.add_commit("refs/heads/main", None, "initial commit", {".gitattributes": GIT_ATTRIBUTES})
        self._repos[repo_id] = repo
        return Answer(body)

    def _validate_yaml(self, request: Request) -> Answer:
        return Answer({"errors": [], "warnings": []})

    def _info(self, request: Request, repo_id: str, revision: str | None = None) -> Answer:
        repo = self._repo(request, repo_id)
        sha = repo.commit(revision or "main")
        siblings = [{"rfilename": path} for path in repo.files(sha)]
        about = {"id": repo_id, "sha": sha, "private": repo.private, "gated": "manual" if repo.gated else False}
        return Answer(about | {"siblings": siblings, "tags": [], "disabled": False})

    def _refs(self, request: Request, repo_id: str) -> Answer:
        refs = self._repo(request, repo_id).refs

        def below(prefix: str) -> list[dict[str, str]]:
            found = {ref: sha for ref, sha in refs.items() if ref.startswith(prefix)}
            return [{"name": r.removeprefix(prefix), "ref": r, "targetCommit": sha} for r, sha in found.items()]

        parts = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        return Answer({"converts": []} | {part: below(prefix) for part, prefix in parts.items()})

    def _create_branch(self, request: Request, repo_id: str, branch: str) -> Answer:
        start = request.json.get("startingPoint", "main")
        return self._create_ref(request, repo_id, f"refs/heads/{branch}", start)

    def _create_tag(self, request: Request, repo_id: str, revision: str) -> Answer:
        return self._create_ref(request, repo_id, f"refs/tags/{request.json['tag']}", revision)

    def _create_ref(self, request: Request, repo_id: str, ref: str, revision: str) -> Answer:
        repo = self._repo(request, repo_id, write=True)
        if ref in repo.refs:
            raise Refused(409, f"Reference {ref} already exists")
        repo.refs[ref] = repo.commit(revision)
        return Answer({})

    def _tree(self, request: Request, repo_id: str, revision: str, folder: str | None = None) -> Answer:
        repo = self._repo(request, repo_id)
        prefix, recursive = f"{folder}/" if folder else "", request.query.get("recursive") == ["true"]
        listing, folders = [], set()
        for path, content in repo.files(repo.commit(revision)).items():
            if path.startswith(prefix):
                inner = [f"{prefix}{parent}" for parent in Path(path.removeprefix(prefix)).parents if parent.name]
                folders.update(inner if recursive else inner[-1:])
                if recursive or not inner:
                    listing.append(_file_entry(path, content))
        if folder and not listing and not folders:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        return Answer(listing + [{"type": "directory", "path": path, "oid": ""} for path in sorted(folders)])

    # Uploads: which way, the large files, the commit

    def _preupload(self, request: Request, repo_id: str, revision: str) -> Answer:
        repo = self._repo(request, repo_id, write="create_pr" not in request.query)
        there = repo.files(repo.commit(revision))
        plan = []
        for path in (entry["path"] for entry in request.json["files"]):
            entry = {"path": path, "uploadMode": "lfs" if _is_lfs(path) else "regular", "shouldIgnore": False}
            plan.append(entry | ({"oid": _etag(path, there[path])} if path in there else {}))
        return Answer({"files": plan})

    def _lfs_batch(self, request: Request, repo_id: str) -> Answer:
        self._repo(request, repo_id)
        self._writer(request)
        objects = []
        for asked in request.json["objects"]:
            oid, size = asked["oid"], asked["size"]
            actions = {}
            if not (self.root / "lfs" / oid).is_file():
                header = {}
                if self.part_size is not None and size > self.part_size:
                    urls = [f"{self.storage}/lfs/{oid}?part={i + 1}" for i in range(-(-size // self.part_size))]
                    header = {"chunk_size": str(self.part_size)} | {str(i + 1): url for i, url in enumerate(urls)}
                verify = {"href": f"{self.endpoint}/{repo_id}.git/info/lfs/verify"}
                upload = {"href": f"{self.storage}/lfs/{oid}", "header": header}
                actions = {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": oid, "size": size} | actions)
        return Answer({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, request: Request, oid: str) -> Answer:
        if "part" in request.query:
            part = self.root / "lfs" / f"{oid}.part-{request.query['part'][0]}"
            part.write_bytes(request.body)
            return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})
        return self._store(oid, request.body)

    def _lfs_complete(self, request: Request, oid: str) -> Answer:
        parts = [self.root / "lfs" / f"{oid}.part-{part['partNumber']}" for part in request.json["parts"]]
        return self._store(oid, b"".join(part.read_bytes() for part in parts))

    def _store(self, oid: str, content: bytes) -> Answer:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "The content does not have the sha256 it was announced with")
        (self.root / "lfs" / oid).write_bytes(content)
        return Answer()

    def _lfs_verify(self, request: Request, repo_id: str) -> Answer:
        stored = self.root / "lfs" / request.json["oid"]
        if not stored.is_file() or stored.stat().st_size != request.json["size"]:
            raise Refused(404, "Object not found")
        return Answer({})

    def _commit(self, request: Request, repo_id: str, revision: str) -> Answer:
        pull_request = "create_pr" in request.query
        repo = self._repo(request, repo_id, write=not pull_request)
        self._writer(request)
        ref, parent = repo.ref(revision), repo.commit(revision)
        if ref is None:
            raise Refused(404, f"{revision} is not a branch", "RevisionNotFound")
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", parent) != parent:
            raise Refused(412, f"{revision} has moved on from the parent commit")
        files = repo.files(parent)
        for value, kind in ((line["value"], line["key"]) for line in lines[1:]):
            path = value["path"]
            if kind == "file":
                files[path] = base64.b64decode(value["content"])
            elif kind == "lfsFile" and (self.root / "lfs" / value["oid"]).is_file():
                files[path] = (self.root / "lfs" / value["oid"]).read_bytes()
            elif kind == "deletedFile" and path in files:
                del files[path]
            else:
                raise Refused(400, f"Cannot commit {kind} {path}")
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        sha = repo.add_commit(f"refs/pr/{number}" if pull_request else ref, parent, header["summary"], files)
        urls = {"pullRequestUrl": f"{self.endpoint}/{repo_id}/discussions/{number}"} if pull_request else {}
        return Answer(
            urls | {"commitUrl": f"{self.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha, "success": True}
        )

    # Downloads

    def _resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Answer:
        repo = self._repo(request, repo_id)
        user = self._user(request)
        if repo.gated and user != repo.owner:
            raise Refused(403 if user else 401, f"Access to model {repo_id} is restricted.", "GatedRepo")
        sha = repo.commit(revision)
        content = repo.files(sha).get(path)
        if content is None:
            raise Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        etag = _etag(path, content)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"'}
        if not _is_lfs(path):
            return _ranged(request, content, headers)
        linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        return Answer(status=302, headers=headers | linked | {"Location": f"{self.storage}/lfs/{etag}"})

    def _lfs_download(self, request: Request, oid: str) -> Answer:
        return _ranged(request, (self.root / "lfs" / oid).read_bytes(), {"ETag": f'"{oid}"'})

    ROUTES: ClassVar[tuple[tuple[str, str, Callable[..., Answer]], ...]] = (
        ("GET", r"/api/whoami-v2", _whoami),
        ("POST", r"/api/repos/create", _create_repo),
        ("POST", r"/api/validate-yaml", _validate_yaml),
        ("GET", r"/api/models/([^/]+/[^/]+)", _info),
        ("GET", r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", _info),
        ("GET", r"/api/models/([^/]+/[^/]+)/refs", _refs),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", _tree),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", _create_branch),
        ("POST", r"/api/models/([^/]+/[^/]+)/tag/([^/]+)", _create_tag),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", _preupload),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", _commit),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", _lfs_batch),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/verify", _lfs_verify),
        ("PUT", r"/lfs/([0-9a-f]{64})", _lfs_upload),
        ("POST", r"/lfs/([0-9a-f]{64})", _lfs_complete),
        ("GET", r"/lfs/([0-9a-f]{64})", _lfs_download),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _resolve),
    )

    def answer(self, request: Request) -> Answer:
        """What the protocol says, one request at a time."""
        method = "GET" if request.method == "HEAD" else request.method
        for verb, pattern, respond in self.ROUTES:
            found = re.fullmatch(pattern, request.path)
            if found and verb == method:
                try:
                    with self._lock:
                        return respond(self, request, *(group and unquote(group) for group in found.groups()))
                except Refused as refused:
                    return refused.answer
        return Answer({"error": f"No route for {request.method} {request.path}"}, 404)

    def next_fault(self, method: str, path: str) -> Fault | None:
        """What shall go wrong with this request."""
        with self._lock:
            for fault in self._faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, and sends the hub's answer or what a fault leaves of it. One request a connection."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def serve(self) -> None:
        self.close_connection = True
        url = urlsplit(self.path)
        fault = self.hub.next_fault(self.command, url.path)
        cut = fault.after if fault else None
        uploads = self.command in ("POST", "PUT")
        body = self.read_body(cut if uploads else None)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, url.path, parse_qs(url.query), headers, body)
        self.hub.requests.append(request)
        if fault and fault.status is not None:
            self.send(Answer({"error": "Something went wrong on our side"}, fault.status))
        elif cut is None or not uploads:
            self.send(self.hub.answer(request), cut)

    def read_body(self, limit: int | None) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            length = int(self.headers.get("Content-Length", 0))
            return self.rfile.read(length if limit is None else min(length, limit))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
            if limit is not None and len(body) >= limit:
                return body[:limit]
        self.rfile.readline()
        return body

    def send(self, answer: Answer, limit: int | None = None) -> None:
        self.send_response(answer.status)
        length = {"Content-Length": str(len(answer.content)), "Connection": "close"}
        for name, value in (length | answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content[:limit])

    def log_message(self, *_: object) -> None:
        pass

    do_GET = do_HEAD = do_POST = do_PUT = serve  # noqa: N815 # the base class looks for these names


def _is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def _etag(path: str, content: bytes) -> str:
    """What the Hub names a file's content by: sha256 of a large file, git's sha1 of any other."""
    if _is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _file_entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _etag(path, content)}
    lfs = {"oid": _etag(path, content), "size": len(content), "pointerSize": 134}
    return entry | ({"lfs": lfs} if _is_lfs(path) else {})


def _ranged(request: Request, content: bytes, headers: dict[str, str]) -> Answer:
    """The content, or the part of it that a `Range` header asks for."""
    headers = headers | {"Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if asked is None:
        return Answer(content, 200, headers)
    start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
    if start >= len(content):
        return Answer(status=416, headers=headers | {"Content-Range": f"bytes */{len(content)}"})
    return Answer(content[start : end + 1], 206, headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"})
