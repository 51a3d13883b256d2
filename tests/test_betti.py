"""Betti numbers: against persistent homology, flood fill, a slow count of cells, and shapes everybody knows."""

from itertools import product

import numpy as np
import pytest
from scipy import ndimage

from hf_adafocal.betti import betti_numbers, euler_characteristic


def masks(count=400):
    for seed in range(count):
        random = np.random.default_rng(seed)
        yield random.random([(7, 9), (4, 5, 6)][seed % 2]) < random.random()


def slow_euler(mask, construction):
    """Cells in coordinates where vertices are even and centres of edges odd, each counted once."""
    cells, places = set(), set(map(tuple, np.argwhere(mask).tolist()))
    for place in places:
        if construction == "T":  # a pixel is a cube with all its faces
            cells.update(product(*[(2 * i, 2 * i + 1, 2 * i + 2) for i in place]))
        else:  # a cell needs all its vertices
            for steps in product((0, 1), repeat=mask.ndim):
                if places.issuperset(product(*[(i, i + step) for i, step in zip(place, steps, strict=True)])):
                    cells.add(tuple(2 * i + step for i, step in zip(place, steps, strict=True)))
    return sum((-1) ** sum(position % 2 for position in cell) for cell in cells)


def grid(size=(20, 22, 24)):
    return np.meshgrid(*(np.arange(side) - side // 2 for side in size), indexing="ij")


class TestBettiNumbers:
    def test_they_equal_persistent_homology_on_400_masks_and_both_constructions(self):
        gudhi = pytest.importorskip("gudhi")
        for mask in masks():
            for construction, cells in (("V", "vertices"), ("T", "top_dimensional_cells")):
                complex_ = gudhi.CubicalComplex(**{cells: 1.0 - mask})
                complex_.compute_persistence()
                expected = complex_.persistent_betti_numbers(0, 0.5)[: mask.ndim]
                assert list(betti_numbers(mask, construction)) == list(expected)

    def test_components_are_those_of_flood_fill_and_the_sum_is_the_euler_characteristic_on_400_masks(self):
        for mask in masks():
            for construction, reach in (("V", 1), ("T", mask.ndim)):
                found = betti_numbers(mask, construction)
                structure = ndimage.generate_binary_structure(mask.ndim, reach)
                assert found[0] == ndimage.label(mask, structure)[1]
                assert sum((-1) ** k * number for k, number in enumerate(found)) == slow_euler(mask, construction)

    @pytest.mark.parametrize("construction", ["V", "T"])
    def test_solids_that_everybody_knows(self, construction):
        x, y, z = grid()
        torus = (np.sqrt(x**2 + y**2) - 6) ** 2 + z**2 <= 5
        distance = np.sqrt(x**2 + y**2 + z**2)
        ball = (distance < 8) & (distance > 4)
        two = ((x - 5) ** 2 + y**2 + z**2 < 9) | ((x + 5) ** 2 + y**2 + z**2 < 9)
        assert betti_numbers(torus, construction) == (1, 1, 0)
        assert betti_numbers(ball, construction) == (1, 0, 1)
        assert betti_numbers(two, construction) == (2, 0, 0)
        assert betti_numbers(np.zeros((3, 4, 5)), construction) == (0, 0, 0)
        assert betti_numbers(np.ones((3, 4, 5)), construction) == (1, 0, 0)

    def test_the_border_is_background(self):
        assert betti_numbers(np.pad(np.zeros((2, 3)), 1, constant_values=1)) == (1, 1)

    def test_pixels_that_touch_at_a_corner_are_one_object_in_t_alone(self):
        assert betti_numbers(np.eye(3), "V") == (3, 0) and betti_numbers(np.eye(3), "T") == (1, 0)

    def test_other_ranks_and_constructions_are_an_error(self):
        with pytest.raises(ValueError, match="found 1 dimensions"):
            betti_numbers([1, 0])
        with pytest.raises(ValueError, match="construction must be 'V'"):
            euler_characteristic([[1]], "W")
