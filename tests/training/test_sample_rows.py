import numpy as np
import pytest
import reference
import torch

from hf_adafocal.losses.functional import cross_entropy
from hf_adafocal.metrics.binning import bin_statistics, equal_mass_edges
from hf_adafocal.metrics.scores import calibration_report, softmax
from hf_adafocal.training import sample_rows as module
from hf_adafocal.training.sample_rows import (
    IGNORED,
    check_counts,
    counted_rows,
    equal_mass_statistics,
    is_lower_better,
    mean_nll,
    sample_metrics,
    sample_rows,
    split_finite,
)


def batch(*shape, dtype=torch.float32):
    return (2 * torch.randn(shape)).to(dtype), torch.randint(shape[-1], shape[:-1])


def slow_rows(logits, labels):
    rows = []
    for z, y in zip(logits.double().tolist(), labels.tolist(), strict=True):
        p = reference.softmax(z)
        top = p.index(max(p))
        brier = sum((value - (place == y)) ** 2 for place, value in enumerate(p))
        rows.append([p[top], float(top == y), reference.focal_loss(z, y, 0.0), float(top), brier])
    return rows


class TestSampleRows:
    def test_confidence_correctness_nll_class_and_brier_score_are_those_of_the_softmax(self):
        logits, labels = batch(50, 6)
        torch.testing.assert_close(sample_rows(logits, labels), torch.tensor(slow_rows(logits, labels)))

    def test_float64_logits_are_computed_in_float64(self):
        logits, labels = batch(50, 6, dtype=torch.float64)
        rows = sample_rows(logits, labels)
        torch.testing.assert_close(rows, torch.tensor(slow_rows(logits, labels), dtype=torch.float64))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_logits_are_computed_in_float32(self, dtype):
        logits, labels = batch(50, 6, dtype=dtype)
        assert torch.equal(sample_rows(logits, labels), sample_rows(logits.float(), labels))

    def test_the_nll_is_the_loss(self):
        logits, labels = batch(50, 6)
        torch.testing.assert_close(sample_rows(logits, labels)[:, 2], cross_entropy(logits, labels, reduction="none"))

    def test_tokens_equal_the_flattened_form(self):
        logits, labels = batch(3, 5, 4)
        labels[1, 2:] = -100
        rows = sample_rows(logits, labels)
        assert rows.shape == (3, 5, 5)
        torch.testing.assert_close(rows.view(15, 5), sample_rows(logits.view(15, 4), labels.view(15)))

    @pytest.mark.parametrize("ignore_index", [-100, -1, 0, 255])
    def test_an_ignored_sample_is_marked_in_all_five_columns(self, ignore_index):
        logits, labels = batch(6, 4)
        labels = labels.clamp_min(1)
        expected = sample_rows(logits, labels)
        labels[1::2] = ignore_index
        rows = sample_rows(logits, labels, ignore_index)
        assert (rows[1::2] == IGNORED).all()
        assert torch.equal(rows[::2], expected[::2])

    def test_a_sample_that_counts_is_never_taken_for_an_ignored_one(self):
        logits = torch.tensor([[1e4, 0.0], [-1e4, 0.0], [0.0, 0.0]])
        rows = sample_rows(logits, torch.tensor([0, 0, 1]))
        assert (rows >= 0).all() and (rows[:, :2] <= 1).all()

    @pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
    def test_confidence_never_exceeds_one(self, scale):
        logits, labels = torch.randn(5000, 3) * scale, torch.zeros(5000, dtype=torch.long)
        rows = sample_rows(logits, labels)
        assert rows[:, 0].max() <= 1 and rows[:, 0].min() > 0 and rows[:, 2].min() >= 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_the_class_is_exact_among_many_whatever_the_dtype_of_the_logits(self, dtype):
        logits, predicted = torch.zeros(3, 100_000, dtype=dtype), torch.tensor([2049, 65_537, 99_999])
        logits[torch.arange(3), predicted] = 9.0
        assert sample_rows(logits, torch.zeros(3, dtype=torch.long))[:, 3].tolist() == predicted.tolist()

    def test_in_chunks_it_is_the_same_to_the_bit(self, monkeypatch):
        logits, labels = batch(7, 3, 5)
        whole = sample_rows(logits, labels)
        monkeypatch.setattr(module, "CHUNK_VALUES", 11)
        assert torch.equal(sample_rows(logits, labels), whole)

    def test_of_no_sample_there_are_no_rows(self):
        assert sample_rows(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).shape == (0, 5)

    def test_an_impossible_class_changes_nothing(self):
        logits, labels = batch(20, 4)
        masked = torch.cat([logits, torch.full((20, 2), -torch.inf)], dim=1)
        torch.testing.assert_close(sample_rows(masked, labels), sample_rows(logits, labels))

    def test_the_mean_nll_is_that_of_the_samples_that_count(self):
        logits, labels = batch(3, 5, 4)
        labels[1, 2:] = -100
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(mean_nll(sample_rows(logits, labels)), expected)
        assert mean_nll(sample_rows(logits, torch.full((3, 5), -100))).isnan()

    def test_int32_labels_are_accepted(self):
        logits, labels = batch(6, 4)
        assert torch.equal(sample_rows(logits, labels.int()), sample_rows(logits, labels))

    @pytest.mark.parametrize(
        ("logits", "labels"), [((4, 3), (3,)), ((4, 3), (4, 1)), ((2, 3, 5), (2, 5)), ((2, 3), ())], ids=str
    )
    def test_shapes_that_do_not_fit_are_an_error_that_names_both(self, logits, labels):
        with pytest.raises(ValueError) as error:
            sample_rows(torch.randn(logits), torch.zeros(labels, dtype=torch.long))
        assert f"found {logits} and {labels}" in str(error.value)


