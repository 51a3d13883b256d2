"""Reject models, labels and arguments that AdaFocalTrainer cannot train on, before the first step."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from hf_adafocal.data.columns import label_column
from hf_adafocal.losses.layout import is_single
from hf_adafocal.training.label_checks import check_labels, check_values
from hf_adafocal.training.model_conventions import base_model, has_single_output
from hf_adafocal.training.processes import check_sequences_are_whole

if TYPE_CHECKING:
    from hf_adafocal.training.plan import RunPlan

SAMPLES_PER_BIN = 10  # below this a bin's gap is mostly noise


def reject_ignored_arguments(args: TrainingArguments, kwargs: dict) -> None:
    """Reject arguments that AdaFocalTrainer would silently ignore, or that would give wrong sums.

    Raises:
        ValueError: If label smoothing of the Trainer or a `compute_loss_func` is asked for, or sequences would be
            split over processes.
    """
    check_sequences_are_whole(getattr(args, "parallelism_config", None))
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} would be ignored: the loss is chosen by `loss`. "
            f"Set it to 0; label smoothing is loss='label_smoothing', smoothing={args.label_smoothing_factor}."
        )
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func would be ignored: pass a loss module as `loss`, or use the stock Trainer.")


def check_model(model: Any, label_names: list[str], processing_class: Any = None) -> None:
    """Check that a model is a single-label classifier of samples, tokens or pixels.

    Args:
        model: The model.
        label_names: What the Trainer takes for labels.
        processing_class: Its tokenizer, whose padding token the Trainer gives to the model.

    Raises:
        ValueError: If it has other targets, or says that it regresses or has several labels per sample; if it reads
            its logits at the last token that is not padding, and there is no padding token.
    """
    name = type(model).__name__
    if not label_names:
        raise ValueError(
            f"{name}.forward has no `labels` argument, so evaluation would find no labels. Set "
            "label_names=['labels'] and remove_unused_columns=False in the training arguments."
        )
    if "labels" not in label_names:
        raise ValueError(
            f"AdaFocalTrainer needs one `labels` per sample, token or pixel, and the targets of {name} are "
            f"{label_names} (question answering?). Use the stock Trainer."
        )
    config = getattr(model, "config", None)
    problem_type = getattr(config, "problem_type", None)
    of_one_label = problem_type == "multi_label_classification" and has_single_output(model)
    if problem_type not in (None, "single_label_classification") and not of_one_label:
        raise ValueError(
            f"AdaFocalTrainer trains classifiers with one label per sample, found problem_type={problem_type!r}. "
            "Build the model with problem_type='single_label_classification', or use the stock Trainer."
        )
    _check_padding(model, processing_class)


def _check_padding(model: Any, tokenizer: Any) -> None:
    """Check that there is a padding token if the model finds the last token of a text by it (its head is `score`)."""
    config: Any = getattr(model, "config", None)
    if not hasattr(base_model(model), "score") or not hasattr(config, "get_text_config"):
        return
    if getattr(config.get_text_config(), "pad_token_id", None) is None:
        if getattr(tokenizer, "pad_token_id", None) is None:
            raise ValueError(
                f"{type(model).__name__} reads its logits at the last token that is not padding, and neither its "
                "config nor the tokenizer (`processing_class`) has a padding token. Set tokenizer.pad_token = "
                "tokenizer.eos_token and model.config.pad_token_id = tokenizer.pad_token_id."
            )


def check_data_sets(plan: "RunPlan", model: Any, ignore_index: int = -100) -> None:
    """Check the labels of a run's data sets before it begins: their type, and if there is training, their range.

    Args:
        plan: Of the run.
        model: The model.
        ignore_index: Label that does not count.

    Raises:
        ValueError: As `check_label_column` and `label_checks.check_labels`.
    """
    named = plan.eval_dataset if isinstance(plan.eval_dataset, Mapping) else {"evaluation": plan.eval_dataset}
    sets = {"training": plan.train_dataset, **named}
    if not any(part is plan.calibration_dataset for part in named.values()):
        sets["calibration"] = plan.calibration_dataset
    for name, part in sets.items():
        check_label_column(name, part, model)
    if plan.train_dataset is not None:
        check_labels(sets, model, ignore_index)


def check_label_column(name: str, dataset: Any, model: Any = None) -> None:
    """Check the type of the stored label column, unless a transform makes the labels from it.

    Args:
        name: Of the set, for the error.
        dataset: A `datasets.Dataset`; anything else is not looked at.
        model: The model, which tells a vector of labels per sample from a label per token.

    Raises:
        ValueError: If labels are strings, floats, or vectors where the model takes one label per sample.
    """
    form = getattr(dataset, "format", {})  # streams have none
    if not hasattr(dataset, "features") or not dataset.features or form.get("type") == "custom":
        return
    column = label_column(dataset)
    feature: Any = None if column is None else dataset.features[column]
    several = hasattr(feature, "feature")
    while hasattr(feature, "feature"):
        feature = feature.feature
    dtype = str(getattr(feature, "dtype", ""))
    if "string" in dtype:
        raise ValueError(
            f"Labels must be integers, found strings in the column {column!r} of the {name} set. Encode them: "
            f"dataset.class_encode_column({column!r})."
        )
    if "float" in dtype and (several or not has_single_output(model)):
        what = "a vector of floats per sample (multi-label?)" if several else "floats (regression?)"
        raise ValueError(
            f"Labels must be integer class indices, found {what} in the column {column!r} of the {name} set. If they "
            f"are classes, cast the column to ClassLabel or int64; otherwise use the stock Trainer."
        )
    task = type(model).__name__
    if several and any(kind in task for kind in ("ForSequenceClassification", "ForImageClassification")):
        raise ValueError(
            f"{task} takes one label per sample, found vectors of integers in the column {column!r} of the {name} set "
            "(multi-label?). Multi-label targets have no single confidence to calibrate: use the stock Trainer."
        )


def check_batch(logits: torch.Tensor, labels: Any, ignore_index: int = -100) -> None:
    """Check that a batch is one of single-label classification.

    Args:
        logits: As the model returns them.
        labels: The batch's labels.
        ignore_index: Label that does not count.

    Raises:
        ValueError: If labels are no integers, the shapes do not fit, or labels of a single logit are not 0 and 1.
    """
    shape = tuple(logits.shape)
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"Labels must be a tensor of integers, found a {type(labels).__name__}. Encode them first.")
    if labels.is_floating_point():
        raise ValueError(
            f"Labels must be integer class indices, found {labels.dtype} of shape {tuple(labels.shape)}: multi-label "
            "and regression targets have no confidence to calibrate here. Cast classes to int64, or use the stock "
            "Trainer."
        )
    if logits.ndim < 2:
        raise ValueError(
            f"Expected logits with a dimension of classes, which a binary head with a single logit has too, (N, 1), "
            f"found logits of shape {shape}."
        )
    if is_single(logits) and labels.device.type == "cpu":
        check_values(labels.numpy(), 2, ignore_index, "batch (of a model with one logit for two classes)")
    if logits.ndim < 4 and labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"Expected one label for each row of logits {shape}, found labels of shape {tuple(labels.shape)}."
            + (" A vector of labels per sample is multi-label: use the stock Trainer." if labels.ndim == 2 else "")
        )
    if logits.ndim >= 4 and labels.ndim != logits.ndim - 1:
        raise ValueError(
            f"Expected labels (N, d1, d2, ...) for logits (N, C, d1, d2, ...), found shapes {tuple(labels.shape)} "
            f"and {shape}."
        )
