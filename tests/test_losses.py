import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F

from hf_adafocal.functional import focal_loss
from hf_adafocal.losses import LOSSES, AdaFocalLoss, CrossEntropyLoss, FLSD53Loss, FocalFamilyLoss, FocalLoss

FAMILY = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)


def batch(size=32, classes=6, dtype=torch.float32):
    return (2 * torch.randn(size, classes, dtype=dtype)).requires_grad_(), torch.randint(classes, (size,))


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def assert_golden(case, name, loss_fn):
    logits = torch.tensor(case["logits"], requires_grad=True)
    loss = loss_fn(logits, torch.tensor(case["labels"]))
    assert loss.item() == pytest.approx(case[name]["value"], rel=1e-5)
    torch.testing.assert_close(gradient(loss, logits), torch.tensor(case[name]["grad"]), rtol=1e-5, atol=1e-7)


def moved(loss_fn):
    """A table as after some training: negative, small and large gammas, a repeated edge."""
    if isinstance(loss_fn, AdaFocalLoss):
        edges = torch.linspace(0.05, 0.99, 16)
        edges[4] = edges[3]
        loss_fn.set_table(edges, [-2, -1, -0.5, 9, 0.2, 0.5, 1, 3, -0.2, 2, 1, -1, 0.3, 5, 20])
    return loss_fn


class TestFocalFamilyLoss:
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
        loss_fn = moved(make())
        logits, labels = torch.randn(4, 3, 5), torch.randint(3, (4, 5))
        labels[0, :4], labels[3, 2:] = -100, -100
        counted = (labels != -100).sum()
        parts = loss_fn(logits[:1], labels[:1], counted) + loss_fn(logits[1:], labels[1:], counted)
        torch.testing.assert_close(parts, loss_fn(logits, labels))

    @FAMILY
    def test_it_takes_the_outputs_of_a_model(self, make):
        logits, labels = batch()
        assert make()(SimpleNamespace(logits=logits), labels) == make()(logits, labels)

    @FAMILY
    def test_weight_ignore_index_and_reduction_reach_the_formula(self, make):
        weight = torch.rand(6)
        loss_fn = make(weight=weight, ignore_index=2, reduction="none")
        logits, labels = batch()
        expected = focal_loss(logits, labels, loss_fn.gamma, weight=weight, ignore_index=2, reduction="none")
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
        loss_fn = moved(make(reduction="sum"))
        for margin in (1e4, 200.0, 88.0, 17.0, 0.0):
            rows = [[margin, 0.0, 0.0], [-margin, 0.0, 0.0], [margin, margin, 0.0]]
            logits = torch.tensor(rows, requires_grad=True)
            loss = loss_fn(logits, torch.zeros(3, dtype=torch.long))
            assert torch.isfinite(loss) and torch.isfinite(gradient(loss, logits)).all()

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

    def test_gradcheck(self):
        loss_fn = moved(AdaFocalLoss().double())
        logits, labels = batch(size=10, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda z: loss_fn(z, labels), logits)

    def test_the_untrained_table_has_the_papers_defaults(self):
        loss_fn = AdaFocalLoss()
        torch.testing.assert_close(loss_fn.edges, torch.linspace(0, 1, 16))
        assert loss_fn.gammas.tolist() == [1.0] * 15
        assert loss_fn.rule == {"lambda_": 1.0, "switch": 0.2, "gamma_min": -2.0, "gamma_max": 20.0}

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
            ([0.0, 1.0], GAP, "edges must be 3 finite numbers for 2 bins"),
            ([0.0, 0.3, 0.6, 1.0], GAP, "edges must be 3 finite numbers for 2 bins"),
            ([0.0, math.nan, 1.0], GAP, "edges must be 3 finite numbers for 2 bins"),
            ([0.0, 0.5, math.inf], GAP, "edges must be 3 finite numbers for 2 bins"),
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
        with pytest.raises(ValueError, match="gammas must be 2 finite numbers for 2 bins"):
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
        assert set(LOSSES) == {"cross_entropy", "focal", "flsd_53", "adafocal"}

    def test_each_is_a_member_of_the_family_that_builds_without_arguments(self):
        assert all(isinstance(make(), FocalFamilyLoss) for make in LOSSES.values())
