"""Platt scaling of a single logit: its fit, its use on logits of one and of two columns, and its place in a head."""

import numpy as np
import pytest
import tiny
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression

from hf_adafocal.scaling import Scaling, fit_platt_scaling, fold_scaling, recorded_scaling, unfold_scaling


def samples(size=400, seed=0, factor=0.6, bias=-0.8):
    """Logits whose right factor and bias are known, and labels drawn from them."""
    generator = np.random.default_rng(seed)
    z = generator.normal(1, 3, size)
    return z, (generator.random(size) < 1 / (1 + np.exp(-(factor * z + bias)))).astype(int)


class TestFit:
    def test_it_is_the_fit_of_scikit_learn(self):
        frozen = pytest.importorskip("sklearn.frozen", reason="scikit-learn 1.5 freezes no estimator")
        z, labels = samples()
        identity = LogisticRegression().fit(z[:, None], labels)
        identity.coef_[:], identity.intercept_[:] = 1.0, 0.0  # so that its decision is z itself
        peer = CalibratedClassifierCV(frozen.FrozenEstimator(identity), method="sigmoid").fit(z[:, None], labels)
        found = fit_platt_scaling(z, labels)
        assert found.method == "platt" and found.num_samples == 400
        new = np.linspace(-8, 8, 33)
        p = 1 / (1 + np.exp(-found.apply(new[:, None])[:, 0]))
        np.testing.assert_allclose(p, peer.predict_proba(new[:, None])[:, 1], atol=2e-4)

    def test_with_many_samples_it_finds_the_numbers_that_made_the_labels(self):
        found = fit_platt_scaling(*samples(100_000))
        assert (found.scale, found.bias) == pytest.approx((0.6, -0.8), abs=0.03)
        assert found.nll_after < found.nll_before and found.is_supported()

    def test_one_column_two_columns_and_tensors_are_the_same(self):
        z, labels = samples()
        found = [
            fit_platt_scaling(given, labels)
            for given in (
                z,
                z[:, None],
                torch.tensor(z),
                np.stack([np.zeros_like(z), z], 1),
                np.stack([5 - z, 0 * z + 5], 1),
            )
        ]
        for other in found[1:]:
            assert (other.scale, other.bias) == pytest.approx((found[0].scale, found[0].bias), rel=1e-6)
            assert other.nll_after == pytest.approx(found[0].nll_after)

    def test_a_shift_and_a_stretch_of_the_logits_change_no_probability(self):
        z, labels = samples()
        plain, moved = fit_platt_scaling(z, labels), fit_platt_scaling(1000 * z - 4000, labels)
        np.testing.assert_allclose(
            plain.apply(z[:, None]), moved.apply(1000 * z[:, None] - 4000), rtol=1e-5, atol=1e-5
        )

    def test_classes_that_a_threshold_separates_have_a_finite_fit(self):
        found = fit_platt_scaling(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([0, 0, 1, 1]))
        p = 1 / (1 + np.exp(-found.apply(np.array([[2.0]]))))
        assert 0.7 < p[0, 0] < 0.95  # Platt's targets are 3 / 4 and 1 / 4 here

    @pytest.mark.parametrize(
        ("z", "labels", "message"),
        [
            ([1.0, 2.0, 3.0], [1, 1, 1], "3 are positive, and their logits are of one class alone"),
            ([1.0, 2.0, 3.0, 4.0], [1, 1, 0, 0], "do not rise with the label"),
            ([2.0, 2.0], [0, 1], "do not rise with the label"),
            ([5.39661, 5.39662, 5.39663], [0, 1, 1], "do not rise with the label"),
        ],
    )
    def test_where_nothing_can_be_fitted_the_scores_stay(self, z, labels, message):
        with pytest.warns(UserWarning, match=message):
            found = fit_platt_scaling(np.array(z), np.array(labels))
        assert (found.scale, found.bias) == (1, 0) and not found.is_supported()

    @pytest.mark.parametrize(
        ("z", "labels"), [([1.0, 2.0], [0, 2]), ([1.0, np.inf], [0, 1]), ([1.0, np.nan], [0, 1]), ([1.0], [0, 1])]
    )
    def test_what_is_no_binary_sample_is_refused(self, z, labels):
        with pytest.raises(ValueError, match="labels|logits"):
            fit_platt_scaling(np.array(z), np.array(labels))

    def test_logits_of_more_classes_are_refused(self):
        with pytest.raises(ValueError, match="two classes"):
            fit_platt_scaling(np.zeros((4, 3)), np.array([0, 1, 0, 1]))


