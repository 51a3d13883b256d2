"""Terms that look at a whole batch: calibration errors one can train on, and losses weighted by ranks.

Each is a function of logits and labels that returns one number, and is meant to be added to a loss of single samples:
`combined.CombinedLoss` does that. All of them take logits `(N, C)` or `(N, C, d1, ...)`, labels `(N,)` or
`(N, d1, ...)` in `[0, C)` or `ignore_index`, and look at every counted label as one sample; logits below float32 are
computed in float32. Whether a prediction is right is a constant, its confidence carries the gradient. With no counted
sample each is 0; with one, or all right, or all wrong, value and gradient are finite. They raise `ValueError` as
`functional.focal_loss` does. None takes class weights: they ask how often a confidence is right, and a class weight
has no say in that.

Memory: `mmce`, `mmce_weighted` and `regularised_aurc` hold N x N numbers, which suits batches of samples and not the
pixels of a segmentation; the others grow with N.

Symbols: p the probabilities of a sample, c the largest of them (the confidence), r 1 if that class is the label else
0, B the counted samples, K the classes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_adafocal.losses import functional

ROOT_EPSILON = 1e-10  # inside each square root: without it the gradient at 0 is NaN
KERNEL_WIDTH = 0.4
SCORES = ("confidence", "neg_entropy", "margin", "l2_norm")


class _Batch(NamedTuple):
    """The samples of a batch in one row each; ignored ones stay, with weight 0, so that no shape depends on data."""

    log_p: Tensor  # (N, C)
    ce: Tensor  # (N,), 0 where ignored
    labels: Tensor  # (N,), 0 where ignored
    counted: Tensor  # (N,), 1 or 0, of the dtype of log_p
    count: Tensor  # scalar, at least 1: a divisor

    @property
    def p(self) -> Tensor:
        return self.log_p.exp()

    def top(self) -> tuple[Tensor, Tensor]:
        """Confidence, and 1 where it is right else 0; both (N,)."""
        confidence, predicted = self.p.max(dim=1)
        return confidence, (predicted == self.labels).to(confidence.dtype)

    def mean(self, values: Tensor) -> Tensor:
        return (values * self.counted).sum() / self.count


def _batch(logits: Tensor, labels: Tensor, ignore_index: int) -> _Batch:
    ce = functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")  # and checks
    rows = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    labels = labels.reshape(-1).long()
    kept = labels != ignore_index
    counted = kept.to(ce.dtype)
    log_p = rows.log_softmax(dim=1, dtype=ce.dtype)
    return _Batch(log_p, ce.reshape(-1), labels.where(kept, 0), counted, counted.sum().clamp_min(1))


def _root(square: Tensor) -> Tensor:
    return (square.clamp_min(0) + ROOT_EPSILON).sqrt()  # rounding can put a square below 0


# Kernel embeddings of the gap between confidence and correctness


def mmce(logits: Tensor, labels: Tensor, *, reference_code: bool = False, ignore_index: int = -100) -> Tensor:
    """MMCE, `sqrt((1/B^2) sum_ij (r_i - c_i) (r_j - c_j) exp(-|c_i - c_j| / 0.4))`.

    Pairs of a sample with itself are in the sum, so small batches of a calibrated model are not near 0.

    Args:
        logits: Unnormalised scores, shape `(N, C)` or `(N, C, d1, ...)`.
        labels: Class indices or `ignore_index`, shape `(N,)` or `(N, d1, ...)`.
        reference_code: Leave out the square root, as the authors' code and the port that others use do.
        ignore_index: Label of samples that do not count.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: If shapes do not fit, labels are not integers or a label is out of range.

    Source: Kumar et al. 2018, "Trainable calibration measures from kernel mean embeddings".

    >>> mmce(torch.zeros(1, 2), torch.tensor([0]))  # one sample, right, at confidence 1/2
    tensor(0.5000)
    """
    batch = _batch(logits, labels, ignore_index)
    confidence, correct = batch.top()
    square = _kernel_square((correct - confidence) * batch.counted / batch.count, confidence)
    return square if reference_code else _root(square)


def mmce_weighted(logits: Tensor, labels: Tensor, *, reference_code: bool = False, ignore_index: int = -100) -> Tensor:
    """MMCE_w: right and wrong samples each have one vote in all, `m` right ones and `n` wrong ones.

    `sqrt(S_cc / m^2 + S_ii / n^2 - 2 S_ci / (m n))` with `S_cc` the sum over pairs of right samples of
    `(1 - c_i) (1 - c_j) k`, `S_ii` over pairs of wrong ones of `c_i c_j k` and `S_ci` over mixed pairs of
    `(1 - c_i) c_j k`. It is 0 if no sample is right or none is wrong.

    It does not vanish at calibration unless half of the samples are right: 4,096 samples of a calibrated model that
    is right in 90 of 100 give 0.53, where MMCE gives 0.004.

    The authors' code takes means over pairs and then divides by m^2, n^2 and m n once more: its value shrinks as the
    batch grows, 30 to 40-fold at 128 samples. `reference_code=True` gives that value, finite for any batch; the code
    itself crashes on a batch of one and gives NaN for a batch of two that is all right or all wrong.

    Args and errors are those of `mmce`, but for `reference_code`: divide twice.

    Source: Kumar et al. 2018, section on MMCE_w; the port is in torrvision/focal_calibration `Losses/mmce.py`.
    """
    batch = _batch(logits, labels, ignore_index)
    confidence, correct = batch.top()
    right, wrong = correct * batch.counted, (1 - correct) * batch.counted
    m, n = right.sum(), wrong.sum()
    power = 2 if reference_code else 1
    vote = right / m.clamp_min(1) ** power + wrong / n.clamp_min(1) ** power
    both = (m > 0) & (n > 0)
    return _root(_kernel_square((correct - confidence) * vote, confidence)) * both


def _kernel_square(residual: Tensor, confidence: Tensor) -> Tensor:
    """Squared length of `sum_i residual_i phi(confidence_i)`; no matrix product, which autocast would round."""
    kernel = torch.exp(-(confidence[:, None] - confidence).abs() / KERNEL_WIDTH)
    return (residual[:, None] * residual * kernel).sum()


# Means of a batch


def dca(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """DCA, the difference of mean confidence and accuracy: `|mean c - mean r|`.

    Args, returns and errors are those of `mmce`.

    Source: Liang et al. 2020, arXiv 2009.04057.

    >>> dca(torch.zeros(2, 2), torch.tensor([0, 0]))  # all right at confidence 1/2
    tensor(0.5000)
    """
    batch = _batch(logits, labels, ignore_index)
    confidence, correct = batch.top()
    return batch.mean(confidence - correct).abs()


def mdca(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """MDCA, DCA of every class: `(1/K) sum_k |mean_n p_nk - mean_n 1[y_n = k]|`.

    With many classes and small batches most of it is the noise of the class counts. Args, returns and errors are
    those of `mmce`.

    Source: Hebbalaguppe et al. 2022, arXiv 2203.13834.
    """
    batch = _batch(logits, labels, ignore_index)
    share = batch.p.new_zeros(batch.p.shape[1]).index_add(0, batch.labels, batch.counted) / batch.count
    probability = (batch.p * batch.counted[:, None]).sum(dim=0) / batch.count
    return (probability - share).abs().mean()


# Binned calibration errors with soft bins


def soft_binned_ece(
    logits: Tensor, labels: Tensor, *, num_bins: int = 15, temperature: float = 0.01, ignore_index: int = -100
) -> Tensor:
    """SB-ECE, ECE in the L2 norm whose bins share each sample: `sqrt(sum_j w_j (conf_j - acc_j)^2)`.

    A sample belongs to the bin around `xi_j = (2 j - 1) / (2 M)` by `softmax_j(-(c - xi_j)^2 / temperature)`.

    The paper tunes the temperature; the authors' code can set it as `1 / (ln(decay) M^2)`, where a decay of at most 1
    would turn the bins inside out. That code takes the root of 0 without an epsilon, where the gradient is NaN.

    Args:
        logits: As in `mmce`.
        labels: As in `mmce`.
        num_bins: Bins M on [0, 1].
        temperature: Softness of the bins; 0.01 with 15 bins lets a neighbour weigh up to 1 / 1.56 of a bin's centre.
        ignore_index: Label of samples that do not count.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: As `mmce`, and if `num_bins` is below 1 or `temperature` is not positive.

    Source: Karandikar et al. 2021, arXiv 2108.00106, eq. 11.
    """
    _check_bins(num_bins, temperature=temperature)
    batch = _batch(logits, labels, ignore_index)
    confidence, correct = batch.top()
    anchors = (torch.arange(num_bins, dtype=confidence.dtype, device=confidence.device) + 0.5) / num_bins
    member = _membership(confidence, anchors, temperature) * batch.counted[:, None]
    mass = member.sum(dim=0)
    gap = (member * (confidence - correct)[:, None]).sum(dim=0) / mass.clamp_min(1e-5)
    return _root((mass / batch.count * gap.square()).sum())


def soft_label_binned_ece(
    logits: Tensor, labels: Tensor, *, num_bins: int = 15, temperature: float = 0.01, ignore_index: int = -100
) -> Tensor:
    """Label-binned SB-ECE: `(1/B) sum_nj u_nj (acc_j - c_n)^2`, each confidence against the accuracy of its soft bin.

    Memberships u are mixed with 1e-5 of a uniform one. As in the authors' code, and unlike in `soft_binned_ece`, the
    bins lie on [1/K, 1] and no root is taken. Args and errors are those of `soft_binned_ece`.

    Source: Karandikar et al. 2021, arXiv 2108.00106, eq. 12.
    """
    _check_bins(num_bins, temperature=temperature)
    batch = _batch(logits, labels, ignore_index)
    confidence, correct = batch.top()
    lowest = 1 / batch.log_p.shape[1]
    centers = (torch.arange(num_bins, dtype=confidence.dtype, device=confidence.device) + 0.5) / num_bins
    anchors = lowest + (1 - lowest) * centers
    member = (1 - 1e-5) * _membership(confidence, anchors, temperature) + 1e-5 / num_bins
    member = member * batch.counted[:, None]
    mass = member.sum(dim=0).clamp_min(torch.finfo(member.dtype).tiny)
    accuracy = (member * correct[:, None]).sum(dim=0) / mass
    return (member * (accuracy - confidence[:, None]).square()).sum() / batch.count


def _membership(confidence: Tensor, anchors: Tensor, temperature: float) -> Tensor:
    return (-(confidence[:, None] - anchors).square() / temperature).softmax(dim=1)


def differentiable_ece(
    logits: Tensor,
    labels: Tensor,
    *,
    num_bins: int = 15,
    accuracy_slope: float = 100.0,
    bin_temperature: float = 0.01,
    ignore_index: int = -100,
) -> Tensor:
    """DECE: ECE in the L1 norm with soft bins and an accuracy that carries a gradient.

    Bins are `softmax_j((j c - sum_{i<=j} (i - 1) / M) / bin_temperature)`. The accuracy of a sample is
    `max(0, 2 - rank)` of its label, with `rank = 1/2 + sum_k sigmoid(accuracy_slope (p_k - p_y))`.

    The authors' code compares all pairs of classes, B x C x C numbers (0.48 GB at B 128, C 1000); the rank of the
    label needs one row of them, which is what is computed here. It divides memberships by `1 + (M + 1) 1e-6` where
    they sum to `1 + M 1e-6`. They use DECE on held-out data, to learn hyper-parameters, and not as a penalty.

    Args:
        logits: As in `mmce`.
        labels: As in `mmce`.
        num_bins: Bins M on [0, 1].
        accuracy_slope: Steepness of the soft rank (the code's t_a).
        bin_temperature: Softness of the bins (the code's t_b).
        ignore_index: Label of samples that do not count.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: As `mmce`, and if `num_bins` is below 1 or a steepness or softness is not positive.

    Source: Bohdal et al. 2021, arXiv 2106.09613, `Losses/dece.py` of the authors' code.
    """
    _check_bins(num_bins, accuracy_slope=accuracy_slope, bin_temperature=bin_temperature)
    batch = _batch(logits, labels, ignore_index)
    p = batch.p
    of_label = p.gather(1, batch.labels[:, None])
    rank = 0.5 + (accuracy_slope * (p - of_label)).sigmoid().sum(dim=1)  # the label's own term is 1/2
    accuracy = (2 - rank).relu()
    confidence = p.amax(dim=1)
    steps = torch.arange(num_bins, dtype=p.dtype, device=p.device)
    heights = confidence[:, None] * (steps + 1) - steps.cumsum(0) / num_bins
    member = ((heights / bin_temperature).softmax(dim=1) + 1e-6) / (1 + num_bins * 1e-6)
    gaps = member * ((accuracy - confidence) * batch.counted)[:, None]
    return gaps.sum(dim=0).abs().sum() / batch.count


def _check_bins(num_bins: int, **positive: float) -> None:
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, found {num_bins}.")
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, found {value}.")


# Losses weighted by the rank of a score of confidence


def aurc(logits: Tensor, labels: Tensor, *, score: str = "confidence", ignore_index: int = -100) -> Tensor:
    """Cross-entropy as the area under its risk-coverage curve: `(1/B) sum_n (H_B - H_{B - rank_n}) ce_n`.

    `H_k` is the k-th harmonic number and rank 1 is the least sure sample: it weighs 1/B, the surest one H_B (6.12 at
    256 samples). So it emphasises confident samples, as inverse focal loss does. Ranks carry no gradient; tied scores
    take their ranks in the order of the batch.

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
    batch = _batch(logits, labels, ignore_index)
    with torch.no_grad():
        scores = _scores(batch, score).where(batch.counted > 0, math.inf)
        rank = _inverse(scores.argsort(stable=True)).to(scores.dtype) + 1
        rank = rank.minimum(batch.count)  # those beyond are ignored
        alpha = torch.digamma(batch.count + 1) - torch.digamma(batch.count - rank + 1)
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
    """The first version of the AURC loss: `mean -ln(1 - r_n / (B + 1)) ce_n` with soft ranks r.

    Soft ranks are those of Blondel et al. (L2): the projection of `score / regularization_strength` on the ranks'
    permutahedron. Scores span at most 1, so they end within `1 / regularization_strength` of each other: where the
    batch is larger than that, they are near-linear in the score and do not reach 1 or B.

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
        ValueError: As `aurc`, and if `regularization_strength` is not positive.

    Source: Zhou et al. 2025, arXiv 2505.23463v1; soft ranks: Blondel et al. 2020, arXiv 2002.08871.
    """
    if not regularization_strength > 0:
        raise ValueError(f"regularization_strength must be above 0, found {regularization_strength}.")
    batch = _batch(logits, labels, ignore_index)
    with torch.set_grad_enabled(rank_gradient and torch.is_grad_enabled()):
        rank = _soft_rank(_scores(batch, score) / regularization_strength, batch.counted)
        rank = rank.clamp_min(0).minimum(batch.count)  # rounding; and rows that are ignored
        alpha = -torch.log1p(-rank / (batch.count + 1))
    return batch.mean(alpha * batch.ce)


def _soft_rank(values: Tensor, counted: Tensor) -> Tensor:
    """Projection of the counted values on the permutahedron of their ranks, 1 for the lowest; others are arbitrary.

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
    seen: Tensor | None = None,
    quantile: float = 0.5,
    sigma: float = 0.05,
    num_bins: int = 64,
    score: str = "confidence",
    ignore_index: int = -100,
) -> Tensor:
    """Selective AU loss: cross-entropy weighted by `-ln(1 - G(min(s, tau)))`, s a score of confidence.

    G is a smooth distribution function of the scores, `sum_b counts_b sigmoid((s - center_b) / sigma) / sum_b
    counts_b`, kept within [1/(B + 1), B/(B + 1)], and tau the batch's `quantile` of s: below it the weight grows with
    confidence, above it is constant. The gradient flows through s, tau and G; counts are constants.

    The authors' shipped configuration (negative entropy) trains on something else: the score gets the wrong sign in
    its normalisation and is clipped to 1, after a second softmax, so every weight is one constant (0.774321 for a
    fresh histogram) and the loss is a scaled cross-entropy. Their confidence is softmaxed twice too. Here each score
    is what its name says.

    Args:
        logits: As in `mmce`.
        labels: As in `mmce`.
        seen: Counts of the scores of earlier batches, shape `(num_bins,)`, from `score_histogram`; this batch is
            added to them. None: this batch alone.
        quantile: Share of the batch below tau. The authors' configurations for Tiny-ImageNet have 0.4 with
            "neg_entropy" (ViT-S) and 0.6 with "confidence" (Swin-T).
        sigma: Width of the steps of G.
        num_bins: Bins of G on [0, 1].
        score: As in `aurc`; all of them lie in [0, 1].
        ignore_index: Label of samples that do not count.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: As `aurc`, and if `seen` has another shape, `quantile` is not in [0, 1], `num_bins` is below 1 or
            `sigma` is not positive.

    Source: Zhou et al. 2025, arXiv 2505.23463v4, `loss/selectAU.py` of the authors' code.
    """
    _check_bins(num_bins, sigma=sigma)
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must lie in [0, 1], found {quantile}.")
    if seen is not None and seen.shape != (num_bins,):
        raise ValueError(f"seen must have shape ({num_bins},), found {tuple(seen.shape)}.")
    batch = _batch(logits, labels, ignore_index)
    scores = _scores(batch, score)
    counts = _histogram(scores.detach(), batch.counted, num_bins)
    if seen is not None:
        counts = counts + seen.to(counts.dtype)
    centers = (torch.arange(num_bins, dtype=scores.dtype, device=scores.device) + 0.5) / num_bins
    capped = scores.minimum(_quantile(scores, quantile, batch))
    steps = ((capped[:, None] - centers) / sigma).sigmoid()
    share = (steps * counts).sum(dim=1) / counts.sum().clamp_min(1)
    share = share.maximum(1 / (batch.count + 1)).minimum(batch.count / (batch.count + 1))
    return batch.mean(-torch.log1p(-share) * batch.ce)


@torch.no_grad()
def score_histogram(
    logits: Tensor, labels: Tensor, *, num_bins: int = 64, score: str = "confidence", ignore_index: int = -100
) -> Tensor:
    """Counts of a batch's scores in bins of one width on [0, 1], the last one closed: what `selective_au` has seen.

    Args and errors are those of `selective_au`.

    Returns:
        Counts, shape `(num_bins,)`.
    """
    _check_bins(num_bins)
    batch = _batch(logits, labels, ignore_index)
    return _histogram(_scores(batch, score), batch.counted, num_bins)


def _histogram(scores: Tensor, counted: Tensor, num_bins: int) -> Tensor:
    index = (scores * num_bins).long().clamp(0, num_bins - 1)
    return torch.zeros(num_bins, dtype=scores.dtype, device=scores.device).index_add(0, index, counted)


def _quantile(scores: Tensor, quantile: float, batch: _Batch) -> Tensor:
    """Of the counted scores, linear in between, as `torch.quantile`."""
    ranked = scores.where(batch.counted > 0, 2.0).sort().values  # above every score
    position = quantile * (batch.count - 1)
    below = position.floor()
    part = position - below
    low, high = (ranked.take(index.long()) for index in (below, position.ceil()))
    return low + part * (high - low)


def _scores(batch: _Batch, score: str) -> Tensor:
    if score == "confidence":
        return batch.p.amax(dim=1)
    if score == "neg_entropy":
        return (1 + (batch.p * batch.log_p).sum(dim=1) / math.log(batch.log_p.shape[1])).clamp(0, 1)
    if score == "margin":
        first, second = batch.p.topk(2, dim=1).values.unbind(dim=1)
        return first - second
    if score == "l2_norm":
        return batch.p.square().sum(dim=1).sqrt()
    raise ValueError(f"score must be one of {', '.join(SCORES)}; found {score!r}.")


def _inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`."""
    return order.argsort()
