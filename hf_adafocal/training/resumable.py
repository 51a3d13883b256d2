"""Trainer with exact resume from the last complete checkpoint after a crash."""

from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_adafocal.checkpoint_files import STATE_FILE
from hf_adafocal.training.checkpoints import last_complete_checkpoint


class ResumableTrainer(Trainer):
    """A `Trainer` that resumes exactly, and only from complete checkpoints.

    A checkpoint is complete once its `trainer_state.json` stands: the Trainer writes it last, and every process has
    written its random state by then. The stock Trainer gives no such order.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As `Trainer.train`; True resumes from the last complete checkpoint.

        A resumed run is the uninterrupted one to the bit, but for two things: the first `loss` it logs is the mean
        since the checkpoint, and data that a transform draws at random are drawn anew if the checkpoint is from
        within an epoch (choose `save_strategy="epoch"` for such data). On the first releases of transformers 5, whose
        Trainer has no `_run_epoch`, a finished run that `max_steps` ended within an epoch takes one more step.

        Raises:
            ValueError: If no checkpoint is complete.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir or ".")
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"{self.args.output_dir} holds no complete checkpoint to resume from; train without "
                    "resume_from_checkpoint to start from the beginning."
                )
        if resume_from_checkpoint:
            self.check_resume(str(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def check_resume(self, checkpoint: str) -> None:
        """Check what a subclass restores from a checkpoint before anything is loaded; nothing here."""

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            # The checkpoint is of a run that ended within an epoch: the Trainer would take one more step.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:
            # Written last, it vouches for the rest; that of an earlier run in the same folder must not.
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / STATE_FILE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # each process writes its own, before trainer_state.json says "complete"
