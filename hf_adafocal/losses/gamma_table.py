"""Tables that map the probability of the label to gamma, and the paper's update rule."""

import torch
from torch import Tensor

FLSD_53_EDGES = (0.0, 0.2, 1.0)
FLSD_53_GAMMAS = (5.0, 3.0)


def lookup(p: Tensor, edges: Tensor, gammas: Tensor) -> Tensor:
    """Look up gamma by the bin that the probability of the label falls in.

    Bins are `[lower, upper)` here, as in the paper's code; the first also holds everything below it and the last
    everything above. A bin between two equal edges is never hit.

    Args:
        p: Probability of the label, any shape.
        edges: Ascending bin edges, shape `(num_bins + 1,)`.
        gammas: Gamma of each bin, shape `(num_bins,)`.

    Returns:
        Gammas, the shape of `p`.

    >>> lookup(torch.tensor([0.1, 0.5, 1.0]), torch.tensor([0.0, 0.5, 1.0]), torch.tensor([3.0, -1.0]))
    tensor([ 3., -1., -1.])
    """
    return gammas[torch.bucketize(p, edges[1:-1], right=True)]


def lookup_by_class(p: Tensor, labels: Tensor, edges: Tensor, gammas: Tensor) -> Tensor:
    """Look up gamma in the table of the label's class; bins as in `lookup`.

    Args:
        p: Probability of the label, any shape.
        labels: Class indices in `[0, C)`, int64, the shape of `p`.
        edges: Ascending bin edges, shared by all classes, shape `(num_bins + 1,)`.
        gammas: Gamma of each bin of each class, shape `(C, num_bins)`.

    Returns:
        Gammas, the shape of `p`.

    >>> gammas = torch.tensor([[3], [-1]])
    >>> lookup_by_class(torch.tensor([0.1, 0.1]), torch.tensor([0, 1]), torch.tensor([0, 1]), gammas)
    tensor([ 3, -1])
    """
    return gammas[labels, torch.bucketize(p, edges[1:-1], right=True)]


def pool(own: Tensor, shared: Tensor, counts: Tensor, prior: float = 150.0) -> Tensor:
    """Shrink each class's gammas toward the shared ones: `w own + (1 - w) shared`, `w = n / (n + prior)`.

    A class without held-out samples has the shared gammas, a class with `prior` of them stands halfway.

    Args:
        own: Gammas of each class, shape `(C, num_bins)`.
        shared: Gammas of all samples together, shape `(num_bins,)`.
        counts: Held-out samples n of each class, shape `(C,)`.
        prior: Weight of the shared gammas in samples, above 0.

    Returns:
        Gammas of each class, shape `(C, num_bins)`.

    >>> pool(torch.tensor([[2.0], [2.0]]), torch.tensor([1.0]), torch.tensor([0.0, 150.0]))
    tensor([[1.0000],
            [1.5000]])
    """
    return torch.lerp(shared, own, (counts / (counts + prior))[:, None])


def update(
    gammas: Tensor,
    gap: Tensor,
    *,
    lambda_: float = 1.0,
    switch: float = 0.2,
    gamma_min: float = -2.0,
    gamma_max: float = 20.0,
) -> Tensor:
    """Update gammas by AdaFocal's rule: up in over-confident bins, down and then to inverse focal loss in the others.

    `gamma exp(sign(gamma) lambda gap)`; a result within `switch` of 0 jumps to the other side of it, from focal
    (`+switch`) to inverse focal (`-switch`) loss and back; then it is clipped.

    Args:
        gammas: Current gamma of each bin, shape `(num_bins,)`, or of each bin of each class, `(C, num_bins)`.
        gap: Confidence minus accuracy of each bin on held-out data, the shape of `gammas`, in [-1, 1]; 0 if empty.
        lambda_: Step size of the rule, no unit.
        switch: Where focal and inverse focal loss meet (the paper's S_th).
        gamma_min: Lowest gamma.
        gamma_max: Highest gamma.

    Returns:
        New gammas, the same shape.

    Raises:
        ValueError: If the shapes differ or a gap is not finite.

    Source: Ghosh et al. 2022, arXiv 2211.11838, as in the authors' code.

    >>> update(torch.tensor([1.0, 0.2]), torch.tensor([0.1, -0.1]))
    tensor([ 1.1052, -0.2000])
    """
    if gammas.shape != gap.shape:
        raise ValueError(f"gammas and gap must have one shape, found {tuple(gammas.shape)} and {tuple(gap.shape)}.")
    if not torch.isfinite(gap).all():
        raise ValueError(f"The calibration gap must be finite, found {gap.tolist()}; check the held-out predictions.")
    moved = gammas * torch.exp(lambda_ * torch.where(gammas > 0, gap, -gap))
    other_side = torch.where(moved > 0, -torch.ones_like(moved), torch.ones_like(moved)) * switch
    return torch.where(moved.abs() < switch, other_side, moved).clamp(gamma_min, gamma_max)
