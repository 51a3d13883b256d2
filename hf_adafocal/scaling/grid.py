"""Best temperature of a stream of logits, from sums of the NLL on a fixed grid of temperatures.

Sums of batches and of processes add up, so no logits need to be kept: 44 numbers stand for an evaluation of any size.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_NODES = 22  # with which T is within 0.1 % from 0.2 to 20
CHAINS = 2  # nodes a factor 2 in 1 / T: the weights of every second node are the squares of those before
STEP = math.log(2) / CHAINS  # of the logarithm between two nodes, which are at T from 45 down to 1 / 32
_ROUNDS = NUM_NODES // CHAINS
_VALUES_AT_ONCE = {"cpu": 1 << 17}  # entries of the temporary array: one that stays in the cache of a processor
_VALUES_AT_ONCE_ELSEWHERE = 1 << 27
_JOINED_VALUES = _VALUES_AT_ONCE["cpu"] // CHAINS  # logits of small batches that are summed in one go


def inverse_temperatures() -> Tensor:
    """Return the grid, 1 / T in ascending order, shape `(22,)`, float64; the one of index 11 is 1."""
    return ((torch.arange(NUM_NODES, dtype=torch.float64) - NUM_NODES // 2) * STEP).exp()


def nll_on_grid(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Sum the NLL of `logits / T` over samples, and its derivative in 1 / T, at each node of the grid.

    Args:
        logits: Unnormalised scores, classes last, shape `(..., C)`; float16 and bfloat16 are computed in float32. A
            logit of -inf is a class of probability 0.
        labels: Class indices or `ignore_index`, shape `(...)`.
        ignore_index: Label of samples that do not count.

    Returns:
        Shape `(2, 22)`: NLL in nats, derivative in nats times the unit of the logits; float64 on the device of the
        logits (float32 on one that has no float64).

    Raises:
        ValueError: If the shapes do not fit.

    >>> nll_on_grid(torch.tensor([[0.0, 2.0]]), torch.tensor([1]))[:, 11]  # T = 1: log(1 + e^-2), -2 / (1 + e^2)
    tensor([ 0.1269, -0.2384], dtype=torch.float64)
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"Expected logits (..., C) and labels (...), found {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    logits, labels = logits.detach().flatten(0, -2), labels.flatten()
    dtype = torch.promote_types(logits.dtype, torch.float32)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    nodes = inverse_temperatures().to(logits.device, dtype)
    first = nodes[:CHAINS, None]
    sums = torch.zeros(2, NUM_NODES, dtype=wide, device=logits.device)
    limit = _VALUES_AT_ONCE.get(logits.device.type, _VALUES_AT_ONCE_ELSEWHERE)
    rows = max(1, limit // (CHAINS * logits.shape[-1]))
    for start in range(0, len(labels), rows):
        part, target = logits[start : start + rows].to(dtype), labels[start : start + rows]
        counted = target != ignore_index
        shifted = part - part.amax(-1, keepdim=True)
        of_label = shifted.gather(-1, target.where(counted, 0).long()[:, None])
        shifted = shifted.clamp_min_(-1e4)[:, None]  # exp(-1e4 / 45) is 0 already, and 0 times -inf would be NaN
        weights = (shifted * first).exp_()  # (rows, 2, C): exponentials cost most, and squares give all the others
        totals, means = [], []
        for index in range(_ROUNDS):
            totals.append(weights.sum(-1))
            means.append(torch.linalg.vecdot(weights, shifted))
            if index < _ROUNDS - 1:
                weights = weights.mul_(weights)
        total = torch.cat(totals, -1)
        slope = torch.cat(means, -1) / total - of_label  # mean logit minus that of the label
        nll = total.log() - nodes * of_label
        found = torch.stack([nll, slope]).where(counted[:, None], 0.0)
        sums += found.sum(1, dtype=wide)
    return sums


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate rows of logits of batches; those with fewer classes than others are filled with -inf.

    >>> joined([torch.zeros(1, 3), torch.zeros(1, 2)])
    tensor([[0., 0., 0.],
            [0., 0., -inf]])
    """
    widest = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, widest - part.shape[-1]), value=-math.inf) for part in parts])


