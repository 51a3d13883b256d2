"""Trainer that uploads only allow-listed files to the Hub, and no report of other weights."""

import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from hf_adafocal.report.card import CARD, START, names_license, without_report
from hf_adafocal.report.eval_results import results_of_other_weights
from hf_adafocal.report.files import FILE, read_report
from hf_adafocal.report.hub_card import card_without_report
from hf_adafocal.report.weights import weights_hash
from hf_adafocal.training.recording_trainer import RecordingTrainer
from hf_adafocal.upload_selection import ABOUT_WEIGHTS, describes_weights, select_files

logger = logging.get_logger(__name__)

LAST = "last-checkpoint"  # its folder in the repository with hub_strategy="checkpoint"
# Pickled arguments: they hold the token and local paths, and no run is resumed from them.
NEVER = ("training_args.bin",)


class UploadingTrainer(RecordingTrainer):
    """A `Trainer` that uploads the files of `upload_selection.select_files`, each time in one commit.

    A card, a report and pictures are uploaded with the weights that they describe; in a commit during training, whose
    weights nobody has measured, those of an earlier commit go. `hub_strategy="checkpoint"` and "all_checkpoints" add
    the folder of the checkpoint with its optimizer, scheduler and random states.
    """

    def push_to_hub(  # type: ignore[override]  # the Trainer returns all three, too
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """Save the model, renew its card and upload the folder in one commit; every process has to call it.

        Args:
            commit_message: First line of the commit message.
            blocking: Wait for the upload; else it goes on in the background with a copy of the files.
            token: Instead of `hub_token` of the arguments.
            revision: Branch, instead of `hub_revision` of the arguments.
            private: Create the repository as a private one.
            **kwargs: Of `create_model_card`: `license`, `language`, `tags`, ...

        Returns:
            The commit, or its future if not `blocking`; None on other processes than the main one.

        Raises:
            ValueError: If a file is not what its name says or holds an access token.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, **({} if private is None else {"private": private}))
        self.save_model(_internal_call=True)
        named = self.args.hub_model_id or self.folder.resolve().name
        tags = [kwargs.pop("tags")] if isinstance(kwargs.get("tags"), str) else list(kwargs.pop("tags", None) or ())
        tags += [tag for tag in getattr(self.model, "model_tags", None) or () if tag not in tags]
        kwargs = {"model_name": named.split("/")[-1], **kwargs, **({"tags": tags} if tags else {})}
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        files, message = self._presented(select_files(self.folder, exclude=NEVER).files), str(commit_message)
        target = self._target(token, revision)
        if blocking:
            return _commit(self._client, target, files, message)
        return self._in_background(target, files, message)

    @cached_property
    def _client(self) -> HfApi:
        """The Hub client for all uploads: its background jobs run in order."""
        return HfApi()

    def _target(self, token: str | None = None, revision: str | None = None) -> dict[str, Any]:
        args = self.args
        revision, token = revision or args.hub_revision, token or args.hub_token
        return {"repo_id": self.hub_model_id, "revision": revision, "token": token}

    def _presented(self, files: Mapping[str, Path]) -> dict[str, Path | bytes]:
        """Select the files of the output folder to upload, without a report of other weights."""
        found: dict[str, Path | bytes] = {**files}
        for path in results_of_other_weights(files, weights_hash(self.folder)):
            del found[path]
        text = files[CARD].read_text(encoding="utf-8") if CARD in files else ""
        report = read_report(self.folder) if FILE in files else None
        if report is None or report.weights != weights_hash(self.folder):
            found = {path: source for path, source in found.items() if path not in ABOUT_WEIGHTS}
            if START in text:
                found[CARD] = without_report(text).encode()
        if text and not names_license(text):
            logger.warning("The model card names no licence. Choose one, as in push_to_hub(license='apache-2.0').")
        return found

    def _push_from_checkpoint(self, checkpoint_folder):
        """Upload the weights of a checkpoint, as `hub_strategy` says; called by `Trainer._save_checkpoint`."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch or 0)}"
        folder = Path(checkpoint_folder)
        places = {HubStrategy.CHECKPOINT: LAST, HubStrategy.ALL_CHECKPOINTS: folder.name}
        inside = places.get(HubStrategy(strategy))
        try:
            files: dict[str, Path | bytes] = {**select_files(folder, exclude=(*NEVER, CARD)).files}
            if inside is not None:
                state = select_files(folder, exclude=NEVER, training_state=True).files
                files |= {f"{inside}/{path}": source for path, source in state.items()}
            if (self.folder / CARD).is_file():
                files[CARD] = without_report((self.folder / CARD).read_text(encoding="utf-8")).encode()
        except ValueError as error:  # a run goes on without its upload
            logger.warning(f"The checkpoint of {when} is not uploaded: {error}")
            return
        job = self._in_background(self._target(), files, f"Training in progress, {when}", inside)
        job.add_done_callback(lambda done: _say_failure(done, when))
        jobs: list[Any] = [job] if not busy else [*self.push_in_progress.jobs, job]
        self.push_in_progress: Any = PushInProgress(cast(Any, jobs))

    def _in_background(
        self, target: dict[str, Any], files: Mapping[str, Path | bytes], message: str, inside: str | None = None
    ) -> Future:
        """Commit a copy of the files in the background, because training overwrites them meanwhile."""
        # Beside the run, on the disk that has room for it; hidden, so that no upload takes it for a part of the run.
        copies = tempfile.TemporaryDirectory(prefix=".upload-", dir=self.folder)
        staged: dict[str, Path | bytes] = {}
        for number, (path, source) in enumerate(files.items()):
            if isinstance(source, Path):
                source = Path(shutil.copyfile(source, Path(copies.name) / str(number)))
            staged[path] = source

        def commit() -> CommitInfo:
            with copies:
                return _commit(self._client, target, staged, message, inside)

        return self._client.run_as_future(commit)


def _commit(
    api: HfApi,
    target: Mapping[str, Any],
    files: Mapping[str, Path | bytes],
    message: str,
    inside: str | None = None,
) -> CommitInfo:
    """Commit the files; delete earlier ones that loaders would take for a part of these, or that show other results.

    Args:
        api: The client.
        target: Repository, branch and token.
        files: For each path in the repository the file on disk, or its content.
        message: First line of the commit message.
        inside: Folder of the repository that holds these files alone afterwards.
    """
    there = {file.rfilename for file in api.model_info(**target).siblings or ()}
    gone = {path for path in there - set(files) if describes_weights(path) or path.startswith(f"{inside}/")}
    added = {**files, **(card_without_report(api, **target) if CARD in there - set(files) else {})}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationDelete(path_in_repo=path) for path in sorted(gone)),
        *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=source) for path, source in added.items()),
    ]
    return api.create_commit(operations=operations, commit_message=message, **target)


def _say_failure(job: Future, when: str) -> None:
    error = None if job.cancelled() else job.exception()
    if error is not None:
        logger.warning(f"The upload of {when} failed: {' '.join(str(error).split())}")
