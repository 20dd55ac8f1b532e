"""The loopback hub speaks the Hub's language: everything here is asked by the real huggingface_hub client."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
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
    """A folder with a text file, weights, and an empty file."""
    folder = tmp_path / "folder"
    (folder / "part").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Ünïcode\n", encoding="utf-8")
    (folder / "part" / "config.json").write_text('{"size": 3}')
    (folder / "part" / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "empty.txt").touch()
    return folder


@pytest.fixture
def repository(owner: HfApi, folder: Path) -> str:
    owner.create_repo("org/tiny")
    owner.upload_folder(repo_id="org/tiny", folder_path=folder, commit_message="first")
    return "org/tiny"


def test_files_come_back_as_they_were(
    loopback_hub: LoopbackHub, owner: HfApi, repository: str, folder: Path, tmp_path: Path
):
    found = Path(snapshot_download(repository, endpoint=owner.endpoint, cache_dir=tmp_path / "cache"))
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert all((found / path).read_bytes() == (folder / path).read_bytes() for path in paths)
    assert loopback_hub.downloaded(repository) == paths - {"empty.txt"}, "the client asks for no empty files"


def test_lists_of_files(owner: HfApi, repository: str):
    inside = {one.path: one.size for one in owner.list_repo_tree(repository, "part", recursive=True)}
    assert inside == {"part/config.json": 11, "part/model.safetensors": len(WEIGHTS)}
    files = set(owner.list_repo_files(repository))
    assert files == {".gitattributes", "README.md", "empty.txt"} | set(inside)
    assert owner.file_exists(repository, "part/config.json")
    assert not owner.file_exists(repository, "part/missing.json")


def test_what_is_not_there_has_the_error_of_its_kind(owner: HfApi, repository: str, tmp_path: Path):
    with pytest.raises(RepositoryNotFoundError):
        owner.model_info("org/missing")
    with pytest.raises(RevisionNotFoundError):
        owner.model_info(repository, revision="0" * 40)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repository, "missing.json", endpoint=owner.endpoint, cache_dir=tmp_path / "cache")
    with pytest.raises(HfHubHTTPError, match="This server has no GET /api/models/org/tiny/likers"):
        list(owner.list_repo_likers(repository))


def test_only_the_owner_reads_a_private_repository_and_writes(
    owner: HfApi, stranger: HfApi, nobody: HfApi, repository: str, folder: Path
):
    owner.create_repo("org/secret", private=True)
    assert owner.model_info("org/secret").private is True
    before = owner.model_info(repository).sha
    for api in (stranger, nobody):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("org/secret")
        with pytest.raises(HfHubHTTPError, match="403"):
            api.upload_folder(repo_id=repository, folder_path=folder)
        with pytest.raises(HfHubHTTPError, match="403"):
            api.create_repo("org/mine")
    assert owner.model_info(repository).sha == before


def test_a_repository_is_created_once(owner: HfApi, repository: str):
    assert owner.create_repo("tiny", exist_ok=True).repo_id == repository
    with pytest.raises(HfHubHTTPError, match="409"):
        owner.create_repo("tiny")
    owner.create_repo("tiny", repo_type="space", space_sdk="gradio")
    owner.upload_file(path_or_fileobj=b"app", path_in_repo="app.py", repo_id=repository, repo_type="space")
    assert "app.py" in owner.list_repo_files(repository, repo_type="space")
    assert "app.py" not in owner.list_repo_files(repository)


def test_commits(loopback_hub: LoopbackHub, owner: HfApi, repository: str):
    first = owner.model_info(repository).sha
    changes = [CommitOperationAdd("README.md", b"changed"), CommitOperationDelete("empty.txt")]
    second = owner.create_commit(repository, changes, commit_message="second").oid
    assert owner.model_info(repository).sha == second
    commits = loopback_hub.repositories["models/org/tiny"].commits
    assert [commit.title for commit in commits.values()] == ["initial commit", "first", "second"]
    assert "empty.txt" not in owner.list_repo_files(repository)
    assert "empty.txt" in owner.list_repo_files(repository, revision=first)
    with pytest.raises(HfHubHTTPError, match="This server has no pull requests"):
        owner.upload_file(path_or_fileobj=b"wish", path_in_repo="a.txt", repo_id=repository, create_pr=True)


def test_branches_and_tags(owner: HfApi, repository: str, tmp_path: Path):
    owner.create_tag(repository, tag="v1.0")
    owner.create_branch(repository, branch="side/work")
    with pytest.raises(HfHubHTTPError, match="409"):
        owner.create_branch(repository, branch="side/work")
    owner.create_branch(repository, branch="side/work", exist_ok=True)
    owner.upload_file(path_or_fileobj=b"side", path_in_repo="a.txt", repo_id=repository, revision="side/work")
    options = {"endpoint": owner.endpoint, "cache_dir": tmp_path / "cache"}
    assert Path(hf_hub_download(repository, "a.txt", revision="side/work", **options)).read_bytes() == b"side"
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repository, "a.txt", revision="v1.0", **options)
    with pytest.raises(RevisionNotFoundError):
        owner.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id=repository, revision="missing")


def test_cards_are_validated(owner: HfApi):
    owner._validate_yaml("---\nlicense: mit\n---\nText")
    with pytest.raises(ValueError, match="Invalid metadata"):
        owner._validate_yaml("---\nlicense: [mit\n---\nText")
