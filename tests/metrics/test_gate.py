import math
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import scipy.stats

from hf_adafocal import cli
from hf_adafocal.metrics.gate import calibration_gate, samples_needed
from hf_adafocal.metrics.intervals import calibration_error_interval
from hf_adafocal.metrics.scores import adaptive_calibration_error, expected_calibration_error, top_label

SUFFIXES = ("parquet", "csv", "npz")
every_suffix = pytest.mark.parametrize("suffix", SUFFIXES)
every_nested_suffix = pytest.mark.parametrize("suffix", ["parquet", "npz"])


def predictions(size=2000, gap=0.0):
    """Probabilities of three classes whose top one is right at a rate of its probability minus the gap."""
    generator = np.random.default_rng(0)
    confidence = 0.5 + 0.5 * generator.random(size)
    predicted = generator.integers(3, size=size)
    labels = np.where(generator.random(size) < confidence - gap, predicted, (predicted + 1) % 3)
    probabilities = np.repeat((1 - confidence[:, None]) / 2, 3, axis=1)
    probabilities[np.arange(size), predicted] = confidence
    return probabilities, labels


def pairs(size=2000, gap=0.0):
    return top_label(*predictions(size, gap))


def save(path, **columns):
    """Write arrays, or lists of a row each, to a file of the kind its suffix says."""
    if path.suffix == ".npz":
        np.savez(path, **columns)
        return path
    table = pyarrow.table({name: list(values) for name, values in columns.items()})
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pyarrow.parquet.write_table(table, path)
    return path


class TestCalibrationGate:
    def test_it_holds_the_interval_of_the_expected_calibration_error(self):
        confidence, correct = pairs()
        found = calibration_gate(confidence, correct, max_ece=0.1, confidence_level=0.9, num_bins=10)
        assert found.interval == calibration_error_interval(confidence, correct, 10, level=0.9)
        assert found.ece == found.interval.value == expected_calibration_error(*predictions(), 10)

    def test_equal_mass_bins_make_it_a_gate_on_the_adaptive_one(self):
        found = calibration_gate(*pairs(), max_ece=0.1, scheme="equal_mass")
        assert found.ece == adaptive_calibration_error(*predictions())
        assert "15 equal-mass bins" in found.message

    def test_a_calibrated_model_passes_and_an_over_confident_one_fails(self):
        assert calibration_gate(*pairs(), max_ece=0.05).passed is True
        assert calibration_gate(*pairs(gap=0.1), max_ece=0.05).passed is False

    def test_the_upper_end_decides_not_the_value(self):
        high = calibration_gate(*pairs(), max_ece=1).interval.high
        assert calibration_gate(*pairs(), max_ece=high).passed
        assert not calibration_gate(*pairs(), max_ece=np.nextafter(high, 0)).passed

    def test_too_few_samples_fail_and_the_message_says_so(self):
        found = calibration_gate(*pairs(200), max_ece=0.08)
        assert found.ece < 0.08 and not found.passed
        needed = samples_needed(pairs(200)[0], max_ece=0.08)
        assert found.message.endswith(
            "the upper end is above the limit 0.08, the lower end is not: a calibrated model with these confidences "
            f"needs about {needed} samples to pass"
        )

    def test_a_limit_that_no_number_of_samples_meets_is_said(self):
        assert calibration_gate(*pairs(200), max_ece=0).message.endswith(
            "no number of samples suffices for this limit"
        )

    def test_a_limit_at_the_upper_end_passes_without_a_word_about_more_samples(self):
        high = calibration_gate(*pairs(200), max_ece=1).interval.high
        assert calibration_gate(*pairs(200), max_ece=high).message.endswith(f"is within the limit {high:g}")

    def test_few_samples_without_an_error_do_not_pass(self):
        found = calibration_gate(np.full(20, 0.98), np.ones(20), max_ece=0.03)
        assert not found.passed and found.interval.low == 0 and found.interval.high > 0.14
        correct = np.arange(100) > 0  # an error rate of 5 % is compatible with 1 error in 100
        assert not calibration_gate(np.full(100, 0.995), correct, max_ece=0.03).passed

    def test_the_message_is_one_line_with_every_number(self):
        found = calibration_gate(np.full(400, 0.75), np.arange(400) % 2, max_ece=0.125, num_bins=10)
        ends = f"{found.interval.low:.4g} to {found.interval.high:.4g}"
        assert found.message == (
            f"FAIL: ECE 0.25 (95% interval {ends}; 400 samples, 10 equal-width bins); "
            "the upper end is above the limit 0.125"
        )

    def test_a_larger_confidence_is_stricter(self):
        ends = [calibration_gate(*pairs(), max_ece=1, confidence_level=level).interval.high for level in (0.5, 0.99)]
        limit = sum(ends) / 2
        assert calibration_gate(*pairs(), max_ece=limit, confidence_level=0.5).passed
        assert not calibration_gate(*pairs(), max_ece=limit, confidence_level=0.99).passed

    @pytest.mark.parametrize("limit", [-0.01, 1.01, 3, np.nan])
    def test_a_limit_that_is_no_fraction_is_an_error(self, limit):
        with pytest.raises(ValueError, match=rf"fraction in \[0, 1\], found {limit}; 0.03 stands for 3 %"):
            calibration_gate(*pairs(), max_ece=limit)

    @pytest.mark.parametrize("level", [0, 1, 95, np.nan])
    def test_a_confidence_out_of_range_is_an_error(self, level):
        with pytest.raises(ValueError, match=f"confidence_level must lie strictly between 0 and 1, found {level}"):
            calibration_gate(*pairs(), max_ece=0.1, confidence_level=level)

    @pytest.mark.parametrize("size", [20, 100, 200])
    def test_a_true_error_above_the_limit_passes_no_more_often_than_it_says(self, size):
        # Accuracy .96 at confidence .995: whether the gate passes depends on the number of errors alone.
        errors = np.arange(size + 1)
        passes = [
            calibration_gate(np.full(size, 0.995), np.arange(size) >= count, max_ece=0.0349).passed for count in errors
        ]
        assert scipy.stats.binom.pmf(errors, size, 0.04)[passes].sum() <= 0.025

    @pytest.mark.parametrize("shape", ["sharp", "flat"])
    @pytest.mark.parametrize("shift", [0.0501, -0.0501])
    def test_drawn_confidences_whose_error_is_above_the_limit_rarely_pass(self, shape, shift):
        generator, passed, trials = np.random.default_rng(0), 0, 0
        for size in (20, 100, 500, 3000):
            for _ in range(60):
                rate = 0.06 + 0.88 * (generator.beta(9, 1, size) if shape == "sharp" else generator.random(size))
                passed += calibration_gate(rate + shift, generator.random(size) < rate, max_ece=0.05).passed
                trials += 1
        assert scipy.stats.binom.sf(passed - 1, trials, 0.025) > 0.001

    def test_what_the_calibration_error_refuses_is_refused(self):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            calibration_gate([1.5], [1], max_ece=0.1)


