"""Metrics of dense prediction: against slow loops, by hand, and what is resampled."""

import numpy as np
import pytest
import scipy.stats

from hf_adafocal.metrics.groups import count_groups, grouped_error_interval
from hf_adafocal.metrics.segmentation import (
    DenseCounts,
    count_dense,
    dense_differences,
    dense_intervals,
    dense_metrics,
)


def predictions(images=5, shape=(6, 7), classes=3, seed=0, ignored=0.1):
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.ones(classes), (images, *shape))
    labels = random.integers(0, classes, (images, *shape))
    labels[random.random(labels.shape) < ignored] = -100
    return probabilities.max(-1), probabilities.argmax(-1), labels


def slow_ece(confidence, correct, num_bins=15):
    total = 0.0
    for low in range(num_bins):
        inside = [i for i, c in enumerate(confidence) if low / num_bins < c <= (low + 1) / num_bins]
        total += abs(sum(confidence[i] for i in inside) - sum(correct[i] for i in inside))
    return total / len(confidence)


class TestDenseMetrics:
    def test_calibration_errors_equal_a_slow_loop_over_the_pixels_that_each_is_about(self):
        confidence, predicted, labels = predictions()
        found = dense_metrics(count_dense(confidence, predicted, labels, 3))
        counted = labels != -100
        hit = predicted == labels
        assert found["pixel_accuracy"] == pytest.approx(sum(hit[counted].tolist()) / sum(counted.ravel().tolist()))
        assert found["pixel_ece"] == pytest.approx(slow_ece(confidence[counted], hit[counted]))
        objects = counted & ((labels > 0) | (predicted > 0))
        assert found["foreground_ece"] == pytest.approx(slow_ece(confidence[objects], hit[objects]))
        single = [slow_ece(c[k], h[k]) for c, h, k in zip(confidence, hit, counted, strict=True)]
        assert found["image_ece"] == pytest.approx(np.mean(single))

    def test_overlaps_equal_sets_of_pixels(self):
        confidence, predicted, labels = predictions()
        found = dense_metrics(count_dense(confidence, predicted, labels, 3))
        for kind in range(3):
            chosen = set(np.flatnonzero((predicted == kind) & (labels != -100)))
            true = set(np.flatnonzero(labels == kind))
            assert found[f"dice_{kind}"] == pytest.approx(2 * len(chosen & true) / (len(chosen) + len(true)))
            assert found[f"iou_{kind}"] == pytest.approx(len(chosen & true) / len(chosen | true))
        for name in ("dice", "iou"):
            assert found[name] == pytest.approx((found[f"{name}_1"] + found[f"{name}_2"]) / 2)

    def test_an_absent_class_is_left_out_of_the_means_and_a_single_pixel_makes_one_present(self):
        labels = np.array([[[0, 0, 1, 1]]])
        predicted = np.array([[[0, 3, 1, 0]]])  # class 2 is absent, class 3 is one wrong pixel
        found = dense_metrics(count_dense(np.ones(labels.shape), predicted, labels, 4))
        assert found["dice_1"] == pytest.approx(2 / 3) and found["iou_1"] == pytest.approx(1 / 2)
        assert found["dice_3"] == found["iou_3"] == 0 and "dice_2" not in found
        assert found["dice"] == pytest.approx((2 / 3 + 0) / 2) and found["iou"] == pytest.approx((1 / 2 + 0) / 2)

    def test_a_confident_background_hides_a_bad_foreground_from_the_pooled_error_alone(self):
        labels = np.zeros((1, 100, 100), dtype=int)
        predicted = labels.copy()
        labels[0, :5, :10] = 1
        confidence = np.where(labels == 1, 0.9, 1.0)  # every object is missed at confidence 0.9
        found = dense_metrics(count_dense(confidence, predicted, labels, 2))
        assert found["pixel_ece"] == pytest.approx(0.0045) and found["foreground_ece"] == pytest.approx(0.9)

    def test_betti_errors_by_hand(self):
        ring = np.pad(np.ones((3, 3), dtype=int), 1)
        hole = ring.copy()
        hole[2, 2] = 0
        two = ring.copy()
        two[:, 2] = 0
        confidence = np.ones((2, 5, 5))
        found = dense_metrics(count_dense(confidence, np.stack([ring, two]), np.stack([hole, ring]), 2))
        assert found["betti_0_error"] == 0.5 and found["betti_1_error"] == 0.5
        without = dense_metrics(count_dense(confidence, np.stack([ring, two]), np.stack([hole, ring]), 2, betti=False))
        assert "betti_0_error" not in without

    def test_betti_errors_are_summed_over_classes_and_averaged_over_images(self):
        empty = np.zeros((5, 7), dtype=int)
        both = empty.copy()
        both[1:4, 1:4] = 1
        both[2, 2] = 0  # a ring: one piece, one hole
        both[0, 6] = both[2, 6] = both[4, 6] = 2  # three pieces
        labels = np.stack([both, both, empty])
        predicted = np.stack([empty, both, empty])
        found = dense_metrics(count_dense(np.ones(labels.shape), predicted, labels, 3))
        assert found["betti_0_error"] == pytest.approx((1 + 3) / 3)
        assert found["betti_1_error"] == pytest.approx(1 / 3)

    def test_classes_that_nobody_has_or_predicts_have_no_overlap(self):
        zeros = np.zeros((2, 4, 5), dtype=int)
        found = dense_metrics(count_dense(np.full(zeros.shape, 0.8), zeros, zeros, 3))
        assert found["dice_0"] == 1 and not {"dice", "dice_1", "dice_2", "foreground_ece"} & found.keys()

    def test_images_and_pixels_are_counted(self):
        confidence, predicted, labels = predictions()
        counts = count_dense(confidence, predicted, labels, 3)
        assert counts.num_images == 5 and counts.num_pixels == (labels != -100).sum()

    def test_an_image_without_a_counted_pixel_changes_no_calibration_error(self):
        confidence, predicted, labels = predictions()
        whole = dense_metrics(count_dense(confidence, predicted, labels, 3, betti=False))
        more = [np.concatenate([part, part[:1]]) for part in (confidence, predicted, labels)]
        more[2][-1] = -100
        assert dense_metrics(count_dense(*more, 3, betti=False)) == pytest.approx(whole)

    def test_an_image_whose_pixels_are_all_wrong_counts_in_the_mean_over_images(self):
        labels = np.array([[[1, 1]], [[1, 1]]])
        predicted = np.array([[[1, 1]], [[0, 0]]])
        found = dense_metrics(count_dense(np.full(labels.shape, 0.75), predicted, labels, 2))
        assert found["image_ece"] == pytest.approx((0.25 + 0.75) / 2) and found["pixel_accuracy"] == 0.5

    def test_an_image_of_a_single_counted_pixel_counts_in_the_mean_over_images(self):
        labels = np.array([[[1, -100]], [[1, 1]]])
        found = dense_metrics(
            count_dense(np.array([[[0.625, 0.9]], [[0.75, 0.75]]]), np.ones((2, 1, 2), int), labels, 2)
        )
        assert found["image_ece"] == pytest.approx((0.375 + 0.25) / 2)

    def test_rows_of_pixels_are_taken_and_single_pixels_are_not(self):
        confidence, predicted, labels = predictions(shape=(40,))
        flat = dense_metrics(count_dense(confidence, predicted, labels, 3, betti=False))
        tall = (part[:, None] for part in (confidence, predicted, labels))
        assert flat == dense_metrics(count_dense(*tall, 3, betti=False))
        with pytest.raises(ValueError, match=r"one shape \(n, d1, ...\), found \(40,\)"):
            count_dense(confidence[0], predicted[0], labels[0], 3, betti=False)

    def test_volumes_are_taken(self):
        confidence, predicted, labels = predictions(shape=(3, 4, 5))
        assert "betti_2_error" in dense_metrics(count_dense(confidence, predicted, labels, 3))

    def test_shapes_labels_and_empty_sets_that_do_not_fit_are_an_error(self):
        confidence, predicted, labels = predictions()
        with pytest.raises(ValueError, match="one shape"):
            count_dense(confidence[:2], predicted, labels, 3)
        with pytest.raises(ValueError, match=r"must lie in \[0, 2\)"):
            count_dense(confidence, predicted, labels, 2)
        with pytest.raises(ValueError, match=r"must lie in \[0, 3\) or be -100"):
            count_dense(confidence, predicted, np.where(labels == 0, -1, labels), 3)
        with pytest.raises(ValueError, match="Every label is ignored"):
            count_dense(confidence, predicted, np.full_like(labels, -100), 3)