class SumsOnGrid:
    """Running sums of `nll_on_grid` over the batches of an evaluation.

    Batches of few logits are joined before they are summed, since the cost of a call would exceed that of its numbers.

    Args:
        ignore_index: Label of samples that do not count.

    >>> sums = SumsOnGrid()
    >>> for row in ([0.0, 2.0], [1.0, 0.0]):
    ...     sums.add(torch.tensor([row]), torch.tensor([1]))
    >>> sums.total()[:, 11]  # log(1 + e^-2) + log(1 + e)
    tensor([1.4402, 0.4927], dtype=torch.float64)
    """

    def __init__(self, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index
        self._sums: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch; logits of shape `(..., C)`, labels of shape `(...)`.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"Expected logits (..., C) and labels (...), found {tuple(logits.shape)} and {tuple(labels.shape)}."
            )
        if logits.numel() > _JOINED_VALUES // 4:
            self._sum(logits, labels)
            return
        # A copy: a compiled model may write its next output into the same memory.
        self._waiting.append((logits.detach().flatten(0, -2).clone(), labels.flatten().clone()))
        if sum(rows.numel() for rows, _ in self._waiting) > _JOINED_VALUES * 3 // 4:
            self._sum_waiting()

    def total(self) -> Tensor | None:
        """Return the sums so far, shape `(2, 22)`; None if no batch was added."""
        self._sum_waiting()
        return self._sums

    def _sum_waiting(self) -> None:
        if self._waiting:
            logits, labels = zip(*self._waiting, strict=True)
            self._waiting = []
            self._sum(joined(logits), torch.cat(labels))

    def _sum(self, logits: Tensor, labels: Tensor) -> None:
        sums = nll_on_grid(logits, labels, self.ignore_index)
        self._sums = sums if self._sums is None else self._sums + sums


def best_temperature(sums: Tensor, num_samples: int) -> tuple[float, float]:
    """Find the temperature with the lowest mean NLL, and that NLL, by cubic interpolation between nodes.

    Args:
        sums: What `nll_on_grid` gives, added over batches and processes, shape `(2, 22)`.
        num_samples: Samples that were counted.

    Returns:
        T and the mean NLL in nats. Where the NLL still falls at the coldest node (every sample is classified
        correctly, so no temperature fits best) T is 1, as `fit_temperature` has it; where it still falls at the
        hottest one, T is that of the node.

    Raises:
        ValueError: If the shape is another one, a sum is not finite, or nothing was counted.

    >>> logits, labels = torch.tensor([[4.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])
    >>> temperature, nll = best_temperature(nll_on_grid(logits, labels), 4)  # 4 / T = log 3, entropy of 3 to 1
    >>> round(temperature, 2), round(nll, 3)
    (3.64, 0.562)
    """
    values = torch.as_tensor(sums).detach().cpu().double()
    if values.shape != (2, NUM_NODES):
        raise ValueError(f"Expected sums of shape (2, {NUM_NODES}), found {tuple(values.shape)}.")
    if num_samples < 1:
        raise ValueError(f"Expected at least one counted sample, found {num_samples}.")
    if not torch.isfinite(values).all():
        raise ValueError("The sums must be finite, found NaN or infinite ones: some logits were.")
    nodes = inverse_temperatures()
    nll = values[0] / num_samples
    slope = values[1] * nodes / num_samples  # in the logarithm of 1 / T
    falling = slope < 0
    if slope[-1] <= 0:  # at 0 it has underflown
        return 1.0, float(nll[NUM_NODES // 2])
    if not bool(falling[0]):
        return float(1 / nodes[0]), float(nll[0])
    last = int(falling.nonzero().max())
    left, right = float(slope[last]) * STEP, float(slope[last + 1]) * STEP
    rise = float(nll[last + 1] - nll[last])
    # The cubic with these values and slopes at the ends has the slope  square t^2 + linear t + left,  t in [0, 1].
    square, linear = 3 * (left + right) - 6 * rise, 6 * rise - 4 * left - 2 * right
    root = math.sqrt(max(linear**2 - 4 * square * left, 0.0))
    t = -2 * left / (linear + root) if linear + root > 0 else left / (left - right)
    t = min(max(t, 0.0), 1.0)
    lowest = float(nll[last]) + left * t + linear * t**2 / 2 + square * t**3 / 3
    return float(1 / nodes[last]) * math.exp(-STEP * t), lowest
