"""The sentences under a comparison, from numbers worked by hand."""

import pytest

from hf_adafocal.report.comparison import verdict


def runs(raw, scaled, accuracy=(0.8, 0.8, 0.8)):
    """The `test` entries of three seeds, from the ECE before and after scaling."""
    return [
        {"raw": {"ece": a, "accuracy": c}, "temperature_scaled": {"ece": b, "accuracy": c}}
        for a, b, c in zip(raw, scaled, accuracy, strict=True)
    ]


CROSS_ENTROPY = runs(raw=(0.10, 0.12, 0.14), scaled=(0.02, 0.02, 0.02))


class TestVerdict:
    def test_the_best_without_a_fit_is_named_with_what_it_gains_and_costs(self):
        other = runs(raw=(0.05, 0.06, 0.07), scaled=(0.04, 0.04, 0.04), accuracy=(0.79, 0.80, 0.78))
        text = verdict({"cross_entropy": CROSS_ENTROPY, "adafocal": other})
        # Differences -5, -6, -7 points: mean -6, standard error 1 / sqrt 3, t(2) = 4.303, so 2.48 either way.
        assert "Without a fit adafocal is calibrated best: ECE 6.00 %, -6.00 points (-8.48 to -3.52)" in text
        # Accuracy -1, 0, -2 points: the same width around -1, which holds 0.
        assert "for -1.00 points (-3.48 to +1.48, noise) of accuracy." in text
        assert text.startswith("3 seeds")

    def test_temperature_scaling_is_the_advice_where_it_is_better(self):
        text = verdict({"cross_entropy": CROSS_ENTROPY, "focal": runs((0.05, 0.06, 0.07), (0.04, 0.04, 0.04))})
        assert "After temperature scaling cross_entropy is calibrated best: ECE 2.00 %." in text
        # 2 - (5, 6, 7) = -3, -4, -5
        assert "Just use temperature scaling: cross_entropy with it has an ECE of 2.00 %, -4.00 points" in text

    def test_it_is_the_advice_too_where_the_difference_is_noise(self):
        text = verdict({"cross_entropy": CROSS_ENTROPY, "focal": runs((0.01, 0.03, 0.015), (0.04, 0.04, 0.04))})
        assert "Just use temperature scaling" in text and "noise) against the best without a fit" in text

    def test_it_is_not_where_a_loss_is_clearly_better_without(self):
        text = verdict({"cross_entropy": CROSS_ENTROPY, "focal": runs((0.010, 0.011, 0.012), (0.01, 0.01, 0.01))})
        assert "Temperature scaling does not make up for it" in text and "Just use" not in text
        assert "has an ECE of 2.00 %, +0.90 points (+0.65 to +1.15) against the best without a fit" in text

    def test_where_nothing_beats_the_baseline_it_says_so(self):
        text = verdict({"cross_entropy": CROSS_ENTROPY, "focal": runs((0.2, 0.2, 0.2), (0.1, 0.1, 0.1))})
        assert "Without a fit cross_entropy is calibrated best: ECE 12.00 %. After" in text

    def test_one_seed_has_no_intervals_and_is_called_so(self):
        text = verdict({"cross_entropy": CROSS_ENTROPY[:1], "focal": runs((0.05,), (0.03,), (0.8,))})
        assert text.startswith("One seed: repeat it with more.") and " to " not in text
        assert "-5.00 points against cross_entropy" in text

    def test_without_something_to_compare_there_is_none(self):
        assert verdict({"cross_entropy": CROSS_ENTROPY}) == verdict({"focal": CROSS_ENTROPY, "brier": []}) == ""

    def test_runs_must_pair_up(self):
        with pytest.raises(ValueError, match="Every loss needs a run of every seed, found .*'focal': 2"):
            verdict({"cross_entropy": CROSS_ENTROPY, "focal": CROSS_ENTROPY[:2]})
