import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F

from hf_adafocal import AdaFocalTrainingArguments
from hf_adafocal.losses import (
    AdaDualFocalLoss,
    AdaFocalLoss,
    AdaptiveLabelSmoothingLoss,
    BrierLoss,
    ClasswiseAdaFocalLoss,
    ConfidencePenaltyLoss,
    CrossEntropyLoss,
    DualFocalLoss,
    FLSD53Loss,
    FocalLoss,
    InverseFocalLoss,
    LabelSmoothingLoss,
)
from hf_adafocal.losses.base import ClassificationLoss, FocalFamilyLoss, PerSampleLoss
from hf_adafocal.losses.functional import (
    brier_loss,
    confidence_penalty_loss,
    dual_focal_loss,
    focal_loss,
    label_smoothing_loss,
)
from hf_adafocal.losses.registry import PER_SAMPLE_LOSSES as LOSSES
from hf_adafocal.metrics.binning import bin_statistics, equal_mass_edges

FAMILY = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
ADAPTIVE = pytest.mark.parametrize("make", [AdaFocalLoss, AdaDualFocalLoss, ClasswiseAdaFocalLoss])
GAMMAS = [-2, -1, -0.5, 9, 0.2, 0.5, 1, 3, -0.2, 2, 1, -1, 0.3, 5, 20]
# What the module of a name computes, if it is not focal loss with the gamma of the module.
FORMULAS = {
    "label_smoothing": lambda *batch, **options: label_smoothing_loss(*batch, torch.tensor(0.05), **options),
    "adaptive_label_smoothing": lambda *batch, **options: label_smoothing_loss(*batch, torch.tensor(0.0), **options),
    "brier": brier_loss,
    "dual_focal": lambda *batch, **options: dual_focal_loss(*batch, 5.0, **options),
    "inverse_focal": lambda *batch, **options: focal_loss(*batch, -2.0, **options),
    "confidence_penalty": lambda *batch, **options: confidence_penalty_loss(*batch, 0.1, **options),
    "ada_dual_focal": lambda *batch, **options: dual_focal_loss(*batch, 1.0, **options),
}


def batch(size=32, classes=6, dtype=torch.float32):
    return (2 * torch.randn(size, classes, dtype=dtype)).requires_grad_(), torch.randint(classes, (size,))


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def assert_golden(case, name, loss_fn):
    logits = torch.tensor(case["logits"], requires_grad=True)
    loss = loss_fn(logits, torch.tensor(case["labels"]))
    assert loss.item() == pytest.approx(case[name]["value"], rel=1e-5)
    torch.testing.assert_close(gradient(loss, logits), torch.tensor(case[name]["grad"]), rtol=1e-5, atol=1e-7)


def moved(loss_fn, classes=6):
    """A table as after some training: negative, small and large gammas, a repeated edge."""
    of_classes = {}
    if isinstance(loss_fn, ClasswiseAdaFocalLoss):
        turned = [GAMMAS[k:] + GAMMAS[:k] for k in range(classes)]
        of_classes = {"class_gammas": turned, "class_counts": [100 * k for k in range(classes)]}
    if isinstance(loss_fn, AdaFocalLoss):
        edges = torch.linspace(0.05, 0.99, 16)
        edges[4] = edges[3]
        loss_fn.set_table(edges, GAMMAS, **of_classes)
    return loss_fn


def calibration_samples(size=600, classes=3):
    """Confidence, correctness and predicted class of held-out samples; the last class is never predicted."""
    generator = np.random.default_rng(0)
    predicted, confidence = generator.integers(0, classes - 1, size), generator.uniform(0.3, 1, size)
    correct = generator.random(size) < np.where(predicted == 0, confidence - 0.2, confidence + 0.1)
    return confidence, correct, predicted


def class_statistics(num_bins, classes=3):
    """What a class-wise table is updated with."""
    confidence, correct, predicted = calibration_samples(classes=classes)
    shared = bin_statistics(confidence, correct, equal_mass_edges(confidence, num_bins))
    gaps, counts = np.zeros((classes, num_bins)), np.bincount(predicted, minlength=classes)
    for k in np.unique(predicted):
        gaps[k] = bin_statistics(confidence[predicted == k], correct[predicted == k], shared.edges).gap
    return SimpleNamespace(edges=shared.edges, gap=shared.gap, class_gap=gaps, class_counts=counts)


