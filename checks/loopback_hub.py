"""A model hub on the loopback interface: of the Hugging Face Hub's HTTP interface, what publishing and loading use.

It keeps what it is given in plain git repositories, `<storage>/<models|datasets|spaces>/<owner>/<name>/.git`, large
files as git-lfs keeps them, in `.git/lfs/objects`; another program that serves git repositories can serve the same
storage. The real client talks to it:

    with LoopbackHub(storage, users={"hf_token": "org"}) as hub:
        subprocess.run([sys.executable, ...], env=hub.environment(home, token="hf_token"))
        print(hub.downloaded("org/name"))

Left out: Xet storage (the environment switches it off in the client), pull requests, gated repositories, uploads in
parts. What is asked for beyond that is refused with a message.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml


LFS_PATTERNS = ("*.bin", "*.ckpt", "*.gguf", "*.npz", "*.pkl", "*.pt", "*.pth", "*.safetensors", "*.zip")
LFS_THRESHOLD = 10 * 2**20  # bytes; larger files are stored as large files whatever their names
LFS_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")
LFS_POINTER_SIZE = 200  # bytes; no pointer is larger
REPOSITORY_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
CHUNK_SIZE = 2**20  # bytes


class HubError(Exception):
    """An answer other than success: HTTP status, message, and the code that the client turns into an exception."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


# --- storage ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A file or folder of a commit; for a large file `size` is that of its contents and `sha256` their digest."""

    path: str
    is_folder: bool
    oid: str
    size: int
    sha256: str | None = None
    pointer_size: int = 0


