"""The one table of metrics, of a report and of several runs."""

import numpy as np
import pytest

from hf_adafocal.metrics.scores import softmax
from hf_adafocal.report.facts import ModelFacts
from hf_adafocal.report.measurement import Collected
from hf_adafocal.report.schema import build_report
from hf_adafocal.report.tables import METRICS, comparison_table, markdown, report_table, results_table
from hf_adafocal.scaling.fit import Scaling

FACTS = ModelFacts("BertForSequenceClassification")
KEYS = ("accuracy", "nll", "brier", "ece", "ada_ece")


def overconfident(size: int, seed: int):
    """Logits three times too large for labels drawn from their softmax."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(size, 4))
    labels = (softmax(logits).cumsum(1) < generator.random((size, 1))).sum(1)
    return 3 * logits, labels


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


class TestReportTable:
    def test_one_run_is_a_table_of_two_rows(self):
        report = build_report(overconfident(100, 0), overconfident(100, 1), model=FACTS, num_resamples=10)
        lines = report_table(report).splitlines()
        assert cells(lines[0]) == ["scores", "accuracy %", "NLL", "Brier", "ECE %", "AdaECE %"]
        assert (
            cells(lines[2])[0] == "as trained (this checkpoint)"
            and cells(lines[2])[4] == f"{100 * report.test.raw['ece']:.2f}"
        )
        assert cells(lines[3])[0] == f"T = {report.test.temperature:.2f}"
        assert len({len(line) for line in lines}) == 1

    def test_a_vector_scaling_has_no_temperature_and_a_row_all_the_same(self):
        vector = Scaling((0.3,) * 4, (0.1, 0.0, 0.0, 0.0))
        report = build_report(overconfident(100, 0), model=FACTS, scaling=vector, num_resamples=10)
        assert cells(report_table(report).splitlines()[3])[0] == "vector scaled"

    def test_metrics_that_no_row_has_are_left_out(self):
        report = build_report(Collected({"accuracy": 0.5, "nll": 1.0, "ece": 0.1}, 10, 15), model=FACTS)
        lines = report_table(report, tuple(METRICS)).splitlines()
        assert cells(lines[0]) == ["scores", "accuracy %", "NLL", "ECE %"] and len(lines) == 3

    def test_intervals_stand_beside_the_metrics_they_were_asked_for(self):
        report = build_report(overconfident(100, 0), model=FACTS, num_resamples=10)
        low, high = (100 * end for end in report.test.intervals["raw"]["ece"])
        found = dict(zip(KEYS, cells(report_table(report, KEYS, intervals=("ece",)).splitlines()[2])[1:], strict=True))
        assert found["ece"] == f"{100 * report.test.raw['ece']:.2f} ({low:.2f} to {high:.2f})"
        assert "(" not in found["accuracy"]

    def test_the_row_that_ships_is_marked_and_baselines_follow(self):
        report = build_report(
            overconfident(100, 0), model=FACTS, folded=Scaling(0.5), num_resamples=10,
            baselines={"cross_entropy": {"num_samples": 1, "num_bins": 1, "accuracy": 0.5, "nll": 1.0, "ece": 0.1}},
        )  # fmt: skip
        titles = [cells(line)[0] for line in report_table(report, mark=True).splitlines()[2:]]
        assert titles == ["as trained", "**T = 2.00** (this checkpoint)", "baseline: cross\\_entropy"]

    def test_names_cannot_break_the_table(self):
        assert markdown([["a", "b"], ["x | y\nz", "1"]]).splitlines()[2] == "| x \\| y z | 1   |"


class TestMeasurement:
    def test_scaling_finds_the_temperature_and_mends_the_test_split(self):
        test = build_report(overconfident(4000, 0), overconfident(4000, 1), model=FACTS, num_resamples=5).test
        assert test.temperature == pytest.approx(3, rel=0.05)
        assert test.raw["ece"] > 0.15 > 0.03 > test.temperature_scaled["ece"]
        assert test.raw["accuracy"] == test.temperature_scaled["accuracy"]
        assert test.intervals["raw"]["ece"][0] > test.intervals["temperature_scaled"]["ece"][1]

    def test_the_temperature_never_sees_the_test_split(self):
        first, second = (
            build_report(overconfident(100, seed), overconfident(500, 1), model=FACTS, num_resamples=5).test
            for seed in (2, 3)
        )
        assert first.temperature == second.temperature and first.raw != second.raw


class TestComparisonTable:
    def test_several_runs_are_summed_up_by_mean_and_sample_deviation(self):
        runs = [
            {"temperature": t, "raw": dict.fromkeys(KEYS, v), "temperature_scaled": dict.fromkeys(KEYS, v)}
            for t, v in ((1.0, 0.1), (2.0, 0.3))
        ]
        line = cells(comparison_table({"focal": runs}).splitlines()[2])
        assert line[:4] == ["focal", "2", "none", "20.00 ± 14.14"] and line[-1] == "1.50 ± 0.71"
        assert "±" not in comparison_table({"focal": runs[:1]})

    def test_runs_without_a_temperature_have_an_empty_cell(self):
        runs = [{"raw": dict.fromkeys(KEYS, 0.1), "temperature_scaled": dict.fromkeys(KEYS, 0.1)}]
        assert cells(comparison_table({"focal": runs}).splitlines()[2])[-1] == ""


class TestResultsTable:
    def test_the_baseline_stands_first_and_accuracy_and_ece_have_their_intervals(self):
        reports = [
            build_report(
                overconfident(100, 0), overconfident(100, 1), model=FACTS, num_resamples=10, loss={"name": name}
            )
            for name in ("focal", "brier")
        ]
        lines = results_table(*reports).splitlines()
        titles = ["brier, as trained", "brier, T", "focal, as trained (this checkpoint)", "focal, T"]
        assert [cells(line)[0].split(" = ")[0] for line in lines[2:]] == titles
        assert ["(" in cell for cell in cells(lines[2])[1:]] == [True, False, True, False]
        low, high = (100 * end for end in reports[0].test.intervals["raw"]["ece"])
        assert cells(lines[4])[3] == f"{100 * reports[0].test.raw['ece']:.2f} ({low:.2f} to {high:.2f})"

    def test_a_run_without_a_baseline_has_its_own_rows_alone(self):
        report = build_report(overconfident(100, 0), model=FACTS, num_resamples=10)
        assert [cells(line)[0] for line in results_table(report).splitlines()[2:]] == [
            "this model, as trained (this checkpoint)"
        ]
