"""A model hub on the loopback interface, in memory: of the Hugging Face Hub's HTTP interface, what publishing and
loading use. The real client talks to it:

    with LoopbackHub(users={"hf_token": "org"}) as hub:
        subprocess.run([sys.executable, ...], env=hub.environment(home, token="hf_token"))
        print(hub.downloaded("org/name"))

Every file is uploaded inside its commit: there are no large files (git-lfs, Xet), no ranges and no pull requests.
Whatever else is asked for is refused with a message.
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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import RepoCard


class HubError(Exception):
    """An answer other than success: HTTP status, message, and the code that the client turns into an exception."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Commit:
    """Contents of all files by path."""

    id: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """Commits by branch and tag, and all of them by id; only its owner sees a private repository."""

    private: bool
    references: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a full commit id names."""
        commit = self.references.get(revision) or self.commits.get(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        """Adds a commit with these files, and no others, to a branch."""
        made = Commit(secrets.token_hex(20), title, files)
        self.references[branch] = self.commits[made.id] = made
        return made


@dataclass
class LoopbackHub:
    """The server and what it has seen. A context manager: it serves inside the `with` block, on a port of its own.

    Attributes:
        users: names by access token. A user owns the repositories under their name, public and private.
        repositories: by kind and name, such as `models/org/name`.
        downloads: repository id and file name of every file whose contents were sent.
    """

    users: Mapping[str, str] = field(default_factory=dict)
    repositories: dict[str, Repository] = field(default_factory=dict)
    downloads: list[tuple[str, str]] = field(default_factory=list)

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
REPOSITORY = r"/api/(?P<kind>models|spaces)/(?P<name>[^/]+/[^/]+)"


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
        method = "GET" if self.command == "HEAD" else self.command
        for expected, pattern, name in ROUTES:
            match = pattern.fullmatch(urlsplit(self.path).path)
            if expected == method and match:
                groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return getattr(self, name)(**groups)
        raise HubError(404, f"This server has no {method} {self.path}")

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

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

    # --- who asks, and for what ---

    def user(self) -> str | None:
        """The name of the user whose token came with the request."""
        return self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def repository(self, kind: str, name: str, write: bool = False) -> Repository:
        """A repository that the user may see or, with `write`, change."""
        repository = self.hub.repositories.get(f"{kind}/{name}")
        owned = self.user() == name.split("/")[0]
        if repository is None or (repository.private and not owned):
            raise HubError(404, "Repository not found", "RepoNotFound")
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
        body = json.loads(self.body)
        owner = body.get("organization") or self.user()
        if owner is None or owner != self.user():
            raise HubError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        kind, name = f"{body.get('type') or 'model'}s", f"{owner}/{body['name']}"
        address = f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{name}"
        if f"{kind}/{name}" in self.hub.repositories:
            self.send_json({"error": "You already created this model repo", "url": address}, status=409)
            return
        # in the words of older and of newer clients
        private = body.get("visibility") == "private" or bool(body.get("private"))
        repository = self.hub.repositories[f"{kind}/{name}"] = Repository(private)
        repository.commit("main", "initial commit", {".gitattributes": b""})
        self.send_json({"url": address, "name": name})

    @route("GET", REPOSITORY + "(?:/revision/(?P<revision>[^/]+))?")
    def information(self, kind: str, name: str, revision: str = "main") -> None:
        repository = self.repository(kind, name)
        commit = repository.resolve(revision)
        files = [{"rfilename": path} for path in commit.files]
        said = {"id": name, "sha": commit.id, "private": repository.private, "tags": [], "siblings": files}
        self.send_json(said)

    @route("POST", REPOSITORY + "/branch/(?P<branch>[^/]+)")
    def create_branch(self, kind: str, name: str, branch: str) -> None:
        references = self.repository(kind, name, write=True).references
        if branch in references:
            raise HubError(409, f"{branch} exists already")
        references[branch] = references["main"]
        self.send_json({})

    @route("POST", REPOSITORY + "/tag/(?P<revision>[^/]+)")
    def create_tag(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name, write=True)
        repository.references[json.loads(self.body)["tag"]] = repository.resolve(revision)
        self.send_json({})

    # --- files ---

    @route("GET", REPOSITORY + "/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?")
    def list_tree(self, kind: str, name: str, revision: str, path: str = "") -> None:
        files = self.repository(kind, name).resolve(revision).files
        prefix = f"{path.strip('/')}/".lstrip("/")
        inside = {one: content for one, content in files.items() if one.startswith(prefix)}
        if path and not inside:
            raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        self.send_json(
            [
                {"type": "file", "path": one, "oid": blob_id(content), "size": len(content)}
                for one, content in inside.items()
            ]
        )

    @route("GET", r"/(?:(?P<kind>spaces)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
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
        self.repository(kind, name, write=True).resolve(revision)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        answers = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
        self.send_json({"files": answers})

    @route("POST", REPOSITORY + "/commit/(?P<revision>[^/]+)")
    def commit(self, kind: str, name: str, revision: str) -> None:
        if "create_pr=1" in self.path:
            raise HubError(403, "This server has no pull requests; commit to a branch instead")
        repository = self.repository(kind, name, write=True)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        files = dict(repository.resolve(revision).files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise HubError(400, f"This server cannot do {key!r} to {value.get('path')!r}")
        made = repository.commit(revision, header["value"]["summary"], files)
        address = f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{name}/commit/{made.id}"
        self.send_json({"commitOid": made.id, "commitUrl": address})


def blob_id(content: bytes) -> str:
    """The id that git gives to a file's contents."""
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
