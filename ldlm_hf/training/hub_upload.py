"""Uploading a run to the Hub: checkpoints while it trains, its pipeline and card at the end."""

from __future__ import annotations

import argparse
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..hub.publish import publish
from ..loading.repository import upload_repository
from ..pipelines.pipeline_ldlm import LDLMPipeline


CHECKPOINTS_BRANCH = "checkpoints"


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """The part of the command line that is about the Hub."""
    group = parser.add_argument_group("Hugging Face Hub (log in with `hf auth login`)")
    group.add_argument("--push_to_hub", action="store_true", help="upload the pipeline and its card at the end")
    group.add_argument(
        "--push_checkpoints",
        action="store_true",
        help=f"upload each checkpoint, when it is made, to the branch `{CHECKPOINTS_BRANCH}`",
    )
    group.add_argument("--hub_model_id", metavar="ID", help="repository; the output folder's name by default")
    group.add_argument("--hub_private", action="store_true", default=None, help="create a private repository")


class HubUploads:
    """The uploads of one run to one repository, made at the start: a wrong token (OSError) shows before training."""

    def __init__(self, model_id: str, private: bool | None):
        self.api = HfApi()
        self.private = private
        self.model_id = self.api.create_repo(model_id, private=private, exist_ok=True).repo_id
        self.upload: Future[Any] | None = None

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Uploads a checkpoint's folder while training goes on; one at a time."""
        self.finish()
        self.api.create_branch(self.model_id, branch=CHECKPOINTS_BRANCH, exist_ok=True)
        self.upload = self.api.upload_folder(
            repo_id=self.model_id,
            folder_path=checkpoint,
            path_in_repo=checkpoint.name,
            revision=CHECKPOINTS_BRANCH,
            commit_message=f"Upload {checkpoint.name}",
            run_as_future=True,
        )

    def finish(self) -> None:
        """Waits for the last upload; one that failed is reported and does not end the run."""
        if self.upload is not None and (error := self.upload.exception()) is not None:
            print(f"a checkpoint could not be uploaded to {self.model_id}: {error}")
        self.upload = None

    def push_pipeline(self, folder: Path) -> None:
        """Uploads the finished pipeline with its card and its code, or an adapter with its card."""
        self.finish()
        if not (folder / LDLMPipeline.config_name).is_file():
            print(upload_repository(folder, self.model_id, "Upload adapter", private=self.private).commit_url)
            return
        print(publish(folder, self.model_id, private=self.private).commit_url)