class TestScaling:
    found = Scaling(0.5, -1.5, 0.7, 0.6, 100)

    def test_the_bias_is_that_of_the_positive_class(self):
        single, both = torch.tensor([[2.0], [-3.0]]), torch.tensor([[0.0, 2.0], [0.0, -3.0]])
        assert self.found.apply(single).tolist() == [[-0.5], [-3.0]]
        assert self.found.apply(both).tolist() == [[0.0, -0.5], [0.0, -3.0]]
        assert torch.equal(self.found.undo(self.found.apply(both)), both)
        torch.testing.assert_close(self.found.apply(both).softmax(1)[:, 1:], self.found.apply(single).sigmoid())
        with pytest.raises(ValueError, match="for two classes, or a single logit, found 3"):
            self.found.apply(torch.zeros(1, 3))

    def test_two_numbers_were_fitted(self):
        # chi-square quantile at 95 %, two degrees of freedom: 5.991; one: 3.841
        assert not Scaling(0.5, 1.0, 0.5 + 5.98 / 200, 0.5, 100).is_supported()
        assert Scaling(0.5, 1.0, 0.5 + 6.0 / 200, 0.5, 100).is_supported()

    @pytest.mark.parametrize("scaling", [Scaling(0.4), Scaling(0.4, 1.2), Scaling(3.0, -0.7)])
    def test_a_server_that_shifts_and_divides_gives_the_scaled_probability(self, scaling):
        told = scaling.pooler()
        z = torch.linspace(-6, 6, 25, dtype=torch.float64)[:, None]
        served = torch.sigmoid((z - told["logit_mean"]) / told["logit_sigma"])
        torch.testing.assert_close(served, scaling.apply(z).sigmoid())

    def test_so_does_one_with_a_softmax_for_a_temperature(self):
        scaling, logits = Scaling(0.4), torch.randn(20, 5, dtype=torch.float64)
        told = scaling.pooler()
        served = torch.softmax((logits - told["logit_mean"]) / told["logit_sigma"], dim=1)
        torch.testing.assert_close(served, scaling.apply(logits).softmax(1))


class TestFolding:
    @pytest.mark.parametrize("outputs", [1, 2])
    def test_it_is_held_by_a_head_with_one_output_and_with_two(self, outputs):
        model = tiny.bert(num_labels=outputs).eval()
        ids = torch.randint(3, tiny.VOCABULARY, (9, 8))
        before = {name: part.clone() for name, part in model.state_dict().items()}
        with torch.no_grad():
            expected = TestScaling.found.apply(model(input_ids=ids).logits)
            fold_scaling(model, TestScaling.found)
            torch.testing.assert_close(model(input_ids=ids).logits, expected)
        assert recorded_scaling(model) == TestScaling.found
        changed = {name for name, part in model.state_dict().items() if not torch.equal(part, before[name])}
        assert changed == {"classifier.weight", "classifier.bias"}
        unfold_scaling(model)
        for name, part in model.state_dict().items():
            torch.testing.assert_close(part, before[name])

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_labels": 3}, "for two classes, or a single logit, found 3"),
            ({"num_labels": 1, "problem_type": "regression"}, "problem_type regression"),
        ],
    )
    def test_another_head_is_refused_and_unchanged(self, settings, message):
        model = tiny.bert(**settings)
        before = model.classifier.weight.clone()
        with pytest.raises(ValueError, match=message):
            fold_scaling(model, TestScaling.found)
        assert torch.equal(model.classifier.weight, before) and recorded_scaling(model) is None
