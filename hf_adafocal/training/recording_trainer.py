"""A Trainer whose evaluations record every sample and add exact calibration metrics."""

import copy
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.trainer_utils import EvalLoopOutput

from hf_adafocal.training.model_conventions import ModelConventions
from hf_adafocal.training.processes import DataProcesses
from hf_adafocal.training.recorder import EvaluationRecorder
from hf_adafocal.training.resumable import ResumableTrainer

Logits = tuple[np.ndarray, np.ndarray]


class RecordingTrainer(ResumableTrainer):
    """A `Trainer` that records its evaluations, independent of the training loss.

    `begin_recording` must be called once after construction. A subclass whose `compute_loss` sees logits hands them
    to `recorder.observe` and sets `batch_recorded`; else they are taken from the prediction step.

    Attributes:
        conventions: How the model's logits and labels belong together.
        ignore_index: Label of samples that do not count.
        processes: Collects tensors over the processes of the run.
        recorder: Results of the last evaluations.
        batch_recorded: The batch under way has been recorded.
    """

    conventions: ModelConventions
    processes: DataProcesses
    recorder: EvaluationRecorder
    ignore_index: int
    calibration_dataset: Any
    batch_recorded = False

    @property
    def network(self) -> nn.Module:
        """The model without accelerate's wrappers."""
        if self.model is None:
            raise RuntimeError("The trainer has no model yet: `model_init` makes it when training begins.")
        return self.model

    @property
    def folder(self) -> Path:
        """`output_dir` of the arguments."""
        return Path(self.args.output_dir or ".")

    def begin_recording(self, num_bins: int, histogram: bool | None, ignore_index: int) -> None:
        """Make the recorder of this trainer's evaluations; arguments are those of `EvaluationRecorder`."""
        self.ignore_index = ignore_index
        self.processes = DataProcesses(self.accelerator, self.get_tp_size())
        self.recorder = EvaluationRecorder(self.processes, num_bins, histogram, ignore_index)
        self.added_metrics: set[str] = set()  # names that no compute_metrics gave
        self.evaluated_dataset: Any = None  # that `evaluate` reads

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As `Trainer.prediction_step`; records the batch also where a subclass replaces `compute_loss`."""
        if inputs is None:  # what accelerate 1.7 makes of an empty stream
            raise RuntimeError(
                "The evaluation found no labelled sample. A stream must start anew each time it is iterated."
            )
        labels = inputs.get("labels")
        targets = None if labels is None else self.conventions.targets(inputs, self.ignore_index)
        self.batch_recorded = False
        needed = self.recorder.active and targets is not None
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only and not needed, ignore_keys)
        if needed and targets is not None and not self.batch_recorded and logits is not None:
            first = logits[0] if isinstance(logits, tuple | list) else logits
            self.recorder.observe(first, targets.to(first.device))
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Evaluate as `Trainer.evaluate`; only evaluations of the trainer's own data sets update the loss."""
        outer = self.evaluated_dataset
        self.evaluated_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(self.evaluated_dataset, str) and isinstance(self.eval_dataset, dict):  # the name of an entry
            self.evaluated_dataset = self.eval_dataset[self.evaluated_dataset]
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self.evaluated_dataset = outer

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Evaluate or predict as the Trainer does, and add exact calibration metrics of every counted sample."""
        dataset = self.evaluated_dataset
        of_calibration = dataset is not None and dataset is self.calibration_dataset
        self.recorder.begin(getattr(dataloader, "dataset", None), of_calibration=of_calibration)
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
            )
            metrics = self.recorder.end(metric_key_prefix, getattr(self.model, "config", None))
        finally:
            self.recorder.abort()
        if metrics is None or output.metrics is None:
            return output
        added = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        for name in added.keys() - output.metrics.keys():  # the user's compute_metrics goes first
            output.metrics[name] = added[name]
            self.added_metrics.add(name)
        # The Trainer's mean of batch means counts the samples that pad the last distributed batch twice.
        output.metrics[f"{metric_key_prefix}_loss"] = metrics["nll"]
        return output

    def get_train_dataloader(self):
        """As `Trainer.get_train_dataloader`.

        Raises:
            ValueError: If batches are not made even and processes would get different numbers of them, so that one
                would wait for ever.
        """
        loader = super().get_train_dataloader()
        if self.processes.count > 1 and not self.accelerator.even_batches and isinstance(self.train_dataset, Sized):
            own = torch.tensor([self._training_batches(loader, self.train_dataset)], device=self.args.device)
            lengths = self.processes.gather(own).tolist()
            if len(set(lengths)) > 1:
                raise ValueError(
                    f"With even_batches=False every process must have as many training batches, found {lengths}: the "
                    "first to end would leave the others waiting. Set dataloader_drop_last=True, choose another batch "
                    "size, or leave even_batches on (the last batch then repeats some samples)."
                )
        return loader

    def _training_batches(self, loader: Any, dataset: Sized) -> int:
        """Number of batches that this process gets, where batches are not made even."""
        if not self.accelerator.split_batches or self.args.dataloader_drop_last:
            return len(loader)
        # Of a batch that is split each process has a part, and accelerate's length counts the empty parts too.
        whole, rest = divmod(len(dataset), loader.total_batch_size)
        return whole + (rest > loader.total_batch_size // self.processes.count * self.processes.index)

    def get_eval_dataloader(self, eval_dataset=None):
        """As `Trainer.get_eval_dataloader`, but no sample is dropped and every process has as many batches."""
        # Persistent workers are kept for the trainer's own sets; the Trainer would take them for any other set too.
        foreign = (
            eval_dataset is not None and not isinstance(eval_dataset, str) and eval_dataset is not self.eval_dataset
        )
        changes = {"dataloader_persistent_workers": False} if foreign else {}
        with self._evaluation_settings(**changes):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As `Trainer.get_test_dataloader`, but no sample is dropped and every process has as many batches."""
        with self._evaluation_settings():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _evaluation_settings(self, **changes: Any) -> Iterator[None]:
        given, self.args = self.args, copy.copy(self.args)
        vars(self.args).update(dataloader_drop_last=False, **changes)
        # The recorder leaves out the samples that make batches even; without them a process may wait for ever.
        even, self.accelerator.even_batches = self.accelerator.even_batches, True
        try:
            yield
        finally:
            self.args, self.accelerator.even_batches = given, even

    def measure(self, dataset: Any, prefix: str) -> tuple[dict[str, float], Logits | None]:
        """Evaluate a data set without logging or callbacks.

        Args:
            dataset: Any set with labels.
            prefix: Of the metrics.

        Returns:
            Metrics without the prefix, and logits `(n, C)` and labels `(n,)` of all counted samples, the same on every
            process and in the order of the data; None in their place where they are too many to keep.
        """
        self.evaluated_dataset, self.recorder.keep_logits = dataset, True
        try:
            loader = self.get_eval_dataloader(dataset)
            output = self.evaluation_loop(loader, "Evaluation", prediction_loss_only=True, metric_key_prefix=prefix)
        finally:
            self.evaluated_dataset, self.recorder.keep_logits = None, False
        metrics = {name.removeprefix(f"{prefix}_"): value for name, value in (output.metrics or {}).items()}
        return metrics, self.recorder.logits