class TestClassificationLoss:
    @FAMILY
    def test_two_micro_batches_sum_to_the_mean_over_the_whole_batch(self, make):
        loss_fn = moved(make())
        logits, labels = batch(size=8)
        whole = loss_fn(logits, labels)
        parts = loss_fn(logits[:3], labels[:3], 8) + loss_fn(
            logits[3:], labels[3:], num_items_in_batch=torch.tensor(8)
        )
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(gradient(parts, logits), gradient(whole, logits))

    @FAMILY
    def test_micro_batches_with_ignored_labels_sum_to_the_mean_over_counted_labels(self, make):
        loss_fn = moved(make(), classes=3)
        logits, labels = torch.randn(4, 3, 5), torch.randint(3, (4, 5))
        labels[0, :4], labels[3, 2:] = -100, -100
        counted = (labels != -100).sum()
        parts = loss_fn(logits[:1], labels[:1], counted) + loss_fn(logits[1:], labels[1:], counted)
        torch.testing.assert_close(parts, loss_fn(logits, labels))

    @FAMILY
    def test_it_takes_the_outputs_of_a_model(self, make):
        logits, labels = batch()
        assert make()(SimpleNamespace(logits=logits), labels) == make()(logits, labels)

    @pytest.mark.parametrize("name", LOSSES)
    def test_weight_ignore_index_and_reduction_reach_the_formula(self, name):
        options = {"weight": torch.rand(6), "ignore_index": 2, "reduction": "none"}
        loss_fn = LOSSES[name](**options)
        logits, labels = batch()
        if name in FORMULAS:
            expected = FORMULAS[name](logits, labels, **options)
        else:
            expected = focal_loss(logits, labels, loss_fn.gamma, **options)
        assert torch.equal(loss_fn(logits, labels), expected)
        assert ((expected == 0) == (labels == 2)).all()

    @FAMILY
    def test_dense_targets_equal_the_flattened_form(self, make):
        loss_fn = moved(make())
        for dims in [(5,), (3, 4)]:
            logits, labels = torch.randn(2, 6, *dims), torch.randint(6, (2, *dims))
            flat = loss_fn(logits.movedim(1, -1).reshape(-1, 6), labels.reshape(-1))
            torch.testing.assert_close(loss_fn(logits, labels), flat)

    @FAMILY
    def test_bfloat16_logits_give_the_float32_loss_of_the_same_values(self, make):
        loss_fn = moved(make())
        logits, labels = batch(dtype=torch.bfloat16)
        loss = loss_fn(logits, labels)
        assert loss.dtype == torch.float32
        assert loss == loss_fn(logits.float(), labels)
        assert gradient(loss, logits).dtype == torch.bfloat16

    @FAMILY
    def test_value_and_gradient_are_finite_whatever_the_logits(self, make):
        loss_fn = moved(make(reduction="sum"), classes=3)
        for margin in (1e4, 200.0, 88.0, 17.0, 0.0):
            rows = [[margin, 0.0, 0.0], [-margin, 0.0, 0.0], [margin, margin, 0.0]]
            logits = torch.tensor(rows, requires_grad=True)
            loss = loss_fn(logits, torch.zeros(3, dtype=torch.long))
            assert torch.isfinite(loss) and torch.isfinite(gradient(loss, logits)).all()

    @FAMILY
    @pytest.mark.parametrize("size", [1, 2])
    def test_a_batch_of_one_or_two_is_the_mean_of_its_samples(self, make, size):
        loss_fn = moved(make())
        logits, labels = batch(size=size)
        each = torch.stack([loss_fn(z[None], y[None]) for z, y in zip(logits, labels, strict=True)])
        torch.testing.assert_close(loss_fn(logits, labels), each.mean())

    @FAMILY
    def test_gradcheck(self, make):
        loss_fn = moved(make()).double()
        logits, labels = batch(size=10, dtype=torch.float64)
        labels[2] = -100
        assert torch.autograd.gradcheck(lambda z: loss_fn(z, labels), logits)

    @FAMILY
    def test_labels_out_of_range_are_an_error(self, make):
        with pytest.raises(ValueError, match=r"\[0, 3\).*found 0 to 3"):
            make()(torch.randn(2, 3), torch.tensor([0, 3]))

    @FAMILY
    def test_the_class_weight_moves_with_the_module_and_is_not_saved(self, make):
        loss_fn = make(weight=torch.ones(3)).double()
        assert loss_fn.weight.dtype == torch.float64
        assert "weight" not in loss_fn.state_dict()

    @FAMILY
    def test_compiled_in_one_graph_it_equals_eager(self, make):
        torch.compiler.reset()
        loss_fn = moved(make())
        logits, labels = batch()
        labels[::5] = -100
        compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")(logits, labels)
        eager = loss_fn(logits, labels)
        torch.testing.assert_close(compiled, eager)
        torch.testing.assert_close(gradient(compiled, logits), gradient(eager, logits))

    @pytest.mark.slow
    @pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
    @FAMILY
    def test_compiled_to_machine_code_it_equals_eager(self, make):
        torch.compiler.reset()
        loss_fn = moved(make())
        logits, labels = batch()
        labels[::5] = -100
        compiled, eager = torch.compile(loss_fn, fullgraph=True)(logits, labels), loss_fn(logits, labels)
        torch.testing.assert_close(compiled, eager)
        torch.testing.assert_close(gradient(compiled, logits), gradient(eager, logits))


class TestCrossEntropyLoss:
    def test_value_and_gradient_are_those_of_the_authors_code(self, golden):
        for case in golden("losses")["cases"]:
            assert_golden(case, "cross_entropy", CrossEntropyLoss(reduction="sum"))

    def test_value_and_gradient_are_those_of_pytorch(self):
        logits, labels = batch()
        ours, theirs = CrossEntropyLoss()(logits, labels), F.cross_entropy(logits, labels)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits))


class TestFocalLoss:
    @pytest.mark.parametrize("gamma", [1, 3])
    def test_value_and_gradient_are_those_of_the_authors_code(self, golden, gamma):
        for case in golden("losses")["cases"]:
            assert_golden(case, f"focal_gamma_{gamma}", FocalLoss(gamma, reduction="sum"))

    def test_gamma_is_3_unless_given(self):
        assert FocalLoss().gamma == 3

    @pytest.mark.parametrize("gamma", [-2.0, 0.0, 0.5, 3.0])
    def test_it_equals_the_slow_formula(self, gamma):
        logits, labels = batch(dtype=torch.float64)
        losses = [reference.focal_loss(z.tolist(), int(y), gamma) for z, y in zip(logits, labels, strict=True)]
        assert FocalLoss(gamma)(logits, labels).item() == pytest.approx(sum(losses) / 32)

    def test_it_prints_its_gamma(self):
        assert repr(FocalLoss(-1.5)) == "FocalLoss(gamma=-1.5)"


