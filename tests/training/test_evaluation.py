from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch

from hf_adafocal.losses.functional import cross_entropy
from hf_adafocal.metrics.binning import bin_statistics, equal_mass_edges
from hf_adafocal.metrics.scores import calibration_report, softmax
from hf_adafocal.training.evaluation import (
    IGNORED,
    CalibrationMetrics,
    HistogramCollector,
    counted_rows,
    equal_mass_statistics,
    per_sample,
    sample_metrics,
)


def batch(*shape, dtype=torch.float32):
    return (2 * torch.randn(shape)).to(dtype), torch.randint(shape[-1], shape[:-1])


def slow_rows(logits, labels):
    rows = []
    for z, y in zip(logits.double().tolist(), labels.tolist(), strict=True):
        p = reference.softmax(z)
        top = p.index(max(p))
        rows.append([p[top], float(top == y), reference.focal_loss(z, y, 0.0), float(top)])
    return rows


class TestPerSample:
    def test_confidence_correctness_nll_and_class_are_those_of_the_softmax(self):
        logits, labels = batch(50, 6)
        torch.testing.assert_close(per_sample(logits, labels), torch.tensor(slow_rows(logits, labels)))

    def test_float64_logits_are_computed_in_float64(self):
        logits, labels = batch(50, 6, dtype=torch.float64)
        rows = per_sample(logits, labels)
        torch.testing.assert_close(rows, torch.tensor(slow_rows(logits, labels), dtype=torch.float64))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_logits_are_computed_in_float32(self, dtype):
        logits, labels = batch(50, 6, dtype=dtype)
        assert torch.equal(per_sample(logits, labels), per_sample(logits.float(), labels))

    def test_the_nll_is_the_loss(self):
        logits, labels = batch(50, 6)
        torch.testing.assert_close(per_sample(logits, labels)[:, 2], cross_entropy(logits, labels, reduction="none"))

    def test_tokens_equal_the_flattened_form(self):
        logits, labels = batch(3, 5, 4)
        labels[1, 2:] = -100
        rows = per_sample(logits, labels)
        assert rows.shape == (3, 5, 4)
        torch.testing.assert_close(rows.view(15, 4), per_sample(logits.view(15, 4), labels.view(15)))

    @pytest.mark.parametrize("ignore_index", [-100, -1, 0, 255])
    def test_an_ignored_sample_is_marked_in_all_four_columns(self, ignore_index):
        logits, labels = batch(6, 4)
        labels = labels.clamp_min(1)
        expected = per_sample(logits, labels)
        labels[1::2] = ignore_index
        rows = per_sample(logits, labels, ignore_index)
        assert (rows[1::2] == IGNORED).all()
        assert torch.equal(rows[::2], expected[::2])

    def test_a_sample_that_counts_is_never_taken_for_an_ignored_one(self):
        logits = torch.tensor([[1e4, 0.0], [-1e4, 0.0], [0.0, 0.0]])
        rows = per_sample(logits, torch.tensor([0, 0, 1]))
        assert (rows >= 0).all() and (rows[:, :2] <= 1).all()

    @pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
    def test_confidence_never_exceeds_one(self, scale):
        logits, labels = torch.randn(5000, 3) * scale, torch.zeros(5000, dtype=torch.long)
        rows = per_sample(logits, labels)
        assert rows[:, 0].max() <= 1 and rows[:, 0].min() > 0 and rows[:, 2].min() >= 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_the_class_is_exact_among_many_whatever_the_dtype_of_the_logits(self, dtype):
        logits, predicted = torch.zeros(3, 100_000, dtype=dtype), torch.tensor([2049, 65_537, 99_999])
        logits[torch.arange(3), predicted] = 9.0
        assert per_sample(logits, torch.zeros(3, dtype=torch.long))[:, 3].tolist() == predicted.tolist()

    def test_int32_labels_are_accepted(self):
        logits, labels = batch(6, 4)
        assert torch.equal(per_sample(logits, labels.int()), per_sample(logits, labels))

    @pytest.mark.parametrize(
        ("logits", "labels"), [((4, 3), (3,)), ((4, 3), (4, 1)), ((2, 3, 5), (2, 5)), ((2, 3), ())], ids=str
    )
    def test_shapes_that_do_not_fit_are_an_error_that_names_both(self, logits, labels):
        with pytest.raises(ValueError) as error:
            per_sample(torch.randn(logits), torch.zeros(labels, dtype=torch.long))
        assert f"found {logits} and {labels}" in str(error.value)


class TestCountedRows:
    def test_ignored_samples_are_dropped_and_the_rest_keep_their_order(self):
        logits, labels = batch(2, 4, 3)
        labels[0, 1], labels[1, 3] = -100, -100
        kept = (labels != -100).view(-1)
        expected = per_sample(logits, labels).view(8, 4)[kept].double().numpy()
        np.testing.assert_array_equal(counted_rows(per_sample(logits, labels)), expected)

    def test_it_is_float64_whatever_comes_in(self):
        rows = counted_rows(per_sample(*batch(4, 3)).numpy())
        assert rows.dtype == np.float64 and rows.shape == (4, 4)

    def test_nothing_counts_where_every_label_is_ignored(self):
        assert counted_rows(per_sample(torch.randn(4, 3), torch.full((4,), -100))).shape == (0, 4)


