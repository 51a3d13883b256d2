import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_adafocal.losses.gamma_table import FLSD_53_EDGES, FLSD_53_GAMMAS, lookup, lookup_by_class, pool, update

EDGES = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
GAMMAS = torch.tensor([5.0, 3.0, -1.0], dtype=torch.float64)
HUNDREDTHS = st.integers(-200, 2000).map(lambda gamma: gamma / 100)


def looked_up(p, edges=EDGES, gammas=GAMMAS):
    return lookup(torch.tensor(p, dtype=torch.float64), edges, gammas).tolist()


class TestLookup:
    def test_a_bin_holds_its_lower_edge_and_not_its_upper_one(self):
        below = math.nextafter(0.25, 0)
        assert looked_up([below, 0.25, 0.3, math.nextafter(0.5, 0), 0.5]) == [5, 3, 3, 3, -1]

    def test_the_end_bins_hold_everything_outside(self):
        edges = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
        assert looked_up([0.0, 0.1, 0.2, 0.39, 0.6, 0.8, 0.9, 1.0], edges) == [5, 5, 5, 5, -1, -1, -1, -1]

    def test_zero_and_one_have_a_bin(self):
        assert looked_up([0.0, 1.0]) == [5, -1]

    def test_a_bin_between_equal_edges_is_never_hit(self):
        edges = torch.tensor([0.0, 0.5, 0.5, 1.0], dtype=torch.float64)
        assert looked_up([0.0, 0.499, 0.5, 0.501, 1.0], edges) == [5, 5, -1, -1, -1]

    def test_a_model_whose_confidences_are_all_one_still_has_two_bins(self):
        assert looked_up([0.0, 0.999, 1.0], torch.ones(4, dtype=torch.float64)) == [5, 5, -1]

    def test_one_bin_holds_everything(self):
        assert looked_up([0.0, 0.5, 1.0], EDGES[[0, -1]], GAMMAS[:1]) == [5, 5, 5]

    def test_flsd_53_is_five_below_one_fifth_and_three_from_it_on(self):
        assert FLSD_53_EDGES == (0.0, 0.2, 1.0) and FLSD_53_GAMMAS == (5.0, 3.0)
        p = torch.tensor([0.0, 0.1999, 0.2, 0.5, 1.0])
        assert lookup(p, torch.tensor(FLSD_53_EDGES), torch.tensor(FLSD_53_GAMMAS)).tolist() == [5, 5, 3, 3, 3]

    def test_the_result_has_the_shape_of_p(self):
        assert lookup(torch.rand(2, 3, 4), EDGES.float(), GAMMAS).shape == (2, 3, 4)

    @given(
        p=st.lists(st.integers(0, 40), min_size=1).map(lambda values: [v / 40 for v in values]),
        edges=st.lists(st.integers(0, 40), min_size=2, max_size=16).map(
            lambda values: [v / 40 for v in sorted(values)]
        ),
    )
    def test_it_equals_a_search_bin_by_bin(self, p, edges):
        gammas = [float(b) for b in range(len(edges) - 1)]
        expected = [reference.looked_up_gamma(value, edges, gammas) for value in p]
        assert looked_up(p, torch.tensor(edges, dtype=torch.float64), torch.tensor(gammas)) == expected


class TestLookupByClass:
    def test_each_sample_meets_the_table_of_its_label(self):
        gammas = torch.stack([GAMMAS, -GAMMAS])
        p = torch.tensor([0.1, 0.1, 0.25, 0.9], dtype=torch.float64)
        assert lookup_by_class(p, torch.tensor([0, 1, 1, 1]), EDGES, gammas).tolist() == [5, -5, -3, 1]

    def test_it_is_lookup_in_each_class_whatever_the_shape(self):
        p, labels, gammas = torch.rand(2, 3, 4), torch.randint(5, (2, 3, 4)), torch.randn(5, 3)
        found = lookup_by_class(p, labels, EDGES.float(), gammas)
        for k in range(5):
            torch.testing.assert_close(found[labels == k], lookup(p[labels == k], EDGES.float(), gammas[k]))


class TestPool:
    def test_a_class_without_samples_has_the_shared_gammas(self):
        shared, own = torch.tensor([1.0, -2.0]), torch.tensor([[5.0, 7.0]])
        assert torch.equal(pool(own, shared, torch.zeros(1), 10.0), shared[None])

    @pytest.mark.parametrize(("count", "share"), [(10, 0.5), (30, 0.75), (1e9, 1.0)])
    def test_its_own_gammas_count_by_the_share_of_its_samples(self, count, share):
        shared, own = torch.tensor([1.0, -2.0]), torch.tensor([[5.0, 6.0]])
        found = pool(own, shared, torch.tensor([float(count)]), 10.0)
        torch.testing.assert_close(found, torch.tensor([[1 + share * 4, -2 + share * 8]]))

    def test_classes_do_not_touch_each_other(self):
        own = torch.tensor([[5.0], [9.0]])
        found = pool(own, torch.tensor([1.0]), torch.tensor([150.0, 0.0]))
        assert found.tolist() == [[3.0], [1.0]]


def updated(gamma, gap, dtype=torch.float32, **rule):
    return update(torch.tensor([gamma], dtype=dtype), torch.tensor([gap], dtype=dtype), **rule).item()


