"""Evaluate a checkpoint on the held-out splits of a data set, and fold a scaling into its head."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_adafocal.data.fingerprint import Fingerprint
from hf_adafocal.data.loading import HUB_IDS, LANGUAGES
from hf_adafocal.data.overlap import check_splits
from hf_adafocal.metrics.prediction_files import GROUP_COLUMN
from hf_adafocal.metrics.scores import softmax
from hf_adafocal.report.facts import describe_model
from hf_adafocal.report.files import read_report
from hf_adafocal.report.measurement import Collected, two_columns
from hf_adafocal.report.schema import Report, build_report
from hf_adafocal.report.weights import weights_hash
from hf_adafocal.runs.dense import add_dense_metrics
from hf_adafocal.runs.examples import make_examples
from hf_adafocal.runs.run_record import published
from hf_adafocal.runs.tasks import Prepared, SegmentationTask, Task
from hf_adafocal.scaling.fit import Scaling, fit_temperature_scaling, fit_vector_scaling
from hf_adafocal.scaling.folding import fold_checkpoint, load_classifier, recorded_scaling
from hf_adafocal.scaling.platt import fit_platt_scaling
from hf_adafocal.training.arguments import AdaFocalTrainingArguments
from hf_adafocal.training.run_report import collected_results
from hf_adafocal.training.trainer import AdaFocalTrainer

logger = logging.get_logger(__name__)

FITS = {"temperature": fit_temperature_scaling, "platt": fit_platt_scaling, "vector": fit_vector_scaling}
PREDICTION_FILES = (".parquet", ".npz")


class Predictions(NamedTuple):
    """Logits of a checkpoint on the held-out splits.

    Attributes:
        calibration: Logits `(N, C)`, classes in the order of the data's labels, and labels `(N,)`, of a segmenter for
            each pixel that counts; the metrics alone if the logits are too many to keep.
        test: The same of the test split.
        ood: Logits of the out-of-distribution inputs, None if the task has none.
        prepared: The task with its data.
        model: The checkpoint.
    """

    calibration: tuple[np.ndarray, np.ndarray] | Collected
    test: tuple[np.ndarray, np.ndarray] | Collected
    ood: np.ndarray | None
    prepared: Prepared
    model: PreTrainedModel


def evaluate_checkpoint(
    task: Task,
    seed: int = 0,
    *,
    num_bins: int = 15,
    batch_size: int = 64,
    split_overlap: str = "error",
    predictions: str | Path | None = None,
    folder: str | Path | None = None,
) -> Report:
    """Measure a checkpoint on the test split of a data set, as it is and with a temperature.

    Of a checkpoint with a folded scaling, "raw" is what it was before and "temperature_scaled" is what it gives now.
    Nothing is written but `predictions`, the example and, of a segmenter, what `add_dense_metrics` writes;
    `report.files.save_report` writes the report.

    Args:
        task: With `model_name_or_path`, any local or Hub checkpoint with a classifier.
        seed: Of the splits, where the data set has none of its own.
        num_bins: Bins of all binned metrics.
        batch_size: Samples of a forward pass.
        split_overlap: What to do if calibration and test share rows: "error", "warn" or "skip".
        predictions: File for the probabilities and labels of the test split, as `hf-adafocal gate` reads them;
            `.parquet` or `.npz`. Of a segmenter a row per pixel, with its image as `group`.
        folder: Of the report; with it the card gets an example or overlay, whose image is written there.

    Returns:
        The report; what the checkpoint's own report says of its training is kept.

    Raises:
        ValueError: If the checkpoint is no classifier or lacks weights, its classes are not those of the data, the
            splits share rows, or the logits to be written are too many to keep.

    ```python
    from hf_adafocal import evaluate_checkpoint
    from hf_adafocal.runs.tasks import ImageTask

    evaluate_checkpoint(ImageTask(model_name_or_path="runs/vision")).test.raw["ece"]
    ```
    """
    if predictions is not None and Path(predictions).suffix not in PREDICTION_FILES:
        raise ValueError(f"Predictions go to a {' or '.join(PREDICTION_FILES)} file, found {predictions}.")
    before = read_report(task.model_name_or_path or "")
    found = predict(task, load_classifier(task.model_name_or_path or ""), seed, batch_size)
    splits = {"calibration": found.prepared.splits.calibration, "test": found.prepared.splits.test}
    blank = getattr(found.prepared.processing_class, "all_special_ids", ())
    check = check_splits(splits, split_overlap, blank_tokens=blank)
    _compare_splits(before, check.fingerprints, seed)
    if predictions is not None and not isinstance(task, SegmentationTask):
        write_predictions(predictions, *_logits(found.test, "test"))
    facts = describe_model(found.model)
    sizes = {
        role: {"size": len(part), "hash": getattr(check.fingerprints[role], "hash", None)}
        for role, part in splits.items()
    }
    known: dict[str, Any] = {"held_out": {"scaling": "calibration"}, "training": {"task": published(task)}}
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
    if not known.get("language"):
        known["language"] = LANGUAGES.get(task.dataset)
    if folder is not None:
        known["examples"] = make_examples(task, found.prepared, found.model, folder)
    order = _order(task, found.model.config, found.prepared)
    report = build_report(
        found.test,
        None if isinstance(found.calibration, Collected) else found.calibration,
        model=facts,
        num_bins=num_bins,
        folded=_in_order(recorded_scaling(found.model), order),
        weights=weights_hash(task.model_name_or_path or ""),
        evaluated_on=HUB_IDS.get(task.dataset, task.dataset),
        splits=sizes,
        overlap={"policy": split_overlap, "rows": check.overlap},
        seed=seed,
        ood=None if found.ood is None else (str(task.ood), found.ood),
        **known,
    )
    if isinstance(task, SegmentationTask):
        construction = (report.loss or {}).get("construction", "V")
        report, counts = add_dense_metrics(
            report, found.model, splits["test"], found.prepared.data_collator, construction=construction, folder=folder
        )
        if predictions is not None:
            images = np.arange(counts.num_images).repeat(counts.bins[..., 0].sum(axis=1).astype(np.int64))
            write_predictions(predictions, *_logits(found.test, "test"), groups=images)
    return report if before is None else replace(report, trained_on=before.trained_on)


def scale_checkpoint(
    task: Task, output: str | Path, *, method: str = "temperature", seed: int = 0, batch_size: int = 64
) -> Scaling:
    """Fit a scaling on the calibration split and write a checkpoint with it folded in.

    Args:
        task: With `model_name_or_path`, a local checkpoint without a folded scaling.
        output: Folder of the new checkpoint.
        method: "temperature", "vector", or for two classes "platt".
        seed: Of the splits, where the data set has none of its own.
        batch_size: Samples of a forward pass.

    Raises:
        ValueError: If the method is unknown, or as `evaluate_checkpoint` and `folding.fold_scaling`.

    ```python
    from hf_adafocal import scale_checkpoint
    from hf_adafocal.runs.tasks import ImageTask

    scale_checkpoint(ImageTask(model_name_or_path="runs/vision"), "runs/vision-calibrated")
    ```
    """
    if method not in FITS:
        raise ValueError(f"method must be one of {', '.join(FITS)}; found {method!r}.")
    folder = task.model_name_or_path or ""
    model = load_classifier(folder)
    if recorded_scaling(model) is not None:
        raise ValueError(f"{folder} has a scaling folded in already; undo it with hf_adafocal.unfold_scaling first.")
    found = predict(task, model, seed, batch_size)
    order = _order(task, found.model.config, found.prepared)
    logits, labels = _logits(found.calibration, "calibration")
    # The head has the checkpoint's order of classes, which may not be that of the data.
    fit: Any = FITS[method]
    scaling = fit(logits[:, np.argsort(order)], order[labels])
    fold_checkpoint(folder, scaling, output)
    return scaling


def predict(task: Task, model: PreTrainedModel, seed: int = 0, batch_size: int = 64) -> Predictions:
    """Compute the logits of a checkpoint on the calibration and the test split.

    Args:
        task: With the `model_name_or_path` of the checkpoint, whose tokenizer or processor is used.
        model: The checkpoint.
        seed: Of the splits.
        batch_size: Samples of a forward pass.

    Raises:
        ValueError: If the checkpoint's classes are not those of the data.
    """
    prepared = task.prepare(seed)
    order = _order(task, model.config, prepared)
    with tempfile.TemporaryDirectory() as folder:
        arguments = AdaFocalTrainingArguments(
            folder,
            loss="cross_entropy",
            per_device_eval_batch_size=batch_size,
            remove_unused_columns=task.training_defaults.get("remove_unused_columns", True),
            report_to="none",
            dataloader_pin_memory=torch.accelerator.is_available(),
        )
        trainer = AdaFocalTrainer(model, arguments, data_collator=prepared.data_collator)
        measured = {role: trainer.measure(getattr(prepared.splits, role), role)[1] for role in ("calibration", "test")}
        ood: Any = prepared.splits.ood
        if ood is not None:
            outside: Any = trainer.predict(ood, metric_key_prefix="ood").predictions
            ood = two_columns(np.asarray(outside))[:, order]
    kept = {
        role: collected_results(trainer, role) if found is None else (found[0][:, order], found[1])
        for role, found in measured.items()
    }
    return Predictions(kept["calibration"], kept["test"], ood, prepared, model)


def _logits(found: tuple[np.ndarray, np.ndarray] | Collected, role: str) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(found, Collected):
        raise ValueError(
            f"The logits of the {role} split are too many to keep: those of {found.num_samples:,} samples, tokens or "
            "pixels. Take a part of it."
        )
    return found


def write_predictions(path: str | Path, logits: np.ndarray, labels: np.ndarray, groups: Any = None) -> None:
    """Write probabilities and labels in a format that `hf-adafocal gate` reads.

    Args:
        path: A `.parquet` file (columns `probabilities`, a list per row, and `label`) or an `.npz` file (arrays of
            these names).
        logits: Shape `(N, C)`.
        labels: Shape `(N,)`.
        groups: Group of each sample, shape `(N,)`, where samples are not independent: a column `group`.

    Raises:
        ValueError: If the file has another suffix.
    """
    path = Path(path)
    probabilities = softmax(np.asarray(logits, dtype=float))
    if path.suffix == ".npz":
        named = {} if groups is None else {GROUP_COLUMN: groups}
        np.savez_compressed(path, probabilities=probabilities, label=labels, **named)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        rows = pa.FixedSizeListArray.from_arrays(pa.array(probabilities.ravel()), probabilities.shape[1])
        columns = {"probabilities": rows.cast(pa.list_(pa.float64())), "label": pa.array(np.asarray(labels))}
        columns |= {} if groups is None else {GROUP_COLUMN: pa.array(np.asarray(groups))}
        parquet.write_table(pa.table(columns), path)
    else:
        raise ValueError(f"Predictions go to a {' or '.join(PREDICTION_FILES)} file, found {path}.")


def class_order(config: PretrainedConfig, names: list[str]) -> np.ndarray:
    """Return for each class of the data the index of the checkpoint's logit, shape `(C,)`.

    Classes are matched by name, or by number if the checkpoint has no names or a single output for two classes.

    Args:
        config: Of the checkpoint.
        names: Class names in the order of the data's labels.

    Raises:
        ValueError: If the classes are not the same.
    """
    labels: Mapping[Any, str] = config.id2label or {}
    known = [str(labels[index]) for index in range(len(labels))]
    if len(known) == 1 and len(names) == 2:  # of which the second is the positive one
        return np.arange(2)
    if sorted(known) == sorted(names):
        return np.asarray([known.index(name) for name in names])
    generic = all(name == f"LABEL_{index}" for index, name in enumerate(known))
    if len(known) == len(names) and generic:
        logger.warning(f"The checkpoint does not name its {len(known)} classes; they are taken in the data's order.")
        return np.arange(len(names))
    shown, own = (", ".join([*some[:5], "..."] if len(some) > 5 else some) for some in (known, names))
    raise ValueError(
        f"The checkpoint has {len(known)} classes ({shown}), the data {len(names)} ({own}). Evaluate it on data with "
        "its own classes."
    )


def _order(task: Task, config: PretrainedConfig, prepared: Prepared) -> np.ndarray:
    if isinstance(task, SegmentationTask):  # masks hold the numbers of classes, not their names
        return np.arange(len(config.id2label or {}))
    return class_order(config, prepared.splits.label_names)


def _in_order(scaling: Scaling | None, order: np.ndarray) -> Scaling | None:
    """Reorder a scaling from the classes of the head to those of the data."""
    if scaling is None:
        return None

    def ordered(value: Any) -> Any:
        return tuple(np.asarray(value)[order].tolist()) if isinstance(value, tuple) else value

    return replace(scaling, scale=ordered(scaling.scale), bias=ordered(scaling.bias))


def _compare_splits(before: Report | None, prints: Mapping[str, Fingerprint | None], seed: int) -> None:
    """Warn if the test split is not the one that the checkpoint's own report describes."""
    then = {} if before is None else before.splits.get("test", {})
    now = prints.get("test")
    if before is not None and then.get("hash") and now is not None and then["hash"] != now.hash:
        logger.warning(
            "This test split is not the one of the checkpoint's own report, so it may hold rows that the checkpoint "
            f"was trained on. The report's seed is {before.seed}, here it is {seed}; the data set, its columns or the "
            "length of texts may differ too."
        )
