import json
import math

import numpy as np
import pytest
import reference
import torch
from loss_cases import ADAPTIVE, assert_golden, batch, class_statistics, gradient, moved

from hf_adafocal.losses import (
    AdaDualFocalLoss,
    AdaFocalLoss,
    AdaptiveLabelSmoothingLoss,
    ClasswiseAdaFocalLoss,
    DualFocalLoss,
    FocalLoss,
)


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
        for half in ({}, {"class_gap": statistics.class_gap}, {"class_counts": statistics.class_counts}):
            with pytest.warns(UserWarning, match="only the table that all classes share moves"):
                loss_fn.update(statistics.edges, statistics.gap, **half)
        assert not torch.equal(loss_fn.gammas, before[0]) and torch.equal(loss_fn.class_gammas, before[1])

    def test_an_ignored_label_has_no_table_and_counts_for_nothing(self):
        loss_fn, _ = self.updated(reduction="none")
        logits, labels = torch.randn(4, 3), torch.tensor([0, -100, 1, 2])
        kept = labels != -100
        assert loss_fn(logits, labels)[1] == 0
        assert torch.equal(loss_fn(logits, labels)[kept], loss_fn(logits[kept], labels[kept]))

    def test_logits_without_a_class_dimension_are_an_error(self):
        with pytest.raises(ValueError, match=r"found \(3,\) and \(\)"):
            self.updated()[0](torch.randn(3), torch.tensor(0))

    def test_a_table_without_classes_makes_it_adafocal_again(self):
        loss_fn, statistics = self.updated()
        loss_fn.set_table(statistics.edges, [2.0] * 5)
        assert loss_fn.table()["class_gammas"] == [] == loss_fn.table()["class_counts"]

    def test_a_table_of_tensors_is_copied(self):
        loss_fn, statistics = self.updated()
        own, counts = torch.ones(3, 5), torch.ones(3)
        loss_fn.set_table(statistics.edges, [1.0] * 5, own, counts)
        own[:], counts[:] = 2, 2
        assert loss_fn.class_gammas.eq(1).all() and loss_fn.class_counts.eq(1).all()

    def test_own_tables_begin_where_the_shared_one_is(self):
        loss_fn, statistics = ClasswiseAdaFocalLoss(5), class_statistics(5)
        loss_fn.set_table(statistics.edges, [3.0, 2.0, 1.0, -1.0, -2.0])
        loss_fn.update(statistics.edges, np.zeros(5), np.zeros((3, 5)), [1, 1, 1])
        assert loss_fn.class_gammas.tolist() == [[3.0, 2.0, 1.0, -1.0, -2.0]] * 3

    def test_logits_of_another_number_of_classes_are_an_error(self):
        loss_fn, _ = self.updated()
        with pytest.raises(ValueError, match=r"logits of 3 classes, one per table, found \(2, 4\)"):
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

    @pytest.mark.parametrize("gamma", [-0.5, -2.0, 20.0])
    def test_reset_returns_to_the_untrained_table(self, gamma):
        loss_fn = moved(AdaFocalLoss(gamma_initial=gamma))
        loss_fn.reset()
        torch.testing.assert_close(loss_fn.edges, torch.linspace(0, 1, 16))
        assert loss_fn.gammas.tolist() == [gamma] * 15

    def test_the_table_is_no_parameter(self):
        assert not list(AdaFocalLoss().parameters())

    @pytest.mark.parametrize("gamma_initial", [-2.5, 20.1, math.nan])
    def test_an_initial_gamma_outside_the_range_is_an_error(self, gamma_initial):
        with pytest.raises(ValueError, match=r"gamma_initial must lie in \[-2.0, 20.0\]"):
            AdaFocalLoss(gamma_initial=gamma_initial)

    @pytest.mark.parametrize("setting", [{"lambda_": -1.0}, {"switch": -0.1}, {"gamma_min": -math.inf}])
    def test_a_setting_of_the_rule_that_is_no_finite_number_from_its_lowest_on_is_an_error(self, setting):
        with pytest.raises(ValueError, match=f"{next(iter(setting))} must be a finite number"):
            AdaFocalLoss(**setting)

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
