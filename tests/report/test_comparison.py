"""The sentences under a comparison, from numbers worked by hand."""

from dataclasses import replace

import numpy as np
import pytest

from hf_adafocal.report.comparison import results_in_words, verdict
from hf_adafocal.report.facts import ModelFacts
from hf_adafocal.report.schema import Report, build_report
from hf_adafocal.scaling.fit import Scaling


def runs(raw, scaled, accuracy=(0.8, 0.8, 0.8)):
    """The `test` entries of three seeds, from the ECE before and after scaling."""
    return [
        {"raw": {"ece": a, "accuracy": c}, "temperature_scaled": {"ece": b, "accuracy": c}}
        for a, b, c in zip(raw, scaled, accuracy, strict=True)
    ]


CROSS_ENTROPY = runs(raw=(0.10, 0.12, 0.14), scaled=(0.02, 0.02, 0.02))


class TestVerdict:
    def test_the_best_as_trained_is_named_with_what_it_gains_and_costs(self):
        other = runs(raw=(0.05, 0.06, 0.07), scaled=(0.04, 0.04, 0.04), accuracy=(0.79, 0.80, 0.78))
        text = verdict({"cross_entropy": CROSS_ENTROPY, "adafocal": other})
        # Differences -5, -6, -7 points: mean -6, standard error 1 / sqrt 3, t(2) = 4.303, so 2.48 either way.
        assert "As trained adafocal is calibrated best: ECE 6.00 %; -6.00 points (-8.48 to -3.52) against" in text
        # Accuracy -1, 0, -2 points: the same width around -1, which holds 0.
        assert "for -1.00 points (-3.48 to +1.48, noise) of accuracy." in text
        assert text.startswith("3 seeds")

    def test_temperature_scaling_is_the_advice_where_it_is_better(self):
        text = verdict({"cross_entropy": CROSS_ENTROPY, "focal": runs((0.05, 0.06, 0.07), (0.04, 0.04, 0.04))})
        assert "After temperature scaling cross_entropy is calibrated best: ECE 2.00 %." in text
        # 2 - (5, 6, 7) = -3, -4, -5
        assert (
            "A temperature is enough here: cross_entropy with a fitted temperature has an ECE of 2.00 %, -4.00" in text
        )

    def test_it_is_left_open_where_the_difference_is_noise(self):
        text = verdict({"cross_entropy": CROSS_ENTROPY, "focal": runs((0.01, 0.03, 0.015), (0.04, 0.04, 0.04))})
        assert "Whether a temperature is enough these seeds leave open: cross_entropy" in text
        assert "noise) against the lowest as trained" in text and "is enough here" not in text

    def test_it_is_not_where_a_loss_is_clearly_better_without(self):
        text = verdict({"cross_entropy": CROSS_ENTROPY, "focal": runs((0.010, 0.011, 0.012), (0.01, 0.01, 0.01))})
        assert "A temperature alone does not reach it" in text and "enough" not in text
        assert "has an ECE of 2.00 %, +0.90 points (+0.65 to +1.15) against the lowest as trained" in text

    def test_where_nothing_beats_the_baseline_it_says_so(self):
        text = verdict({"cross_entropy": CROSS_ENTROPY, "focal": runs((0.2, 0.21, 0.22), (0.1, 0.1, 0.1))})
        assert "As trained cross_entropy is calibrated best: ECE 12.00 %. After" in text

    def test_there_is_no_winner_where_the_difference_is_noise(self):
        text = verdict({"cross_entropy": CROSS_ENTROPY, "focal": runs((0.05, 0.13, 0.12), (0.03, 0.01, 0.02))})
        assert (
            "As trained none is calibrated best by evidence: focal has the lowest ECE, 10.00 %, within noise of "
            in text
        )
        assert "is calibrated best:" not in text.split("After")[0]

    def test_a_winner_must_beat_every_other_loss_with_the_level_divided_among_them(self):
        close = runs((0.055, 0.066, 0.077), (0.04, 0.04, 0.04))  # 0.5, 0.6, 0.7 points worse than the lowest
        lowest = runs((0.05, 0.06, 0.07), (0.04, 0.04, 0.04))
        # Mean 0.6, standard error 0.0577; t(2) is 4.30 at 95 % (0.25 either way) and 10.9 at 99.17 % (0.63).
        two = verdict({"cross_entropy": close, "a": lowest})
        many = verdict({"cross_entropy": close, "a": lowest, **dict.fromkeys("bcdef", close)})
        assert "As trained a is calibrated best" in two
        assert "As trained none is calibrated best by evidence: a has the lowest ECE" in many

    def test_one_seed_is_no_evidence(self):
        text = verdict({"cross_entropy": CROSS_ENTROPY[:1], "focal": runs((0.05,), (0.03,), (0.8,))})
        assert text.startswith(
            "One seed: differences between the losses cannot be told from chance, so none is called"
        )
        assert "cross_entropy 10.00 %, focal 5.00 %" in text and "--seeds 0 1 2" in text

    def test_without_something_to_compare_there_is_none(self):
        assert verdict({"cross_entropy": CROSS_ENTROPY}) == verdict({"focal": CROSS_ENTROPY, "brier": []}) == ""

    def test_runs_must_pair_up(self):
        with pytest.raises(ValueError, match="Every loss needs a run of every seed, found .*'focal': 2"):
            verdict({"cross_entropy": CROSS_ENTROPY, "focal": CROSS_ENTROPY[:2]})


