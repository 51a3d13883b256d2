"""Metrics and pictures of a segmentation model, image by image, and comparisons over images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from hf_adafocal.losses.layout import classes_last
from hf_adafocal.metrics.segmentation import (
    DenseCounts,
    count_dense,
    dense_differences,
    dense_intervals,
    dense_metrics,
)
from hf_adafocal.preserved_state import evaluating, random_state_kept
from hf_adafocal.report.atomic import write_atomically
from hf_adafocal.report.card import OVERLAY
from hf_adafocal.report.comparison import student_interval
from hf_adafocal.report.files import pictures
from hf_adafocal.report.schema import RAW, Report
from hf_adafocal.report.tables import Column, markdown

COUNTS = "image_counts.npz"  # of the scores as trained, in a run folder: what comparisons over images start from
COLUMNS = tuple(
    Column(key, heading, factor, digits)
    for key, heading, factor, digits in (
        ("dice", "Dice %", 100, 2),
        ("iou", "IoU %", 100, 2),
        ("pixel_ece", "pixel ECE %", 100, 2),
        ("foreground_ece", "foreground ECE %", 100, 2),
        ("image_ece", "mean ECE of images %", 100, 2),
        ("betti_0_error", "components wrong", 1, 2),
        ("betti_1_error", "loops wrong", 1, 2),
        ("betti_2_error", "cavities wrong", 1, 2),
    )
)


def measure_images(
    model: Any,
    rows: Any,
    collator: Callable,
    batch_size: int = 8,
    *,
    num_bins: int = 15,
    construction: str | None = "V",
    change: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[DenseCounts, dict[str, np.ndarray]]:
    """Count what the metrics of dense prediction need, and keep the image that has most foreground for a picture.

    Args:
        model: With `logits` `(N, C, d1, ...)`, resized to the labels.
        rows: Data set of `pixel_values` and `labels`.
        collator: Makes batches.
        batch_size: Images of a forward pass.
        num_bins: Bins of the calibration errors.
        construction: Of the Betti numbers; None to leave them out.
        change: Applied to the logits, classes last, such as `Scaling.undo`.

    Returns:
        The counts; and `image`, `label`, `prediction`, `confidence` of one image, shape `(d1, ...)`.
    """
    ignore_index = getattr(model.config, "semantic_loss_ignore_index", -100)
    options: dict[str, Any] = {"num_bins": num_bins, "ignore_index": ignore_index}
    options |= {"betti": construction is not None, "construction": construction or "V"}
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
            parts.append(count_dense(*found, probabilities.shape[-1], **options))
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
    report: Report,
    model: Any,
    rows: Any,
    collator: Callable,
    *,
    construction: str = "V",
    folder: str | Path | None = None,
) -> tuple[Report, DenseCounts]:
    """Put the metrics of dense prediction, with intervals over images, into a report.

    Args:
        report: Of the model on the same rows.
        model: As in `measure_images`.
        rows: Likewise.
        collator: Likewise.
        construction: Of the Betti numbers; that of the loss.
        folder: Of the report: `image_counts.npz` is written there for comparisons with other runs, and `overlay.png`
            if matplotlib is installed. None to write nothing.

    Returns:
        The report with the metrics of `dense_metrics` and `num_images` in each row, all of whose intervals are over
        images, those of accuracy and ECE too; and the counts of the checkpoint's own scores.
    """
    test, scaling = report.test, report.test.scaling
    other = None if scaling is None else (scaling.undo if report.folded else scaling.apply)
    bins = int(report.metrics["num_bins"])
    own, shown = measure_images(model, rows, collator, num_bins=bins, construction=construction)
    counts = {report.shipped: own}
    for row in test.rows().keys() - counts.keys():
        same = test.temperature is not None  # a temperature changes no prediction, so no Betti number either
        measured, _ = measure_images(
            model, rows, collator, num_bins=bins, construction=None if same else construction, change=other
        )
        counts[row] = measured._replace(betti_error=own.betti_error) if same else measured
    changed: dict[str, Any] = {"intervals": {}, "num_resamples": 1000}
    for row, metrics in test.rows().items():
        changed[row] = {**metrics, **dense_metrics(counts[row]), "num_images": own.num_images}
        if own.num_images > 1:
            ends = dense_intervals(counts[row])
            changed["intervals"][row] = {**ends, "accuracy": ends["pixel_accuracy"], "ece": ends["pixel_ece"]}
    if folder is not None:
        _write(Path(folder), counts.get(RAW, own), shown)
    return replace(report, test=replace(test, **changed)), own


def _write(folder: Path, counts: DenseCounts, shown: Mapping[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = BytesIO()
    counts.save(content)
    write_atomically(folder / COUNTS, content.getvalue())
    if pictures() is not None:
        from hf_adafocal.report.overlay import overlay

        content = BytesIO()
        overlay(**shown).savefig(content, format="png")
        write_atomically(folder / OVERLAY, content.getvalue())


def dense_table(report: Report) -> str:
    """The metrics of dense prediction of a report as a Markdown table with 95 % intervals over images."""
    metrics, ends = report.metrics, report.test.intervals.get(report.shipped, {})
    pixels, images = int(metrics["num_samples"]), int(metrics["num_images"])
    rows = [
        [column.heading, column.text(metrics[column.key], ends.get(column.key))]
        for column in COLUMNS
        if column.key in metrics
    ]
    return markdown([[f"{pixels:,} pixels of {images:,} images", "this checkpoint (95 % interval)"], *rows])


def difference_table(folders: Mapping[str, Sequence[str | Path]], baseline: str = "cross_entropy") -> str:
    """Differences between runs with several losses and a baseline in the metrics of dense prediction, as trained.

    Of one seed the intervals are over the images, which are the same for both runs (`dense_differences`), and say
    nothing of other seeds. Of several seeds they are Student's over the seeds.

    Args:
        folders: Run folders of each loss, one per seed, in one order of seeds.
        baseline: The loss that the others are compared with.

    Returns:
        A Markdown table with a sentence above it; empty without the baseline or another loss.
    """
    if baseline not in folders or len(folders) < 2:
        return ""
    counts = {loss: [DenseCounts.load(Path(folder) / COUNTS) for folder in found] for loss, found in folders.items()}
    seeds = len(counts[baseline])
    what = f"{counts[baseline][0].num_images} images of one seed" if seeds == 1 else f"{seeds} seeds"
    rows = []
    for loss in (loss for loss in counts if loss != baseline):
        pairs = list(zip(counts[loss], counts[baseline], strict=True))
        tests = dense_differences(*pairs[0]) if seeds == 1 else {}
        values = [(dense_metrics(one), dense_metrics(other)) for one, other in pairs]
        cells = []
        for column in COLUMNS:
            both = [pair for pair in values if column.key in pair[0] and column.key in pair[1]]
            differences = [one[column.key] - other[column.key] for one, other in both]
            test = tests.get(column.key)
            ends = student_interval(np.array(differences)) if test is None else (test.low, test.high)
            cells.append(column.text(float(np.mean(differences)), ends) if differences else "")
        rows.append([loss, *cells])
    headings = [column.heading for column in COLUMNS]
    kept = [0, *(place for place in range(1, len(headings) + 1) if any(row[place] for row in rows))]
    table = [["minus " + baseline, *headings], *rows]
    return f"Differences as trained with 95 % intervals over the {what}:\n\n" + markdown(
        [[row[place] for place in kept] for row in table]
    )