class TestCountedRows:
    def test_ignored_samples_are_dropped_and_the_rest_keep_their_order(self):
        logits, labels = batch(2, 4, 3)
        labels[0, 1], labels[1, 3] = -100, -100
        kept = (labels != -100).view(-1)
        expected = sample_rows(logits, labels).view(8, 5)[kept].double().numpy()
        np.testing.assert_array_equal(counted_rows(sample_rows(logits, labels)), expected)

    def test_it_is_float64_whatever_comes_in(self):
        rows = counted_rows(sample_rows(*batch(4, 3)).numpy())
        assert rows.dtype == np.float64 and rows.shape == (4, 5)

    def test_nothing_counts_where_every_label_is_ignored(self):
        assert counted_rows(sample_rows(torch.randn(4, 3), torch.full((4,), -100))).shape == (0, 5)


class TestSampleMetrics:
    def test_they_are_those_of_the_report(self):
        logits, labels = batch(400, 5)
        report = calibration_report(softmax(logits), labels, 10)
        found = sample_metrics(counted_rows(sample_rows(logits.double(), labels)), 10)
        assert found == {name: pytest.approx(report[name]) for name in ("accuracy", "nll", "brier", "ece", "ada_ece")}
        assert {type(value) for value in found.values()} == {float}

    def test_ignored_tokens_change_nothing(self):
        logits, labels = batch(6, 5, 3)
        labels[:, 3:] = -100
        shown = sample_rows(logits[:, :3], labels[:, :3])
        assert sample_metrics(counted_rows(sample_rows(logits, labels))) == sample_metrics(counted_rows(shown))


class TestLogitsThatAreNotFinite:
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_their_samples_are_counted_apart_and_an_error(self, value):
        logits, labels = batch(6, 3)
        logits[2, 1] = value
        rows, others = split_finite(counted_rows(sample_rows(logits, labels)))
        assert (len(rows), others) == (5, 1)
        with pytest.raises(ValueError, match="1 of 6 samples of the 'x' set have logits that are NaN or infinite"):
            check_counts(len(rows), others, "'x' set")

    def test_nothing_that_counts_is_an_error_that_names_the_ignored_label(self):
        with pytest.raises(ValueError, match=r"Every label of the 'x' set is ignored \(255\)"):
            check_counts(0, 0, "'x' set", ignore_index=255)
        check_counts(1, 0, "'x' set")


class TestEqualMassStatistics:
    def test_they_are_those_of_equal_mass_bins(self):
        rows = counted_rows(sample_rows(*batch(200, 4)))
        stats = equal_mass_statistics(rows, 10)
        expected = bin_statistics(rows[:, 0], rows[:, 1], equal_mass_edges(rows[:, 0], 10))
        for name in ("edges", "count", "gap"):
            np.testing.assert_array_equal(getattr(stats, name), getattr(expected, name))
        assert stats.class_gap is None and stats.class_counts is None

    @pytest.mark.parametrize("num_bins", [1, 10, 80])
    def test_gaps_of_classes_are_those_of_the_samples_predicted_as_each_in_the_pooled_bins(self, num_bins):
        logits, labels = batch(200, 4)
        logits[:, 2] -= 100  # never predicted
        rows = counted_rows(sample_rows(logits, labels))
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
        rows = counted_rows(sample_rows(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])))
        stats = equal_mass_statistics(rows, 2, num_classes=3)
        assert stats.class_gap.shape == (3, 2) and stats.class_counts.tolist() == [1, 0, 0]

    def test_a_prediction_beyond_the_number_of_classes_is_an_error(self):
        rows = counted_rows(sample_rows(torch.tensor([[0.0, 0.0, 2.0]]), torch.tensor([0])))
        with pytest.raises(ValueError, match=r"\[0, 2\), found 2 to 2"):
            equal_mass_statistics(rows, 2, num_classes=2)


class TestIsLowerBetter:
    @pytest.mark.parametrize("name", ["ece", "ada_ece", "nll", "brier", "refinement"])
    def test_of_the_metrics_that_fall_with_any_prefix(self, name):
        assert all(is_lower_better(f"{prefix}{name}") for prefix in ("", "eval_", "eval_calibration_"))

    @pytest.mark.parametrize("name", ["accuracy", "eval_accuracy", "temperature", "niece", "eval_f1", "", "nll_gain"])
    def test_of_no_others(self, name):
        assert not is_lower_better(name)
