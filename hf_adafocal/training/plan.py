"""What the trainer asks of its arguments, model and data, and the calibration set it carves from train."""

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from sklearn.model_selection import train_test_split
from torch.utils.data import IterableDataset, Subset
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from hf_adafocal.data.overlap import check_splits, without_overlap
from hf_adafocal.training.arguments import AdaFocalTrainingArguments

logger = logging.get_logger(__name__)

SAMPLES_PER_BIN = 10  # below this a bin's gap is mostly noise


def refuse_ignored_arguments(args: TrainingArguments, kwargs: dict) -> None:
    """Refuse what the Trainer would take and this one would not use."""
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} would be ignored: the loss is chosen by `loss`. "
            "Set it to 0."
        )
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func would be ignored: pass a loss module as `loss`, or use the stock Trainer.")


def refuse_other_tasks(model: Any) -> None:
    """Refuse a model whose config says that it is no single-label classifier."""
    config = getattr(model, "config", None)
    problem_type = getattr(config, "problem_type", None)
    if problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"AdaFocalTrainer trains classifiers with one label a sample, found problem_type={problem_type!r}. Build "
            "the model with problem_type='single_label_classification', or use the stock Trainer."
        )
    if getattr(config, "num_labels", None) == 1:
        raise ValueError(
            "AdaFocalTrainer trains classifiers, and num_labels=1 is a regression head. Build the model with "
            "num_labels=2 for two classes, or use the stock Trainer."
        )


def refuse_other_labels(name: str, dataset: Any) -> None:
    """Look at the type of the stored label column, unless a transform makes the labels from it."""
    form = getattr(dataset, "format", {})  # streams have none
    if not hasattr(dataset, "features") or not dataset.features or form.get("type") == "custom":
        return
    column = next((column for column in ("labels", "label", "label_ids") if column in dataset.features), None)
    feature = dataset.features.get(column)
    several = hasattr(feature, "feature")
    while hasattr(feature, "feature"):
        feature = feature.feature
    dtype = str(getattr(feature, "dtype", ""))
    if "string" in dtype:
        raise ValueError(
            f"Labels must be integers, found strings in the column {column!r} of the {name} set. Encode them: "
            f"dataset.class_encode_column({column!r})."
        )
    if "float" in dtype:
        what = "a vector of floats a sample (multi-label?)" if several else "floats (regression?)"
        raise ValueError(
            f"Labels must be integer class indices, found {what} in the column {column!r} of the {name} set. If they "
            f"are classes, cast the column to ClassLabel or int64; otherwise use the stock Trainer."
        )


def refuse_other_batches(logits: Any, labels: Any) -> None:
    """Refuse a batch that is not one of single-label classification."""
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"Labels must be a tensor of integers, found a {type(labels).__name__}. Encode them first.")
    if labels.is_floating_point():
        raise ValueError(
            f"Labels must be integer class indices, found {labels.dtype} of shape {tuple(labels.shape)}: multi-label "
            "and regression targets have no confidence to calibrate here. Cast classes to int64, or use the stock "
            "Trainer."
        )
    if logits.ndim < 2 or (logits.shape[1] if logits.ndim == 4 else logits.shape[-1]) == 1:
        raise ValueError(
            f"Expected one logit a class, found logits of shape {tuple(logits.shape)}: a regression head, or a binary "
            "one with a single logit. Give the model two logits for two classes."
        )


def calibration_entry(eval_dataset: Any) -> Any:
    """The set that drives gamma among the evaluation sets."""
    if not isinstance(eval_dataset, dict):
        return eval_dataset
    if "calibration" not in eval_dataset:
        raise ValueError(
            f"AdaFocal must know which of the evaluation sets {sorted(eval_dataset)} drives gamma: "
            "name one 'calibration', or pass `calibration_dataset`."
        )
    return eval_dataset["calibration"]


def evaluated_as(calibration_dataset: Any, eval_dataset: Any) -> str | None:
    """The prefix under which the Trainer evaluates the calibration set anyway; None if it does not."""
    if isinstance(eval_dataset, dict):
        return next((f"eval_{name}" for name, entry in eval_dataset.items() if entry is calibration_dataset), None)
    return "eval" if eval_dataset is calibration_dataset else None


def settle_default(args: AdaFocalTrainingArguments, calibration_dataset: Any) -> None:
    """Say which loss a run takes that names none: in a log line, and of a stream in `args`, since it has no slices."""
    if _is_stream(calibration_dataset):
        args.loss, args.update_rule = "adafocal", "paper"
        why = "AdaFocal by its paper's rule, the one that a calibration set without a length can drive"
    else:
        why = "label smoothing steered by the temperature of the calibration set, which calibrates short runs too"
    logger.warning(
        f"No loss was named, so training takes {args.loss!r}: {why}. Set `loss` to choose yourself, or "
        "update_rule='paper' for AdaFocal as its paper has it."
    )


