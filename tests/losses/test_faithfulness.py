"""AdaFocal over a whole run beside a transcription of the paper's formulas in plain Python."""

import copy
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from hf_adafocal import AdaFocalLoss, calibrate

EPOCHS, BATCH, BINS = 10, 32, 15
LAMBDA, SWITCH, GAMMA_MIN, GAMMA_MAX = 1.0, 0.2, -2.0, 20.0  # main.py of the authors' code


class PlainAdaFocal:
    """Ghosh et al. 2022, arXiv 2211.11838, one sample at a time: lists of numbers, no tensor but the logits."""

    def __init__(self):
        self.edges = [b / BINS for b in range(BINS + 1)]
        self.gammas = [1.0] * BINS

    def gamma_of(self, p):
        """Bins of the probability of the true class: the first from minus infinity, the last to infinity."""
        if p < self.edges[1]:
            return self.gammas[0]
        for b in range(1, BINS - 1):
            if self.edges[b] <= p < self.edges[b + 1]:
                return self.gammas[b]
        return self.gammas[-1]

    def loss(self, logits, labels):
        """Sum over the batch of `-(1 - s p + 1e-20)^|gamma| log p`."""
        total = 0.0
        for row, label in zip(logits, labels.tolist(), strict=True):
            weights = [torch.exp(z - max(row.tolist())) for z in row]
            p = weights[label] / sum(weights)
            gamma = self.gamma_of(p.item())
            sign = (gamma > 0) - (gamma < 0)
            total = total - (1 - sign * p + 1e-20) ** abs(gamma) * torch.log(p)
        return total

    def update(self, logits, labels):
        """Equal-mass bins of the top confidences of held-out data, their gaps, the rule, the new edges."""
        samples = []
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
            weights = [math.exp(z - max(row)) for z in row]
            predicted = row.index(max(row))
            samples.append((weights[predicted] / sum(weights), predicted == label))
        samples.sort()
        self.edges = []
        for b in range(BINS + 1):
            place = b * len(samples) / BINS
            below = min(int(place), len(samples) - 1)
            above = min(below + 1, len(samples) - 1)
            low, high = samples[below][0], samples[above][0]
            self.edges.append(low + (place - below) * (high - low) if above > below else low)
        for b in range(BINS):
            lower, upper = self.edges[b], self.edges[b + 1]
            inside = [s for s in samples if (lower < s[0] <= upper) or (b == 0 and s[0] == lower)]
            if not inside:
                continue
            gap = sum(c for c, _ in inside) / len(inside) - sum(right for _, right in inside) / len(inside)
            gamma = self.gammas[b]
            gamma = gamma * math.exp(LAMBDA * gap) if gamma > 0 else gamma * math.exp(-LAMBDA * gap)
            if abs(gamma) < SWITCH:
                gamma = -SWITCH if gamma > 0 else SWITCH
            self.gammas[b] = max(GAMMA_MIN, min(GAMMA_MAX, gamma))


def test_over_ten_epochs_tables_edges_and_losses_are_those_of_the_papers_formulas():
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images) / 16, torch.tensor(labels)
    noisy = torch.rand(1797) < 0.15  # so that confidence and accuracy part
    labels = labels.where(~noisy, torch.randint(10, (1797,)))
    train, held_out = (images[:224], labels[:224]), (images[1000:1250], labels[1000:1250])
    ours_model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
    their_model = copy.deepcopy(ours_model)
    ours, theirs = AdaFocalLoss(reduction="sum").double(), PlainAdaFocal()
    ours.reset()  # the edges in float64
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.02) for model in (ours_model, their_model)]
    signs = set()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train[0])).split(BATCH):
            pairs = ((ours_model, ours), (their_model, theirs.loss))
            losses = [loss(model(train[0][rows]), train[1][rows]) for model, loss in pairs]
            assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-9)
            for loss, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        batches = list(zip(*(values.split(100) for values in held_out), strict=True))
        calibrate(ours_model, batches, ours)
        with torch.no_grad():
            theirs.update(their_model(held_out[0]), held_out[1])
        assert ours.edges.tolist() == pytest.approx(theirs.edges, abs=1e-9)
        assert ours.gammas.tolist() == pytest.approx(theirs.gammas, abs=1e-9)
        signs |= {gamma > 0 for gamma in theirs.gammas}
    assert len(set(theirs.gammas)) > 10 and signs == {True, False}  # it has moved, to inverse focal loss too
