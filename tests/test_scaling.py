import math

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hf_adafocal.scaling import LOG_TEMPERATURE_BOUND, fit_temperature

TRUE_TEMPERATURES = [0.297, 0.812, 1.0, 3.03, 10.0, 51.2]


def samples(true_temperature, size=5000, classes=20):
    """Logits and labels drawn from `softmax(logits / true_temperature)`."""
    generator = np.random.default_rng(0)
    calibrated = 2 * generator.normal(size=(size, classes))
    labels = (calibrated + generator.gumbel(size=calibrated.shape)).argmax(axis=1)
    return calibrated * true_temperature, labels


def nll(logits, labels, temperature=1.0):
    return F.cross_entropy(torch.as_tensor(logits) / temperature, torch.as_tensor(labels)).item()


class TestFitTemperature:
    @pytest.mark.parametrize("true_temperature", TRUE_TEMPERATURES)
    def test_it_finds_the_optimum(self, true_temperature):
        logits, labels = samples(true_temperature)
        found, best = fit_temperature(logits, labels), reference.best_temperature(logits, labels)
        assert best == pytest.approx(true_temperature, rel=0.05)
        assert found == pytest.approx(best, rel=1e-4)
        assert nll(logits, labels, found) <= nll(logits, labels, best) + 1e-9

    @pytest.mark.parametrize("true_temperature", TRUE_TEMPERATURES)
    def test_no_temperature_of_a_fine_grid_is_better(self, true_temperature):
        logits, labels = samples(true_temperature, size=500)
        found = nll(logits, labels, fit_temperature(logits, labels))
        assert all(found <= nll(logits, labels, t) + 1e-9 for t in np.geomspace(0.05, 120, 200))

    @given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 50), size=st.integers(1, 30))
    def test_it_is_positive_and_never_worse_than_one(self, seed, scale, size):
        generator = np.random.default_rng(seed)
        logits, labels = scale * generator.normal(size=(size, 3)), generator.integers(3, size=size)
        found = fit_temperature(logits, labels)
        assert math.exp(-LOG_TEMPERATURE_BOUND) <= found <= math.exp(LOG_TEMPERATURE_BOUND)
        assert nll(logits, labels, found) <= nll(logits, labels)

    def test_it_scales_with_the_logits(self):
        logits, labels = samples(2.0, size=500)
        assert fit_temperature(3 * logits, labels) == pytest.approx(3 * fit_temperature(logits, labels), rel=1e-4)

    def test_logits_that_are_always_wrong_get_the_highest_temperature(self):
        found = fit_temperature(torch.tensor([[5.0, 0.0]] * 10), torch.ones(10, dtype=torch.long))
        assert found == pytest.approx(math.exp(LOG_TEMPERATURE_BOUND), rel=1e-3)

    @pytest.mark.parametrize("margin", [0.1, 1.0, 10.0, 100.0])
    def test_where_every_sample_is_right_no_temperature_fits_best_and_it_is_one(self, margin):
        labels = torch.arange(5).repeat(4)
        with pytest.warns(UserWarning, match="All 20 held-out samples are classified correctly.*T stays 1"):
            assert fit_temperature(margin * F.one_hot(labels, 5), labels) == 1.0

    def test_one_mistake_is_enough_for_a_finite_temperature(self):
        labels = torch.arange(5).repeat(4)
        logits = F.one_hot(labels, 5).double()
        logits[0] = torch.tensor([0.9, 1.0, 0.0, 0.0, 0.0])
        assert 0.01 < fit_temperature(logits, labels) < 0.2

    @pytest.mark.parametrize("labels", [[0.0, 1.0], [0, 3], [-100, 1]])
    def test_labels_that_are_no_classes_are_an_error(self, labels):
        with pytest.raises(ValueError, match=r"labels must be integers in \[0, 3\)"):
            fit_temperature(torch.zeros(2, 3), torch.tensor(labels))

    def test_where_no_temperature_helps_it_is_one(self):
        assert fit_temperature(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])) == 1.0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_tensors_of_any_dtype_are_computed_in_float64(self, dtype):
        logits, labels = samples(3.0, size=500)
        logits = torch.tensor(logits).to(dtype)
        assert fit_temperature(logits, torch.tensor(labels)) == fit_temperature(logits.double(), torch.tensor(labels))

    def test_it_is_a_plain_number(self):
        assert type(fit_temperature(*samples(2.0, size=50))) is float

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_logit_that_is_not_finite_is_an_error(self, value):
        with pytest.raises(ValueError, match="must be finite, found NaN or infinite"):
            fit_temperature(torch.tensor([[0.0, 1.0], [value, 0.0]]), torch.tensor([0, 1]))

    @pytest.mark.parametrize(
        ("logits", "labels"),
        [((4, 3), (3,)), ((4, 3), (4, 1)), ((4,), (4,)), ((2, 3, 4), (2, 3)), ((0, 3), (0,))],
        ids=str,
    )
    def test_shapes_that_do_not_fit_are_an_error_that_names_both(self, logits, labels):
        with pytest.raises(ValueError) as error:
            fit_temperature(torch.zeros(logits), torch.zeros(labels, dtype=torch.long))
        assert f"found {logits} and {labels}" in str(error.value)
