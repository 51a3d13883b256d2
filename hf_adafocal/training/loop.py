"""Calibration in a training loop of your own: what `AdaFocalTrainer` does when it evaluates, as one call."""

from collections.abc import Iterable, Mapping, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from hf_adafocal.metrics.binning import BinStats
from hf_adafocal.preserved_state import evaluating, random_state_kept
from hf_adafocal.training.evaluation import (
    IGNORED,
    classes_last,
    counted_rows,
    equal_mass_statistics,
    per_sample,
    sample_metrics,
    split_finite,
)


class Calibration(NamedTuple):
    """What `calibrate` measured.

    Attributes:
        metrics: `accuracy`, `nll` (nats), `ece` and `ada_ece`.
        statistics: Equal-mass bins of the confidences; an AdaFocal table moved by their `edges` and `gap`,
            the tables of a `ClasswiseAdaFocalLoss` by their `class_gap` and `class_counts` too (None for others).
    """

    metrics: dict[str, float]
    statistics: BinStats


def calibrate(
    model: nn.Module,
    dataloader: Iterable,
    loss: nn.Module | None = None,
    accelerator: Accelerator | None = None,
) -> Calibration:
    """Measure a model's calibration on held-out data and, if the loss is an `AdaFocalLoss`, move its gammas.

    Call it once an epoch, on every process. The training that goes on afterwards is the same as without the call but
    for the table: modes of the model's modules and the random state are put back.

    Args:
        model: Gets a batch's inputs without the labels; its output has `logits`, or is the logits: `(N, C)`,
            `(N, L, C)` for token classification or `(N, C, H, W)` for segmentation.
        dataloader: Yields dicts with `labels`, or pairs `(inputs, labels)`. With several processes
            `accelerator.prepare` must have prepared it; the samples that pad its last batch are not counted.
        loss: An `AdaFocalLoss` to update, or a `CombinedLoss` with one as its base. Any other loss, or None, leaves
            it at the metrics. Labels equal to its `ignore_index` (-100 if it has none) do not count.
        accelerator: Needed with several processes: samples are gathered, so all of them compute the same table.

    Returns:
        Metrics and statistics of the model as it is, over all processes.

    Raises:
        ValueError: If no label counts, logits are not finite, a batch has no labels, or the dataloader cannot be
            gathered exactly. The table is then unchanged.
    """
    _check_processes(dataloader, accelerator)
    device = accelerator.device if accelerator is not None else getattr(next(model.parameters(), None), "device", None)
    ignore_index = getattr(loss, "ignore_index", -100)
    batches, num_classes = [], None
    with torch.no_grad(), evaluating(model), random_state_kept(_generators(dataloader)):
        for batch in dataloader:
            inputs, labels = _split(batch if device is None else send_to_device(batch, device))
            logits = classes_last(_logits(model, inputs), labels)
            num_classes = logits.shape[-1]
            batches.append(counted_rows(_gathered(per_sample(logits, labels, ignore_index), accelerator).cpu()))
    rows = _checked(batches, ignore_index)
    adaptive = getattr(loss, "adaptive", None)
    num_bins = getattr(adaptive, "num_bins", 15)
    of_classes = num_classes if getattr(adaptive, "needs_class_statistics", False) else None
    measured = Calibration(sample_metrics(rows, num_bins), equal_mass_statistics(rows, num_bins, of_classes))
    if getattr(adaptive, "follows", None) == "bins":
        adaptive.update_from(measured.statistics)
    return measured


def _check_processes(dataloader: Any, accelerator: Accelerator | None) -> None:
    """Refuse what would count a sample twice or never, or give every process a table of its own."""
    if accelerator is None:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError(
                f"This is one of {torch.distributed.get_world_size()} processes, and without `accelerator` each would "
                "compute a table from its own share of the samples. Pass the Accelerator."
            )
        return
    if accelerator.num_processes == 1:
        return
    if not hasattr(dataloader, "total_batch_size"):
        raise ValueError(
            f"Expected a dataloader that `accelerator.prepare` made, found {type(dataloader).__name__}: each of "
            f"{accelerator.num_processes} processes would read every sample. Prepare it first."
        )
    sampler, dataset = _sampler(dataloader), dataloader.dataset
    if isinstance(sampler, Sized) and isinstance(dataset, Sized) and len(sampler) != len(dataset):
        raise ValueError(
            f"The dataloader samples {len(sampler)} of {len(dataset)} samples, and accelerate cannot tell then which "
            "ones pad the last batch. Give it a `torch.utils.data.Subset` of the data instead of a sampler."
        )


def _generators(dataloader: Any) -> list[torch.Generator]:
    """The generators that a dataloader and its sampler draw from; the training data may share them."""
    found = [getattr(owner, "generator", None) for owner in (dataloader, _sampler(dataloader))]
    return [generator for generator in found if generator is not None]


def _sampler(dataloader: Any) -> Any:
    """What orders the samples, beneath accelerate's wrappers; None if there is no such thing."""
    owner = getattr(dataloader, "batch_sampler", None)
    while hasattr(owner, "batch_sampler"):
        owner = owner.batch_sampler
    return getattr(owner, "sampler", None)


def _split(batch: Any) -> tuple[Any, Tensor]:
    if isinstance(batch, Mapping) and "labels" in batch:
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(f"A batch must be a dict with `labels` or a pair (inputs, labels), found {found}.")


def _logits(model: nn.Module, inputs: Any) -> Tensor:
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output["logits"]
    return output[0] if isinstance(output, tuple | list) else output.logits


def _gathered(rows: Tensor, accelerator: Accelerator | None) -> Tensor:
    if accelerator is None or accelerator.num_processes == 1:
        return rows
    if rows.ndim > 2:  # sequences: each process pads to the longest of its own
        rows = accelerator.pad_across_processes(rows, dim=1, pad_index=IGNORED)
    return accelerator.gather_for_metrics(rows)


def _checked(batches: list[np.ndarray], ignore_index: int) -> np.ndarray:
    if not batches:
        raise ValueError("The calibration dataloader is empty: nothing to measure. Check its dataset and `drop_last`.")
    rows = np.concatenate(batches)
    if len(rows) == 0:
        raise ValueError(f"Every label of the calibration set is ignored ({ignore_index}): nothing to measure.")
    finite, others = split_finite(rows)
    if others:
        raise ValueError(
            f"The logits of {others} of {len(rows)} calibration samples are NaN or infinite. Training has diverged or "
            "overflowed: lower the learning rate, clip gradients, or use bf16 or float32 instead of fp16."
        )
    return finite
