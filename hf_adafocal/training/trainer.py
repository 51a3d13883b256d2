"""`AdaFocalTrainer`: the Hugging Face Trainer with a calibration-aware loss, and calibration in its evaluations."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from hf_adafocal.checkpoint_files import STATE_FILE
from hf_adafocal.losses.functional import cross_entropy
from hf_adafocal.losses.layout import classes_second
from hf_adafocal.metrics.binning import BinStats
from hf_adafocal.report.card import write_card
from hf_adafocal.report.schema import Report
from hf_adafocal.report.weights import weights_hash
from hf_adafocal.scaling.folding import forget_scaling, recorded_scaling
from hf_adafocal.training.arguments import AdaFocalTrainingArguments
from hf_adafocal.training.calibration_at_end import CalibrationOutcome, calibrate_head, check_before_training
from hf_adafocal.training.callbacks import (
    AdaFocalCallback,
    AdaptiveStateCallback,
    FirstStepCheck,
    SaveAfterEvaluation,
    saved_adaptive_state,
)
from hf_adafocal.training.input_checks import check_batch, check_data_sets, check_model, reject_ignored_arguments
from hf_adafocal.training.label_checks import LabelCheck
from hf_adafocal.training.model_conventions import FurtherTerms, ModelConventions, logits_of
from hf_adafocal.training.plan import (
    evaluated_as,
    resolve_plan,
    warn_of_few_samples,
    with_direction_of_best_metric,
)
from hf_adafocal.training.run_report import (
    adaptation_pictures_of,
    card_options,
    current_report,
    pictures_of,
    report_of,
    save_with_weights,
    tensorboard_writer_of,
)
from hf_adafocal.training.sample_rows import mean_nll
from hf_adafocal.training.search import SearchingTrainer
from hf_adafocal.training.smoothing_callback import SmoothingCallback
from hf_adafocal.training.smoothing_control import measure_slice
from hf_adafocal.training.step_scale import StepScale
from hf_adafocal.training.term_start import TermStart
from hf_adafocal.training.trackers import TRACKERS, PictureCallback

logger = logging.get_logger(__name__)


class AdaFocalTrainer(SearchingTrainer):
    """A `Trainer` that trains with AdaFocal, or any loss of `LOSSES`, and reports calibration.

    AdaFocal's gamma moves after each evaluation of the calibration set during training, and at the end of each epoch
    if the Trainer evaluates nothing. Every evaluation adds exact `accuracy`, `nll`, `brier`, `ece` and `ada_ece` under
    its prefix, to the log, the trackers and `metric_for_best_model`; those of the calibration set also `temperature`,
    the best one, and `refinement`, the NLL at that temperature (Berta et al. 2025, arXiv 2501.19195). The evaluation
    loss is the NLL, because gamma moves and could not rank checkpoints.

    Args:
        model: As in `Trainer`; its output has `logits`, shape `(N, C)`; `(N, L, C)` for token classification and
            language models; or `(N, C, d1, d2, ...)` for segmentation, resized to the labels as transformers' own
            losses do. Each token or pixel counts as a sample unless its label is the ignore index. With C = 1 the
            logit is that of the positive class of two (rerankers), and labels are 0 and 1.
        args: `AdaFocalTrainingArguments`, or plain `TrainingArguments` for AdaFocal with the paper's settings.
        train_dataset, eval_dataset: As in `Trainer`.
        calibration_dataset: Held-out data that moves the loss. Left out, it is the part of `train_dataset` that
            `calibration_fraction` asks for, else `eval_dataset` (of a dict, the entry "calibration"), else a tenth of
            `train_dataset`. Training rows that also stand in it are dropped (`split_overlap` of the arguments).
        loss: A loss module to use instead of the one `args` describe.
        **kwargs: Every other argument of `Trainer`.

    Attributes:
        plan: The loss, its settings and the data sets, as resolved at construction.
        loss: The training loss.
        recorder: Results of the last evaluations.
        adaptive_callback: Moves the loss and keeps its history; None if the loss does not adapt.
        calibration_outcome: What `calibrate_at_end` came to; None before, or if it was not asked for.

    Raises:
        ValueError: If the loss has no calibration data, if the model or the labels are not those of single-label
            classification, or if an argument would be ignored (`label_smoothing_factor`, `compute_loss_func`).

    >>> from tempfile import mkdtemp
    >>> from hf_adafocal import AdaFocalTrainer, AdaFocalTrainingArguments
    >>> from hf_adafocal import GlobalPoolingCNNConfig, GlobalPoolingCNNForSequenceClassification
    >>> config = GlobalPoolingCNNConfig(vocab_size=200, embedding_size=4, num_filters=4, hidden_size=4, num_labels=2)
    >>> rows = [{"input_ids": [1 + i] * 30, "labels": i % 2} for i in range(120)]
    >>> args = AdaFocalTrainingArguments(mkdtemp(), num_train_epochs=2, use_cpu=True, report_to=[])
    >>> model = GlobalPoolingCNNForSequenceClassification(config)
    >>> trainer = AdaFocalTrainer(model, args, train_dataset=rows[:60], eval_dataset=rows[60:])
    >>> _ = trainer.train()
    {...
    >>> trainer.adaptive_callback.updates
    2
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        calibration_dataset: Any = None,
        loss: torch.nn.Module | None = None,
        **kwargs,
    ) -> None:
        args = AdaFocalTrainingArguments() if args is None else args
        reject_ignored_arguments(args, kwargs)
        plan = resolve_plan(
            args,
            model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            calibration_dataset=calibration_dataset,
            loss=loss,
        )
        super().__init__(
            model=model,
            args=with_direction_of_best_metric(args),
            train_dataset=plan.train_dataset,
            eval_dataset=plan.eval_dataset,
            **kwargs,
        )
        self.conventions = ModelConventions.of(self.model)
        ignore_index = getattr(plan.loss, "ignore_index", self.conventions.ignore_index)
        check_model(self.model, self.label_names, self.processing_class)
        check_data_sets(plan, self.model, ignore_index)
        self.plan = plan.without_shared_rows(self.train_dataset, **self._content()).weighted(self.args, self.model)
        self.train_dataset = self.plan.train_dataset
        # compute_loss divides by the number of labels itself, so the Trainer must always count them.
        self.model_accepts_loss_kwargs = True
        self.loss = self.plan.loss.to(self.args.device)
        self.begin_recording(plan.num_bins, plan.histogram, ignore_index)
        self._further_terms, self._step = FurtherTerms(ignore_index), StepScale(self)
        self.check_labels = LabelCheck(self.model, ignore_index)
        self.calibration_outcome: CalibrationOutcome | None = None
        self.add_callback(FirstStepCheck(self._check_that_the_loss_trains))
        self.adaptive_callback = self._new_adaptive_callback()
        self.add_callback(self.adaptive_callback or SaveAfterEvaluation())
        self.add_callback(TermStart(self.loss))
        if set(TRACKERS) & set(self.args.report_to or ()):
            drawn = partial(pictures_of, self), partial(adaptation_pictures_of, self)
            self.add_callback(PictureCallback(*drawn, partial(tensorboard_writer_of, self)))

    @property
    def calibration_dataset(self) -> Any:
        """The held-out set that updates the loss and fits the temperature; None if nothing needs one."""
        return self.plan.calibration_dataset

    @property
    def _calibration_prefix(self) -> str | None:
        """The prefix under which the Trainer evaluates the calibration set anyway; `eval_dataset` may be replaced."""
        return evaluated_as(self.calibration_dataset, self.eval_dataset)

    def _content(self) -> dict[str, Any]:
        """Return the columns by which rows are compared (those the model takes) and special tokens to leave out."""
        content: dict[str, Any] = {"blank_tokens": getattr(self.processing_class, "all_special_ids", ())}
        if self.args.remove_unused_columns:
            self._set_signature_columns_if_needed()
            content["columns"] = self._signature_columns
        return content

    def _new_adaptive_callback(self) -> AdaptiveStateCallback | None:
        adaptive, plan = self.plan.adaptive, self.plan
        if adaptive is None:
            return None
        if adaptive.follows == "bins":
            prefix = plan.calibration_prefix or plan.first_prefix
            return AdaFocalCallback(
                adaptive, self._awaited_statistics, prefix, self.log, self._evaluate_calibration, plan.calibration_text
            )
        size, options = plan.calibration_size or 0, {"processes": self.processes.count, **self.steering}
        return SmoothingCallback(adaptive, partial(measure_slice, self), size, log=self.log, **options)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train as `ResumableTrainer.train`; checks checkpoints first and applies `calibrate_at_end`.

        Raises:
            ValueError: If no checkpoint is complete, the state of the one to resume from is not what a run writes, or
                a temperature is to be folded at the end into a head that cannot hold it.
        """
        if self.plan.calibrate_at_end and self.model is not None:  # in a search `model_init` has yet to make it
            check_before_training(self)
        self.batch_recorded = False
        if self.model is not None and recorded_scaling(self.network) is not None:
            logger.warning("The model has a scaling folded into its head; training moves on from there, unrecorded.")
            forget_scaling(self.network)
        outcome = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.plan.calibrate_at_end:
            self.calibration_outcome = calibrate_head(self)
        return outcome

    def check_resume(self, checkpoint: str) -> None:
        """Check the loss's state in a checkpoint before anything is loaded from it.

        Raises:
            ValueError: If it is not what a run with this loss writes.
        """
        if self.adaptive_callback is not None:
            saved = saved_adaptive_state(checkpoint)
            if saved is not None:
                self.adaptive_callback.check_saved(saved, str(Path(checkpoint) / STATE_FILE))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss: a sum over samples, divided by the labels of the optimizer step; the NLL in evaluations.

        Accumulated micro-batches of any size and any number of processes give the gradient of the mean loss.
        """
        if "labels" not in inputs:
            raise ValueError(
                f"The batch must hold `labels`, found {sorted(inputs)}; rename the label column. Labels that are "
                "strings are dropped by the collator: encode them as integers."
            )
        targets = self.conventions.targets(inputs, self.ignore_index)
        self.check_labels(inputs["labels"] if self.conventions.single_output else targets, model.training)
        if model.training and not self._further_terms.looked and not self.is_fsdp_enabled:
            with self.compute_loss_context_manager():
                mixed = self.accelerator.mixed_precision != "no"
                self._further_terms.check(self.network, inputs, targets, mixed_precision=mixed)
        kept = model.training and self._further_terms.found
        outputs = model(**inputs) if kept else model(**self.conventions.inputs(inputs))
        logits = logits_of(outputs, type(self.model).__name__)
        check_batch(logits, targets, self.ignore_index)
        self.batch_recorded = True
        if model.training:
            loss = self._training_loss(logits, targets, num_items_in_batch)
            if kept:
                terms = self._further_terms.of(outputs["loss"], logits, targets)
                loss = loss + terms * self._step.share(targets, num_items_in_batch)
        else:
            loss = self._evaluation_loss(logits, targets)
        # The Trainer takes what follows the loss in a tuple, and all but `loss` of a dict.
        if isinstance(outputs, torch.Tensor):
            outputs = {"logits": outputs}
        elif not isinstance(outputs, dict):
            outputs = (loss, *outputs)
        return (loss, outputs) if return_outputs else loss

    def _training_loss(self, logits, labels, num_items_in_batch):
        logits, labels = classes_second(logits, labels)
        scaled = num_items_in_batch is not None or self.plan.reduction == "sum"
        # Read by training_step of transformers >= 5.20; older releases draw the same conclusion themselves.
        self.loss_is_scaled_for_ga = scaled
        if not scaled:
            return self.loss(logits, labels)
        return self.loss(logits, labels, self._step.divisor(num_items_in_batch)) * self._step.factor

    def _get_num_items_in_batch(self, batch_samples, device):
        """Count the labels of an optimizer step, by their class weights, for the loss of this class to divide by."""
        if self.recorder.active or not batch_samples or "labels" not in batch_samples[0]:
            return None  # an evaluation averages its own batch, and no process waits for another
        targets = [self.conventions.targets(batch, self.ignore_index) for batch in batch_samples]
        return self._step.count_of_step(targets, device)

    def _check_that_the_loss_trains(self) -> None:
        """After the first step: raise if a subclass replaced `compute_loss`, so that the loss is not trained."""
        if self.batch_recorded:
            return
        text = (
            f"{type(self).__name__}.compute_loss replaces that of AdaFocalTrainer without calling it, so "
            f"{type(self.loss).__name__} is not trained."
        )
        if self.plan.adaptive is not None:
            raise ValueError(
                f"{text} Call super().compute_loss, or set loss='cross_entropy' to keep the metrics alone."
            )
        logger.warning(text)

    def _evaluation_loss(self, logits, targets):
        if self.recorder.active:
            return mean_nll(self.recorder.observe(logits, targets))
        return cross_entropy(*classes_second(logits, targets), ignore_index=self.ignore_index)

    def calibration_statistics(self) -> BinStats:
        """Compute statistics of the calibration set under the current model, in equal-mass bins of its confidences.

        If the Trainer evaluates the calibration set these are the samples of its last evaluation; a calibration set
        of its own is evaluated now, under the prefix "eval_calibration".

        Returns:
            `BinStats` with as many bins as the loss's table, and of single classes if it has tables of them.

        Raises:
            RuntimeError: If the Trainer evaluates the calibration set and has not done so yet, or if its last
                evaluation found no labelled sample.
        """
        if self._calibration_prefix is None:
            self.evaluate(self.calibration_dataset, metric_key_prefix="eval_calibration")
        if self.recorder.calibration is None:
            raise RuntimeError(
                "There is no evaluation of the calibration set: it has not been evaluated yet, or its last evaluation "
                "found no labelled sample. A stream must start anew each time it is iterated."
            )
        adaptive = self.plan.adaptive
        num_bins = getattr(adaptive, "num_bins", self.plan.num_bins)
        of_classes = self.recorder.num_classes if getattr(adaptive, "needs_class_statistics", False) else None
        return self.recorder.calibration.statistics(num_bins, of_classes)

    def _awaited_statistics(self) -> BinStats | None:
        """For the callback: None after the evaluation of a set that somebody handed to `evaluate`."""
        own = [self.calibration_dataset]
        if self._calibration_prefix is None:
            own += self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        if not any(self.evaluated_dataset is dataset for dataset in own):
            return None
        stats = self.calibration_statistics()
        if self.adaptive_callback is not None and self.adaptive_callback.updates == 0:
            warn_of_few_samples(int(stats.count.sum()), self.plan.adaptive)
        return stats

    def _evaluate_calibration(self) -> None:
        """For the callback, where the Trainer evaluates nothing by itself."""
        prefix = self._calibration_prefix or self.plan.first_prefix
        self.evaluate(self.calibration_dataset, metric_key_prefix=prefix)

    def write_report(self, test_dataset: Any = None, **facts: Any) -> Report:
        """Measure the current model and write `report.json`, pictures and the model card into `output_dir`.

        If the folder holds other weights the model is saved first, so that report and weights belong together.

        Args:
            test_dataset: Data that trained and chose nothing. Left out, the entry "test" of `eval_dataset`, else the
                first evaluation set, and the report says what that set was used for.
            **facts: What the trainer does not know, as in `report.schema.build_report`: `trained_on`, `language`, ...

        Returns:
            The report, on every process; the main process writes it.
        """
        report = report_of(self, test_dataset, **{"weights": weights_hash(self.network), **facts})
        save_with_weights(self, report)
        return report

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card with the calibration report of the current weights; what a person wrote stays.

        A report in the output folder that describes other weights is not shown; without one of these weights the first
        evaluation set is measured. Without a set to measure it is the Trainer's own card, whose arguments these are.
        """
        report, current = current_report(self)
        if not current and self.eval_dataset is not None:
            report, current = self.write_report(), True
        if not self.is_world_process_zero():
            return
        if report is None or not current:
            super().create_model_card(*args, **kwargs)
        else:
            write_card(self.folder, report, **card_options(self, *args, **kwargs))
