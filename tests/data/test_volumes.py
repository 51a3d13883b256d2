"""Synthetic volumes: their topology by independent counts, contrast, noise and seeds."""

import numpy as np
import pytest
from scipy import ndimage

from hf_adafocal.betti import betti_numbers
from hf_adafocal.data.volumes import synthetic_volumes


class TestSyntheticVolumes:
    @pytest.mark.parametrize("construction", ["V", "T"])
    @pytest.mark.slow
    def test_the_betti_numbers_are_those_that_an_independent_count_finds(self, construction):
        gudhi = pytest.importorskip("gudhi")
        volumes = synthetic_volumes(40, size=24, seed=3)
        for mask, known in zip(volumes.labels, volumes.betti, strict=True):
            name = "vertices" if construction == "V" else "top_dimensional_cells"
            complex_ = gudhi.CubicalComplex(**{name: 1.0 - mask})
            complex_.compute_persistence()
            assert complex_.persistent_betti_numbers(0, 0.5)[:3] == known.tolist()
            assert betti_numbers(mask, construction) == tuple(known)
        assert (volumes.betti.sum(0) > 0).all()

    def test_no_two_objects_touch(self):
        labels = synthetic_volumes(10, seed=1).labels
        for mask in labels:
            corners = ndimage.generate_binary_structure(3, 3)
            assert ndimage.label(mask, corners)[1] == ndimage.label(mask)[1]

    def test_objects_are_brighter_and_fade_across_the_volume(self):
        volumes = synthetic_volumes(20, seed=2, noise=0.0, faintest=0.3)
        inside = volumes.images[volumes.labels == 1]
        assert (volumes.images[volumes.labels == 0] == 0).all()
        assert 0.3 <= inside.min() < 0.5 and 0.8 < inside.max() <= 1

    def test_the_noise_has_the_deviation_that_was_asked_for(self):
        volumes = synthetic_volumes(4, seed=2, noise=0.25)
        assert volumes.images[volumes.labels == 0].std() == pytest.approx(0.25, rel=0.02)

    def test_a_seed_gives_the_same_volumes_and_touches_no_global_state(self):
        before = np.random.get_state()[1].copy()
        one, same, other = (synthetic_volumes(2, seed=seed) for seed in (5, 5, 6))
        assert np.array_equal(one.images, same.images) and not np.array_equal(one.images, other.images)
        assert np.array_equal(before, np.random.get_state()[1])

    def test_a_size_below_one_object_is_an_error(self):
        with pytest.raises(ValueError, match="at least 12 voxels.*size 11"):
            synthetic_volumes(1, size=11)
