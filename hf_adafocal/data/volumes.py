"""Synthetic volumes with objects of known topology: tubes, tori and hollow balls in fading contrast and noise."""

from typing import NamedTuple

import numpy as np

CELL = 12  # side of the cube that holds one object and the gap around it, in voxels
BETTI = {"tube": (1, 0, 0), "torus": (1, 1, 0), "hollow ball": (1, 0, 1)}


class Volumes(NamedTuple):
    """Volumes and their labels.

    Attributes:
        images: Intensities, shape `(n, size, size, size)`, float32.
        labels: 1 in objects and 0 outside, same shape, uint8.
        betti: Components, tunnels and cavities of the objects of each volume, shape `(n, 3)`.
    """

    images: np.ndarray
    labels: np.ndarray
    betti: np.ndarray


def synthetic_volumes(
    count: int, size: int = 24, seed: int = 0, *, noise: float = 0.3, faintest: float = 0.35
) -> Volumes:
    """Generate volumes with tubes, tori and hollow balls that do not touch, and the Betti numbers of their labels.

    Objects stand one per cube of 12 voxels, about two cubes in three holding one, so the Betti numbers of a volume
    are sums. The contrast fades across the volume in a random direction.

    Args:
        count: Volumes.
        size: Side in voxels, at least 12.
        seed: Of all that is random; the global random state is not touched.
        noise: Standard deviation of the Gaussian noise; the contrast is at most 1.
        faintest: Contrast where it is least.

    Raises:
        ValueError: If a number is out of range.

    >>> volumes = synthetic_volumes(2, size=24, seed=0)
    >>> volumes.labels.shape, volumes.betti.shape
    ((2, 24, 24, 24), (2, 3))
    """
    if size < CELL or count < 0 or noise < 0:
        raise ValueError(
            f"Expected size of at least {CELL} voxels, count and noise from 0; found size {size}, count {count}, "
            f"noise {noise}."
        )
    random = np.random.default_rng(seed)
    labels = np.zeros((count, size, size, size), dtype=np.uint8)
    images = np.zeros(labels.shape, dtype=np.float32)
    betti = np.zeros((count, 3), dtype=np.int64)
    corners = CELL * np.stack(np.meshgrid(*[np.arange(size // CELL)] * 3), -1).reshape(-1, 3)
    for index in range(count):
        holds = random.random(len(corners)) < 2 / 3
        holds[random.integers(len(corners))] = True
        for corner in corners[holds]:
            kind = str(random.choice(list(BETTI)))
            place = tuple(slice(start, start + CELL) for start in corner)
            labels[index][place] = _object(kind, random)
            betti[index] += BETTI[kind]
        images[index] = _image(labels[index], random, noise, faintest)
    return Volumes(images, labels, betti)


def _object(kind: str, random: np.random.Generator) -> np.ndarray:
    """Draw the mask of one object in a cube of side `CELL`, whose outer voxels stay empty."""
    centre = (CELL - 1) / 2 + random.uniform(-0.4, 0.4, 3)
    x, y, z = (np.arange(CELL).reshape(shape) - at for shape, at in zip(_AXES, centre, strict=True))
    if kind == "hollow ball":
        distance = np.sqrt(x**2 + y**2 + z**2)
        outer, inner = random.uniform(4.0, 4.6), random.uniform(1.9, 2.4)
        return (distance <= outer) & (distance > min(inner, outer - 1.8))  # no leak through a diagonal of voxels
    if kind == "torus":
        around = np.sqrt(x**2 + y**2) - random.uniform(3.1, 3.5)
        mask = around**2 + z**2 <= random.uniform(1.15, 1.4) ** 2
    else:
        bend = random.uniform(-2, 2) * np.cos(np.pi * z / CELL)
        mask = ((x - bend) ** 2 + (y + bend) ** 2 <= random.uniform(1.2, 1.6) ** 2) & (np.abs(z) <= 4.5)
    return np.transpose(mask, random.permutation(3))


_AXES = ((-1, 1, 1), (1, -1, 1), (1, 1, -1))


def _image(label: np.ndarray, random: np.random.Generator, noise: float, faintest: float) -> np.ndarray:
    direction = random.normal(size=3)
    direction /= np.linalg.norm(direction)
    along = sum(
        part * np.linspace(-1, 1, side).reshape(shape)
        for part, side, shape in zip(direction, label.shape, _AXES, strict=True)
    )
    along = (along - along.min()) / np.ptp(along)
    contrast = faintest + (1 - faintest) * along
    return label * contrast + noise * random.normal(size=label.shape)
