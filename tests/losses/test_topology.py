"""The topological term: against gudhi's own distance, by hand, and what it does and does not see."""

import importlib.util
import subprocess
import sys
from importlib.machinery import PathFinder

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from hf_adafocal import AdaFocalLoss, CombinedLoss, FocalLoss, build_loss
from hf_adafocal.losses import topology
from hf_adafocal.losses.topology import pairs_of_cripser, pairs_of_gudhi, topological_distance

gudhi = pytest.importorskip("gudhi")

CONSTRUCTIONS = pytest.mark.parametrize("construction", ["V", "T"])
SHAPES = [(5, 7), (8, 3), (3, 4, 5), (5, 2, 4)]  # all sides differ, so that C and Fortran order do


def diagrams(filtration, construction):
    """Diagrams of a sublevel filtration by dimension, as gudhi's own interface gives them; infinity is 1."""
    name = "vertices" if construction == "V" else "top_dimensional_cells"
    complex_ = gudhi.CubicalComplex(**{name: filtration})
    complex_.compute_persistence()
    found = [complex_.persistence_intervals_in_dimension(k).reshape(-1, 2) for k in range(filtration.ndim)]
    return [np.minimum(points, 1.0) for points in found]


def assigned(one, other):
    """Squared 2-Wasserstein distance of two diagrams by the Hungarian method; every point has its diagonal place."""
    n, m = len(one), len(other)
    costs = np.zeros((n + m, n + m))
    costs[:n, :m] = ((one[:, None] - other[None]) ** 2).sum(-1)
    costs[:n, m:] = ((one[:, 1] - one[:, 0]) ** 2 / 2)[:, None]
    costs[n:, :m] = ((other[:, 1] - other[:, 0]) ** 2 / 2)[None]
    return costs[linear_sum_assignment(costs)].sum()


def case(shape, seed, classes=2):
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(2 * random.normal(size=(2, classes, *shape)))
    return logits, torch.from_numpy(random.integers(0, classes, (2, *shape)))


def oracle(logits, labels, construction, distance=assigned):
    p = logits.softmax(1).numpy()
    total, classes = 0.0, p.shape[1]
    for sample in range(len(p)):
        for kind in range(1, classes):
            predicted = diagrams(1 - p[sample, kind], construction)
            true = diagrams(1.0 - (labels[sample] == kind).numpy(), construction)
            total += sum(distance(*pair) for pair in zip(predicted, true, strict=True))
    return total / (len(p) * (classes - 1))


def ring(place=(2, 3), shape=(12, 15)):
    mask = torch.zeros(1, *shape, dtype=torch.long)
    row, column = place
    mask[0, row : row + 4, column : column + 5] = 1
    mask[0, row + 1 : row + 3, column + 1 : column + 4] = 0
    return mask


def confident(labels, size=20.0):
    return torch.stack([torch.where(labels == 0, size, -size), torch.where(labels == 1, size, -size)], dim=1)


