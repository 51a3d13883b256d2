"""`AdaFocalTrainer`: the Hugging Face Trainer with a calibration-aware loss, and calibration in its evaluations."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy
from transformers.utils import logging

from hf_adafocal.binning import BinStats
from hf_adafocal.calibration import IGNORED, HistogramCollector, SampleCollector, per_sample
from hf_adafocal.callback import AdaFocalCallback
from hf_adafocal.losses import AdaFocalLoss, FocalFamilyLoss
from hf_adafocal.training_args import AdaFocalTrainingArguments

logger = logging.get_logger(__name__)

SAMPLES_PER_BIN = 10  # below this a bin's gap is mostly noise


class AdaFocalTrainer(Trainer):
    """A `Trainer` that trains with AdaFocal, or any loss of `LOSSES`, and reports calibration.

    Every evaluation adds exact `accuracy`, `nll`, `ece` and `ada_ece` under its prefix, to the log, the trackers and
    `metric_for_best_model`; the evaluation loss is the NLL, because gamma moves and could not rank checkpoints.
    AdaFocal updates gamma after each evaluation during training.

    Args:
        model: As in `Trainer`; its output has `logits`, shape `(N, C)`; `(N, L, C)` for token classification; or
            `(N, C, H, W)` for segmentation, resized to the labels as transformers' own losses do. Each token or pixel
            counts as a sample unless its label is -100.
        args: `AdaFocalTrainingArguments`, or plain `TrainingArguments` for AdaFocal with the paper's settings.
        calibration_dataset: Held-out data that drives gamma. Left out, it is carved from `train_dataset` if
            `calibration_fraction` says so, else it is `eval_dataset` (of a dict, the entry named "calibration"). If
            it is the evaluation set nothing is computed twice.
        loss: A loss module to use instead of the one `args` describe.
        **kwargs: Every other argument of `Trainer`.

    Raises:
        ValueError: If AdaFocal has no calibration data or is never to be evaluated, or an argument would be ignored
            (`label_smoothing_factor`, `compute_loss_func`).
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        calibration_dataset: Any = None,
        loss: FocalFamilyLoss | None = None,
        **kwargs,
    ) -> None:
        args = AdaFocalTrainingArguments() if args is None else args
        ours = isinstance(args, AdaFocalTrainingArguments)
        _refuse_ignored_arguments(args, kwargs)
        if isinstance(loss, str):
            raise TypeError(f"loss must be a module, found {loss!r}: name it in AdaFocalTrainingArguments(loss=...).")
        if loss is None:
            loss = args.build_loss() if ours else AdaFocalLoss()
        if calibration_dataset is None and ours and args.calibration_fraction > 0:
            train_dataset, calibration_dataset = _carve(train_dataset, args)
        if eval_dataset is None:
            eval_dataset = calibration_dataset
        adaptive = isinstance(loss, AdaFocalLoss)
        if calibration_dataset is None and adaptive:
            calibration_dataset = _calibration_entry(eval_dataset)
        if adaptive and train_dataset is not None:
            _check_calibration(calibration_dataset, args, loss.num_bins)

        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        if not self.label_names:
            raise ValueError(
                f"{type(self.model).__name__}.forward has no `labels` argument, so evaluation would find no labels. "
                "Set label_names=['labels'] and remove_unused_columns=False in the training arguments."
            )
        # compute_loss divides by the number of labels itself, so the Trainer must always count them.
        self.model_accepts_loss_kwargs = True
        self.loss = loss.to(self.args.device)
        self.calibration_dataset = calibration_dataset
        self._collector: SampleCollector | HistogramCollector | None = None  # of the evaluation under way
        self._collected: dict[str, SampleCollector | HistogramCollector] = {}  # the last one under each prefix
        self._calibration_prefix = _evaluated_as(calibration_dataset, eval_dataset)
        if adaptive:
            first = f"_{next(iter(eval_dataset))}" if isinstance(eval_dataset, dict) else ""
            trigger = self._calibration_prefix or f"eval{first}"
            self.add_callback(AdaFocalCallback(loss, self.calibrate, trigger, self.log))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss summed over samples and divided by the labels of the whole optimizer step; the NLL when evaluating.

        Accumulated micro-batches of any size and any number of processes give the gradient of the mean loss.
        """
        if "labels" not in inputs:
            raise ValueError(f"The batch must hold `labels`, found {sorted(inputs)}; rename the label column.")
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        if not isinstance(outputs, dict):  # the Trainer drops the first entry of anything else
            outputs = {"logits": outputs if isinstance(outputs, torch.Tensor) else outputs[0]}
        logits = _classes_last(outputs["logits"], labels)
        if model.training:
            loss = self._training_loss(logits, labels, num_items_in_batch)
        else:
            loss = self._evaluation_loss(logits, labels)
        return (loss, outputs) if return_outputs else loss

    def _training_loss(self, logits, labels, num_items_in_batch):
        logits = logits.movedim(-1, 1)  # losses take the classes second
        # Read by training_step of transformers >= 5.20; older releases draw the same conclusion themselves.
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        if num_items_in_batch is None:
            return self.loss(logits, labels)
        if torch.is_tensor(num_items_in_batch) and num_items_in_batch.numel() > 1:  # DataParallel repeats the count
            num_items_in_batch = num_items_in_batch.flatten()[0]
            if not self.args.average_tokens_across_devices:
                num_items_in_batch = num_items_in_batch * self.args.n_gpu
        loss = self.loss(logits, labels, num_items_in_batch)
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # undoes the mean that DDP takes over ranks
        return loss

    def _evaluation_loss(self, logits, labels):
        rows = per_sample(logits, labels)
        if self._collector is not None:
            gathered = self.accelerator.pad_across_processes(rows, dim=1, pad_index=IGNORED) if rows.ndim > 2 else rows
            self._labelled = True
            self._collector.add(self.accelerator.gather_for_metrics(gathered))
        return rows[rows[..., 0] != IGNORED][:, 2].mean()

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Evaluate or predict as the Trainer does, and add exact calibration metrics of every counted sample."""
        streaming = getattr(self.args, "streaming_calibration", False)
        self._collector = HistogramCollector() if streaming else SampleCollector()
        self._labelled = False
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
            )
        finally:
            collected, self._collector = self._collector, None
        if not self._labelled:
            return output
        if len(collected) == 0:
            raise ValueError(f"Every label of the {metric_key_prefix!r} set is ignored: nothing to evaluate.")
        self._collected[metric_key_prefix] = collected
        metrics = collected.metrics(self._num_bins)
        for name, value in metrics.items():
            output.metrics.setdefault(f"{metric_key_prefix}_{name}", value)  # the user's compute_metrics goes first
        # The Trainer's mean of batch means counts the samples that pad the last distributed batch twice.
        output.metrics[f"{metric_key_prefix}_loss"] = metrics["nll"]
        return output

    def calibrate(self) -> BinStats:
        """Statistics of the calibration set under the current model, in equal-mass bins of its confidences.

        If the evaluation set is the calibration set these are the samples of its last evaluation; a calibration set
        of its own is evaluated now, under the prefix "eval_calibration".

        Returns:
            `BinStats` with as many bins as the loss's table.

        Raises:
            RuntimeError: If the evaluation set is the calibration set and has not been evaluated yet.
        """
        prefix = self._calibration_prefix
        if prefix is None:
            prefix = "eval_calibration"
            self.evaluate(self.calibration_dataset, metric_key_prefix=prefix)
        if prefix not in self._collected:
            raise RuntimeError("The calibration set is the evaluation set, and that has not been evaluated yet.")
        return self._collected[prefix].statistics(getattr(self.loss, "num_bins", self._num_bins))

    @property
    def _num_bins(self) -> int:
        return getattr(self.args, "num_bins", 15)


