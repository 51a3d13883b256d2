import numpy as np
import pytest

from hf_adafocal.metrics.scores import softmax
from hf_adafocal.report.tables import comparison_table, report_table, split_report


def overconfident(size: int, seed: int):
    """Logits three times too large for labels drawn from their softmax."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(size, 4))
    labels = (softmax(logits).cumsum(1) < generator.random((size, 1))).sum(1)
    return 3 * logits, labels


class TestSplitReport:
    def test_scaling_finds_the_temperature_and_mends_the_test_split(self):
        report = split_report(overconfident(4000, 0), overconfident(4000, 1))
        assert report["temperature"] == pytest.approx(3, rel=0.05)
        assert report["raw"]["ece"] > 0.15 > 0.03 > report["temperature_scaled"]["ece"]
        assert report["raw"]["accuracy"] == report["temperature_scaled"]["accuracy"]

    def test_the_temperature_never_sees_the_test_split(self):
        calibration = overconfident(500, 1)
        first = split_report(overconfident(100, 2), calibration)
        second = split_report(overconfident(100, 3), calibration)
        assert first["temperature"] == second["temperature"] and first["raw"] != second["raw"]

    def test_it_says_which_bins(self):
        report = split_report(overconfident(50, 0), overconfident(50, 1), num_resamples=5)
        assert report["bins"]["ada_ece"] == "equal_mass" and report["bins"]["ece"] == "equal_width"

    def test_every_metric_has_an_interval_around_it_before_and_after(self):
        report = split_report(overconfident(300, 0), overconfident(300, 1), num_resamples=50)
        intervals = report["intervals"]
        assert (intervals["level"], intervals["num_resamples"]) == (0.95, 50)
        for name in ("raw", "temperature_scaled"):
            assert intervals[name].keys() == report[name].keys() - {"num_samples", "num_bins"}
            for metric, (low, high) in intervals[name].items():
                assert low <= report[name][metric] <= high
        assert intervals["raw"]["ece"][0] > intervals["temperature_scaled"]["ece"][1]


def test_one_run_is_a_table_of_two_rows():
    report = split_report(overconfident(100, 0), overconfident(100, 1))
    lines = report_table(report).splitlines()
    assert lines[0].split("|")[2].strip() == "accuracy %"
    assert lines[2].split("|")[1].strip() == "as trained"
    assert lines[2].split("|")[5].strip() == f"{100 * report['raw']['ece']:.2f}"
    assert lines[3].split("|")[1].strip() == f"T = {report['temperature']:.2f}"
    assert len({len(line) for line in lines}) == 1


def test_several_runs_are_summed_up_by_mean_and_sample_deviation():
    runs = [
        {"temperature": t, "raw": dict.fromkeys(KEYS, v), "temperature_scaled": dict.fromkeys(KEYS, v)}
        for t, v in ((1.0, 0.1), (2.0, 0.3))
    ]
    lines = comparison_table({"focal": runs}).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")]
    assert cells[1:5] == ["focal", "2", "none", "20.00 ± 14.14"]
    assert cells[-2] == "1.50 ± 0.71"
    assert "±" not in comparison_table({"focal": runs[:1]})


KEYS = ("accuracy", "nll", "brier", "ece", "ada_ece")