class TestFLSD53Loss:
    def test_value_and_gradient_are_those_of_the_authors_code(self, golden):
        for case in golden("losses")["cases"]:
            assert_golden(case, "flsd53", FLSD53Loss(reduction="sum"))

    def test_it_equals_the_slow_formula(self):
        logits, labels = batch(dtype=torch.float64)
        expected = []
        for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
            expected.append(reference.focal_loss(z, y, 5 if reference.softmax(z)[y] < 0.2 else 3))
        torch.testing.assert_close(FLSD53Loss(reduction="none")(logits, labels).tolist(), expected)

    def test_it_has_no_state(self):
        assert not FLSD53Loss().state_dict()


class TestInverseFocalLoss:
    def test_it_is_focal_loss_with_the_other_sign(self):
        logits, labels = batch()
        assert InverseFocalLoss(1.5)(logits, labels) == FocalLoss(-1.5)(logits, labels)
        assert InverseFocalLoss()(logits, labels) == FocalLoss(-2.0)(logits, labels)

    def test_by_hand_at_one_half(self):
        loss = InverseFocalLoss(3.0)(torch.zeros(1, 2), torch.tensor([0]))
        assert loss.item() == pytest.approx(1.5**3 * math.log(2))

    @pytest.mark.parametrize("gamma", [-2.0, math.nan, math.inf])
    def test_a_gamma_with_the_focal_sign_is_an_error(self, gamma):
        with pytest.raises(ValueError, match="gamma must be a finite number from 0"):
            InverseFocalLoss(gamma)

    def test_it_prints_its_gamma(self):
        assert repr(InverseFocalLoss(3.5)) == "InverseFocalLoss(gamma=3.5)"


class TestDualFocalLoss:
    @pytest.mark.parametrize("gamma", [1, 5])
    def test_value_and_gradient_are_those_of_the_authors_code(self, golden, gamma):
        for case in golden("losses")["cases"]:
            assert_golden(case, f"dual_focal_gamma_{gamma}", DualFocalLoss(gamma, reduction="sum"))

    def test_gamma_is_5_unless_given(self):
        assert repr(DualFocalLoss()) == "DualFocalLoss(gamma=5.0)"


class TestLabelSmoothingLoss:
    @pytest.mark.parametrize("smoothing", [0.0, 0.05, 0.5])
    def test_it_is_that_of_pytorch(self, smoothing):
        logits, labels = batch()
        weight = torch.rand(6)
        ours = LabelSmoothingLoss(smoothing, weight=weight)(logits, labels)
        torch.testing.assert_close(ours, F.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing))

    def test_below_zero_it_goes_on_in_a_straight_line(self):
        logits, labels = batch()
        low, zero, high = (LabelSmoothingLoss(eps)(logits, labels) for eps in (-0.1, 0.0, 0.1))
        torch.testing.assert_close(zero - low, high - zero)

    def test_a_compiled_loss_sees_a_change_of_the_smoothing(self):
        torch.compiler.reset()
        loss_fn = LabelSmoothingLoss()
        compiled = torch.compile(loss_fn, fullgraph=True, backend="eager")
        logits, labels = batch()
        before = compiled(logits, labels)
        loss_fn.set_smoothing(-0.1)
        assert compiled(logits, labels) != before
        torch.testing.assert_close(compiled(logits, labels), loss_fn(logits, labels))

    def test_a_smoothing_out_of_range_is_an_error_and_changes_nothing(self):
        loss_fn = LabelSmoothingLoss(0.2)
        with pytest.raises(ValueError, match=r"smoothing must lie in \[-0.1, 0.5\], found 0.6"):
            loss_fn.set_smoothing(0.6)
        assert repr(loss_fn) == "LabelSmoothingLoss(smoothing=0.2)"
        with pytest.raises(ValueError, match="found -0.2"):
            LabelSmoothingLoss(-0.2)

    def test_the_smoothing_round_trips_through_state_dict(self):
        fresh = LabelSmoothingLoss()
        fresh.load_state_dict(LabelSmoothingLoss(0.3).state_dict())
        assert fresh.smoothing.item() == pytest.approx(0.3)


class TestBrierLoss:
    def test_it_equals_the_slow_formula(self):
        logits, labels = batch(dtype=torch.float64)
        probabilities = [reference.softmax(z) for z in logits.tolist()]
        expected = reference.brier_score(probabilities, labels.tolist())
        assert BrierLoss()(logits, labels).item() == pytest.approx(expected)


class TestConfidencePenaltyLoss:
    def test_the_penalty_is_one_tenth_unless_given(self):
        assert repr(ConfidencePenaltyLoss()) == "ConfidencePenaltyLoss(penalty=0.1)"

    def test_a_certain_prediction_costs_more_than_without(self):
        logits, labels = torch.tensor([[30.0, 0.0]]), torch.tensor([0])
        unsure = torch.tensor([[1.0, 0.0]])
        gains = [CrossEntropyLoss()(z, labels) - ConfidencePenaltyLoss(1.0)(z, labels) for z in (logits, unsure)]
        assert gains[0] == pytest.approx(0, abs=1e-6) and gains[1] > 0.5

    @pytest.mark.parametrize("penalty", [-1.0, math.nan])
    def test_a_penalty_that_makes_no_sense_is_an_error(self, penalty):
        with pytest.raises(ValueError, match="penalty must be a finite number from 0"):
            ConfidencePenaltyLoss(penalty)