class TestSamplesNeeded:
    @pytest.mark.parametrize("confidence", [np.full(1, 0.98), np.full(1, 0.7), np.linspace(0.3, 1, 400)])
    @pytest.mark.parametrize("limit", [0.05, 0.1])
    def test_a_calibrated_model_passes_with_so_many_about_9_times_in_10(self, confidence, limit):
        generator = np.random.default_rng(0)
        passed = {}
        needed = samples_needed(confidence, max_ece=limit)
        for size in (needed, needed // 4):
            drawn = [generator.choice(confidence, size) for _ in range(60)]
            passed[size] = sum(calibration_gate(c, generator.random(size) < c, max_ece=limit).passed for c in drawn)
        assert passed[needed] >= 45 and passed[needed // 4] <= 30

    def test_more_bins_a_smaller_limit_and_a_higher_level_need_more(self):
        confidence = np.linspace(0.3, 1, 200)
        base = samples_needed(confidence, max_ece=0.05)
        assert samples_needed(confidence, max_ece=0.05, num_bins=50) > base
        assert samples_needed(confidence, max_ece=0.04) > base
        assert samples_needed(confidence, max_ece=0.05, confidence_level=0.99) > base
        assert samples_needed(confidence, max_ece=0.05, num_bins=5) < base

    def test_certain_confidences_need_the_samples_of_an_error_rate(self):
        # without an error (1 - limit)^n <= .025
        needed = samples_needed([1.0], max_ece=0.03)
        assert 0.97 ** (needed * 0.9) > 0.025 > 0.97 ** (needed * 1.1)

    @pytest.mark.parametrize("limit", [0.976, 0.6, 0.5, 0.45, 0.3])
    def test_few_certain_confidences_are_counted_one_by_one(self, limit):
        smallest = next(n for n in range(1, 20) if 0.025 ** (1 / n) >= 1 - limit)
        assert samples_needed([1.0], max_ece=limit) == smallest

    @pytest.mark.parametrize(("limit", "expected"), [(0.0354, 110), (0.0032, 1200), (0.0029, 1300), (3e-5, 130_000)])
    def test_a_number_is_rounded_up_to_two_digits(self, limit, expected):
        exact = math.log(0.025) / math.log1p(-limit)
        assert 0 < expected - exact < 10 ** (len(str(expected)) - 2)
        assert samples_needed([1.0], max_ece=limit) == expected

    @pytest.mark.parametrize("confidence", [[1.0], [0.75], [0.1, 0.5, 0.9]])
    def test_any_number_of_samples_meets_a_limit_of_1(self, confidence):
        assert samples_needed(confidence, max_ece=1) == 1
        assert calibration_gate([0.75], [0], max_ece=1).passed

    def test_it_is_the_number_that_the_simulation_was_run_with(self):
        assert samples_needed([0.99] * 9 + [0.55], max_ece=0.03) == 840  # model_cards/gate.md: 92 of 100 passed

    def test_a_number_beyond_a_billion_is_none(self):
        # about (1.28 * .6 + .8 + 1.96)^2 * .1875 / limit^2 for one bin
        assert 5e8 < samples_needed([0.75], max_ece=5e-5) < 1e9
        assert samples_needed([0.75], max_ece=4e-5) is None

    def test_the_largest_number_that_is_tried_is_found(self, monkeypatch):
        limit = 1 - 0.025 ** (1 / 50)  # which 50 certain samples meet and 49 do not
        for most, expected in ((51, 50), (50, 50), (49, None)):
            monkeypatch.setattr("hf_adafocal.metrics.gate._MOST_SAMPLES", most)
            assert samples_needed([1.0], max_ece=limit + 1e-9) == expected

    def test_no_number_suffices_for_a_limit_of_0(self):
        assert samples_needed([0.75], max_ece=0) is None


class TestGateCommand:
    @every_suffix
    def test_it_exits_with_0_within_the_limit_and_1_above(self, tmp_path, capsys, suffix):
        for gap, code, word in ((0, 0, "PASS"), (0.1, 1, "FAIL")):
            confidence, correct = pairs(gap=gap)
            path = save(tmp_path / f"p.{suffix}", confidence=confidence, correct=correct)
            assert cli.main(["gate", "--max-ece", "0.05", str(path)]) == code
            found = capsys.readouterr()
            assert found.out == calibration_gate(confidence, correct, max_ece=0.05).message + "\n"
            assert found.out.startswith(word) and not found.err

    def test_its_options_reach_the_gate(self, tmp_path, capsys):
        probabilities, labels = predictions()
        path = save(tmp_path / "p.parquet", probs=probabilities, y=labels)
        line = ["gate", "--max-ece", "0.06", "--confidence", "0.5", "--num-bins", "7"]
        assert cli.main([*line, str(path), "--probability-columns", "probs", "y"]) == 0
        expected = calibration_gate(*pairs(), max_ece=0.06, confidence_level=0.5, num_bins=7).message
        assert capsys.readouterr().out == expected + "\n"

    def test_pair_columns_can_be_named(self, tmp_path):
        path = save(tmp_path / "p.csv", score=[0.5] * 400, hit=[0, 1] * 200)
        assert cli.main(["gate", "--max-ece", "0.1", str(path), "--pair-columns", "score", "hit"]) == 0

    @pytest.mark.parametrize(
        ("columns", "extra", "names"),
        [
            ({"confidence": [0.5], "hit": [1]}, [], ["p.csv", "'correct'", "'hit'"]),
            ({"confidence": [1.5], "correct": [1]}, [], ["p.csv", "'confidence'", "found 1.5"]),
            ({"confidence": [0.5], "correct": [1]}, ["--max-ece", "3"], ["max_ece", "found 3"]),
            ({"confidence": [0.5], "correct": [1]}, ["--confidence", "95"], ["confidence_level", "found 95"]),
            ({"confidence": [0.5], "correct": [1]}, ["--num-bins", "0"], ["num_bins", "found 0"]),
        ],
    )
    def test_unusable_input_exits_with_2_and_one_line(self, tmp_path, capsys, columns, extra, names):
        path = save(tmp_path / "p.csv", **columns)
        assert cli.main(["gate", "--max-ece", "0.1", str(path), *extra]) == 2
        found = capsys.readouterr()
        assert not found.out and found.err.startswith("hf-adafocal gate: ") and found.err.count("\n") == 1
        assert all(name in found.err for name in names)

    @pytest.mark.parametrize(
        "line",
        [
            ["p.csv"],
            ["--max-ece", "0.1"],
            ["--max-ece", "0.1", "p.csv", "--unknown"],
            ["--max-ece", "0.1", "p.csv", "--pair-columns", "a", "b", "--probability-columns", "c", "d"],
        ],
    )
    def test_a_wrong_command_line_exits_with_2(self, line):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["gate", *line])
        assert exit_.value.code == 2

    def test_the_process_exits_with_1_above_the_limit_and_2_without_a_file(self, tmp_path):
        confidence, correct = pairs(gap=0.1)
        path = save(tmp_path / "p.parquet", confidence=confidence, correct=correct)
        command = [sys.executable, "-m", "hf_adafocal.cli", "gate", "--max-ece", "0.05"]
        failed = subprocess.run([*command, str(path)], capture_output=True, text=True)
        assert failed.returncode == 1 and failed.stdout.startswith("FAIL: ECE 0.") and not failed.stderr
        missing = subprocess.run([*command, str(tmp_path / "no.parquet")], capture_output=True, text=True)
        assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and "no.parquet" in missing.stderr

    def test_it_loads_neither_torch_nor_transformers(self, tmp_path):
        path = save(tmp_path / "p.parquet", confidence=[0.5], correct=[1])
        code = (
            "import sys; from hf_adafocal import cli; "
            f"cli.main(['gate', '--max-ece', '1', {str(path)!r}]); print(*sys.modules)"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert not set(found.split()) & {"torch", "transformers", "datasets", "sklearn"}
