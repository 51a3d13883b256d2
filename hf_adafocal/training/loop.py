"""Calibration in a custom training loop without a Trainer: evaluate held-out data and update the loss in one call."""

from collections.abc import Iterable, Mapping, Sized
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from hf_adafocal.losses.layout import classes_last
from hf_adafocal.metrics.binning import BinStats
from hf_adafocal.preserved_state import evaluating, random_state_kept
from hf_adafocal.training.collectors import SampleCollector
from hf_adafocal.training.model_conventions import logits_of
from hf_adafocal.training.processes import DataProcesses
from hf_adafocal.training.sample_rows import COLUMNS, IGNORED, check_counts, sample_rows


class Calibration(NamedTuple):
    """Calibration metrics that `calibrate` measured.

    Attributes:
        metrics: `accuracy`, `nll` (nats), `brier`, `ece` and `ada_ece`.
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
    """Measure a model's calibration on held-out data and, if the loss follows the gaps of bins, update it.

    Call it once per epoch, on every process. Training goes on as without the call but for the loss: modes of
    the model's modules and the random state are put back.

    Args:
        model: Gets a batch's inputs without the labels; its output has `logits`, or is the logits: `(N, C)`,
            `(N, L, C)` for token classification or `(N, C, d1, d2, ...)` for segmentation.
        dataloader: Yields dicts with `labels`, or pairs `(inputs, labels)`. With several processes
            `accelerator.prepare` must have prepared it; the samples that pad its last batch are not counted.
        loss: An `AdaFocalLoss` to update, or a `CombinedLoss` with one as its base. A loss that does not adapt, or
            None, leaves it at the metrics. Labels equal to its `ignore_index` (-100 if it has none) do not count.
        accelerator: Needed with several processes: samples are gathered, so all of them compute the same table.

    Returns:
        Metrics and statistics of the model as it is, over all processes.

    Raises:
        ValueError: If no label counts, logits are not finite, a batch has no labels, the dataloader cannot be gathered
            exactly, or the loss adapts in a way that a loop cannot drive. The loss is then unchanged.

    >>> from hf_adafocal import AdaFocalLoss
    >>> loss, undecided = AdaFocalLoss(num_bins=1), nn.Linear(3, 2)
    >>> _ = nn.init.zeros_(undecided.weight), nn.init.zeros_(undecided.bias)
    >>> batch = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)  # confidence 1/2, always right
    >>> calibrate(undecided, [batch], loss).metrics["ece"]
    0.5
    >>> loss.readings()["gamma_mean"]  # under-confident: from 1 to exp(-0.5)
    0.606...
    """
    adaptive = getattr(loss, "adaptive", None)
    if adaptive is not None and adaptive.follows != "bins":
        raise ValueError(
            f"{type(adaptive).__name__} is steered during training, by slices of the calibration set, which only "
            "AdaFocalTrainer does. Train with it, or choose a loss whose gamma follows the evaluation (AdaFocalLoss)."
        )
    _check_processes(dataloader, accelerator)
    device = accelerator.device if accelerator is not None else getattr(next(model.parameters(), None), "device", None)
    ignore_index = getattr(loss, "ignore_index", -100)
    processes = None if accelerator is None else DataProcesses(accelerator)
    # The batches of one process may be fewer than those of another, and such a forward pass waits for the others.
    network = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    num_classes, rows = 0, [torch.empty(0, len(COLUMNS), device=device)]
    with torch.no_grad(), evaluating(model), random_state_kept(_generators(dataloader)):
        for batch in dataloader:
            if batch is None:  # what accelerate 1.7 makes of a share without batches
                break
            inputs, labels = _split(batch if device is None else send_to_device(batch, device))
            outputs = network(**inputs) if isinstance(inputs, Mapping) else network(inputs)
            logits = classes_last(logits_of(outputs, type(network).__name__), labels)
            num_classes = logits.shape[-1]
            if processes is not None:
                labels = processes.without_padding(labels, ignore_index)
            rows.append(sample_rows(logits, labels, ignore_index).reshape(-1, len(COLUMNS)))
    found = torch.cat(rows)
    if processes is not None:
        found = processes.gather(found, IGNORED)
        num_classes = int(processes.gather(torch.tensor([num_classes], device=device)).max())
    if not num_classes:
        raise ValueError("The calibration dataloader is empty: nothing to measure. Check its dataset and `drop_last`.")
    collector = SampleCollector()
    collector.add(found)
    collector.finish()
    check_counts(len(collector), collector.not_finite, "calibration set", ignore_index)
    num_bins = getattr(adaptive, "num_bins", 15)
    of_classes = num_classes if getattr(adaptive, "needs_class_statistics", False) else None
    measured = Calibration(collector.metrics(num_bins), collector.statistics(num_bins, of_classes))
    if adaptive is not None:
        adaptive.update_from(measured.statistics)
    return measured


def _check_processes(dataloader: Any, accelerator: Accelerator | None) -> None:
    """Reject set-ups that would count samples twice or never, or give each process a different table."""
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
    """Return the generators that a dataloader and its sampler draw from; the training data may share them."""
    found = [getattr(owner, "generator", None) for owner in (dataloader, _sampler(dataloader))]
    return [generator for generator in found if generator is not None]


def _sampler(dataloader: Any) -> Any:
    """Return the sampler of a dataloader, beneath accelerate's wrappers; None if there is none."""
    owner = getattr(dataloader, "batch_sampler", None)
    while owner is not None and hasattr(owner, "batch_sampler"):
        owner = owner.batch_sampler
    return getattr(owner, "sampler", None)


def _split(batch: Any) -> tuple[Any, Tensor]:
    if isinstance(batch, Mapping) and "labels" in batch:
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(f"A batch must be a dict with `labels` or a pair (inputs, labels), found {found}.")