class TestAdaDualFocalLoss:
    def test_untrained_it_is_dual_focal_loss_with_the_initial_gamma(self):
        logits, labels = batch()
        assert AdaDualFocalLoss(gamma_initial=2.0)(logits, labels) == DualFocalLoss(2.0)(logits, labels)

    def test_it_equals_the_slow_formula(self):
        loss_fn = moved(AdaDualFocalLoss(reduction="none").double())
        logits, labels = batch(size=200, dtype=torch.float64)
        edges, gammas, expected = loss_fn.edges.tolist(), loss_fn.gammas.tolist(), []
        for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
            p = reference.softmax(z)
            margin = p[y] - max([q for q in p if q < p[y]], default=0.0)
            gamma = reference.looked_up_gamma(margin, edges, gammas)
            base = 1 + margin if gamma < 0 else 1 - margin
            expected.append(-(base ** abs(gamma)) * math.log(p[y]))
        torch.testing.assert_close(loss_fn(logits, labels).tolist(), expected)

    def test_gamma_comes_from_the_margin_and_not_from_the_probability_of_the_label(self):
        loss_fn = AdaDualFocalLoss(num_bins=2)
        loss_fn.set_table([0, 0.5, 1], [5, 1])
        p = torch.tensor([[0.55, 0.45, 0.0001]])  # above one half, with a margin of a tenth
        torch.testing.assert_close(loss_fn(p.log(), torch.tensor([0])), DualFocalLoss(5.0)(p.log(), torch.tensor([0])))

    def test_it_moves_as_adafocal_does(self):
        tables = []
        for make in (AdaFocalLoss, AdaDualFocalLoss):
            loss_fn = make()
            loss_fn.update(torch.linspace(0.1, 1, 16), torch.linspace(-1, 1, 15))
            tables.append(loss_fn.gammas)
        assert torch.equal(*tables)


