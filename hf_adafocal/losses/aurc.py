"""Cross-entropy weighted by the rank of each sample's confidence in its batch: AURC losses and selective AU.

Arguments, shapes and errors are those of `calibration_penalties`, and so are the symbols. They replace cross-entropy
instead of being added to it.
"""

import math

import torch
from torch import Tensor

from hf_adafocal.losses.batch_samples import BatchSamples, batch_samples, check_bins, refuse_pairs
from hf_adafocal.losses.functional import LEAST_LOG_P

SCORES = ("confidence", "neg_entropy", "margin", "l2_norm")


def aurc(logits: Tensor, labels: Tensor, *, score: str = "confidence", ignore_index: int = -100) -> Tensor:
    """Cross-entropy weighted by rank: the area under its risk-coverage curve.

    It is `(1/B) sum_n (H_B - H_{B - rank_n}) ce_n`. `H_k` is the k-th harmonic number and rank 1 is the least sure
    sample: it weighs 1/B, the surest one H_B (6.12 at 256 samples). So it emphasises confident samples, as inverse
    focal loss does. Ranks carry no gradient; tied scores take their ranks in the order of the batch.

    The authors' code holds ranks up to a fixed `batch_size`: a longer batch is an IndexError there, and a shorter
    last batch is weighted as the least sure part of a full one. Here the batch is what it is.

    Args:
        logits: As in `mmce`.
        labels: As in `mmce`.
        score: What ranks the samples: "confidence" (largest probability), "neg_entropy" (`1 - entropy / ln K`),
            "margin" (largest minus second largest probability) or "l2_norm" (of the probabilities).
        ignore_index: Label of samples that do not count.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: As `mmce`, and if `score` is unknown.

    Source: Zhou et al. 2025, arXiv 2505.23463, `loss/aurc.py` of the authors' code.
    """
    batch = batch_samples(logits, labels, ignore_index)
    with torch.no_grad():
        scores = _scores(batch, score).where(batch.counted > 0, math.inf)
        rank = _inverse(scores.argsort(stable=True)).to(scores.dtype) + 1
        rank = rank.minimum(batch.divisor)  # those beyond are ignored
        alpha = torch.digamma(batch.divisor + 1) - torch.digamma(batch.divisor - rank + 1)
    return batch.mean(alpha * batch.ce)


