import json
import math
from functools import cache

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hf_adafocal.scaling import fit as scaling
from hf_adafocal.scaling.fit import (
    LOG_TEMPERATURE_BOUND,
    Scaling,
    fit_temperature,
    fit_temperature_scaling,
    fit_vector_scaling,
)

TRUE_TEMPERATURES = [0.297, 0.812, 1.0, 3.03, 10.0, 51.2]


def samples(true_temperature, size=5000, classes=20):
    """Logits and labels drawn from `softmax(logits / true_temperature)`."""
    generator = np.random.default_rng(0)
    calibrated = 2 * generator.normal(size=(size, classes))
    labels = (calibrated + generator.gumbel(size=calibrated.shape)).argmax(axis=1)
    return calibrated * true_temperature, labels


def nll(logits, labels, temperature=1.0):
    return F.cross_entropy(torch.as_tensor(logits) / temperature, torch.as_tensor(labels)).item()


def bent_samples(scale, bias, size=5000, seed=0):
    """Logits and labels drawn from `softmax(logits * scale + bias)`."""
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(size, len(scale)))
    labels = (logits * scale + bias + generator.gumbel(size=logits.shape)).argmax(axis=1)
    return logits, labels


@cache
def digits(seed, train_size=300):
    """Held-out logits and labels of an over-confident logistic regression on real digits, and the model itself."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    pixels += np.random.default_rng(seed).normal(0, 5, pixels.shape)
    train, held_out, train_labels, held_out_labels = train_test_split(
        pixels, labels, train_size=train_size, stratify=labels, random_state=seed
    )
    model = LogisticRegression(C=100.0, max_iter=500).fit(train, train_labels)
    return model, held_out, model.decision_function(held_out), held_out_labels


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

    @pytest.mark.parametrize("margin", [0.1, 2.0, 10.0, 100.0])
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

    @pytest.mark.parametrize("seed", range(3))
    def test_it_is_scikit_learns_temperature_on_real_digits(self, seed):
        from sklearn.calibration import CalibratedClassifierCV

        FrozenEstimator = pytest.importorskip("sklearn.frozen").FrozenEstimator
        model, pixels, logits, labels = digits(seed)
        try:
            calibrated = CalibratedClassifierCV(FrozenEstimator(model), method="temperature").fit(pixels, labels)
        except ValueError:  # the name of the method is checked there
            pytest.skip("this scikit-learn is older than its temperature scaling (1.8)")
        (theirs,) = [1 / fold.calibrators[0].beta_ for fold in calibrated.calibrated_classifiers_]
        ours = fit_temperature(logits, labels)
        assert ours > 1.2
        assert ours == pytest.approx(theirs, rel=1e-3)
        assert nll(logits, labels, ours) <= nll(logits, labels, theirs) + 1e-9

    def test_a_search_that_goes_astray_is_refused_with_a_warning(self, monkeypatch):
        class Astray:
            x, fun = 3.0, 9.9

        monkeypatch.setattr(scaling, "minimize_scalar", lambda *args, **kwargs: Astray)
        with pytest.warns(UserWarning, match="temperature moves the NLL .* to 9.9.*refused"):
            assert fit_temperature(*samples(3.0, size=50)) == 1.0

    def test_it_is_a_plain_number(self):
        assert type(fit_temperature(*samples(2.0, size=50))) is float

    @pytest.mark.parametrize(("value", "label"), [(math.nan, 1), (math.inf, 1), (-math.inf, 0)])
    def test_a_logit_that_is_not_finite_is_an_error(self, value, label):
        with pytest.raises(ValueError, match="must be finite, but for -inf of classes"):
            fit_temperature(torch.tensor([[0.0, 1.0], [value, 0.0]]), torch.tensor([0, label]))

    @pytest.mark.parametrize(
        ("logits", "labels"),
        [((4, 3), (3,)), ((4, 3), (4, 1)), ((4,), (4,)), ((2, 3, 4), (2, 3)), ((0, 3), (0,))],
        ids=str,
    )
    def test_shapes_that_do_not_fit_are_an_error_that_names_both(self, logits, labels):
        with pytest.raises(ValueError) as error:
            fit_temperature(torch.zeros(logits), torch.zeros(labels, dtype=torch.long))
        assert f"found {logits} and {labels}" in str(error.value)


class TestFitTemperatureScaling:
    @pytest.mark.parametrize("true_temperature", TRUE_TEMPERATURES)
    def test_it_is_the_temperature_and_what_it_was_worth(self, true_temperature):
        logits, labels = samples(true_temperature, size=500)
        found = fit_temperature_scaling(logits, labels)
        temperature = fit_temperature(logits, labels)
        assert (found.method, found.bias, found.num_samples) == ("temperature", 0.0, 500)
        assert found.scale == pytest.approx(1 / temperature)
        assert found.nll_before == pytest.approx(nll(logits, labels))
        assert found.nll_after == pytest.approx(nll(logits, labels, temperature))

    def test_where_every_sample_is_right_it_is_the_identity_with_a_warning(self):
        with pytest.warns(UserWarning, match="All 3 held-out samples"):
            found = fit_temperature_scaling(2 * torch.eye(3), torch.arange(3))
        assert (found.scale, found.bias) == (1.0, 0.0) and found.nll_after == found.nll_before


class TestFitVectorScaling:
    def penalised_nll(self, factors, bias, temperature, logits, labels):
        """The documented objective, on autograd."""
        scaled = torch.as_tensor(logits) / temperature * factors + bias
        distance = ((factors - 1) ** 2).sum() + (bias**2).sum()
        return F.cross_entropy(scaled, torch.as_tensor(labels), reduction="sum") + distance / 2

    @pytest.mark.parametrize("size", [60, 5000])
    def test_no_step_in_any_direction_lowers_the_objective(self, size):
        logits, labels = bent_samples([1.0, 0.5, 2.0, 0.2], [0.0, 1.0, -1.0, 0.5], size)
        found, temperature = fit_vector_scaling(logits, labels), fit_temperature(logits, labels)
        factors = (torch.tensor(found.scale).double() * temperature).requires_grad_()
        bias = torch.tensor(found.bias).double().requires_grad_()
        self.penalised_nll(factors, bias, temperature, logits, labels).backward()
        assert factors.grad.abs().max() / size < 1e-5 and bias.grad.abs().max() / size < 1e-5

    def test_it_finds_the_numbers_that_the_labels_were_drawn_from(self):
        scale, bias = np.array([1.0, 0.5, 2.0, -0.2]), np.array([0.0, 1.0, -1.0, 0.5])
        logits, labels = bent_samples(scale, bias, size=50_000)
        found = fit_vector_scaling(logits, labels)
        np.testing.assert_allclose(found.scale, scale, atol=0.05)
        np.testing.assert_allclose(np.subtract(found.bias, np.mean(found.bias)), bias - bias.mean(), atol=0.05)

    def test_where_one_temperature_is_the_truth_it_is_close_to_it(self):
        logits, labels = samples(3.03, size=20_000, classes=4)
        found = fit_vector_scaling(logits, labels)
        np.testing.assert_allclose(found.scale, 1 / 3.03, rtol=0.05)
        np.testing.assert_allclose(found.bias, 0, atol=0.1)

    @pytest.mark.parametrize("seed", range(3))
    def test_it_is_never_worse_than_the_temperature_on_the_samples_of_the_fit(self, seed):
        _, _, logits, labels = digits(seed)
        vector, temperature = fit_vector_scaling(logits, labels), fit_temperature_scaling(logits, labels)
        assert vector.nll_after < temperature.nll_after < temperature.nll_before == vector.nll_before
        assert vector.nll_after == pytest.approx(nll(vector.apply(logits), labels))
        assert (vector.method, vector.num_samples) == ("vector", len(labels))

    @given(seed=st.integers(0, 10_000), spread=st.floats(0.01, 50), size=st.integers(6, 30))
    def test_it_never_raises_the_nll(self, seed, spread, size):
        generator = np.random.default_rng(seed)
        logits = spread * generator.normal(size=(size, 3))
        labels = np.concatenate([np.arange(3), generator.integers(3, size=size - 3)])
        if (logits.argmax(axis=1) == labels).all():
            logits[0] = -logits[0]
        found = fit_vector_scaling(logits, labels)
        assert found.nll_after <= found.nll_before and np.isfinite(found.scale + found.bias).all()

    def test_it_scales_with_the_logits(self):
        logits, labels = bent_samples([1.0, 0.5, 2.0], [0.0, 1.0, -1.0], 500)
        found, tripled = fit_vector_scaling(logits, labels), fit_vector_scaling(3 * logits, labels)
        np.testing.assert_allclose(np.multiply(tripled.scale, 3), found.scale, rtol=1e-3)
        np.testing.assert_allclose(tripled.bias, found.bias, atol=1e-3)

    def test_a_class_that_is_always_right_keeps_finite_numbers(self):
        logits, labels = bent_samples([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], 200)
        logits[:, 2] = np.where(labels == 2, 40.0, -40.0)
        found = fit_vector_scaling(logits, labels)
        temperature = fit_temperature(logits, labels)
        assert 0.5 < found.scale[2] * temperature < 20 and abs(found.bias[2]) < 5
        assert found.nll_after < found.nll_before

    def test_a_class_without_sample_leaves_the_temperature_and_a_warning(self):
        logits, labels = bent_samples([1.0, 0.5, 2.0], [0.0, 1.0, -1.0], 300)
        logits = np.insert(logits, 1, -3.0, axis=1)
        labels = np.where(labels > 0, labels + 1, 0)
        with pytest.warns(UserWarning, match=r"300 held-out samples hold none of class \[1\].*one temperature"):
            found = fit_vector_scaling(logits, labels)
        assert found == fit_temperature_scaling(logits, labels) and found.method == "temperature"

    def test_where_every_sample_is_right_it_is_the_identity_with_a_warning(self):
        with pytest.warns(UserWarning, match="All 3 held-out samples"):
            found = fit_vector_scaling(2 * torch.eye(3), torch.arange(3))
        assert (found.scale, found.bias) == (1.0, 0.0)

    @pytest.mark.parametrize("factor", [-5.0, 0.0, math.nan])
    def test_a_search_that_goes_astray_is_refused_with_a_warning(self, monkeypatch, factor):
        class Astray:
            x = np.array([factor] * 3 + [0.0] * 3)

        monkeypatch.setattr(scaling, "minimize", lambda *args, **kwargs: Astray)
        logits, labels = samples(3.0, size=200, classes=3)
        with pytest.warns(UserWarning, match="vector scaling moves the NLL .*refused"):
            found = fit_vector_scaling(logits, labels)
        assert (found.scale, found.bias) == (1.0, 0.0)
        assert found.nll_after == found.nll_before == pytest.approx(nll(logits, labels))

    def test_labels_that_are_no_classes_are_an_error(self):
        with pytest.raises(ValueError, match=r"labels must be integers in \[0, 3\)"):
            fit_vector_scaling(torch.zeros(2, 3), torch.tensor([0, 3]))


class TestScaling:
    vector = Scaling((0.5, -2.0), (1.0, 0.25), 0.7, 0.6, 40)

    def test_logits_are_multiplied_then_shifted(self):
        np.testing.assert_array_equal(self.vector.apply(np.array([[2.0, 3.0], [0.0, 1.0]])), [[2, -5.75], [1, -1.75]])
        np.testing.assert_array_equal(Scaling(0.5).apply(np.array([[2.0, 3.0]])), [[1.0, 1.5]])

    @pytest.mark.parametrize("shape", [(2,), (4, 2), (3, 4, 2)])
    def test_classes_are_the_last_axis(self, shape):
        assert self.vector.apply(torch.zeros(shape)).shape == shape
        assert torch.equal(self.vector.apply(torch.zeros(shape))[..., 0], torch.ones(shape[:-1]))

    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
    )
    def test_half_precision_is_computed_in_float32(self, dtype, expected):
        assert Scaling(0.3).apply(torch.ones(2, 3, dtype=dtype)).dtype == expected

    def test_a_tensor_stays_a_tensor_with_its_gradient_and_an_array_an_array(self):
        logits = torch.ones(2, requires_grad=True)
        self.vector.apply(logits).sum().backward()
        assert logits.grad.tolist() == [0.5, -2.0]
        assert type(self.vector.apply(np.ones(2))) is np.ndarray

    @pytest.mark.parametrize("found", [vector, Scaling(0.25, 0.0, 1.0, 0.5, 9), Scaling(np.array([1.0, 2.0]))])
    def test_it_survives_json(self, found):
        record = found.to_dict()
        assert json.loads(json.dumps(record)) == record and Scaling.from_dict(record) == found

    def test_its_record_names_method_and_temperature(self):
        assert Scaling(0.25).to_dict()["temperature"] == 4.0
        assert (Scaling(0.25).method, self.vector.method) == ("temperature", "vector")
        assert "temperature" not in self.vector.to_dict()

    def test_a_record_without_scale_is_an_error(self):
        with pytest.raises(ValueError, match="Expected a scaling as Scaling.to_dict writes it, found {'T': 2}"):
            Scaling.from_dict({"T": 2})

    @pytest.mark.parametrize(
        ("scale", "bias", "match"),
        [
            (math.nan, 0.0, "scale must be a finite number"),
            ((1.0, math.inf), 0.0, "scale must be a finite number"),
            (((1.0,),), 0.0, "scale must be a finite number or one per class"),
            (1.0, (0.0, math.nan), "bias must be a finite number"),
            (0.0, 0.0, "scale must not be 0"),
            ((1.0, 0.0), 0.0, "scale must not be 0"),
            ((1.0, 2.0), (0.0, 0.0, 0.0), "one length, found 2 and 3"),
        ],
    )
    def test_numbers_that_scale_nothing_are_an_error(self, scale, bias, match):
        with pytest.raises(ValueError, match=match):
            Scaling(scale, bias)


class TestSupport:
    @pytest.mark.parametrize(("size", "supported"), [(192, False), (193, True)])
    def test_a_temperature_needs_twice_the_gain_to_exceed_chi_square(self, size, supported):
        # The 95 % quantile of chi-square with one degree of freedom is 3.8415; 2 n 0.01 passes it from 193 on.
        assert Scaling(0.8, 0.0, 0.50, 0.49, size).is_supported() is supported

    def test_a_vector_scaling_has_a_degree_of_freedom_for_each_number(self):
        # chi-square with 6 degrees of freedom: 12.592
        vector = {"scale": (0.5, 0.6, 0.7), "bias": (0.0, 0.1, 0.2), "nll_before": 0.50, "nll_after": 0.49}
        assert [Scaling(**vector, num_samples=size).is_supported() for size in (629, 630)] == [False, True]

    def test_one_that_makes_the_nll_worse_is_not_supported(self):
        assert not Scaling(0.8, 0.0, 0.49, 0.50, 10_000).is_supported()

    def test_the_test_keeps_its_level_on_calibrated_models(self):
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(400):
            logits = 2 * torch.randn(150, 4, generator=generator)
            labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
            found.append(fit_temperature_scaling(logits, labels).is_supported())
        assert 0.02 <= np.mean(found) <= 0.08  # 5 % but for chance: three standard errors are 3.3 %

    def test_a_scaling_of_unknown_origin_cannot_be_judged(self):
        with pytest.raises(ValueError, match="needs nll_before, nll_after and num_samples"):
            Scaling(0.8).is_supported()

    def test_undo_is_the_inverse_of_apply(self):
        logits = torch.randn(5, 3, dtype=torch.float64)
        for fitted in (Scaling(0.37), Scaling((0.4, 1.3, -0.2), (0.5, -1.0, 2.0))):
            torch.testing.assert_close(fitted.undo(fitted.apply(logits)), logits)


class TestWhatIsNoLogit:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_probabilities_are_refused(self, dtype):
        p = (3 * torch.randn(50, 4)).softmax(-1).to(dtype)
        for fit in (fit_temperature, fit_temperature_scaling, fit_vector_scaling):
            with pytest.raises(ValueError, match="Expected logits, found rows of probabilities"):
                fit(p, torch.arange(50) % 4)

    def test_their_logarithm_is_as_good_as_the_logits(self):
        logits, labels = 3 * torch.randn(50, 4), torch.arange(50) % 4
        assert fit_temperature(logits.log_softmax(-1), labels) == pytest.approx(fit_temperature(logits, labels))

    def test_a_temperature_at_the_end_of_the_search_warns(self):
        logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
        with pytest.warns(UserWarning, match="lies at the end of the search"):
            fit_temperature(logits, torch.tensor([1, 0]))
