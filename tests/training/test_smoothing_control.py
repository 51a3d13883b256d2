"""The temperature rule: its signal and its schedule."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from hf_adafocal.training import smoothing_control
from hf_adafocal.training.smoothing_control import (
    COMPUTE,
    MAX_LOG_T,
    MOST_SAMPLES,
    MOST_UPDATES,
    START,
    STEPS_PER_UPDATE,
    gain_of_update,
    log_temperature,
    schedule,
    temperature_sums,
)


def predictions(size=4000, classes=6, temperature=1.0, seed=0):
    """Logits whose best temperature is about the one given, and labels drawn from it."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(size, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    return logits * temperature, labels


class TestTemperatureSums:
    def test_they_are_the_derivatives_of_the_nll_by_the_inverse_temperature(self):
        logits, labels = predictions(50)
        beta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        nll = F.cross_entropy(beta * logits, labels, reduction="sum")
        (slope,) = torch.autograd.grad(nll, beta, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, beta)
        expected = torch.stack([-slope.detach(), curvature, torch.tensor(50.0)])
        torch.testing.assert_close(temperature_sums(logits, labels), expected.double())

    def test_sums_of_batches_are_those_of_the_whole(self):
        logits, labels = predictions(40)
        parts = [temperature_sums(logits[i : i + 13], labels[i : i + 13]) for i in range(0, 40, 13)]
        torch.testing.assert_close(sum(parts), temperature_sums(logits, labels))

    def test_sums_of_chunks_are_those_of_the_whole(self, monkeypatch):
        logits, labels = predictions(40)
        whole = temperature_sums(logits, labels)
        for values in (1, 30, 6 * 40):  # chunks of 1, 5 and 40 samples
            monkeypatch.setattr(smoothing_control, "CHUNK_VALUES", values)
            torch.testing.assert_close(temperature_sums(logits, labels), whole)

    def test_a_single_class_tells_nothing(self):
        found = temperature_sums(torch.randn(4, 1), torch.tensor([0, 0, -100, 0]))
        assert found.tolist() == [0, 0, 3]

    def test_ignored_samples_do_not_count_whatever_their_logits(self):
        logits, labels = predictions(10)
        longer = torch.cat([logits, torch.full((3, 6), torch.nan)])
        ignored = torch.cat([labels, torch.full((3,), -100)])
        torch.testing.assert_close(temperature_sums(longer, ignored), temperature_sums(logits, labels))

    def test_tokens_equal_the_flattened_form(self):
        logits, labels = predictions(12)
        torch.testing.assert_close(
            temperature_sums(logits.reshape(3, 4, 6), labels.reshape(3, 4)), temperature_sums(logits, labels)
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_logits_are_computed_in_float32(self, dtype):
        logits, labels = predictions(200)
        half = logits.to(dtype)
        torch.testing.assert_close(temperature_sums(half, labels), temperature_sums(half.float(), labels))

    def test_a_shift_of_all_logits_changes_nothing(self):
        logits, labels = predictions(30)
        torch.testing.assert_close(temperature_sums(logits + 300, labels), temperature_sums(logits, labels))

    def test_sums_are_in_float64_whatever_comes_in(self):
        logits, labels = predictions(5)
        assert temperature_sums(logits.float(), labels).dtype == torch.float64

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_logits_that_are_not_finite_are_an_error_once_all_processes_have_them(self, value):
        logits, labels = predictions(5)
        logits[2, 1] = value
        with pytest.raises(ValueError, match="must be finite"):
            log_temperature(temperature_sums(logits, labels))

    def test_a_label_that_is_impossible_is_an_error_too(self):
        logits, labels = predictions(5)
        logits[2, labels[2]] = -torch.inf
        with pytest.raises(ValueError, match="must be finite"):
            log_temperature(temperature_sums(logits, labels))

    def test_classes_masked_with_minus_infinity_change_nothing(self):
        logits, labels = predictions(30)
        masked = torch.cat([logits, torch.full((30, 2), -torch.inf)], dim=1)
        torch.testing.assert_close(temperature_sums(masked, labels), temperature_sums(logits, labels))

    def test_without_a_label_there_is_nothing_to_measure(self):
        sums = temperature_sums(torch.zeros(3, 2), torch.full((3,), -100))
        with pytest.raises(ValueError, match="nothing to measure"):
            log_temperature(sums)

    def test_shapes_that_do_not_fit_are_an_error_that_names_both(self):
        with pytest.raises(ValueError, match=r"found \(4, 3\) and \(5,\)"):
            temperature_sums(torch.zeros(4, 3), torch.zeros(5, dtype=torch.long))


def best_log_temperature(logits, labels):
    def nll(log_t):
        return F.cross_entropy(logits * math.exp(-log_t), labels).item()

    return minimize_scalar(nll, bounds=(-3, 3), method="bounded", options={"xatol": 1e-8}).x


class TestLogTemperature:
    @pytest.mark.parametrize("temperature", [0.85, 0.95, 1.0, 1.05, 1.2])
    def test_near_1_it_is_what_a_search_finds_up_to_one_newton_step(self, temperature):
        logits, labels = predictions(temperature=temperature)
        found = log_temperature(temperature_sums(logits, labels))
        assert found == pytest.approx(best_log_temperature(logits, labels), rel=0.3, abs=0.005)

    @pytest.mark.parametrize(("temperature", "sign"), [(0.2, -1), (0.5, -1), (2.0, 1), (8.0, 1), (50.0, 1)])
    def test_far_from_1_it_has_the_right_sign_and_is_clipped(self, temperature, sign):
        logits, labels = predictions(temperature=temperature)
        assert log_temperature(temperature_sums(logits, labels)) == pytest.approx(sign * MAX_LOG_T)

    def test_it_is_the_newton_step_of_the_nll_with_a_prior_on_the_inverse_temperature(self):
        logits, labels = predictions(100, temperature=1.1)
        beta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        loss = F.cross_entropy(beta * logits, labels, reduction="sum") + ((beta - 1) * 4).square() / 2
        (slope,) = torch.autograd.grad(loss, beta, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, beta)
        expected = -math.log(1 - slope.item() / curvature.item())
        assert log_temperature(temperature_sums(logits, labels)) == pytest.approx(expected)

    @pytest.mark.parametrize("lead", [0.0, 12.0, 40.0, 1000.0])
    def test_predictions_that_are_right_and_uniform_or_certain_tell_nothing(self, lead):
        logits = torch.eye(4).repeat(16, 1) * lead
        assert abs(log_temperature(temperature_sums(logits, torch.arange(4).repeat(16)))) < 0.01

    def test_right_but_unsure_is_under_confident(self):
        logits = torch.eye(4).repeat(16, 1) * 2.0
        assert log_temperature(temperature_sums(logits, torch.arange(4).repeat(16))) == pytest.approx(-MAX_LOG_T)

    def test_an_untrained_model_moves_little(self):
        logits, labels = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)) / 10, torch.arange(64) % 10
        assert abs(log_temperature(temperature_sums(logits, labels))) < 0.1

    def test_certain_predictions_still_have_a_direction(self):
        assert log_temperature(torch.tensor([-4.0, 0.0, 20.0])) == pytest.approx(-math.log(0.75))

    def test_a_model_that_is_always_wrong_and_certain_is_over_confident(self):
        logits = torch.eye(4) * 1e4
        sums = temperature_sums(logits.repeat(10, 1), torch.arange(4).roll(1).repeat(10))
        assert log_temperature(sums) == pytest.approx(MAX_LOG_T)