def regularised_aurc(
    logits: Tensor,
    labels: Tensor,
    *,
    regularization_strength: float = 0.02,
    rank_gradient: bool = True,
    score: str = "confidence",
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy weighted by soft rank, the first version of the AURC loss.

    It is `mean -ln(1 - r_n / (B + 1)) ce_n` with soft ranks r. Soft ranks are those of Blondel et al. (L2): the
    projection of `score / regularization_strength` on the ranks' permutahedron. Scores span at most 1, so they end
    within `1 / regularization_strength` of each other: where the batch is larger than that, they are near-linear in
    the score and do not reach 1 or B.

    Args:
        logits: As in `mmce`.
        labels: As in `mmce`.
        regularization_strength: Softness of the ranks; towards 0 they become the ranks.
        rank_gradient: Let the gradient flow through the ranks too.
        score: As in `aurc`.
        ignore_index: Label of samples that do not count.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: As `aurc`, and if `regularization_strength` is not positive or there are more than `MOST_PAIRED`
            samples, whose soft ranks compare all pairs of them.

    Source: Zhou et al. 2025, arXiv 2505.23463v1; soft ranks: Blondel et al. 2020, arXiv 2002.08871.
    """
    refuse_pairs("regularised_aurc", labels)
    if not regularization_strength > 0:
        raise ValueError(f"regularization_strength must be above 0, found {regularization_strength}.")
    batch = batch_samples(logits, labels, ignore_index)
    with torch.set_grad_enabled(rank_gradient and torch.is_grad_enabled()):
        rank = _soft_rank(_scores(batch, score) / regularization_strength, batch.counted)
        rank = rank.clamp_min(1).minimum(batch.divisor)  # rounding; and rows that are ignored
        alpha = -torch.log1p(-rank / (batch.divisor + 1))
    return batch.mean(alpha * batch.ce)


def _soft_rank(values: Tensor, counted: Tensor) -> Tensor:
    """Project the counted values on the permutahedron of their ranks, 1 for the lowest; others are arbitrary.

    With values sorted downwards it is `values - v`, v the decreasing sequence nearest to `values - (n, ..., 1)`.
    Level runs of v are found by its min-max form without a loop; on a run v is a mean, which carries the gradient.
    """
    n = counted.sum()
    order = values.detach().where(counted > 0, -math.inf).argsort(descending=True, stable=True)
    ranked = values[order]
    position = torch.arange(len(values), dtype=values.dtype, device=values.device)
    hard = n - position
    with torch.no_grad():
        sums = (ranked - ranked.mean()).cumsum(0)
        before = torch.cat([torch.zeros_like(sums[:1]), sums[:-1]])
        first, last = position[:, None], position
        means = (sums - before[:, None]) / (last - first + 1).clamp_min(1) - (n - (first + last) / 2)
        means = means.where((first <= last) & (last < n), -math.inf)
        highest = means.flip(1).cummax(1).values.flip(1)  # of runs from `first` to `last` or beyond
        level = highest.where(first <= last, math.inf).amin(dim=0)
        run = (level[:, None] == level).to(values.dtype)
    nearest = (run * (ranked - hard)).sum(dim=1) / run.sum(dim=1)
    return (ranked - nearest)[_inverse(order)]


def selective_au(
    logits: Tensor,
    labels: Tensor,
    *,
    quantile: float = 0.5,
    sigma: float = 0.05,
    num_bins: int = 64,
    score: str = "confidence",
    ignore_index: int = -100,
) -> Tensor:
    """Selective AU loss: cross-entropy weighted by `-ln(1 - G(min(s, tau)))`, s a score of confidence.

    G is a smooth distribution function of the batch's scores, `sum_b counts_b sigmoid((s - center_b) / sigma) / sum_b
    counts_b`, kept within [1/(B + 1), B/(B + 1)], and tau the batch's `quantile` of s: below it the weight grows with
    confidence, above it is constant. The gradient flows through s, tau and G; counts are constants. G is that of the
    scores of this batch; the authors' code keeps counting through an epoch.

    The authors' shipped configuration (negative entropy) trains on something else: the score gets the wrong sign in
    its normalisation and is clipped to 1, after a second softmax, so every weight is one constant (0.774321 for a
    fresh histogram) and the loss is a scaled cross-entropy. Their confidence is softmaxed twice too. Here each score
    is what its name says.

    Args:
        logits: As in `mmce`.
        labels: As in `mmce`.
        quantile: Share of the batch below tau. The authors' configurations for Tiny-ImageNet have 0.4 with
            "neg_entropy" (ViT-S) and 0.6 with "confidence" (Swin-T).
        sigma: Width of the steps of G.
        num_bins: Bins of G on [0, 1].
        score: As in `aurc`; all of them lie in [0, 1].
        ignore_index: Label of samples that do not count.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: As `aurc`, and if `quantile` is not in [0, 1], `num_bins` is below 1 or `sigma` is not positive.

    Source: Zhou et al. 2025, arXiv 2505.23463v4, `loss/selectAU.py` of the authors' code.
    """
    check_bins(num_bins, sigma=sigma)
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must lie in [0, 1], found {quantile}.")
    batch = batch_samples(logits, labels, ignore_index)
    scores = _scores(batch, score)
    counts = _histogram(scores, batch.counted, num_bins)
    centers = (torch.arange(num_bins, dtype=scores.dtype, device=scores.device) + 0.5) / num_bins
    capped = scores.minimum(_quantile(scores, quantile, batch))
    steps = ((capped[:, None] - centers) / sigma).sigmoid()
    share = (steps * counts).sum(dim=1) / batch.divisor
    share = share.maximum(1 / (batch.divisor + 1)).minimum(batch.divisor / (batch.divisor + 1))
    return batch.mean(-torch.log1p(-share) * batch.ce)


def _histogram(scores: Tensor, counted: Tensor, num_bins: int) -> Tensor:
    index = (scores * num_bins).long().clamp(0, num_bins - 1)
    return torch.zeros(num_bins, dtype=scores.dtype, device=scores.device).index_add(0, index, counted)


def _quantile(scores: Tensor, quantile: float, batch: BatchSamples) -> Tensor:
    """Compute a quantile of the counted scores with linear interpolation, as `torch.quantile`."""
    ranked = scores.where(batch.counted > 0, 2.0).sort().values  # above every score
    position = quantile * (batch.divisor - 1)
    below = position.floor()
    part = position - below
    low, high = (ranked.gather(0, index.long()[None])[0] for index in (below, position.ceil()))
    return low + part * (high - low)


def _scores(batch: BatchSamples, score: str) -> Tensor:
    if score == "confidence":
        return batch.p.amax(dim=1)
    if score == "neg_entropy":
        log_p = batch.log_p.clamp_min(LEAST_LOG_P)  # 0 log 0 is 0
        return 1 + (batch.p * log_p).sum(dim=1) / math.log(log_p.shape[1])
    if score == "margin":
        first, second = batch.p.topk(2, dim=1).values.unbind(dim=1)
        return first - second
    if score == "l2_norm":
        return batch.p.square().sum(dim=1).sqrt()
    raise ValueError(f"score must be one of {', '.join(SCORES)}; found {score!r}.")


def _inverse(order: Tensor) -> Tensor:
    """Invert a permutation."""
    return order.argsort()