@dataclass
class GitRepository:
    """A git repository without a work tree, read and written through git's own commands."""

    path: Path
    trees: dict[str, dict[str, Entry]] = field(default_factory=dict)

    @property
    def exists(self) -> bool:
        return (self.path / ".git" / "HEAD").is_file()

    @property
    def private(self) -> bool:
        """Whether only the owner may see it."""
        return self.privacy_mark.exists()

    @property
    def privacy_mark(self) -> Path:
        return self.path / ".git" / "private"

    def set_private(self, private: bool) -> None:
        if private:
            self.privacy_mark.touch()
        else:
            self.privacy_mark.unlink(missing_ok=True)

    def git(self, *arguments: str, stdin: bytes = b"") -> bytes:
        command = ["git", f"--git-dir={self.path / '.git'}", *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, check=True).stdout

    def create(self, private: bool) -> None:
        """Makes the repository, with a first commit, which says which files are large files."""
        subprocess.run(["git", "init", "--quiet", "--initial-branch=main", self.path], check=True)
        self.set_private(private)
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        self.commit("main", "initial commit", {".gitattributes": attributes.encode()}, [])

    def references(self, kind: str) -> dict[str, str]:
        """Commits of all branches (`kind="heads"`) or tags (`kind="tags"`), by name."""
        fields = "%(refname:lstrip=2)%00%(objectname)%00%(*objectname)"
        lines = self.git("for-each-ref", f"--format={fields}", f"refs/{kind}").decode().splitlines()
        rows = [line.split("\0") for line in lines]
        return {name: peeled or oid for name, oid, peeled in rows}

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag or a full commit id names."""
        commit = self.references("heads").get(revision) or self.references("tags").get(revision)
        if commit is None and re.fullmatch("[0-9a-f]{40}", revision):
            found = self.git("cat-file", "--batch-check=%(objecttype)", stdin=revision.encode())
            commit = revision if found == b"commit\n" else None
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def log(self, commit: str, path: str | None = None) -> list[dict[str, str]]:
        """The commits that led to `commit`, the newest first; with a path, those that touched it."""
        fields = ["id", "title", "date", "author", "message"]
        paths = [] if path is None else ["--", path]
        output = self.git("log", "-z", "--format=%H%x1f%s%x1f%ct%x1f%an%x1f%b", commit, *paths).decode()
        return [dict(zip(fields, line.split("\x1f"), strict=True)) for line in output.split("\0") if line]

    def tree(self, commit: str) -> dict[str, Entry]:
        """All files and folders of a commit, by path."""
        if commit not in self.trees:
            entries = {}
            for line in self.git("ls-tree", "-r", "-t", "-l", "-z", commit).decode().split("\0")[:-1]:
                head, path = line.split("\t", 1)
                _, kind, oid, size = head.split()
                entries[path] = Entry(path, kind == "tree", oid, 0 if size == "-" else int(size))
            small = [one for one in entries.values() if not one.is_folder and one.size < LFS_POINTER_SIZE]
            for one, content in zip(small, self.blobs([one.oid for one in small]), strict=True):
                pointer = LFS_POINTER.fullmatch(content)
                if pointer:
                    entries[one.path] = Entry(
                        one.path, False, one.oid, int(pointer[2]), sha256=pointer[1].decode(), pointer_size=one.size
                    )
            self.trees[commit] = entries
        return self.trees[commit]

    def entry(self, commit: str, path: str) -> Entry:
        """A file of a commit."""
        found = self.tree(commit).get(path)
        if found is None or found.is_folder:
            raise HubError(404, f"{path} does not exist on {commit!r}", "EntryNotFound")
        return found

    def blobs(self, oids: list[str]) -> Iterator[bytes]:
        """The contents of git objects."""
        output = io.BytesIO(self.git("cat-file", "--batch", stdin="\n".join(oids).encode()))
        for _ in oids:
            size = int(output.readline().split()[2])
            yield output.read(size + 1)[:-1]

    def lfs_path(self, sha256: str) -> Path:
        """Where a large file lies, or will lie."""
        return self.path / ".git" / "lfs" / "objects" / sha256[:2] / sha256[2:4] / sha256

    def commit(self, branch: str, message: str, files: Mapping[str, bytes], deleted: list[str]) -> str:
        """Adds a commit to a branch: `deleted` paths go, `files` come. Gives its id."""
        parent = self.references("heads").get(branch)
        data = message.encode()
        stream = io.BytesIO()
        stream.write(f"commit refs/heads/{branch}\n".encode())
        stream.write(f"committer loopback <loopback@localhost> {int(time.time())} +0000\n".encode())
        stream.write(b"data %d\n%b\n" % (len(data), data))
        if parent is not None:
            stream.write(f"from {parent}\n".encode())
        for path in deleted:
            stream.write(f"D {path}\n".encode())
        for path, content in files.items():
            stream.write(f"M 100644 inline {path}\n".encode())
            stream.write(b"data %d\n%b\n" % (len(content), content))
        self.git("fast-import", "--quiet", stdin=stream.getvalue())
        return self.references("heads")[branch]


def is_repository_name(name: str) -> bool:
    """Whether a text names a repository: `owner/name`, and nothing outside of the storage."""
    return bool(REPOSITORY_NAME.fullmatch(name)) and not {".", ".."} & set(name.split("/"))


def check_path(path: str) -> str:
    """A path inside a repository; anything that could leave it, or that git cannot be told plainly, is refused."""
    parts = PurePosixPath(path).parts
    plain = path.isprintable() and '"' not in path and "\\" not in path and path == "/".join(parts)
    if not plain or not parts or {"..", ".git", "/"} & set(parts):
        raise HubError(400, f"Invalid path in the repository: {path!r}")
    return path


# --- server ----------------------------------------------------------------------------------------------------------


@dataclass
class Transfer:
    """An address that was handed out for the contents of one large file: to fetch it, or to bring it."""

    repository_id: str
    name: str
    path: Path
    sha256: str
    size: int


@dataclass
class LoopbackHub:
    """The server and what it has seen. A context manager: it serves inside the `with` block, on a port of its own.

    Attributes:
        endpoint: what `HF_ENDPOINT` has to be, while it serves.
        storage: folder of the git repositories; those that are there already are served.
        users: names by access token. A user owns the repositories under their name, public and private.
        requests: method, address and status of every request, in the order in which they were answered.
        downloads: repository id and file name of every file whose contents were sent.
        cut_next_download: number of bytes after which the next download of a large file breaks off, once.
    """

    storage: Path
    users: Mapping[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    downloads: list[tuple[str, str]] = field(default_factory=list)
    cut_next_download: int | None = None
    repositories: dict[str, GitRepository] = field(default_factory=dict)
    transfers: dict[str, Transfer] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> LoopbackHub:
        handler = type("Handler", (HubRequestHandler,), {"hub": self})
        # the client takes a large file's size and digest from a redirection only if that leads to another host or port
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.endpoint, self.contents_endpoint = (f"http://127.0.0.1:{one.server_port}" for one in self.servers)
        for server in self.servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment of a process whose client shall use this server, with a cache of its own under `home`."""
        return client_environment(self.endpoint, home, token)

    def repository(self, key: str) -> GitRepository:
        """The repository `<kind>/<owner>/<name>`, whether it exists or not."""
        return self.repositories.setdefault(key, GitRepository(self.storage / key))

    def downloaded(self, repository_id: str) -> set[str]:
        """Names of the files of a repository whose contents were sent."""
        return {name for identifier, name in self.downloads if identifier == repository_id}

    def forget(self) -> None:
        """Empties the records."""
        self.requests.clear()
        self.downloads.clear()

    def hand_out(self, transfer: Transfer) -> str:
        """An address for a large file's contents, which needs no further permission."""
        ticket = secrets.token_urlsafe()
        self.transfers[ticket] = transfer
        return f"{self.contents_endpoint}/contents/{ticket}"


