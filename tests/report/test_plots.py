import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is the extra `plots`")

from hf_adafocal.metrics.binning import (  # noqa: E402
    BinStats,
    bin_statistics,
    equal_mass_edges,
    equal_width_edges,
)
from hf_adafocal.metrics.scores import calibration_error, expected_calibration_error, softmax  # noqa: E402
from hf_adafocal.report.plots import (  # noqa: E402
    adaptation_diagrams,
    comparison_chart,
    gamma_trajectory,
    reliability_diagram,
    reliability_of_confidences,
    reliability_of_probabilities,
)


def stats(size: int = 500) -> BinStats:
    generator = np.random.default_rng(0)
    confidence = generator.beta(3, 1, size)
    return bin_statistics(confidence, generator.random(size) < confidence**2, equal_width_edges(10))


def drawn(figure, tmp_path) -> bytes:
    figure.savefig(tmp_path / "figure.png")
    return (tmp_path / "figure.png").read_bytes()


class TestReliabilityDiagram:
    def test_points_are_the_confidence_and_accuracy_of_filled_bins(self):
        table = stats()
        line = reliability_diagram(table).axes[0].containers[-1].lines[0]
        filled = table.count > 0
        np.testing.assert_allclose(line.get_xdata(), table.confidence[filled])
        np.testing.assert_allclose(line.get_ydata(), table.accuracy[filled])

    def test_the_counts_of_filled_bins_are_written_out(self):
        table = stats()
        counts = [int(text.get_text()) for text in reliability_diagram(table).axes[1].texts]
        assert counts == table.count[table.count > 0].tolist() and sum(counts) == 500

    def test_intervals_are_wilsons(self):
        # 8 of 10: 0.4902 to 0.9433, as in textbooks
        table = BinStats(np.array([0.0, 1.0]), np.array([10]), np.array([0.7]), np.array([0.8]))
        segments = reliability_diagram(table).axes[0].containers[-1].lines[2][0].get_segments()
        np.testing.assert_allclose(segments[0][:, 1], [0.4902, 0.9433], atol=1e-4)

    def test_the_title_gives_the_calibration_error_under_the_name_that_its_bins_deserve(self):
        table = stats()
        error = 100 * np.abs(table.gap) @ table.count / 500
        assert reliability_diagram({"raw": table}).axes[0].get_title() == f"raw\nECE {error:.1f} %"
        confidence = np.random.default_rng(0).random(50)
        other = bin_statistics(confidence, confidence > 0.5, equal_mass_edges(confidence, 5))
        assert reliability_diagram(other).axes[0].get_title().startswith("AdaECE ")

    def test_probabilities_and_labels_are_drawn_in_one_call(self):
        generator = np.random.default_rng(0)
        p = softmax(2 * generator.normal(size=(200, 4)))
        labels = generator.integers(0, 4, 200)
        figure = reliability_of_probabilities(p, labels, 10, title="mine")
        assert figure.axes[0].get_title() == f"mine\nECE {100 * expected_calibration_error(p, labels, 10):.1f} %"
        assert sum(int(text.get_text()) for text in figure.axes[1].texts) == 200

    def test_so_are_confidences_and_correctness(self):
        generator = np.random.default_rng(0)
        confidence, correct = generator.random(200), generator.integers(0, 2, 200)
        title = reliability_of_confidences(confidence, correct).axes[0].get_title()
        assert title == f"ECE {100 * calibration_error(confidence, correct):.1f} %"

    def test_arrays_given_to_the_other_function_are_an_error_that_names_the_right_one(self):
        with pytest.raises(TypeError, match="reliability_of_probabilities, from confidences .*reliability_of_conf"):
            reliability_diagram(np.ones((3, 2)) / 2)

    def test_nothing_to_draw_is_an_error(self):
        empty = BinStats(np.array([0.0, 1.0]), np.array([0]), np.array([0.0]), np.array([0.0]))
        for diagrams in ({}, empty):
            with pytest.raises(ValueError, match="Expected bins that hold samples"):
                reliability_diagram(diagrams)

    def test_letters_are_11_pixels_high_where_the_picture_is_600_wide(self):
        figure = reliability_diagram({"raw": stats(), "scaled": stats(50)})
        smallest = min(text.get_fontsize() for axes in figure.axes for text in axes.texts + axes.get_xticklabels())
        assert smallest / 72 * 600 / figure.get_size_inches()[0] >= 10.7

    def test_several_are_drawn_side_by_side(self, tmp_path):
        figure = reliability_diagram({"raw": stats(), "scaled": stats(50)})
        assert len(figure.axes) == 4 and drawn(figure, tmp_path)[:4] == b"\x89PNG"

    def test_one_sample_can_be_drawn(self, tmp_path):
        assert drawn(reliability_diagram(bin_statistics([1.0], [0], equal_width_edges(15))), tmp_path)