class TestUpdate:
    def test_it_follows_the_authors_trajectories(self, golden):
        for trajectory in golden("gamma_update")["trajectories"]:
            rule = {name: trajectory[name] for name in ("lambda_", "switch", "gamma_min", "gamma_max")}
            gammas = torch.full((15,), trajectory["gamma_initial"])
            for step in trajectory["steps"]:
                gammas = update(gammas, torch.tensor(step["gap"]), **rule)
                torch.testing.assert_close(gammas, torch.tensor(step["gammas"]), rtol=1e-5, atol=0)

    @given(gamma=HUNDREDTHS, gap=st.floats(-1, 1), lambda_=st.floats(0.1, 10), switch=st.floats(0.01, 0.5))
    def test_it_equals_the_rule_bin_by_bin_with_any_settings(self, gamma, gap, lambda_, switch):
        rule = {"lambda_": lambda_, "switch": switch, "gamma_min": -3.0, "gamma_max": 10.0}
        sizes = [abs(gamma) * math.exp(sign * lambda_ * gap) for sign in (1, -1)]
        if not any(math.isclose(size, switch, rel_tol=1e-4) for size in sizes):  # there rounding decides the side
            expected = reference.updated_gamma(gamma, gap, **rule)
            assert updated(gamma, gap, **rule) == pytest.approx(expected, rel=1e-5)
            assert updated(gamma, gap, torch.float64, **rule) == pytest.approx(expected, rel=1e-5)

    @given(gamma=HUNDREDTHS, gap=st.floats(-1, 1))
    def test_gamma_stays_in_range_and_out_of_the_switch(self, gamma, gap):
        found = torch.tensor(updated(gamma, gap))
        assert -2 <= found <= 20
        assert found.abs() >= 0.2

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("switch", [0.2, 0.3, 0.7])
    def test_a_gamma_that_jumped_stays_while_there_is_no_gap(self, dtype, switch):
        jumped = update(torch.tensor([switch], dtype=dtype), torch.tensor([-0.5], dtype=dtype), switch=switch)
        assert jumped.item() == pytest.approx(-switch, rel=1e-2)
        assert torch.equal(update(jumped, torch.zeros(1, dtype=dtype), switch=switch), jumped)

    def test_an_over_confident_bin_gets_more_focal_loss(self):
        assert updated(1.0, 0.1) == pytest.approx(math.exp(0.1))
        assert updated(1.0, -0.1) == pytest.approx(math.exp(-0.1))

    def test_an_over_confident_bin_gets_less_inverse_focal_loss(self):
        assert updated(-1.0, 0.1) == pytest.approx(-math.exp(-0.1))
        assert updated(-1.0, -0.1) == pytest.approx(-math.exp(0.1))

    def test_below_the_switch_it_jumps_to_the_other_side(self):
        assert updated(0.2, -0.1) == pytest.approx(-0.2)
        assert updated(-0.2, 0.1) == pytest.approx(0.2)

    def test_at_the_switch_it_stays(self):
        assert updated(0.2, 0.0) == pytest.approx(0.2)
        assert updated(-0.2, 0.0) == pytest.approx(-0.2)

    def test_zero_becomes_focal_loss_as_in_the_authors_code(self):
        assert updated(0.0, 0.0) == pytest.approx(0.2)

    def test_it_is_clipped_at_both_ends(self):
        assert updated(19.0, 0.5) == 20
        assert updated(-1.9, -0.5) == -2

    def test_lambda_is_the_step_size(self):
        assert updated(1.0, 0.1, lambda_=5.0) == pytest.approx(math.exp(0.5))

    def test_a_bin_without_gap_keeps_its_gamma(self):
        gammas = torch.tensor([-2.0, -0.2, 0.2, 1.0, 20.0])
        assert torch.equal(update(gammas, torch.zeros(5)), gammas)

    def test_tables_of_classes_move_row_by_row(self):
        gammas, gap = torch.tensor([[1.0, -1.0], [0.2, 3.0]]), torch.tensor([[0.1, 0.2], [-0.1, 0.0]])
        rows = [update(*row) for row in zip(gammas, gap, strict=True)]
        assert torch.equal(update(gammas, gap), torch.stack(rows))

    def test_the_arguments_are_left_alone(self):
        gammas, gap = torch.tensor([1.0, 0.2]), torch.tensor([0.5, -0.5])
        update(gammas, gap)
        assert gammas.tolist() == pytest.approx([1.0, 0.2]) and gap.tolist() == [0.5, -0.5]

    @pytest.mark.parametrize("gap", [math.nan, math.inf, -math.inf])
    def test_a_gap_that_is_not_finite_is_an_error(self, gap):
        with pytest.raises(ValueError, match="gap must be finite"):
            update(torch.ones(2), torch.tensor([0.1, gap]))

    @pytest.mark.parametrize("shape", [(3,), (1,), (), (2, 1)], ids=str)
    def test_a_gap_of_another_shape_is_an_error_that_names_both(self, shape):
        with pytest.raises(ValueError) as error:
            update(torch.ones(2), torch.zeros(shape))
        assert f"found (2,) and {shape}" in str(error.value)
