import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_adafocal.losses import AdaFocalLoss, focal_kernel
from hf_adafocal.losses.cross_entropy_kernel import cross_entropy
from hf_adafocal.losses.focal_kernel import focal, modulate

GAMMAS = torch.tensor([-2.0, -0.5, 0.0, 0.3, 1.0, 3.0, 20.0, -1.0, 0.7, 2.0, 5.0, -0.2])
KINDS = {"number": 2.5, "below zero": -1.5, "below one": 0.5, "tensor": GAMMAS, "function": lambda p: 3 - 5 * p}


def batch(scale=2.0, dtype=torch.float64):
    logits, labels = scale * torch.randn(12, 5, dtype=dtype), torch.randint(5, (12,))
    labels[4] = -100
    return logits.requires_grad_(), labels


def by_autograd(logits, labels, gamma):
    return modulate(cross_entropy(logits, labels, -100), gamma)


def noted(monkeypatch):
    calls, apply = [], focal_kernel._FocalLoss.apply
    monkeypatch.setattr(focal_kernel._FocalLoss, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


@pytest.mark.parametrize("kind", KINDS)
class TestWrittenSlope:
    @pytest.mark.parametrize("scale", [0.1, 2.0, 50.0])
    @pytest.mark.parametrize("summed", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_value_and_gradient_are_those_of_autograd(self, kind, scale, summed, dtype, monkeypatch):
        calls = noted(monkeypatch)
        (logits, labels), gamma = batch(scale, dtype), KINDS[kind]
        slope = torch.rand(() if summed else (12,), dtype=dtype)
        ours, theirs = focal(logits, labels, gamma, -100, summed), by_autograd(logits, labels, gamma)
        theirs = theirs.sum() if summed else theirs
        assert calls == [1] and torch.equal(ours, theirs)
        found, expected = (torch.autograd.grad(loss, logits, slope)[0] for loss in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == torch.float32 else 1e-11, atol=1e-30)

    def test_gradients_of_higher_order_are_those_of_autograd(self, kind):
        (logits, labels), gamma = batch(), KINDS[kind]

        def third(loss):
            value = loss.sum()
            for _ in range(3):
                (slopes,) = torch.autograd.grad(value, logits, create_graph=True)
                value = slopes.pow(2).sum()
            return slopes

        torch.testing.assert_close(
            third(focal(logits, labels, gamma, -100)), third(by_autograd(logits, labels, gamma))
        )
        torch.testing.assert_close(
            third(focal(logits, labels, gamma, -100, True)), third(by_autograd(logits, labels, gamma))
        )
        if kind != "function":  # which carries no gradient by itself
            assert torch.autograd.gradcheck(lambda z: focal(z, labels, gamma, -100), logits)
            assert torch.autograd.gradgradcheck(lambda z: focal(z, labels, gamma, -100), logits)

    def test_transformed_functions_agree(self, kind):
        (logits, labels), gamma = batch(), KINDS[kind]
        ours = torch.func.grad(lambda z: focal(z, labels, gamma, -100, True))(logits.detach())
        expected = torch.autograd.grad(by_autograd(logits, labels, gamma).sum(), logits)[0]
        torch.testing.assert_close(ours, expected)

    def test_twice_through_one_graph_is_twice_the_same(self, kind):
        logits, labels = batch()
        loss = focal(logits, labels, KINDS[kind], -100, True)
        (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert torch.equal(first, torch.autograd.grad(loss, logits)[0])


class TestWhere:
    def test_a_gamma_that_is_learnt_gets_its_gradient(self, monkeypatch):
        calls = noted(monkeypatch)
        logits, labels = batch()
        for gamma in (torch.tensor(2.0, requires_grad=True), torch.nn.Parameter(torch.full((12,), 0.5))):
            focal(logits, labels, gamma, -100, True).backward()
            assert gamma.grad.isfinite().all() and gamma.grad.any()
            learnt = gamma.detach().clone().requires_grad_()
            focal(logits, labels, lambda p, learnt=learnt: learnt * torch.ones_like(p), -100, True).backward()
            torch.testing.assert_close(learnt.grad, gamma.grad)
        assert calls == []

    def test_dense_targets_and_logits_without_gradient_go_through_autograd(self, monkeypatch):
        calls = noted(monkeypatch)
        focal(torch.randn(2, 5, 3, requires_grad=True), torch.zeros(2, 3, dtype=torch.long), 2.0, -100)
        focal(torch.randn(2, 5), torch.zeros(2, dtype=torch.long), 2.0, -100)
        with torch.no_grad():
            focal(torch.randn(2, 5, requires_grad=True), torch.zeros(2, dtype=torch.long), 2.0, -100)
        assert calls == []

    def test_a_loss_that_is_trained_has_a_written_slope(self, monkeypatch):
        calls = noted(monkeypatch)
        AdaFocalLoss()(*batch())
        AdaFocalLoss(weight=torch.ones(5), reduction="sum")(*batch())
        assert calls == [1, 1]


class TestRoundingBelowZero:
    @pytest.mark.parametrize("gamma", [0.5, 2.0, -0.5, torch.tensor([0.5]), torch.tensor([-2.0])], ids=str)
    @pytest.mark.parametrize("ce", [-1e-7, -0.0, 0.0, 1e-40])
    def test_a_cross_entropy_that_rounding_put_below_zero_is_finite(self, ce, gamma):
        ce = torch.tensor([ce], requires_grad=True)
        loss = modulate(ce, gamma)
        (slope,) = torch.autograd.grad(loss, ce)
        assert loss.isfinite().all() and slope.isfinite().all() and loss.abs() <= 4e-7

    @given(st.floats(-(2.0**-20), 200, width=32), st.floats(-5, 20, width=32))
    def test_number_and_tensor_agree_everywhere(self, ce, gamma):
        ce = torch.tensor([ce])
        number, tensor = modulate(ce, gamma), modulate(ce, torch.tensor([gamma]))
        assert number.isfinite().all()
        torch.testing.assert_close(number, tensor)
