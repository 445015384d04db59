"""Uploads to the Hugging Face hub, as transformers' Trainer makes them."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy

from .config import MLOConfig

_LEFT_OUT = ["_*", "checkpoint-*", "tmp-checkpoint-*"]


class Hub:
    """The repository of one run, on the main process.

    Args:
        args: Of the trainer: ``hub_model_id``, ``hub_token``, ``hub_private_repo``, ``hub_revision``, ``hub_strategy``.
    """

    def __init__(self, args: MLOConfig):
        self._args = args
        self._repository: str | None = None
        self._running: list[Future] = []

    def _api(self) -> tuple[HfApi, str]:
        args = self._args
        api = HfApi(token=args.hub_token)
        if self._repository is None:
            name = args.hub_model_id or Path(args.output_dir).absolute().name
            self._repository = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
        return api, self._repository

    def push(self, message: str, *, blocking: bool = True, **options: Any) -> Any:
        """Upload the output folder but for checkpoints.

        Args:
            message: Of the commit.
            blocking: Whether to wait.
            **options: Of ``upload_folder``.

        Returns:
            The commit, or its future.
        """
        self.wait()
        return self._upload(self._args.output_dir, message, blocking, ignore_patterns=_LEFT_OUT, **options)

    def push_save(self, checkpoint: Path, step: int) -> None:
        """After a checkpoint: upload what ``hub_strategy`` says, in the background.

        While an upload is under way nothing is uploaded, unless ``hub_always_push``.

        Args:
            checkpoint: Its folder.
            step: Its step.
        """
        strategy = self._args.hub_strategy
        if strategy == HubStrategy.END:
            return
        if not self._args.hub_always_push and any(not future.done() for future in self._running):
            return
        self._running = [future for future in self._running if not future.done()]
        message = f"Training in progress, step {step}"
        # The newest checkpoint's model files are the run's model until it ends.
        self._upload(checkpoint, message, False, ignore_patterns=["scalemlo/*", "trainer_state.json"])
        where = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}.get(strategy)
        if where is not None:
            self._upload(checkpoint, f"{message}, checkpoint", False, path_in_repo=where)

    def wait(self) -> None:
        """Wait for uploads in the background; their errors are raised here."""
        running, self._running = self._running, []
        for future in running:
            future.result()

    def _upload(self, folder: str | Path, message: str, blocking: bool, **options: Any) -> Any:
        api, repository = self._api()
        options.setdefault("revision", self._args.hub_revision)
        result: Any = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message, run_as_future=not blocking, **options
        )
        if not blocking:
            self._running.append(result)
        return result