class TestDenseIntervals:
    def test_copies_of_one_image_have_an_interval_of_width_zero(self):
        one = [np.repeat(part, 4, axis=0) for part in predictions(images=1)]
        counts = count_dense(*one, 3)
        found, metrics = dense_intervals(counts, num_resamples=20), dense_metrics(counts)
        assert all(ends == pytest.approx((metrics[name], metrics[name])) for name, ends in found.items())

    def test_images_that_differ_give_a_wider_interval_than_their_pixels_resampled_would(self):
        labels = np.zeros((10, 20, 20), dtype=int)
        predicted = labels.copy()
        predicted[:5] = 1  # half of the images are wrong throughout
        counts = count_dense(np.full(labels.shape, 0.75), predicted, labels, 2, betti=False)
        low, high = dense_intervals(counts, num_resamples=300)["pixel_ece"]
        assert high - low > 4 * 1.96 * np.sqrt(0.25 / labels.size)

    @pytest.mark.parametrize(("level", "ends"), [(0.4, (0.5, 0.5)), (0.6, (0.25, 0.75))])
    def test_their_ends_are_the_quantiles_over_drawn_images(self, level, ends):
        # Errors of .25 and .75: of two drawn images the mean is .25, .5 and .75 with probabilities 1/4, 1/2 and 1/4.
        labels = np.array([[[1, 1]], [[1, 1]]])
        predicted = np.array([[[1, 1]], [[0, 0]]])
        counts = count_dense(np.full(labels.shape, 0.75), predicted, labels, 2)
        found = dense_intervals(counts, level=level)
        assert found["image_ece"] == pytest.approx(ends)
        low, high = ends
        assert found["pixel_accuracy"] == pytest.approx((1.5 - 2 * high, 1.5 - 2 * low))  # 1 and 0

    def test_pooled_errors_have_the_interval_of_grouped_samples(self):
        confidence, predicted, labels = predictions(ignored=0)
        image = np.arange(len(labels)).repeat(labels[0].size)
        groups = count_groups(confidence.ravel(), (predicted == labels).ravel(), image, np.arange(16) / 15)
        found = dense_intervals(count_dense(confidence, predicted, labels, 3, betti=False), level=0.8, num_resamples=2)
        assert found["pixel_ece"] == pytest.approx(grouped_error_interval(groups, 0.8)[1:])

    def test_one_image_is_an_error(self):
        with pytest.raises(ValueError, match="two images at least, found 1"):
            dense_intervals(count_dense(*predictions(images=1), 3))

    def test_the_error_of_a_model_that_is_calibrated_may_be_zero(self):
        labels = (np.random.default_rng(0).random((20, 8, 9)) < 0.3).astype(int)
        counts = count_dense(np.full(labels.shape, 0.7), np.zeros_like(labels), labels, 2, betti=False)
        assert dense_intervals(counts, num_resamples=50)["pixel_ece"][0] == 0

    def test_foreground_of_a_single_image_has_none(self):
        labels = np.zeros((3, 4, 5), dtype=int)
        labels[0] = 1
        counts = count_dense(np.full(labels.shape, 0.7), labels, labels, 2, betti=False)
        assert "foreground_ece" not in dense_intervals(counts, num_resamples=20)

    def test_foreground_of_two_images_has_one_even_if_all_of_one_is_missed(self):
        labels = np.zeros((3, 4, 5), dtype=int)
        labels[:2] = 1
        predicted = labels.copy()
        predicted[0] = 0
        counts = count_dense(np.full(labels.shape, 0.75), predicted, labels, 2, betti=False)
        # Student's interval of the mean gap, (.75 - .25) / 2, of two images; its upper end is above 1
        assert dense_intervals(counts, num_resamples=20)["foreground_ece"] == (0, 1)
        low, high = dense_intervals(counts, num_resamples=20, level=0.1)["foreground_ece"]
        assert high == pytest.approx(0.25 + 0.5 * scipy.stats.t.ppf(0.55, 1))


