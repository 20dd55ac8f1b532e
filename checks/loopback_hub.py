"""A model hub on the loopback interface, in memory: of the Hugging Face Hub's HTTP interface, what publishing and
loading use. The real client talks to it:

    with LoopbackHub(users={"hf_token": "org"}) as hub:
        subprocess.run([sys.executable, ...], env=hub.environment(home, token="hf_token"))
        print(hub.downloaded("org/name"))

Every file is uploaded inside its commit: there are no large files (git-lfs, Xet), no ranges and no pull requests.
What is asked for beyond that is refused with a message.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import RepoCard


class HubError(Exception):
    """An answer other than success: HTTP status, message, and the code that the client turns into an exception."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Commit:
    """Contents of all files by path, and what is said of the commit."""

    id: str
    title: str
    description: str
    date: str
    parent: Commit | None
    files: dict[str, bytes]


@dataclass
class Repository:
    """Commits by branch and tag; a private repository shows itself to its owner only."""

    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a full commit id names."""
        commit = self.branches.get(revision) or self.tags.get(revision) or self.commits.get(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def commit(self, branch: str, title: str, description: str, files: dict[str, bytes]) -> Commit:
        """Adds a commit with these files, and no others, to a branch."""
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        made = Commit(secrets.token_hex(20), title, description, date, self.branches.get(branch), files)
        self.branches[branch] = self.commits[made.id] = made
        return made


@dataclass
class LoopbackHub:
    """The server and what it has seen. A context manager: it serves inside the `with` block, on a port of its own.

    Attributes:
        users: names by access token. A user owns the repositories under their name, public and private.
        repositories: by kind and name, such as `models/org/name`; several hubs can serve the same.
        requests: method, address and status of every request, in the order in which they were answered.
        downloads: repository id and file name of every file whose contents were sent.
    """

    users: Mapping[str, str] = field(default_factory=dict)
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    downloads: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> LoopbackHub:
        handler = type("Handler", (HubRequestHandler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment of a process whose client shall use this server, with a cache of its own under `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        settings = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        return kept | settings | ({} if token is None else {"HF_TOKEN": token})

    def downloaded(self, repository_id: str) -> set[str]:
        """Names of the files of a repository whose contents were sent."""
        return {name for identifier, name in self.downloads if identifier == repository_id}


ROUTES: list[tuple[str, re.Pattern[str], str]] = []
REPOSITORY = r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"


def route(method: str, pattern: str) -> Callable[[Callable], Callable]:
    """Marks the method of the handler that answers requests whose path is `pattern`; its groups are the arguments."""

    def mark(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern), function.__name__))
        return function

    return mark


class HubRequestHandler(BaseHTTPRequestHandler):
    """One connection of a client."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def dispatch(self) -> None:
        self.address = urlsplit(self.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            self.answer()
        except HubError as error:
            # headers are ASCII, file names need not be
            headers = {"X-Error-Message": error.message.encode("ascii", "backslashreplace").decode()}
            if error.code is not None:
                headers["X-Error-Code"] = error.code
            self.send_json({"error": error.message}, error.status, headers)

    do_GET = do_HEAD = do_POST = dispatch  # noqa: N815 (names that http.server asks for)

    def answer(self) -> None:
        if "Transfer-Encoding" in self.headers:
            raise HubError(501, "This server reads no body of unknown length")
        method = "GET" if self.command == "HEAD" else self.command
        for expected, pattern, name in ROUTES:
            match = pattern.fullmatch(self.address.path)
            if expected == method and match:
                groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return getattr(self, name)(**groups)
        raise HubError(404, f"This server has no {method} {self.address.path}")

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        self.hub.requests.append((self.command, self.path, int(code)))

    def send_json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_content(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send_content(self, content: bytes, status: int, headers: Mapping[str, str]) -> None:
        """Sends a whole body, without it if only the head was asked for."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def flag(self, name: str) -> bool:
        return parse_qs(self.address.query).get(name, ["false"])[0].lower() in ("1", "true")

    # --- who asks, and for what ---

    def user(self) -> str | None:
        """The name of the user whose token came with the request; None without a token."""
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        user = self.hub.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def repository(self, kind: str, name: str, write: bool = False) -> Repository:
        """A repository that the user may see or, with `write`, change."""
        user = self.user()
        owned = user == name.split("/")[0]
        repository = self.hub.repositories.get(f"{kind}/{name}")
        if repository is None or (repository.private and not owned):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not owned:
            raise HubError(403, f"You have no write access to {name}")
        return repository

    # --- repositories ---

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        try:
            RepoCard(json.loads(self.body)["content"])
        except (yaml.YAMLError, ValueError) as error:
            self.send_json({"errors": [{"message": str(error)}], "warnings": []}, status=400)
        else:
            self.send_json({"errors": [], "warnings": []})

    @route("POST", "/api/repos/create")
    def create_repository(self) -> None:
        user, body = self.user(), json.loads(self.body)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        owner = body.get("organization") or user
        if owner != user:
            raise HubError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        kind, name = f"{body.get('type') or 'model'}s", f"{owner}/{body['name']}"
        address = f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{name}"
        with self.hub.lock:
            if f"{kind}/{name}" in self.hub.repositories:
                self.send_json({"error": "You already created this model repo", "url": address}, status=409)
                return
            # in the words of older and of newer clients
            private = body.get("visibility") == "private" or bool(body.get("private"))
            repository = self.hub.repositories[f"{kind}/{name}"] = Repository(private)
            repository.commit("main", "initial commit", "", {".gitattributes": b""})
        self.send_json({"url": address, "name": name, "private": private})

    @route("GET", REPOSITORY + "(?:/revision/(?P<revision>[^/]+))?")
    def information(self, kind: str, name: str, revision: str = "main") -> None:
        repository = self.repository(kind, name)
        commit = repository.resolve(revision)
        files = [{"rfilename": path} for path in commit.files]
        said = {"id": name, "sha": commit.id, "private": repository.private, "tags": [], "siblings": files}
        self.send_json(said)

    @route("GET", REPOSITORY + "/refs")
    def list_references(self, kind: str, name: str) -> None:
        repository = self.repository(kind, name)
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commit.id}
            for branch, commit in repository.branches.items()
        ]
        self.send_json({"branches": branches, "tags": [], "converts": [], "pullRequests": []})

    @route("GET", REPOSITORY + "/commits/(?P<revision>[^/]+)")
    def list_commits(self, kind: str, name: str, revision: str) -> None:
        commit: Commit | None = self.repository(kind, name).resolve(revision)
        listed = []
        while commit is not None:
            said = {"id": commit.id, "title": commit.title, "message": commit.description, "date": commit.date}
            listed.append(said | {"authors": []})
            commit = commit.parent
        self.send_json(listed)

    @route("POST", REPOSITORY + "/(?P<place>branch|tag)/(?P<revision>[^/]+)")
    def create_reference(self, kind: str, name: str, place: str, revision: str) -> None:
        repository, body = self.repository(kind, name, write=True), json.loads(self.body)
        if place == "branch":
            references, made, start = repository.branches, revision, body.get("startingPoint", "main")
        else:
            references, made, start = repository.tags, body["tag"], revision
        if made in references:
            raise HubError(409, f"{made} exists already")
        references[made] = repository.resolve(start)
        self.send_json({})

    # --- files ---

    @route("GET", REPOSITORY + "/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?")
    def list_tree(self, kind: str, name: str, revision: str, path: str = "") -> None:
        files = self.repository(kind, name).resolve(revision).files
        prefix = f"{path.strip('/')}/".lstrip("/")
        inside = {one: content for one, content in files.items() if one.startswith(prefix)}
        if path and not inside:
            raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        entries = {one: {"type": "file", "oid": blob_id(found), "size": len(found)} for one, found in inside.items()}
        if not self.flag("recursive"):
            for one in inside:
                folder, below, _ = one.removeprefix(prefix).partition("/")
                if below:
                    del entries[one]
                    entries[prefix + folder] = {"type": "directory", "oid": "0" * 40, "size": 0}
        self.send_json([{"path": one} | entry for one, entry in entries.items()])

    @route("GET", r"/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve_file(self, name: str, revision: str, path: str, kind: str = "models") -> None:
        commit = self.repository(kind, name).resolve(revision)
        content = commit.files.get(path)
        if content is None:
            raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        if self.command == "GET":
            self.hub.downloads.append((name, path))
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{blob_id(content)}"'}
        self.send_content(content, 200, headers | {"Content-Type": "application/octet-stream"})

    @route("POST", REPOSITORY + "/preupload/(?P<revision>[^/]+)")
    def prepare_upload(self, kind: str, name: str, revision: str) -> None:
        files = self.repository(kind, name, write=True).resolve(revision).files
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            oid = blob_id(files[path]) if path in files else None
            answers.append({"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": oid})
        self.send_json({"files": answers})

    @route("POST", REPOSITORY + "/commit/(?P<revision>[^/]+)")
    def commit(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name, write=True)
        if self.flag("create_pr"):
            raise HubError(403, "This server has no pull requests; commit to a branch instead")
        operations = [json.loads(line) for line in self.body.splitlines()]
        with self.hub.lock:
            if revision not in repository.branches:
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            parent = repository.branches[revision]
            files, header = dict(parent.files), operations[0]["value"]
            for operation in operations[1:]:
                key, value = operation["key"], operation["value"]
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "deletedFile" and value["path"] in files:
                    del files[value["path"]]
                else:
                    raise HubError(400, f"This server cannot do {key!r} to {value.get('path')!r}")
            if not parent.id.startswith(header.get("parentCommit", "")):
                raise HubError(412, f"{revision!r} has moved on from {header['parentCommit']} to {parent.id}")
            made = repository.commit(revision, header["summary"], header.get("description", ""), files)
        address = f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{name}/commit/{made.id}"
        self.send_json({"success": True, "commitOid": made.id, "commitUrl": address, "hookOutput": ""})


def blob_id(content: bytes) -> str:
    """The id that git gives to a file's contents."""
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
