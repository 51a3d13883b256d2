"""Oracles: slow, obvious, one sample at a time, and independent of the package."""

import math

import numpy as np


def softmax(logits):
    highest = max(logits)
    weights = [math.exp(z - highest) for z in logits]
    return [w / sum(weights) for w in weights]


def focal_loss(logits, label, gamma):
    """`-(1 - s p)^|gamma| log p` of one sample, `s = sign(gamma)`."""
    highest = max(logits)
    log_p = logits[label] - highest - math.log(sum(math.exp(z - highest) for z in logits))
    base = 1 + math.exp(log_p) if gamma < 0 else 1 - math.exp(log_p)
    return -(base ** abs(gamma)) * log_p


def looked_up_gamma(p, edges, gammas):
    """Bins are [lower, upper); what lies below the first or above the last edge belongs to that end."""
    if p < edges[1]:
        return gammas[0]
    if p >= edges[-2]:
        return gammas[-1]
    for lower, upper, gamma in zip(edges[:-1], edges[1:], gammas, strict=True):
        if lower <= p < upper:
            return gamma


def updated_gamma(gamma, gap, lambda_=1.0, switch=0.2, gamma_min=-2.0, gamma_max=20.0):
    gamma = gamma * math.exp(lambda_ * gap) if gamma > 0 else gamma * math.exp(-lambda_ * gap)
    if abs(gamma) < switch:
        gamma = -switch if gamma > 0 else switch
    return min(max(gamma, gamma_min), gamma_max)


def equal_width_edges(num_bins):
    return [b / num_bins for b in range(num_bins + 1)]


def equal_mass_edges(confidence, num_bins):
    """The sorted confidences read at position `b N / num_bins`, linear in between, the last one from `N - 1` on."""
    ranked, edges = sorted(confidence), []
    for b in range(num_bins + 1):
        below, part = divmod(b * len(ranked), num_bins)
        part /= num_bins
        if below >= len(ranked) - 1:
            edges.append(ranked[-1])
        else:
            edges.append(ranked[below] + part * (ranked[below + 1] - ranked[below]))
    return edges


def bins(confidence, correct, edges):
    """`(count, mean confidence, accuracy)` of each bin `(lower, upper]`, the first one closed; zeros if empty."""
    members = [[] for _ in edges[1:]]
    for pair in zip(confidence, correct, strict=True):
        for b, upper in enumerate(edges[1:]):
            if pair[0] <= upper or b == len(members) - 1:
                members[b].append(pair)
                break
    return [
        (len(m), sum(c for c, _ in m) / len(m), sum(float(r) for _, r in m) / len(m)) if m else (0, 0.0, 0.0)
        for m in members
    ]


def calibration_error(confidence, correct, edges):
    return sum(n * abs(c - a) for n, c, a in bins(confidence, correct, edges)) / len(confidence)


def largest_gap(confidence, correct, edges):
    return max(abs(c - a) for _, c, a in bins(confidence, correct, edges))


def top_label(probabilities, labels):
    """Confidence of the predicted class, the first of several equals, and whether it is the label."""
    pairs = []
    for row, label in zip(probabilities, labels, strict=True):
        predicted = 0
        for k in range(len(row)):
            if row[k] > row[predicted]:
                predicted = k
        pairs.append((float(row[predicted]), predicted == label))
    return [c for c, _ in pairs], [r for _, r in pairs]


def expected_calibration_error(probabilities, labels, num_bins):
    return calibration_error(*top_label(probabilities, labels), equal_width_edges(num_bins))


def maximum_calibration_error(probabilities, labels, num_bins):
    return largest_gap(*top_label(probabilities, labels), equal_width_edges(num_bins))


def adaptive_calibration_error(probabilities, labels, num_bins):
    confidence, correct = top_label(probabilities, labels)
    return calibration_error(confidence, correct, equal_mass_edges(confidence, num_bins))


def classwise_calibration_error(probabilities, labels, num_bins):
    edges, classes = equal_width_edges(num_bins), range(len(probabilities[0]))
    errors = [calibration_error([row[k] for row in probabilities], [y == k for y in labels], edges) for k in classes]
    return sum(errors) / len(errors)


def brier_score(probabilities, labels):
    total = 0.0
    for row, label in zip(probabilities, labels, strict=True):
        total += sum((p - (k == label)) ** 2 for k, p in enumerate(row))
    return total / len(labels)


def negative_log_likelihood(probabilities, labels):
    return -sum(math.log(row[label]) for row, label in zip(probabilities, labels, strict=True)) / len(labels)


def best_temperature(logits, labels):
    """Where the slope of the NLL in `1 / T` is 0, by halving: that NLL is convex, so its slope only rises."""
    of_label = logits[np.arange(len(labels)), labels]
    low, high = 1e-4, 1e4
    for _ in range(80):
        middle = math.sqrt(low * high)
        weights = np.exp(middle * (logits - logits.max(axis=1, keepdims=True)))
        mean_logit = (weights * logits).sum(axis=1) / weights.sum(axis=1)
        if (mean_logit - of_label).mean() < 0:
            low = middle
        else:
            high = middle
    return 1 / middle