class TestSampleMetrics:
    def test_they_are_those_of_the_report(self):
        logits, labels = batch(400, 5)
        report = calibration_report(softmax(logits), labels, 10)
        found = sample_metrics(counted_rows(per_sample(logits.double(), labels)), 10)
        assert found == {name: pytest.approx(report[name]) for name in ("accuracy", "nll", "ece", "ada_ece")}
        assert {type(value) for value in found.values()} == {float}

    def test_ignored_tokens_change_nothing(self):
        logits, labels = batch(6, 5, 3)
        labels[:, 3:] = -100
        shown = per_sample(logits[:, :3], labels[:, :3])
        assert sample_metrics(counted_rows(per_sample(logits, labels))) == sample_metrics(counted_rows(shown))

    def test_nan_logits_are_an_error(self):
        logits, labels = batch(4, 3)
        logits[2, 1] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            sample_metrics(counted_rows(per_sample(logits, labels)))


class TestEqualMassStatistics:
    def test_they_are_those_of_equal_mass_bins(self):
        rows = counted_rows(per_sample(*batch(200, 4)))
        stats = equal_mass_statistics(rows, 10)
        expected = bin_statistics(rows[:, 0], rows[:, 1], equal_mass_edges(rows[:, 0], 10))
        for name in ("edges", "count", "gap"):
            np.testing.assert_array_equal(getattr(stats, name), getattr(expected, name))
        assert stats.class_gap is None and stats.class_counts is None

    @pytest.mark.parametrize("num_bins", [1, 10, 80])
    def test_gaps_of_classes_are_those_of_the_samples_predicted_as_each_in_the_pooled_bins(self, num_bins):
        logits, labels = batch(200, 4)
        logits[:, 2] -= 100  # never predicted
        rows = counted_rows(per_sample(logits, labels))
        stats = equal_mass_statistics(rows, num_bins, num_classes=4)
        predicted, edges = logits.argmax(1).numpy(), equal_mass_edges(rows[:, 0], num_bins)
        gaps = np.zeros((4, num_bins))
        for k in (0, 1, 3):
            bins = reference.bins(rows[predicted == k, 0], rows[predicted == k, 1], edges)
            gaps[k] = [confidence - accuracy for _, confidence, accuracy in bins]
        np.testing.assert_allclose(stats.class_gap, gaps, atol=1e-12)
        assert stats.class_counts.tolist() == np.bincount(predicted, minlength=4).tolist()
        assert stats.class_counts[2] == 0 and np.abs(gaps[[0, 1, 3]]).max() > 0.05

    def test_a_class_of_the_model_has_its_row_also_where_no_sample_is_predicted_as_the_last(self):
        rows = counted_rows(per_sample(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])))
        stats = equal_mass_statistics(rows, 2, num_classes=3)
        assert stats.class_gap.shape == (3, 2) and stats.class_counts.tolist() == [1, 0, 0]

    def test_a_prediction_beyond_the_number_of_classes_is_an_error(self):
        rows = counted_rows(per_sample(torch.tensor([[0.0, 0.0, 2.0]]), torch.tensor([0])))
        with pytest.raises(ValueError, match=r"\[0, 2\), found 2 to 2"):
            equal_mass_statistics(rows, 2, num_classes=2)

    def test_a_histogram_has_none_of_single_classes(self):
        collector = HistogramCollector()
        collector.add(per_sample(*batch(20, 3)))
        assert collector.statistics(5).class_gap is None
        with pytest.raises(ValueError, match="no statistics of single classes"):
            collector.statistics(5, num_classes=3)


class TestCalibrationMetrics:
    def test_reduce_gives_the_rows_also_from_a_tuple_of_outputs(self):
        logits, labels = batch(8, 3)
        assert torch.equal(CalibrationMetrics().reduce(logits, labels), per_sample(logits, labels))
        assert torch.equal(CalibrationMetrics().reduce((logits, None), labels), per_sample(logits, labels))

    def test_a_call_gives_the_metrics_and_calibrate_the_bins_of_the_same_samples(self):
        metrics = CalibrationMetrics(num_bins=5)
        rows = per_sample(*batch(40, 3))
        rows[::4] = IGNORED
        found = metrics(SimpleNamespace(predictions=rows.numpy(), label_ids=None))
        assert found == sample_metrics(counted_rows(rows), 5)
        stats, expected = metrics.calibrate(), equal_mass_statistics(counted_rows(rows), 5)
        assert stats.count.sum() == 30
        np.testing.assert_array_equal(stats.gap, expected.gap)

    def test_calibrate_has_a_row_for_each_class_of_the_reduced_logits(self):
        metrics, (logits, labels) = CalibrationMetrics(num_bins=5), batch(40, 3)
        logits = torch.cat([logits, torch.full((40, 2), -50.0)], dim=1)
        metrics(SimpleNamespace(predictions=metrics.reduce(logits, labels).numpy()))
        found = metrics.calibrate()
        assert found.class_gap.shape == (5, 5)
        assert found.class_counts.tolist() == torch.bincount(logits.argmax(1), minlength=5).tolist()

    def test_calibrate_uses_the_last_evaluation(self):
        metrics = CalibrationMetrics(num_bins=2)
        for size in (10, 6):
            metrics(SimpleNamespace(predictions=per_sample(*batch(size, 3)).numpy()))
        assert metrics.calibrate().count.sum() == 6

    def test_calibrate_before_any_evaluation_is_an_error(self):
        with pytest.raises(RuntimeError, match="compute_metrics"):
            CalibrationMetrics().calibrate()

    def test_batches_that_the_trainer_pads_to_one_length_count_no_padding(self):
        metrics = CalibrationMetrics()
        short, long = per_sample(*batch(2, 3, 4)), per_sample(*batch(2, 5, 4))
        padded = torch.nn.functional.pad(short, (0, 0, 0, 2), value=-100)  # as a stock Trainer pads predictions
        found = metrics(SimpleNamespace(predictions=torch.cat([padded, long]).numpy()))
        expected = np.concatenate([counted_rows(short), counted_rows(long)])
        assert found == {name: pytest.approx(value) for name, value in sample_metrics(expected).items()}
