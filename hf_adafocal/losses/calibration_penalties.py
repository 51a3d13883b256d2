"""Differentiable calibration errors of a batch: MMCE, DCA, MDCA, soft-binned ECE, DECE.

Each is a function of logits and labels that returns one number, meant to be added to a per-sample loss:
`batch_loss.CombinedLoss` does that. All of them take logits `(N, C)` or `(N, C, d1, ...)`, labels `(N,)` or
`(N, d1, ...)` in `[0, C)` or `ignore_index`, and take every counted label as one sample; logits below float32 are
computed in float32. Whether a prediction is right is a constant, its confidence carries the gradient. With no counted
sample each is 0; with one, or all right, or all wrong, value and gradient are finite. They raise `ValueError` as
`functional.focal_loss` does. None takes class weights: they ask how often a confidence is right, and a class weight
has no say in that.

`mmce` and `mmce_weighted` compare all pairs of samples, N x N numbers, and refuse more than `MOST_PAIRED` samples,
such as the pixels of a segmentation; the memory of the others grows with N.

Symbols: p the probabilities of a sample, c the largest of them (the confidence), r 1 if that class is the label else
0, B the counted samples, K the classes.
"""

import torch
from torch import Tensor

from hf_adafocal.losses.batch_samples import batch_samples, check_bins, refuse_pairs

ROOT_EPSILON = 1e-10  # inside each square root: without it the gradient at 0 is NaN
KERNEL_WIDTH = 0.4


def _root(square: Tensor) -> Tensor:
    return (square.clamp_min(0) + ROOT_EPSILON).sqrt()  # rounding can put a square below 0


# Kernel embeddings of the gap between confidence and correctness


def mmce(logits: Tensor, labels: Tensor, *, reference_code: bool = False, ignore_index: int = -100) -> Tensor:
    """MMCE, a kernel calibration error.

    It is `sqrt((1/B^2) sum_ij (r_i - c_i) (r_j - c_j) exp(-|c_i - c_j| / 0.4))`.
    Pairs of a sample with itself are in the sum, so small batches of a calibrated model are not near 0.

    Args:
        logits: Unnormalised scores, shape `(N, C)` or `(N, C, d1, ...)`.
        labels: Class indices or `ignore_index`, shape `(N,)` or `(N, d1, ...)`.
        reference_code: Leave out the square root, as the authors' code and the port that others use do.
        ignore_index: Label of samples that do not count.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: If shapes do not fit, labels are not integers, a label is out of range, or there are more than
            `MOST_PAIRED` samples.

    Source: Kumar et al. 2018, "Trainable calibration measures from kernel mean embeddings".

    >>> mmce(torch.zeros(1, 2), torch.tensor([0]))  # one sample, right, at confidence 1/2
    tensor(0.5000)
    """
    refuse_pairs("mmce", labels)
    batch = batch_samples(logits, labels, ignore_index)
    confidence, correct = batch.top()
    square = _kernel_square((correct - confidence) * batch.counted / batch.divisor, confidence)
    return square if reference_code else _root(square)