class TestDenseDifferences:
    def test_a_model_against_itself_differs_in_nothing(self):
        counts = count_dense(*predictions(), 3)
        found = dense_differences(counts, counts, num_resamples=20)
        assert found.keys() == dense_metrics(counts).keys()
        assert all(test.difference == test.low == test.high == 0 and test.p_value == 1 for test in found.values())

    def test_differences_are_those_of_the_metrics(self):
        one = predictions()
        other = one[0] ** 2, *one[1:]
        counts = [count_dense(*part, 3) for part in (one, other)]
        found, metrics = dense_differences(*counts, num_resamples=20), [dense_metrics(part) for part in counts]
        for name, test in found.items():
            assert test.difference == pytest.approx(metrics[0][name] - metrics[1][name])

    def test_images_that_are_hard_for_both_do_not_hide_a_small_difference(self):
        random = np.random.default_rng(0)
        labels = (random.random((12, 10, 10)) < random.random((12, 1, 1))).astype(int)  # some images are all objects
        predicted = np.zeros_like(labels)
        sure, fair = (count_dense(np.full(labels.shape, p), predicted, labels, 2, betti=False) for p in (0.85, 0.8))
        test = dense_differences(sure, fair)["pixel_ece"]
        assert 0.049 < test.low <= test.difference <= test.high < 0.051 and test.p_value < 0.01
        ends = [dense_intervals(counts, num_resamples=50)["pixel_ece"] for counts in (sure, fair)]
        assert ends[0][0] < ends[1][1]  # of the models alone

    def test_the_gaps_of_under_confident_bins_keep_their_sign(self):
        labels = np.ones((6, 5, 5), dtype=int)
        labels[:, :, 4] = 0
        predicted = np.ones_like(labels)  # right for 4 pixels of 5
        one, other = (count_dense(np.full(labels.shape, p), predicted, labels, 2, betti=False) for p in (0.65, 0.75))
        found = dense_differences(one, other, num_resamples=20)
        for name in ("pixel_ece", "foreground_ece"):  # errors of .15 and .05, in every image
            assert found[name][:3] == pytest.approx((0.1, 0.1, 0.1)), name

    def test_a_metric_that_one_model_lacks_is_left_out(self):
        labels = np.zeros((3, 4, 5), dtype=int)
        one, other = (
            count_dense(np.full(labels.shape, 0.75), np.full_like(labels, kind), labels, 2, betti=False)
            for kind in (1, 0)
        )
        for pair in ((one, other), (other, one)):
            found = dense_differences(*pair, num_resamples=20)
            assert found.keys() == {"pixel_accuracy", "pixel_ece", "image_ece", "dice_0", "iou_0"}

    def test_one_image_is_an_error(self):
        counts = count_dense(*predictions(images=1), 3)
        with pytest.raises(ValueError, match="A test over images needs two images at least, found 1"):
            dense_differences(counts, counts)

    @pytest.mark.slow
    def test_no_difference_is_called_one_in_about_5_percent_of_cases(self):
        called = 0
        for seed in range(60):
            random = np.random.default_rng(seed)
            hard = random.random((16, 1, 1))
            labels = (random.random((16, 8, 8)) < hard).astype(int)
            confidences = 0.55 + 0.4 * random.random((2, *labels.shape))
            one, other = (count_dense(c, np.ones_like(labels), labels, 2, betti=False) for c in confidences)
            called += dense_differences(one, other, num_resamples=100)["pixel_ece"].p_value < 0.05
        assert called <= 9  # 3 are expected, and more than 9 have a chance of 0.1 %

    def test_other_images_are_an_error(self):
        with pytest.raises(ValueError, match="same images in the same order"):
            dense_differences(count_dense(*predictions(), 3), count_dense(*predictions(seed=1), 3))


class TestDenseCounts:
    @pytest.mark.parametrize("betti", [True, False])
    def test_they_come_back_from_a_file(self, tmp_path, betti):
        counts = count_dense(*predictions(), 3, betti=betti)
        counts.save(tmp_path / "counts.npz")
        assert dense_metrics(DenseCounts.load(tmp_path / "counts.npz")) == dense_metrics(counts)
