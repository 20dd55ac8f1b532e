"""The loopback hub speaks the Hub's language: everything here is asked by the real huggingface_hub client."""

from __future__ import annotations

import hashlib
import json
import subprocess
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from loopback_hub import LoopbackHub


WEIGHTS = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def client_without_xet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def owner(loopback_hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=loopback_hub.endpoint, token="hf_org")


@pytest.fixture
def stranger(loopback_hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=loopback_hub.endpoint, token="hf_other")


@pytest.fixture
def nobody(loopback_hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=loopback_hub.endpoint, token=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a text file, a large file by its name, one by its contents, and an empty file."""
    folder = tmp_path / "folder"
    (folder / "part").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [tiny]\nlibrary_name: ldlm\n---\n# Ünïcode\n")
    (folder / "part" / "config.json").write_text('{"size": 3}')
    (folder / "part" / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "table.dat").write_bytes(b"\0\1\2")
    (folder / "empty.txt").touch()
    return folder


@pytest.fixture
def repository(owner: HfApi, folder: Path) -> str:
    owner.create_repo("org/tiny")
    owner.upload_folder(repo_id="org/tiny", folder_path=folder, commit_message="first")
    return "org/tiny"


def test_who_am_i(owner: HfApi, loopback_hub: LoopbackHub):
    assert owner.whoami()["name"] == "org"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=loopback_hub.endpoint, token="hf_unknown").whoami()


def test_files_come_back_as_they_were(owner: HfApi, repository: str, folder: Path, tmp_path: Path):
    found = Path(snapshot_download(repository, endpoint=owner.endpoint, cache_dir=tmp_path / "cache"))
    for file in folder.rglob("*"):
        if file.is_file():
            assert (found / file.relative_to(folder)).read_bytes() == file.read_bytes(), file.name
    assert {path.name for path in found.iterdir()} == {path.name for path in folder.iterdir()} | {".gitattributes"}


def test_large_files_are_stored_as_git_lfs_does(loopback_hub: LoopbackHub, owner: HfApi, repository: str):
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    git = ["git", f"--git-dir={loopback_hub.storage}/models/org/tiny/.git", "show"]
    pointer = subprocess.run([*git, "main:part/model.safetensors"], capture_output=True, check=True).stdout.decode()
    assert pointer == f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(WEIGHTS)}\n"
    stored = loopback_hub.storage / "models/org/tiny/.git/lfs/objects" / digest[:2] / digest[2:4] / digest
    assert stored.read_bytes() == WEIGHTS
    text = subprocess.run([*git, "main:part/config.json"], capture_output=True, check=True).stdout
    assert json.loads(text) == {"size": 3}


def test_lists_of_files(owner: HfApi, repository: str):
    top = {one.path: one for one in owner.list_repo_tree(repository)}
    assert set(top) == {".gitattributes", "README.md", "empty.txt", "part", "table.dat"}
    inside = {one.path: one for one in owner.list_repo_tree(repository, "part")}
    assert set(inside) == {"part/config.json", "part/model.safetensors"}
    everything = {one.path: one for one in owner.list_repo_tree(repository, recursive=True, expand=True)}
    assert set(everything) == set(top) | set(inside)
    assert everything["part"].last_commit.title == "first"
    assert everything["part/config.json"].size == 11
    assert everything["part/config.json"].lfs is None
    large = everything["part/model.safetensors"]
    assert (large.size, large.lfs.size, large.lfs.sha256) == (10240, 10240, hashlib.sha256(WEIGHTS).hexdigest())
    named = owner.get_paths_info(repository, ["part", "table.dat", "missing"], expand=True)
    assert [one.path for one in named] == ["part", "table.dat"]
    assert named[1].lfs.size == 3
    assert owner.file_exists(repository, "part/config.json")
    assert not owner.file_exists(repository, "part/missing.json")


def test_information(owner: HfApi, repository: str):
    information = owner.model_info(repository, files_metadata=True)
    sizes = {one.rfilename: one.size for one in information.siblings}
    assert sizes["part/model.safetensors"] == len(WEIGHTS)
    assert sizes["empty.txt"] == 0
    assert (information.private, information.library_name, information.tags) == (False, "ldlm", ["tiny"])
    assert information.card_data.license == "mit"
    assert information.sha == owner.list_repo_commits(repository)[0].commit_id
    assert information.last_modified >= information.created_at
    assert owner.model_info(repository, expand=["tags"]).tags == ["tiny"]
    assert owner.model_info(repository, expand=["tags"]).sha is None


def test_contents_have_the_headers_that_the_client_reads(owner: HfApi, repository: str):
    sha = owner.model_info(repository).sha
    small = owner.get_hf_file_metadata(url=f"{owner.endpoint}/{repository}/resolve/main/part/config.json")
    blob = subprocess.run(["git", "hash-object", "--stdin"], input=b'{"size": 3}', capture_output=True, check=True)
    assert (small.commit_hash, small.size, small.etag) == (sha, 11, blob.stdout.decode().strip())
    large = owner.get_hf_file_metadata(url=f"{owner.endpoint}/{repository}/resolve/{sha}/part/model.safetensors")
    assert (large.commit_hash, large.size) == (sha, len(WEIGHTS))
    assert large.etag == hashlib.sha256(WEIGHTS).hexdigest()
    # the large file lies at another address, which tells its length as well
    assert not large.location.startswith(owner.endpoint)
    with urllib.request.urlopen(urllib.request.Request(large.location, method="HEAD")) as response:
        assert response.headers["Content-Length"] == str(len(WEIGHTS))


def test_ranges(owner: HfApi, repository: str):
    address = f"{owner.endpoint}/{repository}/resolve/main/part/model.safetensors"
    for asked, status, expected in (
        ("bytes=10-19", 206, WEIGHTS[10:20]),
        ("bytes=10000-", 206, WEIGHTS[10000:]),
        ("bytes=-5", 206, WEIGHTS[-5:]),
        ("bytes=10230-99999", 206, WEIGHTS[10230:]),
        ("lines=1-2", 200, WEIGHTS),
    ):
        with urllib.request.urlopen(urllib.request.Request(address, headers={"Range": asked})) as response:
            assert (response.status, response.read()) == (status, expected), asked
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(address, headers={"Range": "bytes=10240-"}))
    assert (refused.value.code, refused.value.headers["Content-Range"]) == (416, "bytes */10240")


def test_a_download_that_broke_off_goes_on_where_it_was(
    loopback_hub: LoopbackHub, owner: HfApi, repository: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # the client keeps whole pieces only, of 10 MB if they are not made smaller
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    loopback_hub.cut_next_download = 4000
    found = hf_hub_download(
        repository, "part/model.safetensors", endpoint=owner.endpoint, cache_dir=tmp_path / "cache"
    )
    assert Path(found).read_bytes() == WEIGHTS
    statuses = [status for method, path, status in loopback_hub.requests if method == "GET" and "/contents/" in path]
    assert statuses == [200, 206]


def test_what_is_not_there_has_the_error_of_its_kind(owner: HfApi, nobody: HfApi, repository: str, tmp_path: Path):
    with pytest.raises(RepositoryNotFoundError):
        owner.model_info("org/missing")
    with pytest.raises(RepositoryNotFoundError, match="401"):
        nobody.model_info("org/missing")
    with pytest.raises(RevisionNotFoundError):
        owner.model_info(repository, revision="missing")
    with pytest.raises(RevisionNotFoundError):
        owner.model_info(repository, revision="0" * 40)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repository, "missing.json", endpoint=owner.endpoint, cache_dir=tmp_path / "cache")
    with pytest.raises(EntryNotFoundError):
        list(owner.list_repo_tree(repository, "README.md"))
    with pytest.raises(HfHubHTTPError, match="This server has no GET /api/models/org/tiny/likers"):
        list(owner.list_repo_likers(repository))


def test_a_private_repository_is_its_owners_alone(owner: HfApi, stranger: HfApi, nobody: HfApi, folder: Path):
    owner.create_repo("org/secret", private=True)
    owner.upload_folder(repo_id="org/secret", folder_path=folder)
    assert owner.model_info("org/secret").private is True
    with pytest.raises(RepositoryNotFoundError, match="401"):
        nobody.model_info("org/secret")
    with pytest.raises(RepositoryNotFoundError, match="404"):
        stranger.model_info("org/secret")
    with pytest.raises(RepositoryNotFoundError):
        nobody.get_hf_file_metadata(url=f"{nobody.endpoint}/org/secret/resolve/main/README.md")
    owner.update_repo_settings("org/secret", private=False)
    assert nobody.model_info("org/secret").private is False


def test_only_the_owner_writes(owner: HfApi, stranger: HfApi, nobody: HfApi, repository: str, folder: Path):
    before = owner.model_info(repository).sha
    for api, status in ((stranger, "403"), (nobody, "403")):
        with pytest.raises(HfHubHTTPError, match=status):
            api.upload_folder(repo_id=repository, folder_path=folder)
    with pytest.raises(HfHubHTTPError, match="403"):
        stranger.create_repo("org/mine")
    with pytest.raises(HfHubHTTPError, match="401"):
        nobody.create_repo("org/mine")
    assert owner.model_info(repository).sha == before


def test_a_repository_is_created_once_and_deleted(loopback_hub: LoopbackHub, owner: HfApi):
    assert owner.create_repo("tiny").repo_id == "org/tiny"
    assert owner.create_repo("tiny", exist_ok=True).repo_id == "org/tiny"
    with pytest.raises(HfHubHTTPError, match="409"):
        owner.create_repo("tiny")
    owner.create_repo("tiny", repo_type="space", space_sdk="gradio")
    owner.upload_file(path_or_fileobj=b"app", path_in_repo="app.py", repo_id="org/tiny", repo_type="space")
    assert (loopback_hub.storage / "models/org/tiny/.git").is_dir()
    owner.delete_repo("tiny")
    assert not owner.repo_exists("org/tiny")
    assert not (loopback_hub.storage / "models/org/tiny").exists()
    assert "app.py" in owner.list_repo_files("org/tiny", repo_type="space")


def test_a_commit_adds_changes_copies_and_deletes(owner: HfApi, repository: str):
    first = owner.model_info(repository).sha
    info = owner.create_commit(
        repository,
        [
            CommitOperationAdd("README.md", b"changed"),
            CommitOperationAdd("new/weights.safetensors", WEIGHTS[:100]),
            CommitOperationCopy("part/model.safetensors", "copy/model.safetensors"),
            CommitOperationDelete("table.dat"),
            CommitOperationDelete("part/", is_folder=True),
        ],
        commit_message="second",
        commit_description="with a description",
        parent_commit=first,
    )
    assert owner.model_info(repository).sha == info.oid
    files = {".gitattributes", "README.md", "empty.txt", "new/weights.safetensors", "copy/model.safetensors"}
    assert set(owner.list_repo_files(repository)) == files
    commits = owner.list_repo_commits(repository)
    assert [one.title for one in commits] == ["second", "first", "initial commit"]
    assert commits[0].message.strip() == "with a description"
    assert "table.dat" in owner.list_repo_files(repository, revision=first)
    assert owner.get_paths_info(repository, "copy/model.safetensors")[0].size == len(WEIGHTS)


def test_what_did_not_change_is_not_sent_again(loopback_hub: LoopbackHub, owner: HfApi, repository: str, folder: Path):
    before = owner.model_info(repository).sha
    loopback_hub.forget()
    owner.upload_folder(repo_id=repository, folder_path=folder)
    assert owner.model_info(repository).sha == before
    assert not [path for method, path, _ in loopback_hub.requests if method == "PUT" or "/commit/" in path]


def test_commits_that_cannot_be_made(owner: HfApi, repository: str):
    add = [CommitOperationAdd("a.txt", b"a")]
    first = owner.list_repo_commits(repository)[-1].commit_id
    with pytest.raises(HfHubHTTPError, match="412"):
        owner.create_commit(repository, add, commit_message="late", parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="This server has no pull requests"):
        owner.create_commit(repository, add, commit_message="wish", create_pr=True)
    with pytest.raises(RevisionNotFoundError):
        owner.create_commit(repository, add, commit_message="astray", revision="missing")
    with pytest.raises(EntryNotFoundError):
        owner.create_commit(repository, [CommitOperationDelete("missing.txt")], commit_message="gone")
    assert [one.title for one in owner.list_repo_commits(repository)] == ["first", "initial commit"]


def test_paths_that_leave_the_repository_are_refused(owner: HfApi, repository: str):
    for path in ("../outside.txt", ".git/config", "/etc/passwd", "a/../b", 'quo"te', "new\nline", "a//b", "."):
        commit = [{"key": "header", "value": {"summary": ""}}, {"key": "file", "value": {"path": path, "content": ""}}]
        request = urllib.request.Request(
            f"{owner.endpoint}/api/models/{repository}/commit/main",
            data="\n".join(map(json.dumps, commit)).encode(),
            headers={"Authorization": "Bearer hf_org", "Content-Type": "application/x-ndjson"},
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == 400
        assert "Invalid path" in refused.value.headers["X-Error-Message"]
    assert len(owner.list_repo_commits(repository)) == 2


def test_large_files_are_checked_against_what_was_announced(loopback_hub: LoopbackHub, owner: HfApi, repository: str):
    def ask(path: str, method: str, body: bytes) -> dict:
        headers = {"Authorization": "Bearer hf_org", "Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(path, body, headers, method=method)) as response:
            return json.load(response)

    oid = hashlib.sha256(b"promised").hexdigest()
    batch = {"operation": "upload", "objects": [{"oid": oid, "size": 8}]}
    address = f"{owner.endpoint}/{repository}.git/info/lfs/objects/batch"
    actions = ask(address, "POST", json.dumps(batch).encode())["objects"][0]["actions"]
    for sent in (b"something else", b"promise"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(actions["upload"]["href"], "PUT", sent)
        assert refused.value.code == 400
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(actions["verify"]["href"], "POST", json.dumps({"oid": oid, "size": 8}).encode())
    assert refused.value.code == 404
    assert not list(loopback_hub.storage.rglob(oid))
    ask(actions["upload"]["href"], "PUT", b"promised")
    ask(actions["verify"]["href"], "POST", json.dumps({"oid": oid, "size": 8}).encode())
    assert "actions" not in ask(address, "POST", json.dumps(batch).encode())["objects"][0]


def test_branches_and_tags(owner: HfApi, repository: str, tmp_path: Path):
    first = owner.model_info(repository).sha
    owner.create_tag(repository, tag="v1.0", tag_message="first release")
    owner.create_branch(repository, branch="side/work")
    with pytest.raises(HfHubHTTPError, match="409"):
        owner.create_branch(repository, branch="side/work")
    owner.create_branch(repository, branch="side/work", exist_ok=True)
    with pytest.raises(RevisionNotFoundError):
        owner.create_branch(repository, branch="other", revision="missing")
    owner.upload_file(path_or_fileobj=b"side", path_in_repo="a.txt", repo_id=repository, revision="side/work")
    references = owner.list_repo_refs(repository)
    branches = {one.name: one.target_commit for one in references.branches}
    assert set(branches) == {"main", "side/work"}
    assert branches["main"] == first != branches["side/work"]
    assert [(one.name, one.target_commit) for one in references.tags] == [("v1.0", first)]
    options = {"endpoint": owner.endpoint, "cache_dir": tmp_path / "cache"}
    assert Path(hf_hub_download(repository, "a.txt", revision="side/work", **options)).read_bytes() == b"side"
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repository, "a.txt", revision="v1.0", **options)
    with pytest.raises(HfHubHTTPError, match="is no branch"):
        owner.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id=repository, revision="v1.0")
    owner.delete_branch(repository, branch="side/work")
    owner.delete_tag(repository, tag="v1.0")
    references = owner.list_repo_refs(repository)
    assert ([one.name for one in references.branches], references.tags) == (["main"], [])


def test_cards_are_validated(owner: HfApi):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        owner._validate_yaml("---\nlicense: mit\n---\nText")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        owner._validate_yaml("Text")
    with pytest.raises(ValueError, match="Invalid metadata"):
        owner._validate_yaml("---\nlicense: [mit\n---\nText")


def test_downloads_are_recorded_and_the_storage_outlives_the_server(
    loopback_hub: LoopbackHub, owner: HfApi, repository: str, tmp_path: Path
):
    hf_hub_download(repository, "part/config.json", endpoint=owner.endpoint, cache_dir=tmp_path / "cache")
    hf_hub_download(repository, "part/model.safetensors", endpoint=owner.endpoint, cache_dir=tmp_path / "cache")
    assert loopback_hub.downloaded(repository) == {"part/config.json", "part/model.safetensors"}
    hf_hub_download(repository, "part/config.json", endpoint=owner.endpoint, cache_dir=tmp_path / "cache")
    assert len(loopback_hub.downloads) == 2
    with LoopbackHub(loopback_hub.storage) as again:
        assert "part/config.json" in HfApi(endpoint=again.endpoint, token=False).list_repo_files(repository)
