"""Metrics and pictures of a segmentation model, image by image."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from hf_adafocal.losses.layout import classes_last
from hf_adafocal.metrics.segmentation import DenseCounts, count_dense, dense_intervals, dense_metrics
from hf_adafocal.preserved_state import evaluating, random_state_kept
from hf_adafocal.report.atomic import write_atomically
from hf_adafocal.report.card import OVERLAY
from hf_adafocal.report.files import pictures, save_report
from hf_adafocal.report.schema import Report

COLUMNS = (
    "dice",
    "iou",
    "pixel_ece",
    "foreground_ece",
    "image_ece",
    "betti_0_error",
    "betti_1_error",
    "betti_2_error",
)


def measure_images(
    model: Any,
    rows: Any,
    collator: Callable,
    batch_size: int = 8,
    *,
    construction: str | None = "V",
    change: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[DenseCounts, dict[str, np.ndarray]]:
    """Count per-image statistics of a segmentation model, and keep the image with most foreground for a picture.

    Args:
        model: With `logits` `(N, C, d1, ...)`, resized to the labels.
        rows: Data set of `pixel_values` and `labels`.
        collator: Makes batches.
        batch_size: Images of a forward pass.
        construction: Of the Betti numbers; None to leave them out.
        change: Applied to the logits, classes last, such as `Scaling.undo`.

    Returns:
        The counts; and `image`, `label`, `prediction`, `confidence` of one image, shape `(d1, ...)`.
    """
    ignore_index = getattr(model.config, "semantic_loss_ignore_index", -100)
    parts, shown, most = [], {}, -1
    with torch.no_grad(), evaluating(model), random_state_kept():
        for batch in DataLoader(rows, batch_size, collate_fn=collator):
            labels = batch["labels"].to(model.device)
            outputs = model(pixel_values=batch["pixel_values"].to(model.device))
            logits = classes_last(outputs.logits, labels).float()
            if change is not None:
                logits = torch.from_numpy(change(logits.cpu().numpy()))
            probabilities = logits.softmax(-1)
            top, predicted = probabilities.max(-1)
            found = top.cpu().numpy(), predicted.cpu().numpy(), labels.cpu().numpy()
            options: dict[str, Any] = {"betti": construction is not None, "construction": construction or "V"}
            parts.append(count_dense(*found, probabilities.shape[-1], ignore_index=ignore_index, **options))
            for index, label in enumerate(found[2]):
                size = int(((label > 0) & (label != ignore_index)).sum())
                if size > most:
                    most = size
                    pixels = batch["pixel_values"][index].float().mean(0).numpy()
                    shown = {
                        "image": pixels,
                        "label": np.where(label == ignore_index, 0, label),
                        "prediction": found[1][index],
                        "confidence": found[0][index],
                    }
    columns = zip(*parts, strict=True)
    joined: list[Any] = [None if part[0] is None else np.concatenate(part) for part in columns]
    return DenseCounts(*joined), shown


def add_dense_metrics(
    report: Report, model: Any, rows: Any, collator: Callable, folder: str | Path, *, construction: str = "V"
) -> Report:
    """Add the metrics of dense prediction, with intervals over images, to a report; save it with an overlay picture.

    Args:
        report: Of the model on the same rows.
        model: As in `measure_images`.
        rows: Likewise.
        collator: Likewise.
        folder: Of the report; `overlay.png` is written there if matplotlib is installed.
        construction: Of the Betti numbers; that of the loss.

    Returns:
        The report with the metrics of `dense_metrics` and `num_images` in each row, Betti errors in that of the
        checkpoint's own scores. All its intervals resample images, those of accuracy and ECE too.
    """
    test, scaling = report.test, report.test.scaling
    other = None if scaling is None else (scaling.undo if report.folded else scaling.apply)
    shown: dict[str, np.ndarray] = {}
    changed: dict[str, Any] = {"intervals": {}, "num_resamples": 1000}
    for row, metrics in test.rows().items():
        own = row == report.shipped
        counts, found = measure_images(
            model, rows, collator, construction=construction if own else None, change=None if own else other
        )
        changed[row] = {**metrics, **dense_metrics(counts), "num_images": counts.num_images}
        shown = found if own else shown
        if counts.num_images > 1:
            ends = dense_intervals(counts)
            changed["intervals"][row] = {**ends, "accuracy": ends["pixel_accuracy"], "ece": ends["pixel_ece"]}
    report = replace(report, test=replace(test, **changed))
    plots = pictures()
    if plots is not None:
        from hf_adafocal.report.overlay import overlay

        content = BytesIO()
        overlay(**shown).savefig(content, format="png")
        write_atomically(Path(folder) / OVERLAY, content.getvalue())
    save_report(folder, report)
    return report


def dense_table(report: Report, names: Sequence[str] = COLUMNS) -> str:
    """Render a report's metrics of dense prediction as a Markdown table with 95 % intervals over images."""
    metrics, ends = report.metrics, report.test.intervals.get(report.shipped, {})
    rows = [f"| {name} | {metrics[name]:.4f} | {_interval(ends.get(name))} |" for name in names if name in metrics]
    pixels, images = int(metrics["num_samples"]), int(metrics["num_images"])
    return "\n".join([f"| {pixels:,} pixels of {images:,} images | | 95 % interval |", "| --- | --- | --- |", *rows])


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"
