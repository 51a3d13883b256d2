"""Topological loss of dense prediction: Wasserstein distance of the persistence diagrams of prediction and label."""

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_adafocal.betti import betti_numbers, check_image
from hf_adafocal.losses import functional

Pairs = tuple[list[np.ndarray], np.ndarray]
Pairing = Callable[[np.ndarray, str], Pairs]


def topological_distance(
    logits: Tensor, labels: Tensor, *, construction: str = "V", ignore_index: int = -100
) -> Tensor:
    """Squared 2-Wasserstein distance between the persistence diagrams of predicted probabilities and of labels.

    For each sample and foreground class k (every class but 0), `1 - p_k` is a filtered cubical complex: as the
    threshold rises, components, loops and cavities are born at b and die at d; the component that never dies is given
    d = 1. The label's own diagram holds one point (0, 1) per component, loop and cavity, its Betti number, so that the
    optimal matching has a closed form. A point costs `b^2 + (1 - d)^2` if matched and `(d - b)^2 / 2` if not, an
    unmatched label point costs 1/2; in each dimension the points that gain most by a match,
    `(d - b)^2 / 2 + 1/2 - b^2 - (1 - d)^2 > 0`, are matched while label points last. The distances of all dimensions
    are added, and averaged over samples and foreground classes. This equals
    `gudhi.wasserstein.wasserstein_distance(order=2, internal_p=2) ** 2`.

    The gradient reaches the pixels at which features are born and die. The term is blind to place: a ring anywhere
    has the diagram of a ring elsewhere, so it belongs beside a loss per pixel. Betti matching (Stucki et al. 2023,
    arXiv 2211.15272) sees places too; it is not here because no maintained package implements it. Ignored pixels are
    background in prediction and label. Pairs are found on the CPU, in float64 of the probabilities as computed in
    float32 or wider; the function cannot be traced by `torch.compile`.

    Args:
        logits: Unnormalised scores, shape `(N, C, d1, d2)` or `(N, C, d1, d2, d3)`, C at least 2.
        labels: Class indices or `ignore_index`, shape `(N, d1, d2)` or `(N, d1, d2, d3)`; class 0 is background.
        construction: "V" or "T", see `hf_adafocal.betti.betti_numbers`.
        ignore_index: Label of pixels that do not count.

    Returns:
        A scalar, at least 0, no unit.

    Raises:
        ValueError: If shapes do not fit, labels are not integers, or a label is out of range.
        ImportError: If gudhi is not installed (the extra `topology`). cripser is used instead if it is installed.

    Source: ours, after the idea of Demir, Massaad and Kiziltan 2023, arXiv 2304.12223, of which no code or table is
    public: this is no reproduction.

    ```python
    topological_distance(torch.zeros(1, 2, 16, 16), torch.zeros(1, 16, 16, dtype=torch.long))  # 0.125: no object
    topological_distance(torch.zeros(1, 2, 16, 16), torch.ones(1, 16, 16, dtype=torch.long))  # 0.25: one, half seen
    ```
    """
    pairs_of = _library()
    check_image(logits.ndim - 2, construction)
    functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")  # checks shapes and labels
    classes = logits.shape[1]
    wide = logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    counted = labels != ignore_index
    filtration = 1 - wide[:, 1:] * counted[:, None]  # (N, C - 1, d1, ...)
    if filtration.numel() == 0:
        return filtration.sum()
    values = filtration.detach().cpu().numpy().astype(np.float64)
    targets = labels.where(counted, 0).cpu().numpy()
    found: list[_Matched] = []
    for sample, of_sample in enumerate(values):
        for index, volume in enumerate(of_sample):
            start = (sample * (classes - 1) + index) * volume.size
            expected = betti_numbers(targets[sample] == index + 1, construction)
            found += _matched(pairs_of, volume, expected, construction, start)
    flat = filtration.reshape(-1)
    total = flat.new_zeros(())
    for matched in found:
        birth = flat[torch.as_tensor(matched.births, device=flat.device)]
        death = 1.0 if matched.deaths is None else flat[torch.as_tensor(matched.deaths, device=flat.device)]
        of_label = torch.as_tensor(matched.to_label, device=flat.device)
        costs = torch.where(of_label, birth.square() + (1 - death) ** 2, (death - birth) ** 2 / 2)
        total = total + costs.sum() + matched.left_over / 2
    return total / (len(values) * (classes - 1))