class TestClasswiseAdaFocalLoss:
    def updated(self, **settings):
        loss_fn = ClasswiseAdaFocalLoss(5, **settings)
        statistics = class_statistics(5)
        loss_fn.update_from(statistics)
        return loss_fn, statistics

    def test_each_table_moves_by_the_rule_with_the_gap_of_its_class(self):
        loss_fn, statistics = self.updated(gamma_initial=0.5, lambda_=2.0)
        for found, gaps in zip(
            [loss_fn.gammas, *loss_fn.class_gammas], [statistics.gap, *statistics.class_gap], strict=True
        ):
            expected = [reference.updated_gamma(0.5, gap, lambda_=2.0) for gap in gaps]
            assert found.tolist() == pytest.approx(expected, rel=1e-5)
        assert loss_fn.class_gammas[0].mean() > loss_fn.gammas.mean() > loss_fn.class_gammas[1].mean()

    def test_it_equals_the_slow_formula(self):
        loss_fn = moved(ClasswiseAdaFocalLoss(prior=200.0, reduction="none").double())
        logits, labels = batch(size=200, dtype=torch.float64)
        edges, expected = loss_fn.edges.tolist(), []
        for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
            p, share = reference.softmax(z)[y], 100 * y / (100 * y + 200)
            own = reference.looked_up_gamma(p, edges, loss_fn.class_gammas[y].tolist())
            shared = reference.looked_up_gamma(p, edges, loss_fn.gammas.tolist())
            expected.append(reference.focal_loss(z, y, share * own + (1 - share) * shared))
        torch.testing.assert_close(loss_fn(logits, labels).tolist(), expected)

    def test_a_class_that_was_never_predicted_has_the_shared_table(self):
        loss_fn, statistics = self.updated()
        plain = AdaFocalLoss(5)
        plain.update(statistics.edges, statistics.gap)
        logits = 2 * torch.randn(30, 3)
        unseen, seen = torch.full((30,), 2), torch.zeros(30, dtype=torch.long)
        torch.testing.assert_close(loss_fn(logits, unseen), plain(logits, unseen))
        assert loss_fn(logits, seen) < plain(logits, seen)  # over-confident: more focal loss, which is lower

    def test_a_huge_prior_is_adafocal_and_a_tiny_one_a_table_for_each_class(self):
        logits, labels = 2 * torch.randn(30, 3), torch.zeros(30, dtype=torch.long)
        loss_fn, statistics = self.updated(prior=1e9)
        plain, own = AdaFocalLoss(5), AdaFocalLoss(5)
        plain.update(statistics.edges, statistics.gap)
        own.update(statistics.edges, statistics.class_gap[0])
        torch.testing.assert_close(loss_fn(logits, labels), plain(logits, labels))
        torch.testing.assert_close(self.updated(prior=1e-6)[0](logits, labels), own(logits, labels))

    def test_before_the_first_update_it_is_adafocal_for_any_number_of_classes(self):
        for classes in (2, 6):
            logits, labels = batch(classes=classes)
            assert ClasswiseAdaFocalLoss()(logits, labels) == AdaFocalLoss()(logits, labels)

    def test_without_statistics_of_classes_only_the_shared_table_moves_and_a_warning_says_so(self):
        loss_fn, statistics = self.updated()
        before = loss_fn.gammas.clone(), loss_fn.class_gammas.clone()
        with pytest.warns(UserWarning, match="only the table that all classes share moves"):
            loss_fn.update(statistics.edges, statistics.gap)
        assert not torch.equal(loss_fn.gammas, before[0]) and torch.equal(loss_fn.class_gammas, before[1])

    def test_own_tables_begin_where_the_shared_one_is(self):
        loss_fn, statistics = ClasswiseAdaFocalLoss(5), class_statistics(5)
        loss_fn.set_table(statistics.edges, [3.0, 2.0, 1.0, -1.0, -2.0])
        loss_fn.update(statistics.edges, np.zeros(5), np.zeros((3, 5)), [1, 1, 1])
        assert loss_fn.class_gammas.tolist() == [[3.0, 2.0, 1.0, -1.0, -2.0]] * 3

    def test_logits_of_another_number_of_classes_are_an_error(self):
        loss_fn, _ = self.updated()
        with pytest.raises(ValueError, match=r"logits of 3 classes, one a table, found \(2, 4\)"):
            loss_fn(torch.randn(2, 4), torch.tensor([0, 3]))

    def test_labels_out_of_range_are_an_error_once_there_are_tables(self):
        with pytest.raises(ValueError, match=r"\[0, 3\).*found 0 to 3"):
            self.updated()[0](torch.randn(2, 3), torch.tensor([0, 3]))

    GAP = np.full((3, 5), 0.1)

    @pytest.mark.parametrize(
        ("class_gap", "class_counts", "message"),
        [
            (GAP[:2], [1, 1], r"found \(3, 5\) and \(2, 5\)"),
            (GAP[:, :4], [1, 1, 1], r"found \(3, 5\) and \(3, 4\)"),
            (np.full((3, 5), np.nan), [1, 1, 1], "gap must be finite"),
            (GAP, [1, 1], "class_counts must be .*numbers"),
            (GAP, [1, -1, 1], "class_counts must be .*numbers"),
            (GAP, [1, math.nan, 1], "class_counts must be .*numbers"),
            (GAP, [1, math.inf, 1], "must be finite"),
        ],
        ids=range(7),
    )
    def test_an_update_that_does_not_fit_is_an_error_and_changes_nothing(self, class_gap, class_counts, message):
        loss_fn, statistics = self.updated()
        before = loss_fn.table()
        with pytest.raises(ValueError, match=message):
            loss_fn.update(statistics.edges, statistics.gap, class_gap, class_counts)
        assert loss_fn.table() == before

    def test_edges_that_do_not_fit_leave_the_tables_of_the_classes_too(self):
        loss_fn, statistics = self.updated()
        before = loss_fn.table()
        with pytest.raises(ValueError, match="edges must ascend"):
            loss_fn.update(statistics.edges[::-1].copy(), statistics.gap, self.GAP, [1, 1, 1])
        assert loss_fn.table() == before

    def test_a_first_update_that_does_not_fit_leaves_no_tables(self):
        loss_fn, statistics = ClasswiseAdaFocalLoss(5), class_statistics(5)
        for class_gap in (np.zeros((3, 4)), np.zeros(5), 0.1):
            with pytest.raises(ValueError, match="gammas and gap must have one shape"):
                loss_fn.update(statistics.edges, statistics.gap, class_gap, [1, 1, 1])
        assert loss_fn.table() == ClasswiseAdaFocalLoss(5).table()

    def test_the_tables_round_trip_through_lists_and_state_dict(self):
        trained, _ = self.updated()
        listed, loaded = ClasswiseAdaFocalLoss(5), ClasswiseAdaFocalLoss(5)
        listed.set_table(**json.loads(json.dumps(trained.table())))
        loaded.load_state_dict(trained.state_dict())
        logits, labels = batch(classes=3)
        assert listed(logits, labels) == loaded(logits, labels) == trained(logits, labels)

    def test_a_table_is_a_copy(self):
        loss_fn, rows = ClasswiseAdaFocalLoss(1), torch.ones(2, 1)
        loss_fn.set_table([0, 1], [1], rows, torch.ones(2))
        rows.fill_(9)
        assert loss_fn.class_gammas.tolist() == [[1.0], [1.0]]

    def test_reset_drops_the_tables_of_the_classes(self):
        loss_fn, _ = self.updated()
        loss_fn.reset()
        assert loss_fn.table() == ClasswiseAdaFocalLoss(5).table()

    def test_a_compiled_loss_sees_the_first_and_the_second_update(self):
        torch.compiler.reset()
        loss_fn, statistics = ClasswiseAdaFocalLoss(5), class_statistics(5)
        compiled = torch.compile(loss_fn, fullgraph=True, backend="eager")
        logits, labels = batch(classes=3)
        values = [compiled(logits, labels).item()]
        for _ in range(2):
            loss_fn.update_from(statistics)
            values.append(compiled(logits, labels).item())
            assert values[-1] == pytest.approx(loss_fn(logits, labels).item(), rel=1e-6)
        assert len(set(values)) == 3

    @pytest.mark.parametrize("prior", [0.0, -1.0, math.nan, math.inf])
    def test_a_prior_that_makes_no_sense_is_an_error(self, prior):
        with pytest.raises(ValueError, match="prior must be a finite number above 0"):
            ClasswiseAdaFocalLoss(prior=prior)

    def test_it_prints_its_prior(self):
        assert repr(ClasswiseAdaFocalLoss()).endswith("gamma_max=20.0, prior=150.0)")