def one_run(loss: str, ece: float, interval: tuple[float, float], scaled: float, *, folded: bool = False) -> Report:
    """A report with an accuracy of 0.8 (0.7 to 0.9), and an ECE whose interval with a temperature is 0 to twice it."""
    logits = np.log([[0.9, 0.1], [0.8, 0.2]])
    scaling = {"folded" if folded else "scaling": Scaling(0.5, num_samples=100)}
    report = build_report(
        (logits, np.array([0, 1])), model=ModelFacts("X"), num_resamples=10, loss={"name": loss}, **scaling
    )
    rows = [
        {**metrics, "accuracy": 0.8, "ece": value}
        for metrics, value in ((report.test.raw, ece), (report.test.temperature_scaled, scaled))
    ]
    ends = {"raw": interval, "temperature_scaled": (0.0, 2 * scaled)}
    intervals = {kind: {"accuracy": (0.7, 0.9), "ece": found} for kind, found in ends.items()}
    return replace(report, test=replace(report.test, raw=rows[0], temperature_scaled=rows[1], intervals=intervals))


class TestResultsInWords:
    def test_values_are_told_apart_only_where_their_intervals_do_not_overlap(self):
        cross_entropy = one_run("cross_entropy", 0.10, (0.08, 0.12), 0.02)
        text = results_in_words(one_run("adafocal", 0.05, (0.03, 0.07), 0.02), cross_entropy)
        assert "adafocal has an ECE of 5.00 % (3.00 to 7.00) and cross_entropy 10.00 % (8.00 to 12.00), lower" in text
        assert "80.00 % (70.00 to 90.00), which their intervals cannot tell apart" in text
        text = results_in_words(one_run("adafocal", 0.15, (0.13, 0.17), 0.02), cross_entropy)
        assert "12.00), higher beyond both intervals." in text
        text = results_in_words(one_run("adafocal", 0.07, (0.05, 0.09), 0.02), cross_entropy)
        assert "12.00), which their intervals cannot tell apart." in text and text.endswith("one seed on one split.")

    def test_a_folded_temperature_is_named_with_what_it_did(self):
        text = results_in_words(one_run("adafocal", 0.10, (0.08, 0.12), 0.02, folded=True))
        assert text == (
            "A temperature of 2.00 is folded in: ECE 10.00 % (8.00 to 12.00) before, 2.00 % (0.00 to 4.00) after, "
            "lower beyond both intervals."
        )

    def test_one_that_is_not_folded_is_said_not_to_be(self):
        text = results_in_words(one_run("adafocal", 0.10, (0.08, 0.12), 0.02))
        assert text.startswith("The scores are those of the trained model.")

    def test_after_a_temperature_for_both_the_scaled_values_are_compared(self):
        ours, theirs = (one_run(loss, 0.1, (0.0, 0.2), ece) for loss, ece in (("adafocal", 0.02), ("focal", 0.01)))
        text = results_in_words(ours, theirs)
        assert "With a temperature for both, adafocal has an ECE of 2.00 % (0.00 to 4.00) and focal 1.00 %" in text
