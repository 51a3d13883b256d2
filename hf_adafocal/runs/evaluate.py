"""A report of a checkpoint that is already there, trained with us or not, and a scaling folded into it."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging

from hf_adafocal.data.loading import HUB_IDS
from hf_adafocal.data.overlap import check_splits
from hf_adafocal.report.facts import describe_model
from hf_adafocal.report.files import read_report
from hf_adafocal.report.schema import Report, build_report
from hf_adafocal.report.weights import weights_hash
from hf_adafocal.runs.tasks import Prepared, Task
from hf_adafocal.scaling.fit import Scaling, fit_temperature_scaling, fit_vector_scaling
from hf_adafocal.scaling.folding import fold_checkpoint, recorded_scaling

logger = logging.get_logger(__name__)

FITS = {"temperature": fit_temperature_scaling, "vector": fit_vector_scaling}


class Predictions(NamedTuple):
    """What a checkpoint says of the held-out splits.

    Attributes:
        calibration: Logits `(N, C)`, classes in the order of the data's labels, and labels `(N,)`.
        test: The same of the test split.
        prepared: The task with its data.
        model: The checkpoint.
    """

    calibration: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    prepared: Prepared
    model: PreTrainedModel


def evaluate_checkpoint(
    task: Task, seed: int = 0, *, num_bins: int = 15, batch_size: int = 64, split_overlap: str = "error"
) -> Report:
    """The report of a checkpoint on the test split of a data set.

    Of a checkpoint with a folded scaling, "raw" is what it was before and "temperature_scaled" is what it gives now.

    Args:
        task: With `model_name_or_path`, any local or Hub checkpoint with a classifier.
        seed: Of the splits, where the data set has none of its own.
        num_bins: Bins of all binned metrics.
        batch_size: Samples of a forward pass.
        split_overlap: What rows are that calibration and test share: "error", "warn" or "skip".

    Returns:
        The report; what the checkpoint's own report says of its training is kept.

    Raises:
        ValueError: If the checkpoint's classes are not those of the data, or the splits share rows.
    """
    config = AutoConfig.from_pretrained(task.model_name_or_path)
    found = predict(task, config, seed, batch_size)
    splits = {"calibration": found.prepared.splits.calibration, "test": found.prepared.splits.test}
    blank = getattr(found.prepared.processing_class, "all_special_ids", ())
    check = check_splits(splits, split_overlap, blank_tokens=blank)
    before = read_report(task.model_name_or_path)
    _compare_splits(before, check.fingerprints, seed)
    dataset = HUB_IDS.get(task.dataset, task.dataset)
    facts = describe_model(found.model)
    sizes = {
        role: {"size": len(part), "hash": getattr(check.fingerprints[role], "hash", None)}
        for role, part in splits.items()
    }
    known: dict[str, Any] = {"held_out": {"scaling": "calibration"}}
    if before is not None:  # what the checkpoint's own report says of its training still holds
        known = {
            "loss": before.loss,
            "adaptation": before.adaptation,
            "training": before.training,
            "baselines": before.baselines,
            "held_out": {**before.held_out, "scaling": "calibration"},
            "language": before.language,
        }
        sizes = {**{role: part for role, part in before.splits.items() if role == "train"}, **sizes}
        facts = replace(facts, base_model=before.model.base_model)
    report = build_report(
        found.test,
        found.calibration,
        model=facts,
        num_bins=num_bins,
        folded=_in_order(recorded_scaling(config), class_order(config, found.prepared.splits.train)),
        weights=weights_hash(task.model_name_or_path),
        evaluated_on=dataset,
        splits=sizes,
        overlap={"policy": split_overlap, "rows": check.overlap},
        seed=seed,
        **known,
    )
    return report if before is None else replace(report, trained_on=before.trained_on)


def scale_checkpoint(
    task: Task, output: str | Path, *, method: str = "temperature", seed: int = 0, batch_size: int = 64
) -> Scaling:
    """Fit a scaling on the calibration split and write a checkpoint with it folded in.

    Args:
        task: With `model_name_or_path`, a local checkpoint without a folded scaling.
        output: Folder of the new checkpoint.
        method: "temperature" or "vector".
        seed: Of the splits, where the data set has none of its own.
        batch_size: Samples of a forward pass.

    Raises:
        ValueError: If the method is unknown, or as `evaluate_checkpoint` and `folding.fold_scaling`.
    """
    if method not in FITS:
        raise ValueError(f"method must be one of {', '.join(FITS)}; found {method!r}.")
    config = AutoConfig.from_pretrained(task.model_name_or_path)
    if recorded_scaling(config) is not None:
        raise ValueError(
            f"{task.model_name_or_path} has a scaling folded in already; undo it with hf_adafocal.unfold_scaling "
            "first."
        )
    found = predict(task, config, seed, batch_size)
    order = class_order(config, found.prepared.splits.train)
    logits, labels = found.calibration
    # The head has the checkpoint's order of classes, which may not be that of the data.
    scaling = FITS[method](logits[:, np.argsort(order)], order[labels])
    fold_checkpoint(task.model_name_or_path, scaling, output)
    return scaling


def predict(task: Task, config: PretrainedConfig, seed: int = 0, batch_size: int = 64) -> Predictions:
    """Logits of the calibration and the test split."""
    prepared = task.prepare(seed)
    order = class_order(config, prepared.splits.train)
    arguments = TrainingArguments(
        per_device_eval_batch_size=batch_size,
        remove_unused_columns=task.training_defaults.get("remove_unused_columns", True),
        report_to="none",
    )
    trainer = Trainer(prepared.model_init(), arguments, data_collator=prepared.data_collator)
    held_out = []
    for part in (prepared.splits.calibration, prepared.splits.test):
        outputs = trainer.predict(part)
        logits = outputs.predictions[0] if isinstance(outputs.predictions, tuple) else outputs.predictions
        held_out.append((logits[:, order], outputs.label_ids))
    return Predictions(*held_out, prepared, trainer.model)


def class_order(config: PretrainedConfig, train: Any) -> np.ndarray:
    """For each label of the data the checkpoint's logit, shape `(C,)`: by name, or by number if it has no names.

    Raises:
        ValueError: If the classes are not the same.
    """
    names = train.features["labels" if "labels" in train.features else "label"].names
    known = [str(config.id2label[index]) for index in range(config.num_labels)]
    if sorted(known) == sorted(names):
        return np.asarray([known.index(name) for name in names])
    generic = all(name == f"LABEL_{index}" for index, name in enumerate(known))
    if len(known) == len(names) and generic:
        logger.warning(f"The checkpoint does not name its {len(known)} classes; they are taken in the data's order.")
        return np.arange(len(names))
    raise ValueError(
        f"The checkpoint has {len(known)} classes ({', '.join(known[:5])}, ...), the data {len(names)} "
        f"({', '.join(names[:5])}, ...). Evaluate it on data with its own classes."
    )


def _in_order(scaling: Scaling | None, order: np.ndarray) -> Scaling | None:
    """A scaling of the head's classes as one of the data's."""
    if scaling is None:
        return None
    parts = {
        name: tuple(np.asarray(value)[order].tolist()) if isinstance(value, tuple) else value
        for name, value in (("scale", scaling.scale), ("bias", scaling.bias))
    }
    return replace(scaling, **parts)


def _compare_splits(before: Report | None, prints: dict[str, Any], seed: int) -> None:
    then = {} if before is None else before.splits.get("test", {})
    now = prints.get("test")
    if then.get("hash") and now is not None and then["hash"] != now.hash:
        logger.warning(
            f"This test split is not the one of the checkpoint's own report (seed {before.seed}, here {seed}): "
            "it may hold rows the checkpoint was trained on. Use the seed of the run."
        )