class TestTable:
    """The state of every adaptive loss, as a checkpoint holds it."""

    @pytest.mark.parametrize("make", [*ADAPTIVE.args[1], AdaptiveLabelSmoothingLoss])
    def test_it_round_trips_through_json_to_the_bit(self, make):
        trained, fresh = make(), make()
        if trained.follows == "bins":
            trained.update_from(class_statistics(trained.num_bins))
        else:
            trained.steer(1 / 3)
        fresh.set_table(**json.loads(json.dumps(trained.table())))
        assert fresh.table() == trained.table() != make().table()
        assert all(torch.equal(*pair) for pair in zip(fresh.buffers(), trained.buffers(), strict=True))
        fresh.reset()
        assert fresh.readings() == make().readings() != trained.readings()

    @pytest.mark.parametrize(
        "damage",
        [
            *({"edges": damage} for damage in (None, "wide", [0.1] * 5, [0.5, 0.1, 0.6, 0.7, 0.8, 0.9], [True] * 6)),
            *({"gammas": damage} for damage in (None, "many", [math.nan] * 5, [1e300] * 5, [[1.0] * 5], [1.0] * 4)),
            {"class_gammas": [[1.0] * 4] * 3},
            {"class_gammas": "many"},
            {"class_gammas": [[math.nan] * 5] * 3},
            {"class_gammas": [[1.0] * 5, [1.0]]},
            {"class_counts": [1.0]},
            {"class_counts": [1.0, -1.0, 1.0]},
        ],
        ids=str,
    )
    def test_a_damaged_one_is_an_error_and_changes_nothing(self, damage):
        loss_fn = ClasswiseAdaFocalLoss(5)
        loss_fn.update_from(class_statistics(5))
        before = loss_fn.table()
        with pytest.raises(ValueError, match=next(iter(damage))):
            loss_fn.set_table(**{**before, **damage})
        assert loss_fn.table() == before

    @pytest.mark.parametrize("damage", ["much", None, math.nan, 0.6, -0.2, [0.1], True])
    def test_a_damaged_smoothing_is_an_error_and_changes_nothing(self, damage):
        loss_fn = AdaptiveLabelSmoothingLoss(0.2)
        with pytest.raises(ValueError, match="smoothing must"):
            loss_fn.set_table(damage)
        assert loss_fn.readings() == {"smoothing": pytest.approx(0.2)}

    def test_readings_are_the_least_mean_and_largest_gamma(self):
        loss_fn = AdaFocalLoss(3)
        loss_fn.set_table([0, 0.3, 0.6, 1], [-1.5, 0.5, 4.0])
        assert loss_fn.readings() == {"gamma_min": -1.5, "gamma_mean": 1.0, "gamma_max": 4.0}

    def test_a_loss_says_what_it_cannot_follow(self):
        with pytest.raises(TypeError, match="AdaptiveLabelSmoothingLoss follows the temperature: it has no `update"):
            AdaptiveLabelSmoothingLoss().update_from(class_statistics(5))
        with pytest.raises(TypeError, match="AdaFocalLoss follows the bins: it has no `steer`"):
            AdaFocalLoss().steer(1.0)
        assert [make.needs_class_statistics for make in ADAPTIVE.args[1]] == [False, False, True]


