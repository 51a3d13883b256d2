"""Collect tensors over the processes of a distributed run, and end its process group.

Processes that see the same batches count as one.
"""

import gc
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

if torch.distributed.is_available():
    # Its functions have the process group as default argument: None now, but imported later, as DDP does, they would
    # keep the group, so that nothing could end its threads.
    import torch.distributed.nn.functional


class DataProcesses:
    """Gather and sum tensors over data-parallel groups, each of which sees batches of its own.

    Under tensor parallelism the processes of a group hold parts of the model and see the same batches, so that a
    gather over all processes would return each sample once per process. Processes of a group have consecutive ranks,
    as accelerate assigns batches.

    Args:
        accelerator: Of the run.
        group_size: Processes that see the same batches: the size of tensor parallelism. Left out, it is that of the
            accelerator's `parallelism_config`.

    Attributes:
        count: Number of groups.
        index: Group of this process, from 0.

    Raises:
        ValueError: If sequences are split over processes, as `check_sequences_are_whole`.

    >>> processes = DataProcesses(Accelerator(cpu=True))
    >>> processes.count, processes.index, processes.sum(torch.tensor([2.0]))
    (1, 0, tensor([2.]))
    """

    def __init__(self, accelerator: Accelerator, group_size: int | None = None) -> None:
        config = getattr(accelerator, "parallelism_config", None)
        check_sequences_are_whole(config)
        self.accelerator = accelerator
        self._group_size = getattr(config, "tp_size", 1) if group_size is None else group_size
        self.count = accelerator.num_processes // self._group_size
        self.index = accelerator.process_index // self._group_size

    @property
    def device(self) -> torch.device:
        """Device on which tensors must lie to be collected: the backend nccl takes those of the accelerator alone."""
        return self.accelerator.device

    def gather(self, rows: Tensor, pad_index: float | None = None) -> Tensor:
        """Concatenate the rows of all groups, in their order.

        Args:
            rows: Shape `(n, ...)`; `n` must be the same on every process unless `pad_index` is given.
            pad_index: Value of the rows that fill up what a process has fewer; they stay in the result.

        Returns:
            Rows of all groups, the same on every process.
        """
        if self.count == 1:
            return rows
        if pad_index is not None:
            rows = self.accelerator.pad_across_processes(rows, dim=0, pad_index=pad_index)
        gathered = self.accelerator.gather(rows)
        if self._group_size == 1:
            return gathered
        return torch.cat(gathered.split(len(rows))[:: self._group_size])  # of the first process of each group

    def widened(self, rows: Tensor, fill: float) -> Tensor:
        """Pad the last dimension of rows with `fill` to the width that the widest process has."""
        if self.count == 1:
            return rows
        return self.accelerator.pad_across_processes(rows, dim=rows.ndim - 1, pad_index=fill)

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over all groups; the sum is the same on every process."""
        if self.count == 1:
            return values
        if self.accelerator.process_index % self._group_size:
            values = torch.zeros_like(values)
        return self.accelerator.reduce(values)

    def without_padding(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Mark with `ignore_index` the samples that accelerate repeated to fill the last batch.

        Args:
            labels: Of the batch that a dataloader of `accelerator.prepare` has just given, shape `(n, ...)`.
            ignore_index: Label of samples that do not count.
        """
        state = self.accelerator.gradient_state
        if self.count == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return labels
        if not getattr(getattr(state.active_dataloader, "batch_sampler", None), "even_batches", True):
            return labels
        kept = state.remainder - self.index * len(labels)  # of this group's part
        if kept >= len(labels):
            return labels
        labels = labels.clone()
        labels[max(kept, 0) :] = ignore_index
        return labels


def check_sequences_are_whole(config: Any) -> None:
    """Check that every process sees whole samples.

    Args:
        config: accelerate's `ParallelismConfig`, or None.

    Raises:
        ValueError: If context or sequence parallelism is on.
    """
    for kind, size in (("context", getattr(config, "cp_size", 1)), ("sequence", getattr(config, "sp_size", 1))):
        if size > 1:
            raise ValueError(
                f"Expected whole sequences on every process, found {kind} parallelism over {size} processes "
                f"(ParallelismConfig.{kind[0]}p_size), which splits them: labels would be counted in parts. Use data "
                "or tensor parallelism, FSDP2 or DeepSpeed ZeRO, or the stock Trainer."
            )


def end_process_group() -> None:
    """Destroy the process group and wait until its threads have ended: the last call of a distributed script.

    A thread of gloo may still hold a tensor of the last operation. If it frees that tensor while the interpreter shuts
    down, the process is aborted ("terminate called without an active exception") and the launcher reports a failure
    after a run that was complete. `torch.distributed.destroy_process_group` alone does not end these threads while a
    model in `DistributedDataParallel` refers to the group, so garbage is collected first; a trainer or a model
    that the caller still refers to keeps the threads. Without a process group, nothing is done.

    >>> end_process_group()
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        PartialState().destroy_process_group()
