"""A variable number of options: a class that no sample can have changes no loss, no metric and no temperature."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_names import ANY_SHAPE

from hf_adafocal.losses.registry import LOSSES
from hf_adafocal.metrics import calibration_report, softmax
from hf_adafocal.scaling import best_temperature, fit_temperature, fit_vector_scaling, nll_on_grid
from hf_adafocal.training.sample_rows import sample_metrics, sample_rows

MASKS = [-np.inf, -1e9, float(torch.finfo(torch.float32).min)]


def rows(seed, size, options, padding, mask):
    """Logits of samples with the same options, the same with columns that nobody has, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(size, options, generator=generator)
    labels = torch.randint(0, options, (size,), generator=generator)
    padded = torch.cat([logits, torch.full((size, padding), mask)], dim=1)
    return logits.requires_grad_(), padded.requires_grad_(), labels


@pytest.mark.parametrize("name", ANY_SHAPE)
@settings(max_examples=25)  # for each of the losses
@given(
    st.integers(0, 10**6), st.integers(2, 20), st.integers(2, 5), st.integers(1, 4), st.sampled_from(MASKS),
)  # fmt: skip
def test_options_that_no_sample_has_change_neither_value_nor_gradient(name, seed, size, options, padding, mask):
    logits, padded, labels = rows(seed, size, options, padding, mask)
    found, expected = LOSSES[name]()(padded, labels), LOSSES[name]()(logits, labels)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    (gradient,) = torch.autograd.grad(found, padded)
    assert gradient.isfinite().all() and not gradient[:, options:].any()
    torch.testing.assert_close(gradient[:, :options], torch.autograd.grad(expected, logits)[0], atol=1e-6, rtol=1e-4)


@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(2, 5), st.integers(1, 4), st.sampled_from(MASKS))
def test_metrics_and_temperatures_are_those_of_the_options(seed, size, options, padding, mask):
    logits, padded, labels = (part.detach() for part in rows(seed, size, options, padding, mask))
    assert sample_metrics(sample_rows(padded, labels).numpy()) == pytest.approx(
        sample_metrics(sample_rows(logits, labels).numpy()), abs=1e-6
    )
    found = calibration_report(softmax(padded.numpy()), labels.numpy())
    expected = calibration_report(softmax(logits.numpy()), labels.numpy())
    for metric in ("accuracy", "nll", "brier", "ece", "ada_ece"):
        assert found[metric] == pytest.approx(expected[metric], abs=1e-6)
    with_padding, without = (best_temperature(nll_on_grid(part, labels), size) for part in (padded, logits))
    assert with_padding == pytest.approx(without, rel=1e-4)
    assert fit_temperature(padded, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-4)


def test_a_number_of_options_for_each_row():
    logits = torch.tensor([[2.0, 0.0, -torch.inf], [1.0, 0.0, 1.0], [0.0, 3.0, -torch.inf]])
    labels = torch.tensor([1, 2, 1])
    nll = [np.log(1 + np.exp(2)), np.log(2 * np.e + 1) - 1, np.log(1 + np.exp(-3))]
    assert sample_rows(logits, labels)[:, 2].tolist() == pytest.approx(nll)
    assert LOSSES["cross_entropy"]()(logits, labels).item() == pytest.approx(np.mean(nll))
    assert fit_temperature(logits, labels) == pytest.approx(fit_temperature(logits.clamp_min(-1e4), labels), rel=1e-5)


def test_a_label_that_a_sample_cannot_have_and_a_vector_scaling_are_refused():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]] * 2)
    with pytest.raises(ValueError, match="or -inf at a label"):
        fit_temperature(logits, torch.tensor([2, 0]))
    with pytest.raises(ValueError, match="found logits of -inf: fit a temperature"):
        fit_vector_scaling(logits, torch.tensor([1, 0]))
