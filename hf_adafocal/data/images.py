"""Conversion of images of any PIL mode to 8-bit RGB, and Gaussian noise on images."""

import numpy as np
from PIL import Image as PILImage

HIGHEST = {"I": 65535.0, "F": 1.0}  # white in images of 16-bit integers and of floats
TOLERANCE = 1e-3  # for floats that were rounded


def eight_bit(image: PILImage.Image) -> PILImage.Image:
    """Convert an image to mode "L" or "RGB", 8 bits per channel.

    PIL's own `convert` clips 16-bit grey levels at 255; here they are scaled, by one factor for all images: 0 to 65535
    of modes "I;16" and "I" (what a 16-bit PNG is read as), and 0 to 1 of mode "F", become 0 to 255. Transparency is
    dropped, as transformers' pipelines do.

    Raises:
        ValueError: If a pixel lies outside of that range or is NaN.

    >>> levels = np.array([[0, 255, 256, 1000, 32768, 65535]], dtype=np.uint16)
    >>> np.asarray(eight_bit(PILImage.fromarray(levels))).tolist()
    [[0, 1, 1, 4, 128, 255]]
    """
    highest = HIGHEST.get(image.mode.partition(";")[0])
    if highest is None:
        return image if image.mode in ("L", "RGB") else image.convert("RGB")
    pixels = np.asarray(image, dtype=np.float64)
    slack = TOLERANCE if image.mode == "F" else 0
    if pixels.size and not (pixels.min() >= -slack and pixels.max() <= highest + slack):
        raise ValueError(
            f"An image of mode {image.mode!r} must have grey levels from 0 to {highest:g}, found {pixels.min():g} to "
            f"{pixels.max():g}. Scale its values, or convert it to 8 bits."
        )
    return PILImage.fromarray(np.clip(np.round(pixels * (255 / highest)), 0, 255).astype(np.uint8))


def to_rgb(image: PILImage.Image) -> PILImage.Image:
    """Convert an image of any mode to 8-bit RGB, 16-bit and float grey levels by their value (see `eight_bit`).

    >>> to_rgb(PILImage.new("F", (1, 1), 0.5)).getpixel((0, 0))
    (128, 128, 128)
    """
    return eight_bit(image).convert("RGB")


def looks_like_eight_bits(images: list[PILImage.Image]) -> bool:
    """Tell whether all images are of 16 bits or more and none has a level above 255: likely unscaled 8-bit values."""
    wide = [np.asarray(image) for image in images if image.mode.startswith("I")]
    return bool(wide) and len(wide) == len(images) and all(pixels.max(initial=0) <= 255 for pixels in wide)


def add_noise(image: PILImage.Image, deviation: float, generator: np.random.Generator) -> PILImage.Image:
    """Add Gaussian noise to each channel of each pixel, rounded and clipped to 8 bits.

    Args:
        image: Of any mode.
        deviation: Standard deviation on pixels in [0, 1].
        generator: Source of the noise.
    """
    pixels = np.asarray(eight_bit(image), dtype=float)
    noise = generator.normal(scale=255 * deviation, size=pixels.shape)
    return PILImage.fromarray(np.clip(np.round(pixels + noise), 0, 255).astype(np.uint8))