def choose_rule(args: TrainingArguments, loss: Any, calibration_dataset: Any) -> str | None:
    """The update rule of a run.

    Args:
        args: Of the trainer.
        loss: What moves, or None. AdaFocal moves by the paper's rule.
        calibration_dataset: The held-out data.

    Raises:
        ValueError: If the loss does not move by the rule that `args` name, or a stream cannot feed it.
    """
    if loss is None:
        return None
    said = getattr(args, "update_rule", None)
    only = "temperature" if loss.follows == "temperature" else "paper"
    if said not in (None, only):
        raise ValueError(f"{type(loss).__name__} moves by the {only} rule alone; leave update_rule out.")
    if only == "temperature" and _is_stream(calibration_dataset):
        raise ValueError(
            "The temperature rule looks at slices of the calibration set, and this one is a stream. Pass a "
            "calibration set with a length and an index, or train with loss='adafocal' and update_rule='paper'."
        )
    return only


def _is_stream(dataset: Any) -> bool:
    return dataset is not None and (isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"))


def check_calibration(calibration_dataset: Any, args: TrainingArguments, rule: str, num_bins: int) -> None:
    """Refuse no calibration set, an empty one, or one that is never evaluated; warn of a small one."""
    if calibration_dataset is None:
        raise ValueError(
            "AdaFocal follows a held-out calibration split, but there is none. Pass `calibration_dataset` or "
            "`eval_dataset`, or set `calibration_fraction`. Split it off train, not test."
        )
    if rule == "paper" and args.eval_strategy == IntervalStrategy.NO:
        raise ValueError(
            "By the paper's rule gamma moves when the trainer evaluates, but eval_strategy is 'no', so it would never "
            "move. Set eval_strategy='epoch', or update_rule='temperature'."
        )
    if not hasattr(calibration_dataset, "__len__"):
        return
    size = len(calibration_dataset)
    if size == 0:
        raise ValueError("The calibration set is empty: AdaFocal cannot measure a calibration gap on it.")
    if rule == "paper" and size < SAMPLES_PER_BIN * num_bins:
        logger.warning(
            f"The calibration set has {size} samples for {num_bins} bins, fewer than {SAMPLES_PER_BIN} a bin, so "
            "gamma will follow noise. Hold out more samples or lower num_bins."
        )


class SeenClasses:
    """Which classes the calibration set has, noted while it is evaluated for the first time."""

    def __init__(self) -> None:
        self._seen: torch.Tensor | None = None
        self._done = False

    def add(self, labels: torch.Tensor, num_classes: int) -> None:
        """Note the labels of a batch on this process."""
        if not self._done:
            seen = torch.isin(torch.arange(num_classes, device=labels.device), labels)
            self._seen = seen if self._seen is None else self._seen | seen

    def warn_of_missing(self, accelerator: Accelerator, config: Any) -> None:
        """Once, over all processes, name the classes of which there was no sample."""
        if self._done:
            return
        seen = accelerator.gather(self._seen[None].int()).any(0)
        self._done, self._seen = True, None
        missing = (~seen).nonzero().flatten().tolist()
        if missing:
            names = getattr(config, "id2label", None) or {}
            shown = ", ".join(f"{index} ({names[index]})" if index in names else str(index) for index in missing[:10])
            logger.warning(
                f"No sample of the calibration set has the label {shown}{', ...' if len(missing) > 10 else ''} "
                f"({len(missing)} of {len(seen)} classes), so the loss follows the other classes alone. Hold out a "
                "part that is stratified by label."
            )


def keep_apart(train: Any, calibration: Any, evaluation: Any, policy: str, carved: bool, **content: Any) -> Any:
    """Training data without the copies of what was carved from it; other sets that share rows are refused.

    Args:
        train: The training set.
        calibration: The calibration set.
        evaluation: The evaluation set, or several by name; one named "test" is kept apart too.
        policy: "error", "warn" or "skip".
        carved: The calibration set was a part of train.
        **content: What makes two rows the same, as in `splits.without_overlap`.

    Raises:
        ValueError: If sets share rows and the policy is "error".
    """
    if not carved:
        sets = {"train": train, "calibration": calibration}
        if isinstance(evaluation, dict) and "test" in evaluation:
            sets["test"] = evaluation["test"]
        check_splits(sets, policy, **content)
        return train
    if policy == "skip":
        return train
    kept = without_overlap(train, calibration, **content)
    if len(kept) < len(train):
        logger.warning(
            f"Dropped {len(train) - len(kept)} of {len(train)} training rows whose inputs stand in the calibration "
            "set carved from them too."
        )
    return kept


def carve(train_dataset: Any, args: AdaFocalTrainingArguments) -> tuple[Any, Any]:
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
