"""Tensor data sets against torchvision's pipeline of PIL images, and against interrupted runs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from torch.utils.data import DataLoader, Subset

from hf_adafocal.data.overlap import fingerprint
from hf_adafocal.data.tensor_rows import ImageRows, TensorRows, crop, flip, stack_images, whole_batch

v2 = pytest.importorskip("torchvision.transforms.v2")


def pil_images(count: int, size: int = 8) -> list[PILImage.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [PILImage.fromarray(image) for image in pixels]


def image_rows(count: int = 6, **options) -> ImageRows:
    return ImageRows(stack_images(pil_images(count)), torch.arange(count), **options)


class TestStackImages:
    def test_pixels_are_those_of_torchvision(self):
        images = pil_images(3)
        expected = torch.stack([v2.functional.pil_to_tensor(image) for image in images])
        assert torch.equal(stack_images(images), expected)

    def test_resized_pixels_are_those_of_a_timm_processor(self):
        images, side = pil_images(3, 32), 16
        pipeline = v2.Compose([v2.Resize((side, side), interpolation=v2.InterpolationMode.BICUBIC), v2.PILToTensor()])
        assert torch.equal(stack_images(images, side), torch.stack([pipeline(image) for image in images]))

    def test_grey_images_become_rgb(self):
        grey = PILImage.fromarray(np.full((2, 2), 9, np.uint8))
        assert stack_images([grey]).shape == (1, 3, 2, 2) and (stack_images([grey]) == 9).all()


class TestCropAndFlip:
    @settings(deadline=None, max_examples=30)
    @given(padding=st.integers(0, 4), size=st.integers(2, 9), seed=st.integers(0, 99))
    def test_each_image_is_what_torchvision_makes_of_the_pil_image(self, padding, size, seed):
        images = pil_images(5, size)
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.randint(2 * padding + 1, (5, 2), generator=generator)
        mirrored = torch.rand(5, generator=generator) < 0.5
        found = flip(crop(stack_images(images), offsets, padding), mirrored)
        for image, (top, left), mirror, ours in zip(images, offsets.tolist(), mirrored, found, strict=True):
            expected = v2.functional.crop(v2.functional.pad(image, padding), top, left, size, size)
            expected = v2.functional.hflip(expected) if mirror else expected
            assert torch.equal(ours, v2.functional.pil_to_tensor(expected))


class TestImageRows:
    def test_without_augmentation_a_batch_is_normalised_as_torchvision_does(self):
        mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
        rows = image_rows(mean=mean, std=std)
        expected = v2.functional.normalize(rows.inputs / 255, list(mean), list(std))
        assert torch.allclose(rows.__getitems__([4, 1])["pixel_values"], expected[[4, 1]], atol=1e-6)

    def test_augmented_batches_have_the_statistics_of_the_pil_pipeline(self):
        # One image a thousand times: the mean over crops and flips of each pixel estimates one expectation.
        image, count = pil_images(1)[0], 4000
        rows = ImageRows(
            stack_images([image]).expand(count, -1, -1, -1), torch.zeros(count), crop_padding=2, horizontal_flip=True
        )
        ours = rows.__getitems__(range(count))["pixel_values"]
        torch.manual_seed(0)
        steps = [v2.RandomCrop(8, padding=2), v2.RandomHorizontalFlip(), v2.PILToTensor()]
        pipeline = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
        theirs = torch.stack([pipeline(image) for _ in range(count)])
        for moment in (1, 2):
            difference = (ours**moment).mean(0) - (theirs**moment).mean(0)
            error = ((ours**moment).var(0) + (theirs**moment).var(0)).div(count).sqrt()
            assert (difference.abs() < 5 * error).all()  # 384 comparisons

    def test_every_offset_and_both_directions_are_drawn_equally_often(self):
        rows = ImageRows(torch.zeros(9000, 1, 1, 1, dtype=torch.uint8), torch.zeros(9000), crop_padding=1)
        counts = torch.bincount((rows._offsets * torch.tensor([3, 1])).sum(1), minlength=9)
        assert ((counts - 1000).abs() < 5 * 30).all()  # a standard deviation of 29.8
        assert abs(rows._mirrored.sum().item() - 4500) < 5 * 48

    def test_an_image_is_augmented_by_seed_epoch_and_index_alone(self):
        options = {"crop_padding": 2, "horizontal_flip": True}
        rows, twin = image_rows(20, seed=3, **options), image_rows(20, seed=3, **options)
        torch.manual_seed(1)
        rows.set_epoch(5)
        torch.manual_seed(2)
        twin.set_epoch(4)
        twin.set_epoch(5)
        batch, other = rows.__getitems__([7, 2])["pixel_values"], twin.__getitems__([2, 9, 7])["pixel_values"]
        assert torch.equal(batch, other[[2, 0]])
        twin.set_epoch(6)
        assert not torch.equal(other, twin.__getitems__([2, 9, 7])["pixel_values"])
        assert not torch.equal(rows._offsets, image_rows(20, seed=4, **options)._offsets)

    def test_set_epoch_leaves_the_global_random_state(self):
        torch.manual_seed(0)
        expected = torch.rand(1)
        torch.manual_seed(0)
        image_rows(crop_padding=2).set_epoch(3)
        assert torch.equal(torch.rand(1), expected)

    def test_rows_are_compared_as_they_are_stored(self):
        plain, augmented = image_rows(), image_rows(crop_padding=2, horizontal_flip=True)
        assert fingerprint(plain).hash == fingerprint(augmented).hash

    @pytest.mark.parametrize("pixels", [torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8)])
    def test_other_pixels_are_refused(self, pixels):
        with pytest.raises(ValueError, match="uint8 pixels of shape"):
            ImageRows(pixels, torch.zeros(2))

    def test_a_negative_padding_is_refused(self):
        with pytest.raises(ValueError, match="from 0, found -1"):
            image_rows(crop_padding=-1)


class TestTensorRows:
    def test_a_loader_gets_each_row_once_with_its_label_also_through_a_subset(self):
        rows = TensorRows(torch.arange(10)[:, None], torch.arange(10), "features")
        loader = DataLoader(Subset(rows, range(1, 8)), batch_size=3, shuffle=True, collate_fn=whole_batch)
        batches = list(loader)
        assert [len(batch["labels"]) for batch in batches] == [3, 3, 1]
        assert all(torch.equal(batch["features"][:, 0], batch["labels"]) for batch in batches)
        assert sorted(torch.cat([batch["labels"] for batch in batches]).tolist()) == list(range(1, 8))

    def test_a_missing_label_is_refused(self):
        with pytest.raises(ValueError, match="3 rows and 2 labels"):
            TensorRows(torch.eye(3), torch.zeros(2))