def _classes_last(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits `(N, C)` and `(N, L, C)` as they are; those of segmentation, `(N, C, h, w)`, as `(N, H, W, C)`."""
    if logits.ndim != 4:
        return logits
    if logits.shape[2:] != labels.shape[1:]:
        logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    return logits.movedim(1, -1)


def _refuse_ignored_arguments(args: TrainingArguments, kwargs: dict) -> None:
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} would be ignored: the loss is chosen by `loss`. "
            "Set it to 0."
        )
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func would be ignored: pass a loss module as `loss`, or use the stock Trainer.")


def _calibration_entry(eval_dataset: Any) -> Any:
    if not isinstance(eval_dataset, dict):
        return eval_dataset
    if "calibration" not in eval_dataset:
        raise ValueError(
            f"AdaFocal must know which of the evaluation sets {sorted(eval_dataset)} drives gamma: "
            "name one 'calibration', or pass `calibration_dataset`."
        )
    return eval_dataset["calibration"]


def _evaluated_as(calibration_dataset: Any, eval_dataset: Any) -> str | None:
    """The prefix under which the Trainer evaluates the calibration set anyway; None if it does not."""
    if isinstance(eval_dataset, dict):
        return next((f"eval_{name}" for name, entry in eval_dataset.items() if entry is calibration_dataset), None)
    return "eval" if eval_dataset is calibration_dataset else None


def _check_calibration(calibration_dataset: Any, args: TrainingArguments, num_bins: int) -> None:
    if calibration_dataset is None:
        raise ValueError(
            "AdaFocal updates gamma on a held-out calibration split, but there is none. Pass `calibration_dataset` or "
            "`eval_dataset`, or set `calibration_fraction`. Split it off train, not test."
        )
    if args.eval_strategy == IntervalStrategy.NO:
        raise ValueError(
            "AdaFocal updates gamma when it evaluates, but eval_strategy is 'no', so gamma would never move. "
            "Set eval_strategy='epoch'."
        )
    if not hasattr(calibration_dataset, "__len__"):
        return
    size = len(calibration_dataset)
    if size == 0:
        raise ValueError("The calibration set is empty: AdaFocal cannot measure a calibration gap on it.")
    if size < SAMPLES_PER_BIN * num_bins:
        logger.warning(
            f"The calibration set has {size} samples for {num_bins} bins, fewer than {SAMPLES_PER_BIN} a bin, so "
            "gamma will follow noise. Hold out more samples or lower num_bins."
        )


def _carve(train_dataset: Any, args: AdaFocalTrainingArguments) -> tuple[Any, Any]:
    """Split the calibration set off the training set, stratified by label and seeded."""
    if not (hasattr(train_dataset, "__len__") and hasattr(train_dataset, "__getitem__")):
        raise ValueError(
            "calibration_fraction needs a training set with a length and an index, found "
            f"{type(train_dataset).__name__}; pass `calibration_dataset` instead."
        )
    labels = _labels_of(train_dataset)
    try:
        train, calibration = train_test_split(
            np.arange(len(labels)),
            test_size=args.calibration_fraction,
            stratify=labels,
            random_state=args.data_seed if args.data_seed is not None else args.seed,
        )
    except ValueError as error:
        raise ValueError(
            f"calibration_fraction={args.calibration_fraction} cannot hold out a stratified part of "
            f"{len(labels)} samples: {error} Change the fraction, or pass `calibration_dataset`."
        ) from error
    # In the order of the data, so that reading stays sequential; the sampler shuffles.
    return tuple(_select(train_dataset, np.sort(part).tolist()) for part in (train, calibration))


def _labels_of(dataset: Any) -> np.ndarray:
    if hasattr(dataset, "column_names"):
        for name in ("labels", "label", "label_ids"):
            if name in dataset.column_names:
                return np.asarray(dataset.with_format(None)[name][:])
        raise ValueError(
            f"calibration_fraction stratifies by the column `labels` or `label`; found {dataset.column_names}."
        )
    return np.asarray([int(dataset[index]["labels"]) for index in range(len(dataset))])


def _select(dataset: Any, indices: list[int]) -> Any:
    return dataset.select(indices) if hasattr(dataset, "select") else Subset(dataset, indices)