class TestGammaTrajectory:
    def test_there_is_a_line_for_each_bin_with_a_point_for_each_update(self, tmp_path):
        gammas = np.arange(12.0).reshape(3, 4)
        figure = gamma_trajectory([10, 20, 30], gammas)
        lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
        np.testing.assert_array_equal([line.get_ydata() for line in lines], gammas.T)
        assert drawn(figure, tmp_path)

    def test_one_update_of_one_bin_can_be_drawn(self, tmp_path):
        assert drawn(gamma_trajectory([10], [[1.0]]), tmp_path)

    @pytest.mark.parametrize(("num_bins", "legends"), [(1, 0), (2, 1)])
    def test_one_gamma_for_all_needs_no_legend_of_bins(self, num_bins, legends):
        assert len(gamma_trajectory([10, 20], np.ones((2, num_bins))).axes) - 1 == legends

    @pytest.mark.parametrize("gammas", [[], [[1.0]], [1.0, 2.0]])
    def test_gammas_that_do_not_fit_the_steps_are_an_error(self, gammas):
        with pytest.raises(ValueError, match=r"must have shape \(updates, num_bins\) for 2 updates"):
            gamma_trajectory([1, 2], gammas)


class TestAdaptationDiagrams:
    def test_gammas_and_smoothing_have_a_picture_each_from_the_start_on(self, tmp_path):
        gammas = [{"step": 0, "gammas": [1.0, 1.0]}, {"step": 5, "gammas": [1.5, 0.5]}]
        smoothing = [{"step": 0, "smoothing": 0.0}, {"step": 5, "smoothing": 0.1}]
        found = adaptation_diagrams([*gammas, *smoothing])
        assert list(found) == ["gamma", "smoothing"] and list(adaptation_diagrams(smoothing)) == ["smoothing"]
        for figure in found.values():
            assert any(list(line.get_xdata()) == [0, 5] for line in figure.axes[0].lines) and drawn(figure, tmp_path)

    def test_where_nothing_adapted_there_is_none(self):
        assert adaptation_diagrams([]) == {}

    def test_the_letters_are_as_high_as_those_of_the_diagrams_at_60_percent_of_their_width(self):
        wide = reliability_diagram({"raw": stats(), "scaled": stats()})
        narrow = gamma_trajectory([0, 1], np.ones((2, 3)))
        assert narrow.get_size_inches()[0] == pytest.approx(0.6 * wide.get_size_inches()[0])
        assert narrow.axes[0].xaxis.label.get_fontsize() == wide.axes[2].xaxis.label.get_fontsize()


class TestComparisonChart:
    def test_bars_are_means_and_dots_are_seeds(self, tmp_path):
        errors = {"a": {"raw": [1.0, 3.0], "scaled": [1.0, 1.5]}, "b": {"raw": [4.0, 6.0], "scaled": [2.0, 2.0]}}
        figure = comparison_chart(errors)
        assert sorted(bar.get_width() for bar in figure.axes[0].patches) == [1.25, 2.0, 2.0, 5.0]
        assert [line.get_xdata().tolist() for line in figure.axes[0].lines][:2] == [[1.0, 3.0], [4.0, 6.0]]
        assert drawn(figure, tmp_path)


def test_drawing_leaves_matplotlibs_settings_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    reliability_diagram(stats())
    assert dict(matplotlib.rcParams) == before
