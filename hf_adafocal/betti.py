"""Betti numbers of binary images in two and three dimensions: components, loops or tunnels, and cavities."""

from itertools import combinations
from typing import Any

import numpy as np

CONSTRUCTIONS = ("V", "T")


def betti_numbers(mask: Any, construction: str = "V") -> tuple[int, ...]:
    """Count the components, loops (2D: holes) and cavities (3D) of a binary image.

    Components of foreground and background are counted by flood fill; the tunnels of a volume follow from them and
    the Euler characteristic of its cubical complex. The border of the array is background.

    Args:
        mask: Foreground where not 0, shape `(d1, d2)` or `(d1, d2, d3)`.
        construction: "V": pixels are the vertices of the cubical complex, so that foreground is connected through
            faces (4 or 6 neighbours) and background through corners too; "T": pixels are its top-dimensional cells,
            the other way round (foreground 8 or 26 neighbours).

    Returns:
        `(components, holes)` in 2D, `(components, tunnels, cavities)` in 3D.

    Raises:
        ValueError: If the array has another number of dimensions or the construction is unknown.

    Source: Kovalevsky 1989, "Finite topology as applied to image analysis"; V and T as in Bleile et al. 2022,
    arXiv 2105.06025.

    >>> ring = [[1, 1, 1], [1, 0, 1], [1, 1, 1]]
    >>> betti_numbers(ring)
    (1, 1)
    >>> betti_numbers([[1, 0], [0, 1]], "V"), betti_numbers([[1, 0], [0, 1]], "T")  # touching at a corner
    ((2, 0), (1, 0))
    """
    from scipy import ndimage  # here, so that the metrics that need NumPy alone load nothing else

    mask = np.asarray(mask) != 0
    check_image(mask.ndim, construction)
    padded = np.pad(mask, 1)
    faces, corners = (ndimage.generate_binary_structure(mask.ndim, reach) for reach in (1, mask.ndim))
    foreground, background = (faces, corners) if construction == "V" else (corners, faces)
    components = ndimage.label(padded, foreground)[1]
    enclosed = ndimage.label(~padded, background)[1] - 1  # all but the component outside
    if mask.ndim == 2:
        return components, enclosed
    return components, components + enclosed - euler_characteristic(mask, construction), enclosed


def euler_characteristic(mask: Any, construction: str = "V") -> int:
    """Euler characteristic of a binary image: cells of even minus cells of odd dimension of its cubical complex.

    Args:
        mask: As in `betti_numbers`.
        construction: As in `betti_numbers`.

    Raises:
        ValueError: As `betti_numbers`.

    >>> euler_characteristic([[1, 1, 1], [1, 0, 1], [1, 1, 1]])  # 8 vertices - 8 edges
    0
    """
    mask = np.asarray(mask) != 0
    check_image(mask.ndim, construction)
    whole = construction == "V"
    cells = mask if whole else np.pad(mask, 1)
    total = 0
    for count in range(mask.ndim + 1):
        for axes in combinations(range(mask.ndim), count):
            present = cells
            for axis in axes:  # V: a cell needs all of its vertices; T: it is a face of any of its cubes
                one, other = np.delete(present, -1, axis), np.delete(present, 0, axis)
                present = one & other if whole else one | other
            dimension = count if whole else mask.ndim - count
            total += (-1) ** dimension * int(present.sum())
    return total


def check_image(dimensions: int, construction: str) -> None:
    """Check that an image has a number of dimensions and a construction that are known here.

    Raises:
        ValueError: If not.
    """
    if dimensions not in (2, 3):
        raise ValueError(
            f"Betti numbers are computed of images (d1, d2) and volumes (d1, d2, d3), found {dimensions} dimensions."
        )
    if construction not in CONSTRUCTIONS:
        raise ValueError(
            f"construction must be 'V' (pixels as vertices) or 'T' (pixels as cells), found {construction!r}."
        )