class TestGainOfUpdate:
    @pytest.mark.parametrize(("updates", "spent"), [(1, 12), (2, 24), (10, 120), (20, 120)])
    def test_shares_rise_evenly_and_add_up_to_the_gain_or_a_tenth_of_it_an_update(self, updates, spent):
        shares = [gain_of_update(120, update, updates) for update in range(updates)]
        assert sum(shares) == pytest.approx(spent)
        np.testing.assert_allclose(shares, shares[0] * np.arange(1, updates + 1))


class TestSchedule:
    @given(
        total=st.integers(1, 5000),
        per_step=st.integers(1, 300),
        size=st.integers(4, 6000),
        processes=st.integers(1, 4),
    )
    def test_it_fits_the_run_and_its_budget(self, total, per_step, size, processes):
        plan = schedule(total, per_step, size, processes=processes)
        assert list(plan.steps) == sorted(set(plan.steps))
        assert len(plan.steps) <= min(MOST_UPDATES, total // STEPS_PER_UPDATE)
        assert all(START * total - 0.5 < step < total for step in plan.steps)
        assert plan.slice_size % processes == 0 and 1 <= plan.slice_size <= max(min(MOST_SAMPLES, size), processes)
        cost = len(plan.steps) * plan.slice_size / 3
        assert cost <= COMPUTE * total * per_step or len(plan.steps) == 1

    @given(total=st.integers(10, 5000), per_step=st.integers(1, 300))
    def test_updates_are_as_many_as_the_budget_allows_in_exact_arithmetic(self, total, per_step):
        budget = Fraction(3 * total * per_step, 20)  # forward passes
        expected = min(20, total // 10, max(budget // 64, 1))  # from 20 updates of 64 on the slices grow
        assert len(schedule(total, per_step, 6000).steps) == expected

    def test_slices_are_of_64_to_256_samples_and_of_what_the_user_says(self):
        few, many = schedule(400, 16, 6000), schedule(2100, 32, 6000)  # 960 forward passes, and 10,080
        assert (len(few.steps), few.slice_size) == (15, 64) and (len(many.steps), many.slice_size) == (20, 256)
        assert schedule(400, 16, 6000, samples=75).slice_size == 75

    def test_a_long_run_gets_all_updates_evenly(self):
        plan = schedule(total_steps=2100, samples_per_step=32, calibration_size=1000)
        assert (len(plan.steps), plan.slice_size) == (MOST_UPDATES, MOST_SAMPLES)
        assert plan.steps[0] == 168 + 92 and set(np.diff(plan.steps)) == {92}

    def test_a_run_of_few_steps_is_left_alone(self):
        assert schedule(9, 16, 100).steps == ()
        assert len(schedule(10, 16, 100).steps) == 1

    def test_the_user_can_say_how_often(self):
        assert schedule(100, 16, 100, every=30).steps == (38, 68, 98)

    def test_slices_roll_through_a_fixed_permutation(self):
        plan = schedule(2000, 32, 300)
        seen = np.concatenate([plan.slice(k, 300, seed=1) for k in range(3)])
        assert sorted(seen[:300]) == list(range(300))  # all of them before any of them again
        assert (seen[300:600] == seen[:300]).all()
        assert (plan.slice(2, 300, seed=1) == seen[2 * plan.slice_size : 3 * plan.slice_size]).all()
        assert (plan.slice(0, 300, seed=2) != plan.slice(0, 300, seed=1)).any()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0, 16, 100), "total_steps must be at least 1, found 0"),
            ((10, 0, 100), "samples_per_step must be at least 1, found 0"),
            ((10, 16, 0), "calibration_size must be at least 1, found 0"),
            ((10, 16, 100, 0), "every must be at least 1, found 0"),
            ((10, 16, 1, None, None, 2), "for each of 2 processes, found 1"),
            ((10, 16, 100, None, 0), "samples must be at least 1, found 0"),
        ],
    )
    def test_what_makes_no_sense_is_an_error(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            schedule(*arguments)