class TestValue:
    def test_it_equals_the_optimal_assignment_of_the_diagrams_in_100_cases_and_both_constructions(self):
        for seed in range(100):
            logits, labels = case(SHAPES[seed % 4], seed)
            for construction in "VT":
                found = float(topological_distance(logits, labels, construction=construction))
                assert found == pytest.approx(oracle(logits, labels, construction), abs=1e-10)

    @pytest.mark.slow  # its solver is not of the extra `dev`; the assignment above is found by scipy's
    def test_it_equals_gudhis_distance_squared_in_100_cases_and_both_constructions(self):
        wasserstein = pytest.importorskip("gudhi.wasserstein")
        pytest.importorskip("ot")

        def distance(one, other):
            return wasserstein.wasserstein_distance(one, other, order=2, internal_p=2) ** 2

        for seed in range(100, 200):
            logits, labels = case(SHAPES[seed % 4], seed)
            for construction in "VT":
                found = float(topological_distance(logits, labels, construction=construction))
                assert found == pytest.approx(oracle(logits, labels, construction, distance), abs=1e-10)

    @CONSTRUCTIONS
    def test_several_classes_are_averaged_without_the_background(self, construction):
        logits, labels = case((5, 6), 7, classes=4)
        found = float(topological_distance(logits, labels, construction=construction))
        assert found == pytest.approx(oracle(logits, labels, construction), abs=1e-10)

    @CONSTRUCTIONS
    def test_by_hand_a_constant_probability_of_one_half(self, construction):
        logits, empty = torch.zeros(1, 2, 16, 16), torch.zeros(1, 16, 16, dtype=torch.long)
        assert topological_distance(logits, empty, construction=construction) == 0.125  # (1 - 0.5)^2 / 2
        assert topological_distance(logits, empty + 1, construction=construction) == 0.25  # 0.5^2 + (1 - 1)^2

    def test_by_hand_a_faint_second_component(self):
        p = torch.tensor([[[1e-9, 1e-9, 1e-9, 1e-9, 1e-9], [0.8, 1e-9, 0.6, 1e-9, 1e-9]]], dtype=torch.float64)
        labels = torch.tensor([[[0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]])
        # (0.2, 1) is matched at 0.2^2, (0.4, 1) goes to the diagonal at 0.6^2 / 2
        logits = torch.stack([torch.zeros_like(p), torch.logit(p)], dim=1)
        assert float(topological_distance(logits, labels)) == pytest.approx(0.04 + 0.18, abs=1e-7)

    @CONSTRUCTIONS
    def test_a_perfect_prediction_costs_nothing_and_has_no_gradient(self, construction):
        logits = confident(ring()).requires_grad_()
        loss = topological_distance(logits, ring(), construction=construction)
        assert loss < 1e-12 and torch.autograd.grad(loss, logits)[0].abs().max() < 1e-12

    def test_a_wrong_prediction_has_a_gradient_that_mends_it(self):
        broken = ring().clone()
        broken[0, 2, 5] = 0  # the ring is open: no loop
        logits = confident(broken, 1.0)
        logits[0, :, 2, 5] /= 4  # the gap is less sure to be background, so the loop closes there first
        logits.requires_grad_()
        gradient = torch.autograd.grad(topological_distance(logits, ring()), logits)[0]
        assert gradient[0, 1, 2, 5] < 0 < gradient[0, 0, 2, 5]  # a step down raises the probability of the gap

    def test_it_is_blind_to_place(self):
        elsewhere = ring((6, 8))
        assert topological_distance(confident(elsewhere), ring()) < 1e-12
        assert FocalLoss()(confident(elsewhere), ring()) > 1

    def test_gradient_descent_on_a_noisy_ring_restores_its_topology(self):
        random = torch.Generator().manual_seed(0)
        logits = (confident(ring(), 0.5) + torch.randn(1, 2, 12, 15, generator=random)).requires_grad_()
        optimizer, values = torch.optim.Adam([logits], lr=0.1), []
        for _ in range(60):
            optimizer.zero_grad()
            loss = topological_distance(logits, ring())
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        assert values[-1] < 0.05 * values[0]


class TestCripser:
    def test_it_finds_the_pairs_of_gudhi_and_is_used_where_it_is_installed(self):
        pytest.importorskip("cripser")
        for seed in range(40):
            volume = np.random.default_rng(seed).random(SHAPES[seed % 4])
            for construction in "VT":
                ours, theirs = (find(volume, construction) for find in (pairs_of_cripser, pairs_of_gudhi))
                assert ours[1].tolist() == theirs[1].tolist()
                for one, other in zip(ours[0], theirs[0], strict=True):
                    assert sorted(map(tuple, one.tolist())) == sorted(map(tuple, other.tolist()))
        assert topology._library() is pairs_of_cripser

    @pytest.mark.parametrize("construction", ["V", "T"])
    def test_of_equal_values_it_finds_the_same_births_and_deaths(self, construction):
        pytest.importorskip("cripser")
        for seed in range(40):
            volume = np.random.default_rng(seed).integers(4, size=[*SHAPES, (1, 9), (7, 1), (1, 1)][seed % 7]) / 4
            (ours, our_root), (theirs, root) = (
                find(volume, construction) for find in (pairs_of_cripser, pairs_of_gudhi)
            )
            assert volume.flat[our_root] == volume.flat[root] == volume.min()
            for one, other in zip(ours, theirs, strict=True):
                assert sorted(volume.flat[one].tolist()) == sorted(volume.flat[other].tolist())

    def test_without_it_gudhi_does(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cripser", None)
        assert topology._library() is pairs_of_gudhi

    def test_a_folder_of_its_name_is_not_the_library(self, monkeypatch, tmp_path):
        (tmp_path / "cripser").mkdir()
        folder = importlib.util.module_from_spec(PathFinder.find_spec("cripser", [str(tmp_path)]))
        monkeypatch.setitem(sys.modules, "cripser", folder)
        assert topology._library() is pairs_of_gudhi


class TestGradient:
    @pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
    @CONSTRUCTIONS
    def test_it_is_that_of_the_value(self, shape, construction):
        logits, labels = case(shape, 3)
        logits.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda values: topological_distance(values, labels, construction=construction), logits
        )

    @pytest.mark.parametrize("fill", [0, 1])
    @pytest.mark.parametrize("size", [0.0, 100.0, -100.0])
    def test_it_is_finite_for_empty_full_and_constant_maps(self, fill, size):
        logits = torch.zeros(1, 2, 4, 5, 6)
        logits[:, 1] = size
        logits.requires_grad_()
        loss = topological_distance(logits, torch.full((1, 4, 5, 6), fill))
        assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()

    def test_an_empty_batch_is_zero(self):
        loss = topological_distance(torch.zeros(0, 2, 4, 5), torch.zeros(0, 4, 5, dtype=torch.long))
        assert loss == 0


class TestInput:
    def test_ignored_pixels_are_background_in_both_maps(self):
        labels = ring()
        logits = confident(labels)
        logits[0, :, 8:, 10:] = torch.tensor([-20.0, 20.0])[:, None, None]  # an object where nobody looked
        assert topological_distance(logits, labels) > 0.4
        labels[0, 8:, 10:] = 255
        assert topological_distance(logits, labels, ignore_index=255) < 1e-12
        assert topological_distance(logits, labels.where(labels != 255, -100)) < 1e-12

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_narrow_logits_give_the_value_of_float32(self, dtype):
        logits, labels = case((6, 7), 1)
        narrow = logits.to(dtype)
        found = topological_distance(narrow, labels)
        assert found.dtype == torch.float32 and found == topological_distance(narrow.float(), labels)

    def test_other_ranks_constructions_and_labels_are_an_error(self):
        logits, labels = case((5, 6), 0)
        with pytest.raises(ValueError, match="images .d1, d2. and volumes"):
            topological_distance(logits[..., 0], labels[..., 0])
        with pytest.raises(ValueError, match="construction must be 'V'.*found 'X'"):
            topological_distance(logits, labels, construction="X")
        with pytest.raises(ValueError):
            topological_distance(logits, labels + 5)

    def test_without_gudhi_the_loss_names_the_extra_before_training_and_everything_else_works(self):
        code = (
            "import sys; sys.modules['gudhi'] = sys.modules['cripser'] = None\n"
            "from hf_adafocal import CombinedLoss\n"
            "from hf_adafocal.betti import betti_numbers\n"
            "import hf_adafocal.metrics.segmentation\n"
            "CombinedLoss('mmce'); betti_numbers([[1]])\n"
            "try: CombinedLoss('topological_focal')\n"
            "except ImportError as error: print(error)"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert "hf-adafocal[topology]" in found


class TestTopologicalFocal:
    def test_it_is_focal_loss_plus_the_weighted_term(self):
        logits, labels = case((5, 6), 2)
        found = build_loss("topological_focal", auxiliary_weight=0.3)(logits, labels)
        torch.testing.assert_close(found, FocalLoss()(logits, labels) + 0.3 * topological_distance(logits, labels))

    def test_until_its_start_it_is_the_base(self):
        logits, labels = case((5, 6), 2)
        loss = CombinedLoss("topological_focal", start=0.25)
        whole, base = loss(logits, labels), FocalLoss()(logits, labels)
        loss.progress = 0.24
        assert loss(logits, labels) == base
        loss.progress = 0.25
        assert loss(logits, labels) == whole != base

    def test_by_default_it_starts_in_the_middle_of_the_run_with_weight_0_001(self):
        loss = CombinedLoss("topological_focal")
        assert (loss.start, loss.auxiliary_weight, loss.progress) == (0.5, 0.001, 1.0)
        assert CombinedLoss("topological_focal", start=1).start == 1

    def test_adafocal_as_its_base_adapts(self):
        base = AdaFocalLoss()
        assert CombinedLoss("topological_focal", base, construction="T").adaptive is base

    def test_micro_batches_add_up(self):
        logits, labels = case((5, 6), 2)
        loss = CombinedLoss("topological_focal", auxiliary_weight=0.5)
        parts = sum(loss(logits[i : i + 1], labels[i : i + 1], 60) for i in range(2))
        torch.testing.assert_close(parts, loss(logits, labels))

    @pytest.mark.parametrize("start", [-0.1, 1.1, float("nan")])
    def test_a_start_that_is_no_share_is_an_error(self, start):
        with pytest.raises(ValueError, match="start must be a share of the run"):
            CombinedLoss("topological_focal", start=start)
