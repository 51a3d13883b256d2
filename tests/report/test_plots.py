import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is the extra `plots`")

from hf_adafocal.metrics.binning import BinStats, bin_statistics, equal_width_edges  # noqa: E402
from hf_adafocal.report.plots import comparison_chart, gamma_trajectory, reliability_diagram  # noqa: E402


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

    def test_the_title_gives_the_mean_gap_over_samples(self):
        table = stats()
        error = 100 * np.abs(table.gap) @ table.count / 500
        assert reliability_diagram({"raw": table}).axes[0].get_title() == f"raw\nmean gap {error:.1f} %"

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

    @pytest.mark.parametrize(("num_bins", "legends", "bands"), [(1, 0, 0), (2, 1, 1)])
    def test_one_gamma_for_all_has_neither_legend_nor_jump(self, num_bins, legends, bands):
        figure = gamma_trajectory([10, 20], np.ones((2, num_bins)))
        assert (len(figure.axes) - 1, len(figure.axes[0].patches)) == (legends, bands)

    @pytest.mark.parametrize("gammas", [[], [[1.0]], [1.0, 2.0]])
    def test_gammas_that_do_not_fit_the_steps_are_an_error(self, gammas):
        with pytest.raises(ValueError, match=r"must have shape \(updates, num_bins\) for 2 updates"):
            gamma_trajectory([1, 2], gammas)


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
