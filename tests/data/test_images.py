"""Images of every PIL mode become 8-bit RGB by value."""

import io

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image as PILImage
from transformers import ViTImageProcessor

from hf_adafocal.data.encoding import encode_images
from hf_adafocal.data.images import add_noise, eight_bit, to_rgb
from hf_adafocal.data.loading import Splits
from hf_adafocal.data.tensor_rows import stack_images

LEVELS, EXPECTED = [0, 255, 256, 1000, 32768, 65535], [0, 1, 1, 4, 128, 255]


def wide(mode: str) -> PILImage.Image:
    """The levels in one row, as an image of this mode."""
    if mode.startswith("I;16"):
        return PILImage.fromarray(np.array([LEVELS], dtype=">u2" if mode == "I;16B" else "<u2"))
    return PILImage.fromarray(np.array([LEVELS], dtype=np.int32))


class TestDepth:
    @pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
    def test_16_bit_grey_is_scaled_by_value(self, mode):
        image = wide(mode)
        assert image.mode == mode and np.asarray(eight_bit(image)).tolist() == [EXPECTED]
        assert np.asarray(to_rgb(image)).tolist() == [[[level] * 3 for level in EXPECTED]]

    def test_16_bit_files_are_scaled_by_value(self):
        for form in ("PNG", "TIFF"):
            buffer = io.BytesIO()
            wide("I;16").save(buffer, form)
            assert np.asarray(eight_bit(PILImage.open(buffer))).tolist() == [EXPECTED]

    @given(arrays.arrays(np.uint16, st.tuples(st.integers(1, 4), st.integers(1, 4))))
    def test_16_bit_levels_are_those_of_exact_rational_arithmetic(self, levels):
        from fractions import Fraction

        expected = [[int(Fraction(int(level), 257) + Fraction(1, 2)) for level in row] for row in levels]
        assert np.asarray(eight_bit(PILImage.fromarray(levels))).tolist() == expected

    def test_floats_from_0_to_1_are_scaled(self):
        image = PILImage.fromarray(np.array([[0.0, 0.25, 0.5, 1.0, 1 + 1e-6, -1e-6]], dtype=np.float32))
        assert image.mode == "F" and np.asarray(eight_bit(image)).tolist() == [[0, 64, 128, 255, 255, 0]]

    @pytest.mark.parametrize(
        ("pixels", "found"),
        [
            (np.array([[0.0, 200.0]], np.float32), "from 0 to 1, found 0 to 200"),
            (np.array([[0.5, np.nan]], np.float32), "from 0 to 1, found nan to nan"),
            (np.array([[-5, 9]], np.int32), "from 0 to 65535, found -5 to 9"),
            (np.array([[0, 1 << 20]], np.int32), r"from 0 to 65535, found 0 to 1.04858e\+06"),
        ],
    )
    def test_levels_out_of_range_are_an_error(self, pixels, found):
        with pytest.raises(ValueError, match=found):
            eight_bit(PILImage.fromarray(pixels))


class TestModes:
    @given(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX"]), st.integers(0, 99))
    def test_8_bit_modes_are_converted_as_pil_does(self, mode, seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
        image = PILImage.fromarray(pixels)
        image = image.convert("L").convert("LA") if mode == "LA" else image.convert(mode)
        found = to_rgb(image)
        assert found.mode == "RGB" and found.size == (4, 5)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(image.convert("RGB")))

    def test_a_palette_with_transparency_keeps_its_colours(self):
        image = PILImage.new("P", (2, 1))
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.putpixel((1, 0), 1)
        image.info["transparency"] = 0
        assert np.asarray(to_rgb(image)).tolist() == [[[255, 0, 0], [0, 0, 255]]]

    def test_transparency_is_dropped(self):
        assert to_rgb(PILImage.new("RGBA", (1, 1), (9, 8, 7, 0))).getpixel((0, 0)) == (9, 8, 7)
        assert to_rgb(PILImage.new("LA", (1, 1), (9, 0))).getpixel((0, 0)) == (9, 9, 9)

    def test_8_bit_grey_and_colour_stay_the_objects_they_are(self):
        for mode in ("L", "RGB"):
            image = PILImage.new(mode, (2, 2))
            assert eight_bit(image) is image


class TestNoise:
    def test_it_is_added_to_8_bit_levels_whatever_the_mode(self):
        grey = PILImage.fromarray(np.full((60, 60), 32768, np.uint16))
        palette = PILImage.new("P", (60, 60), 1)
        palette.putpalette([0, 0, 0, 128, 128, 128])
        for image in (grey, palette):
            noisy = np.asarray(add_noise(image, 0.1, np.random.default_rng(0)), float)
            assert noisy.mean() == pytest.approx(128, abs=2) and noisy.std() == pytest.approx(25.5, rel=0.05)


def splits(images: list) -> Splits:
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    data = Dataset.from_dict({"image": images, "label": [0] * len(images)}, features=features)
    return Splits(data, data, data)


class TestEncoding:
    processor = ViTImageProcessor(size={"height": 4, "width": 6}, do_normalize=False, resample=0)

    @pytest.mark.parametrize("mode", ["I;16", "I"])
    def test_pixel_values_of_16_bit_images_are_their_scaled_levels(self, mode, caplog, log_propagates):
        image = PILImage.fromarray(np.repeat(np.asarray(wide(mode)), 4, axis=0))  # one row would pass for channels
        row = encode_images(splits([image] * 3), self.processor).train[0]["pixel_values"]
        np.testing.assert_allclose(row[:, 0] * 255, [EXPECTED] * 3, atol=1e-3)
        assert caplog.text.count("Pipelines of transformers clip them instead") == 1

    def test_8_bit_values_in_16_bit_images_give_a_warning(self, caplog, log_propagates):
        encode_images(splits([PILImage.fromarray(np.full((2, 2), 200, np.uint16))] * 3), self.processor)
        assert "3 training images are 16-bit and none has a grey level above 255" in caplog.text

    def test_8_bit_images_say_nothing(self, caplog, log_propagates):
        encode_images(splits([PILImage.new(mode, (2, 2)) for mode in ("L", "RGB", "P")]), self.processor)
        assert not caplog.text

    def test_stacked_images_are_scaled_too(self):
        assert stack_images([wide("I;16")])[0, :, 0].tolist() == [EXPECTED] * 3