class _Matched(NamedTuple):
    """Points of a persistence diagram in one dimension and their optimal matching to the label's diagram.

    Attributes:
        births: Flat indices into the filtration of the whole batch.
        deaths: Likewise; None for the component that never dies.
        to_label: Whether a point is matched to a label point, else to the diagonal.
        left_over: Label points that no point is matched to.
    """

    births: np.ndarray
    deaths: np.ndarray | None
    to_label: np.ndarray
    left_over: int


def _matched(
    pairs_of: Pairing, volume: np.ndarray, expected: tuple[int, ...], construction: str, start: int
) -> list[_Matched]:
    """Match the persistence diagram of one filtered volume to the label's Betti numbers, dimension by dimension."""
    finite, essential = pairs_of(volume, construction)
    flat = volume.reshape(-1)
    found = []
    for dimension, points in enumerate(expected):
        births, deaths = finite[dimension].T
        never = essential if dimension == 0 else essential[:0]
        birth, death = flat[np.concatenate([births, never])], np.concatenate([flat[deaths], np.ones(len(never))])
        gain = (death - birth) ** 2 / 2 + 0.5 - birth**2 - (1 - death) ** 2
        best = np.argsort(-gain, kind="stable")[:points]
        best = best[gain[best] > 0]
        to_label = np.zeros(len(gain), dtype=bool)
        to_label[best] = True
        found.append(_Matched(births + start, deaths + start, to_label[: len(births)], points - len(best)))
        if len(never):
            found.append(_Matched(never + start, None, to_label[len(births) :], 0))
    return found


def pairs_of_gudhi(volume: np.ndarray, construction: str) -> Pairs:
    """Find the cells of a sublevel filtration at which topological features are born and die, with gudhi.

    Args:
        volume: Filtration values, shape `(d1, d2)` or `(d1, d2, d3)`.
        construction: "V" or "T".

    Returns:
        For each dimension below that of the volume the flat indices, in C order, of birth and death, shape `(n, 2)`,
        features that die as they are born left out; and the flat index of the birth of the component that never dies,
        shape `(1,)`.
    """
    from gudhi import CubicalComplex

    if construction == "V":
        complex_ = CubicalComplex(vertices=volume)
        complex_.compute_persistence(homology_coeff_field=2)
        finite, essential = complex_.vertices_of_persistence_pairs()
    else:
        complex_ = CubicalComplex(top_dimensional_cells=volume)
        complex_.compute_persistence(homology_coeff_field=2)
        finite, essential = complex_.cofaces_of_persistence_pairs()

    def in_c_order(indices: Any) -> np.ndarray:  # gudhi counts cells in Fortran order
        places = np.unravel_index(np.asarray(indices, dtype=np.int64), volume.shape, order="F")
        return np.ravel_multi_index(places, volume.shape)

    pairs = [in_c_order(part).reshape(-1, 2) for part in finite]
    pairs += [np.zeros((0, 2), dtype=np.int64)] * (volume.ndim - len(pairs))
    return pairs, in_c_order(essential[0]).reshape(-1)


def pairs_of_cripser(volume: np.ndarray, construction: str) -> Pairs:
    """Find the same cells with cripser, which is several times faster and under the GPL; as `pairs_of_gudhi`."""
    from cripser import compute_ph

    if volume.ndim == 2 and 1 in volume.shape:  # of an image of one row or column it misses minima, of a volume not
        pairs, roots = pairs_of_cripser(volume[None], construction)
        return pairs[:2], roots
    found = compute_ph(volume, filtration=construction, maxdim=volume.ndim - 1)
    dimension, death = found[:, 0].astype(np.int64), found[:, 2]
    places = found[:, 3:].astype(np.int64)
    ends = [
        np.ravel_multi_index(tuple(places[:, first : first + volume.ndim].T), volume.shape, mode="clip")
        for first in (0, 3)
    ]
    never = death > volume.max()
    indices = np.stack(ends, axis=-1)
    pairs = [indices[~never & (dimension == index)] for index in range(volume.ndim)]
    return pairs, ends[0][never & (dimension == 0)]


def _library() -> Pairing:
    """Return the function that finds pairs: with cripser if the user has installed it, else with gudhi."""
    libraries = (("cripser", "compute_ph", pairs_of_cripser), ("gudhi", "CubicalComplex", pairs_of_gudhi))
    for module, needed, function in libraries:
        with suppress(ImportError):
            if hasattr(import_module(module), needed):  # a folder of that name imports, too
                return function
    raise ImportError(
        "The topological term computes persistence with gudhi, which is not installed: "
        "pip install 'hf-adafocal[topology]'."
    )