def mmce_weighted(logits: Tensor, labels: Tensor, *, reference_code: bool = False, ignore_index: int = -100) -> Tensor:
    """MMCE_w: MMCE in which the `m` correct and the `n` wrong samples have the same total weight.

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
    refuse_pairs("mmce_weighted", labels)
    batch = batch_samples(logits, labels, ignore_index)
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
    batch = batch_samples(logits, labels, ignore_index)
    confidence, correct = batch.top()
    return batch.mean(confidence - correct).abs()


def mdca(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """MDCA, DCA of every class: `(1/K) sum_k |mean_n p_nk - mean_n 1[y_n = k]|`.

    K counts the classes that some sample of the batch can have.

    With many classes and small batches most of it is the noise of the class counts. Args, returns and errors are
    those of `mmce`.

    Source: Hebbalaguppe et al. 2022, arXiv 2203.13834.
    """
    batch = batch_samples(logits, labels, ignore_index)
    share = batch.p.new_zeros(batch.p.shape[1]).index_add(0, batch.labels, batch.counted) / batch.divisor
    probability = (batch.p * batch.counted[:, None]).sum(dim=0) / batch.divisor
    return (probability - share).abs().sum() / batch.possible


# Binned calibration errors with soft bins


def soft_binned_ece(
    logits: Tensor, labels: Tensor, *, num_bins: int = 15, temperature: float = 0.01, ignore_index: int = -100
) -> Tensor:
    """SB-ECE, ECE in the L2 norm with soft bin membership: `sqrt(sum_j w_j (conf_j - acc_j)^2)`.

    A sample belongs to the bin around `xi_j = (2 j - 1) / (2 M)` by `softmax_j(-(c - xi_j)^2 / temperature)`. Means of
    a bin are its sums over its mass, or over 1e-5 if that is more.

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
    check_bins(num_bins, temperature=temperature)
    batch = batch_samples(logits, labels, ignore_index)
    confidence, correct = batch.top()
    anchors = (torch.arange(num_bins, dtype=confidence.dtype, device=confidence.device) + 0.5) / num_bins
    member = _membership(confidence, anchors, temperature) * batch.counted[:, None]
    mass = member.sum(dim=0)
    gap = (member * (confidence - correct)[:, None]).sum(dim=0) / mass.clamp_min(1e-5)
    return _root((mass / batch.divisor * gap.square()).sum())


def soft_label_binned_ece(
    logits: Tensor, labels: Tensor, *, num_bins: int = 15, temperature: float = 0.01, ignore_index: int = -100
) -> Tensor:
    """Label-binned SB-ECE: `(1/B) sum_nj u_nj (acc_j - c_n)^2`, each confidence against the accuracy of its soft bin.

    Memberships u are mixed with 1e-5 of a uniform one. As in the authors' code, and unlike in `soft_binned_ece`, the
    bins lie on [1/K, 1] and no root is taken. Args and errors are those of `soft_binned_ece`.

    Source: Karandikar et al. 2021, arXiv 2108.00106, eq. 12.
    """
    check_bins(num_bins, temperature=temperature)
    batch = batch_samples(logits, labels, ignore_index)
    confidence, correct = batch.top()
    lowest = 1 / batch.possible
    centers = (torch.arange(num_bins, dtype=confidence.dtype, device=confidence.device) + 0.5) / num_bins
    anchors = lowest + (1 - lowest) * centers
    member = (1 - 1e-5) * _membership(confidence, anchors, temperature) + 1e-5 / num_bins
    member = member * batch.counted[:, None]
    mass = member.sum(dim=0).clamp_min(torch.finfo(member.dtype).tiny)
    accuracy = (member * correct[:, None]).sum(dim=0) / mass
    return (member * (accuracy - confidence[:, None]).square()).sum() / batch.divisor


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
    """DECE: ECE in the L1 norm with soft bins and a differentiable accuracy.

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
    check_bins(num_bins, accuracy_slope=accuracy_slope, bin_temperature=bin_temperature)
    batch = batch_samples(logits, labels, ignore_index)
    p = batch.p
    of_label = p.gather(1, batch.labels[:, None])
    rank = 0.5 + (accuracy_slope * (p - of_label)).sigmoid().sum(dim=1)  # the label's own term is 1/2
    accuracy = (2 - rank).relu()
    confidence = p.amax(dim=1)
    steps = torch.arange(num_bins, dtype=p.dtype, device=p.device)
    heights = confidence[:, None] * steps - steps.cumsum(0) / num_bins  # less c, which the softmax does not see
    member = ((heights / bin_temperature).softmax(dim=1) + 1e-6) / (1 + num_bins * 1e-6)
    gaps = member * ((accuracy - confidence) * batch.counted)[:, None]
    return gaps.sum(dim=0).abs().sum() / batch.divisor