class TestAdaFocalLoss:
    def test_value_and_gradient_are_those_of_the_authors_code(self, golden):
        for case in golden("losses")["cases"]:
            loss_fn = AdaFocalLoss(reduction="sum")
            loss_fn.set_table(case["bin_edges"], case["gammas"])
            assert_golden(case, "adafocal", loss_fn)

    def test_updates_follow_the_authors_trajectories(self, golden):
        edges = torch.linspace(0.1, 0.9, 16)
        for trajectory in golden("gamma_update")["trajectories"]:
            loss_fn = AdaFocalLoss()
            for step in trajectory["steps"]:
                loss_fn.update(edges, step["gap"])
                torch.testing.assert_close(loss_fn.gammas, torch.tensor(step["gammas"]), rtol=1e-5, atol=0)

    def test_it_equals_the_slow_formula(self):
        loss_fn = moved(AdaFocalLoss(reduction="none").double())
        logits, labels = batch(size=200, dtype=torch.float64)
        edges, gammas, expected = loss_fn.edges.tolist(), loss_fn.gammas.tolist(), []
        for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
            gamma = reference.looked_up_gamma(reference.softmax(z)[y], edges, gammas)
            expected.append(reference.focal_loss(z, y, gamma))
        torch.testing.assert_close(loss_fn(logits, labels).tolist(), expected)

    def test_the_untrained_table_has_the_papers_defaults(self):
        loss_fn = AdaFocalLoss()
        torch.testing.assert_close(loss_fn.edges, torch.linspace(0, 1, 16))
        assert loss_fn.gammas.tolist() == [1.0] * 15
        assert loss_fn.update_settings == {"lambda_": 1.0, "switch": 0.2, "gamma_min": -2.0, "gamma_max": 20.0}

    def test_untrained_it_is_focal_loss_with_the_initial_gamma(self):
        logits, labels = batch()
        assert AdaFocalLoss(gamma_initial=2.0)(logits, labels) == FocalLoss(2.0)(logits, labels)

    def test_gamma_comes_from_the_probability_of_the_label_and_not_the_confidence(self):
        loss_fn = AdaFocalLoss(num_bins=2, reduction="none")
        loss_fn.set_table([0, 0.5, 1], [5, -1])
        logits = torch.tensor([[3.0, 0.0], [3.0, 0.0]])
        right, wrong = loss_fn(logits, torch.tensor([0, 1]))
        assert right.item() == pytest.approx(reference.focal_loss([3.0, 0.0], 0, -1), rel=1e-5)
        assert wrong.item() == pytest.approx(reference.focal_loss([3.0, 0.0], 1, 5), rel=1e-5)

    def test_a_probability_on_an_edge_belongs_to_the_bin_above(self):
        loss_fn = AdaFocalLoss(num_bins=2)
        loss_fn.set_table([0, 0.5, 1], [5, 3])
        half = torch.tensor(0.5)
        below = torch.nextafter(half, torch.tensor(0.0))
        assert loss_fn.gamma(torch.stack([below, half])).tolist() == [5, 3]

    def test_a_repeated_edge_is_never_hit(self):
        loss_fn = AdaFocalLoss(num_bins=3)
        loss_fn.set_table([0, 0.5, 0.5, 1], [1, 7, 3])
        assert loss_fn.gamma(torch.tensor([0.0, 0.49, 0.5, 0.51, 1.0])).tolist() == [1, 1, 3, 3, 3]

    @pytest.mark.parametrize("margin", [9.0, 10.0, 12.0, 15.0])
    @pytest.mark.parametrize("gamma", [-2.0, 1.0])
    def test_pure_bfloat16_does_not_give_loss_zero(self, margin, gamma):
        loss_fn = AdaFocalLoss(gamma_initial=gamma).bfloat16()
        logits = torch.tensor([[margin, 0.0]], dtype=torch.bfloat16, requires_grad=True)
        loss = loss_fn(logits, torch.tensor([0]))
        assert loss.item() == pytest.approx(reference.focal_loss([margin, 0.0], 0, gamma), rel=0.3)
        assert gradient(loss, logits).abs().min() > 0

    def test_float64_logits_meet_a_float32_table(self):
        logits, labels = batch(dtype=torch.float64)
        loss = moved(AdaFocalLoss())(logits, labels)
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss.float(), moved(AdaFocalLoss())(logits.float(), labels))

    def test_an_update_moves_the_edges_to_the_held_out_ones(self):
        loss_fn = AdaFocalLoss(num_bins=2)
        loss_fn.update(np.array([0.3, 0.6, 0.9]), np.array([0.1, -0.1]))
        torch.testing.assert_close(loss_fn.edges, torch.tensor([0.3, 0.6, 0.9]))
        torch.testing.assert_close(loss_fn.gammas, torch.tensor([0.1, -0.1]).exp())

    def test_an_update_uses_the_settings_of_the_rule(self):
        loss_fn = AdaFocalLoss(3, 0.5, lambda_=2.0, switch=0.4, gamma_min=-1.0, gamma_max=1.2)
        loss_fn.update([0, 0.3, 0.6, 1], [0.9, -0.2, 0.1])
        rule = {"lambda_": 2.0, "switch": 0.4, "gamma_min": -1.0, "gamma_max": 1.2}
        expected = [reference.updated_gamma(0.5, gap, **rule) for gap in (0.9, -0.2, 0.1)]
        assert expected[:2] == [1.2, -0.4]
        assert loss_fn.gammas.tolist() == pytest.approx(expected)

    def test_bins_without_samples_keep_their_gamma(self):
        loss_fn = AdaFocalLoss(num_bins=3, gamma_initial=1.7)
        loss_fn.update([0.2, 0.8, 0.8, 1.0], [0.3, 0.0, 0.0])
        assert loss_fn.gammas[1:].tolist() == pytest.approx([1.7, 1.7])
        assert loss_fn.gammas[0] > 2

    def test_a_compiled_loss_sees_the_update(self):
        torch.compiler.reset()
        loss_fn = AdaFocalLoss()
        compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
        logits, labels = batch()
        before = compiled(logits, labels)
        loss_fn.update(torch.linspace(0.1, 1, 16), torch.linspace(-1, 1, 15))
        assert compiled(logits, labels) != before
        torch.testing.assert_close(compiled(logits, labels), loss_fn(logits, labels))

    EDGES, GAP = [0.0, 0.5, 1.0], [0.1, 0.1]

    @pytest.mark.parametrize(
        ("edges", "gap", "message"),
        [
            (EDGES, [0.1, math.nan], "gap must be finite"),
            (EDGES, [0.1, math.inf], "gap must be finite"),
            (EDGES, [0.1], r"found \(2,\) and \(1,\)"),
            (EDGES, [0.1] * 3, r"found \(2,\) and \(3,\)"),
            (EDGES, 0.1, r"found \(2,\) and \(\)"),
            ([0.0, 1.0], GAP, "edges must be finite numbers of shape \\(3,\\)"),
            ([0.0, 0.3, 0.6, 1.0], GAP, "edges must be finite numbers of shape \\(3,\\)"),
            ([0.0, math.nan, 1.0], GAP, "edges must be finite numbers of shape \\(3,\\)"),
            ([0.0, 0.5, math.inf], GAP, "edges must be finite numbers of shape \\(3,\\)"),
            ([0.5, 0.2, 1.0], GAP, "edges must ascend"),
        ],
        ids=str,
    )
    def test_an_update_that_does_not_fit_is_an_error_and_changes_nothing(self, edges, gap, message):
        loss_fn = AdaFocalLoss(num_bins=2)
        before = {name: values.clone() for name, values in loss_fn.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            loss_fn.update(edges, gap)
        assert all(torch.equal(before[name], values) for name, values in loss_fn.state_dict().items())

    @pytest.mark.parametrize("gammas", [[1.0], [1.0, math.nan], [[1.0, 1.0]]], ids=str)
    def test_a_table_that_does_not_fit_is_an_error_and_changes_nothing(self, gammas):
        loss_fn = AdaFocalLoss(num_bins=2)
        with pytest.raises(ValueError, match="gammas must be finite numbers of shape \\(2,\\)"):
            loss_fn.set_table([0.2, 0.5, 0.8], gammas)
        assert loss_fn.edges.tolist() == [0, 0.5, 1] and loss_fn.gammas.tolist() == [1, 1]

    def test_the_table_round_trips_through_state_dict(self, tmp_path):
        trained = moved(AdaFocalLoss())
        torch.save(trained.state_dict(), tmp_path / "loss.pt")
        fresh = AdaFocalLoss()
        fresh.load_state_dict(torch.load(tmp_path / "loss.pt"))
        assert set(trained.state_dict()) == {"edges", "gammas"}
        assert torch.equal(fresh.edges, trained.edges) and torch.equal(fresh.gammas, trained.gammas)
        logits, labels = batch()
        assert fresh(logits, labels) == trained(logits, labels)

    def test_the_table_round_trips_through_lists(self):
        trained, fresh = moved(AdaFocalLoss()), AdaFocalLoss()
        fresh.set_table(trained.edges.tolist(), trained.gammas.tolist())
        assert torch.equal(fresh.edges, trained.edges) and torch.equal(fresh.gammas, trained.gammas)

    def test_reset_returns_to_the_untrained_table(self):
        loss_fn = moved(AdaFocalLoss(gamma_initial=-0.5))
        loss_fn.reset()
        torch.testing.assert_close(loss_fn.edges, torch.linspace(0, 1, 16))
        assert loss_fn.gammas.tolist() == [-0.5] * 15

    def test_the_table_is_no_parameter(self):
        assert not list(AdaFocalLoss().parameters())

    @pytest.mark.parametrize("gamma_initial", [-2.5, 20.1, math.nan])
    def test_an_initial_gamma_outside_the_range_is_an_error(self, gamma_initial):
        with pytest.raises(ValueError, match=r"gamma_initial must lie in \[-2.0, 20.0\]"):
            AdaFocalLoss(gamma_initial=gamma_initial)

    def test_no_bin_is_an_error(self):
        with pytest.raises(ValueError, match="num_bins must be at least 1, found 0"):
            AdaFocalLoss(num_bins=0)

    def test_one_bin_is_one_gamma_for_all(self):
        loss_fn = AdaFocalLoss(num_bins=1)
        loss_fn.update([0.4, 0.9], [0.5])
        logits, labels = batch()
        torch.testing.assert_close(loss_fn(logits, labels), FocalLoss(math.exp(0.5))(logits, labels))

    def test_it_prints_its_settings(self):
        assert "num_bins=15, gamma_initial=1.0, lambda_=1.0, switch=0.2" in repr(AdaFocalLoss())


class TestLosses:
    def test_the_names_are_those_users_type(self):
        old = ["cross_entropy", "focal", "flsd_53", "adafocal"]
        rivals = ["label_smoothing", "brier", "dual_focal", "inverse_focal", "confidence_penalty"]
        assert set(old + rivals + ["ada_dual_focal", "classwise_adafocal"]) <= set(LOSSES)

    def test_each_builds_without_arguments(self):
        assert all(isinstance(make(), ClassificationLoss) for make in LOSSES.values())
        assert all(isinstance(LOSSES[name](), FocalFamilyLoss) for name in LOSSES if "focal" in name)

    @pytest.mark.parametrize(
        ("settings", "shown"),
        [
            ({"loss": "inverse_focal", "inverse_focal_gamma": 3.5}, "InverseFocalLoss(gamma=3.5)"),
            ({"loss": "dual_focal", "dual_focal_gamma": 6.1}, "DualFocalLoss(gamma=6.1)"),
            ({"loss": "label_smoothing", "smoothing": -0.05}, "LabelSmoothingLoss(smoothing=-0.05)"),
            ({"loss": "confidence_penalty", "entropy_penalty": 0.3}, "ConfidencePenaltyLoss(penalty=0.3)"),
            (
                {"loss": "ada_dual_focal", "num_bins": 7, "gamma_lambda": 2.0},
                "num_bins=7, gamma_initial=1.0, lambda_=2.0",
            ),
            ({"loss": "classwise_adafocal", "class_prior": 20.0, "gamma_max": 9.0}, "gamma_max=9.0, prior=20.0"),
        ],
        ids=str,
    )
    def test_training_arguments_reach_the_loss(self, tmp_path, settings, shown):
        loss_fn = AdaFocalTrainingArguments(str(tmp_path), **settings).build_loss()
        assert type(loss_fn) is LOSSES[settings["loss"]] and shown in repr(loss_fn)

    def test_a_member_without_a_formula_is_an_error(self):
        with pytest.raises(NotImplementedError, match="PerSampleLoss must define `formula`"):
            PerSampleLoss()(torch.zeros(1, 2), torch.tensor([0]))