def client_environment(endpoint: str, home: Path, token: str | None = None) -> dict[str, str]:
    """The environment of a process whose client shall use the server at `endpoint`, with its cache under `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return kept | settings | ({} if token is None else {"HF_TOKEN": token})


ROUTES: list[tuple[str, re.Pattern[str], str]] = []
REPOSITORY = r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
FILE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)"


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
        self.query = parse_qs(self.address.query)
        self.remaining = int(self.headers.get("Content-Length", 0))
        self.chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        try:
            self.answer()
        except subprocess.CalledProcessError as error:
            self.send_error_message(HubError(400, f"git refused: {error.stderr.decode().splitlines()}"))
        except HubError as error:
            self.send_error_message(error)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = dispatch  # noqa: N815 (names that http.server asks for)

    def answer(self) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        for expected, pattern, name in ROUTES:
            match = pattern.fullmatch(self.address.path)
            if expected == method and match:
                groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return getattr(self, name)(**groups)
        raise HubError(404, f"This server has no {method} {self.address.path}")

    def send_error_message(self, error: HubError) -> None:
        # headers are ASCII, file names need not be
        headers = {"X-Error-Message": error.message.encode("ascii", "backslashreplace").decode()}
        if error.code is not None:
            headers["X-Error-Code"] = error.code
        self.send_json({"error": error.message}, error.status, headers)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        self.hub.requests.append((self.command, self.path, int(code)))

    # --- reading and writing ---

    def read_chunks(self) -> Iterator[bytes]:
        """The body of the request, piece by piece, whichever way its length is given."""
        while self.chunked:
            size = int(self.rfile.readline().split(b";")[0], 16)
            data = self.rfile.read(size)
            self.rfile.readline()
            self.chunked = size > 0
            yield data
        while self.remaining:
            data = self.rfile.read(min(self.remaining, CHUNK_SIZE))
            self.remaining = self.remaining - len(data) if data else 0
            if not data:
                raise HubError(400, "The connection broke off inside the body of a request")
            yield data

    def read_body(self) -> bytes:
        return b"".join(self.read_chunks())

    def read_json(self) -> dict[str, Any]:
        return json.loads(self.read_body())

    def send_json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        headers = {"Content-Type": "application/json"} | dict(headers or {})
        self.send_content(io.BytesIO(json.dumps(value).encode()), status, headers)

    def send_content(self, content: BinaryIO, status: int, headers: Mapping[str, str]) -> None:
        """Sends a whole body, without it if only the head was asked for."""
        # a request that was refused may have left its body unread on the connection
        self.read_body()
        size = content.seek(0, io.SEEK_END)
        self.send_response(status)
        for name, value in ({"Content-Length": str(size)} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            content.seek(0)
            shutil.copyfileobj(content, self.wfile, CHUNK_SIZE)

    def send_file(self, content: BinaryIO, headers: Mapping[str, str], repository_id: str, name: str) -> None:
        """Sends a file or the range of it that was asked for, and records the download."""
        if self.command != "HEAD":
            self.hub.downloads.append((repository_id, name))
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"} | dict(headers)
        size = content.seek(0, io.SEEK_END)
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None or asked.groups() == ("", ""):
            self.send_content(content, 200, headers)
            return
        if asked[1]:
            first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
        else:
            first, last = max(size - int(asked[2]), 0), size - 1
        if first > last:
            self.send_content(io.BytesIO(), 416, {"Content-Range": f"bytes */{size}"})
            return
        content.seek(first)
        part = io.BytesIO(content.read(last - first + 1))
        self.send_content(part, 206, headers | {"Content-Range": f"bytes {first}-{last}/{size}"})

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

    def required_user(self) -> str:
        user = self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        return user

    def repository(self, name: str, kind: str = "models", write: bool = False) -> GitRepository:
        """A repository that the user may see or, with `write`, change."""
        user = self.user()
        owned = user == name.split("/")[0]
        repository = self.hub.repository(f"{kind}/{name}")
        if not is_repository_name(name) or not repository.exists or (repository.private and not owned):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not owned:
            raise HubError(403, f"You have no write access to {name}")
        return repository

    # --- accounts and repositories ---

    @route("GET", "/api/whoami-v2")
    def who_am_i(self) -> None:
        user = self.required_user()
        token = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": "write"}}
        self.send_json({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": token})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        try:
            metadata = read_card_metadata(self.read_json()["content"])
        except yaml.YAMLError as error:
            self.send_json({"errors": [{"message": str(error)}], "warnings": []}, status=400)
            return
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        self.send_json({"errors": [], "warnings": warnings})

    def named_repository(self) -> tuple[str, dict[str, Any]]:
        """The key of the repository that the body of a request names, and that body."""
        user, body = self.required_user(), self.read_json()
        owner = body.get("organization") or user
        if owner != user:
            raise HubError(403, f"You don't have the rights to create or delete a model under the namespace {owner!r}")
        name = f"{owner}/{body['name']}"
        if not is_repository_name(name):
            raise HubError(400, f"Invalid repository name: {name!r}")
        return f"{body.get('type') or 'model'}s/{name}", body

    @route("POST", "/api/repos/create")
    def create_repository(self) -> None:
        key, body = self.named_repository()
        address = f"{self.hub.endpoint}/{key.removeprefix('models/')}"
        private = is_private(body)
        with self.hub.lock:
            if self.hub.repository(key).exists:
                self.send_json({"error": "You already created this model repo", "url": address}, status=409)
                return
            self.hub.repository(key).create(private)
        self.send_json({"url": address, "name": key.split("/", 1)[1], "private": private})

    @route("DELETE", "/api/repos/delete")
    def delete_repository(self) -> None:
        key, _ = self.named_repository()
        with self.hub.lock:
            if not self.hub.repository(key).exists:
                raise HubError(404, "Repository not found", "RepoNotFound")
            shutil.rmtree(self.hub.repositories.pop(key).path)
        self.send_json({})

    @route("PUT", REPOSITORY + "/settings")
    def change_settings(self, kind: str, name: str) -> None:
        repository, body = self.repository(name, kind, write=True), self.read_json()
        repository.set_private(is_private(body))
        self.send_json({"private": repository.private})

    @route("GET", REPOSITORY)
    def information(self, kind: str, name: str) -> None:
        self.revision_information(kind, name, "main")

    @route("GET", REPOSITORY + "/revision/(?P<revision>[^/]+)")
    def revision_information(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(name, kind)
        commit = repository.resolve(revision)
        files = [entry for entry in repository.tree(commit).values() if not entry.is_folder]
        card = next((entry for entry in files if entry.path == "README.md"), None)
        content = "" if card is None else next(repository.blobs([card.oid])).decode()
        try:
            metadata = read_card_metadata(content)
        except yaml.YAMLError:
            metadata = {}
        with_sizes = self.flag("blobs")
        history = repository.log(commit)
        information = {
            "id": name,
            "modelId": name,
            "author": name.split("/")[0],
            "sha": commit,
            "createdAt": as_utc(history[-1]["date"]),
            "lastModified": as_utc(history[0]["date"]),
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": metadata.get("tags", []),
            "cardData": metadata,
            "siblings": [describe_sibling(entry, with_sizes) for entry in files],
        }
        information |= {key: metadata[key] for key in ("library_name", "pipeline_tag") if key in metadata}
        asked = self.query.get("expand", [])
        if asked:
            information = {key: value for key, value in information.items() if key in {"id", "modelId", *asked}}
        self.send_json(information)

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("1", "true")

    @route("GET", REPOSITORY + "/refs")
    def list_references(self, kind: str, name: str) -> None:
        repository = self.repository(name, kind)
        listed = {
            group: [
                {"name": one, "ref": f"refs/{place}/{one}", "targetCommit": commit}
                for one, commit in repository.references(place).items()
            ]
            for group, place in (("branches", "heads"), ("tags", "tags"))
        }
        self.send_json(listed | {"converts": [], "pullRequests": []})

    @route("GET", REPOSITORY + "/commits/(?P<revision>[^/]+)")
    def list_commits(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(name, kind)
        commits = repository.log(repository.resolve(revision))
        self.send_json(
            [one | {"date": as_utc(one["date"]), "authors": [{"user": one.pop("author")}]} for one in commits]
        )

    @route("POST", REPOSITORY + "/(?P<place>branch|tag)/(?P<revision>[^/]+)")
    def create_reference(self, kind: str, name: str, place: str, revision: str) -> None:
        repository, body = self.repository(name, kind, write=True), self.read_json()
        if place == "branch":
            reference, start = f"refs/heads/{revision}", body.get("startingPoint", "main")
        else:
            reference, start = f"refs/tags/{body['tag']}", revision
        commit = repository.resolve(start)
        try:
            # the old value of forty zeros: the reference must not exist
            repository.git("update-ref", reference, commit, "0" * 40)
        except subprocess.CalledProcessError as error:
            raise HubError(409, f"{reference} exists already or is no valid name") from error
        self.send_json({})

    @route("DELETE", REPOSITORY + "/(?P<place>branch|tag)/(?P<revision>[^/]+)")
    def delete_reference(self, kind: str, name: str, place: str, revision: str) -> None:
        repository = self.repository(name, kind, write=True)
        folder = "heads" if place == "branch" else "tags"
        if revision not in repository.references(folder):
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        repository.git("update-ref", "-d", f"refs/{folder}/{revision}")
        self.send_json({})

    # --- files: lists and contents ---

    @route("GET", REPOSITORY + "/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?")
    def list_tree(self, kind: str, name: str, revision: str, path: str = "") -> None:
        repository = self.repository(name, kind)
        commit = repository.resolve(revision)
        entries = repository.tree(commit)
        path = path.strip("/")
        if path and not (path in entries and entries[path].is_folder):
            raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        inside = [entry for entry in entries.values() if entry.path.startswith(f"{path}/" if path else "")]
        if not self.flag("recursive"):
            inside = [entry for entry in inside if entry.path.rpartition("/")[0] == path]
        self.send_json([self.describe(repository, commit, entry, self.flag("expand")) for entry in inside])

    @route("POST", REPOSITORY + "/paths-info/(?P<revision>[^/]+)")
    def list_paths(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(name, kind)
        commit = repository.resolve(revision)
        form = parse_qs(self.read_body().decode())
        expand = form.get("expand", ["false"])[0].lower() == "true"
        entries = repository.tree(commit)
        found = [entries[path.strip("/")] for path in form.get("paths", []) if path.strip("/") in entries]
        self.send_json([self.describe(repository, commit, entry, expand) for entry in found])

    def describe(self, repository: GitRepository, commit: str, entry: Entry, expand: bool) -> dict[str, Any]:
        """What the lists of files say of one of them."""
        described: dict[str, Any] = {
            "type": "directory" if entry.is_folder else "file",
            "path": entry.path,
            "oid": entry.oid,
            "size": entry.size,
        }
        if entry.sha256 is not None:
            described["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
        if expand:
            last = repository.log(commit, entry.path)[0]
            described["lastCommit"] = {"id": last["id"], "title": last["title"], "date": as_utc(last["date"])}
        return described

    @route("GET", FILE + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve_file(self, name: str, revision: str, path: str, kind: str = "models") -> None:
        repository = self.repository(name, kind)
        commit = repository.resolve(revision)
        entry = repository.entry(commit, path)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry.oid}"'}
        if entry.sha256 is None:
            self.send_file(io.BytesIO(next(repository.blobs([entry.oid]))), headers, name, path)
            return
        # large files come from somewhere else, and their size and digest are those of the contents there
        stored = repository.lfs_path(entry.sha256)
        headers["Location"] = self.hub.hand_out(Transfer(name, path, stored, entry.sha256, entry.size))
        headers["X-Linked-ETag"] = f'"{entry.sha256}"'
        headers["X-Linked-Size"] = str(entry.size)
        self.send_content(io.BytesIO(b"Found"), 302, headers)

    def transfer(self, ticket: str) -> Transfer:
        if ticket not in self.hub.transfers:
            raise HubError(403, "This address of a large file was never handed out, or has been used")
        return self.hub.transfers[ticket]

    @route("GET", "/contents/(?P<ticket>[^/]+)")
    def send_large_file(self, ticket: str) -> None:
        transfer = self.transfer(ticket)
        with transfer.path.open("rb") as content:
            if self.command == "GET" and self.hub.cut_next_download is not None:
                length, self.hub.cut_next_download = self.hub.cut_next_download, None
                self.break_off(content, length)
                return
            self.send_file(content, {"ETag": f'"{transfer.sha256}"'}, transfer.repository_id, transfer.name)

    def break_off(self, content: BinaryIO, length: int) -> None:
        """Announces the whole file, sends its first `length` bytes and drops the connection."""
        self.send_response(200)
        self.send_header("Content-Length", str(content.seek(0, io.SEEK_END)))
        self.end_headers()
        content.seek(0)
        self.wfile.write(content.read(length))
        self.close_connection = True

    # --- uploads ---

    @route("POST", REPOSITORY + "/preupload/(?P<revision>[^/]+)")
    def prepare_upload(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(name, kind, write=True)
        self.refuse_pull_requests()
        entries = repository.tree(repository.resolve(revision))
        answers = []
        for file in self.read_json()["files"]:
            known = entries.get(check_path(file["path"]))
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large_file(file) else "regular",
                    "shouldIgnore": False,
                    "oid": None if known is None else known.sha256 or known.oid,
                }
            )
        self.send_json({"files": answers})

    @route("POST", FILE + r"\.git/info/lfs/objects/batch")
    def start_large_files(self, name: str, kind: str = "models") -> None:
        repository = self.repository(name, kind, write=True)
        answers = []
        for wanted in self.read_json()["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            path = repository.lfs_path(check_sha256(wanted["oid"]))
            if not path.exists():
                place = self.hub.hand_out(Transfer(name, "", path, wanted["oid"], wanted["size"]))
                verify = f"{self.hub.endpoint}{self.address.path.removesuffix('batch')}verify"
                answer["actions"] = {"upload": {"href": place}, "verify": {"href": verify}}
            answers.append(answer)
        self.send_json({"transfer": "basic", "hash_algo": "sha256", "objects": answers})

    @route("PUT", "/contents/(?P<ticket>[^/]+)")
    def receive_large_file(self, ticket: str) -> None:
        transfer = self.transfer(ticket)
        transfer.path.parent.mkdir(parents=True, exist_ok=True)
        digest, size = hashlib.sha256(), 0
        with tempfile.NamedTemporaryFile(dir=transfer.path.parent, delete=False) as file:
            for chunk in self.read_chunks():
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
        if (digest.hexdigest(), size) != (transfer.sha256, transfer.size):
            Path(file.name).unlink()
            raise HubError(
                400, f"Announced: {transfer.size} bytes, {transfer.sha256}; came: {size}, {digest.hexdigest()}"
            )
        os.replace(file.name, transfer.path)
        del self.hub.transfers[ticket]
        self.send_json({})

    @route("POST", FILE + r"\.git/info/lfs/objects/verify")
    def verify_large_file(self, name: str, kind: str = "models") -> None:
        body = self.read_json()
        self.large_file_pointer(self.repository(name, kind, write=True), body)
        self.send_json({})

    def large_file_pointer(self, repository: GitRepository, file: dict[str, Any]) -> bytes:
        """The text that stands in the repository for a large file that was uploaded."""
        path = repository.lfs_path(check_sha256(file["oid"]))
        if not path.exists():
            raise HubError(404, f"The large file {file['oid']} was not uploaded")
        size = path.stat().st_size
        if file.get("size", size) != size:
            raise HubError(400, f"The large file {file['oid']} has {size} bytes, not {file['size']}")
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize %d\n" % (file["oid"].encode(), size)

    def refuse_pull_requests(self) -> None:
        if self.flag("create_pr"):
            raise HubError(403, "This server has no pull requests; commit to a branch instead")

    @route("POST", REPOSITORY + "/commit/(?P<revision>[^/]+)")
    def commit(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(name, kind, write=True)
        self.refuse_pull_requests()
        files: dict[str, bytes] = {}
        deleted: list[str] = []
        header: dict[str, str] = {}
        with self.hub.lock:
            parent = repository.resolve(revision)
            if revision not in repository.references("heads"):
                raise HubError(400, f"{revision!r} is no branch; commits go to branches")
            entries = repository.tree(parent)
            for line in self.read_body().splitlines():
                operation = json.loads(line)
                key, value = operation["key"], operation["value"]
                if key == "header":
                    header = value
                elif key == "file":
                    files[check_path(value["path"])] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    files[check_path(value["path"])] = self.large_file_pointer(repository, value)
                elif key in ("deletedFile", "deletedFolder"):
                    path = check_path(value["path"].rstrip("/"))
                    if path not in entries or entries[path].is_folder != (key == "deletedFolder"):
                        raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                    deleted.append(path)
                else:
                    raise HubError(400, f"Unknown operation in a commit: {key!r}")
            if not parent.startswith(header.get("parentCommit", "")):
                raise HubError(412, f"{revision!r} has moved on from {header['parentCommit']} to {parent}")
            message = "\n\n".join(text for text in (header["summary"], header.get("description")) if text)
            commit = repository.commit(revision, message, files, deleted)
        address = f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{quote(name)}/commit/{commit}"
        self.send_json({"success": True, "commitOid": commit, "commitUrl": address, "hookOutput": ""})


def as_utc(date: str) -> str:
    """A date of git's, in seconds since 1970, as the client reads it."""
    return datetime.fromtimestamp(int(date), timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def read_card_metadata(content: str) -> dict[str, Any]:
    """The YAML block at the top of a README; empty without one."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", content, re.DOTALL)
    metadata = yaml.safe_load(match[1]) if match else {}
    if not isinstance(metadata or {}, dict):
        raise yaml.YAMLError("the metadata of a card must be a mapping")
    return metadata or {}


def describe_sibling(entry: Entry, with_sizes: bool) -> dict[str, Any]:
    """What a repository's description says of one file."""
    described: dict[str, Any] = {"rfilename": entry.path}
    if with_sizes:
        described |= {"size": entry.size, "blobId": entry.oid}
        if entry.sha256 is not None:
            described["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    return described


def is_private(settings: Mapping[str, Any]) -> bool:
    """Whether a repository shall be private, in the words of older and of newer clients."""
    return settings.get("visibility") == "private" or bool(settings.get("private"))


def is_large_file(file: Mapping[str, Any]) -> bool:
    """Whether a file that was announced (path, size, first bytes) is stored as a large file: by name, size or type."""
    name = PurePosixPath(file["path"]).name
    if file["size"] > LFS_THRESHOLD or any(fnmatch.fnmatch(name, pattern) for pattern in LFS_PATTERNS):
        return True
    return b"\0" in base64.b64decode(file["sample"])


def check_sha256(oid: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", oid):
        raise HubError(400, f"No sha256 digest: {oid!r}")
    return oid
