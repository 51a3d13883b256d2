"""Labelled data held in tensors and read a batch at a time, with random crops and flips of image batches.

Decoding and augmenting images one by one costs about as much as a step of a small network. Here images are decoded
once into `uint8` tensors; a batch is indexed, cropped, flipped and normalised by a handful of tensor operations.

```python
train = ImageRows(stack_images(dataset["image"]), labels, crop_padding=4, horizontal_flip=True, seed=0)
trainer = AdaFocalTrainer(
    model, AdaFocalTrainingArguments(..., remove_unused_columns=False),
    train_dataset=train, eval_dataset=..., data_collator=whole_batch,
)
```
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import Dataset

from hf_adafocal.data.images import to_rgb


def stack_images(images: Iterable[PILImage.Image], size: int | None = None) -> Tensor:
    """Stack decoded images into one tensor.

    Args:
        images: PIL images of one size, at least one; converted to RGB.
        size: Side in pixels to which each image is resized (bicubic, as timm's image processors do); kept if left out.

    Returns:
        Pixels in [0, 255], uint8, shape `(N, 3, H, W)`.

    >>> stack_images([PILImage.new("RGB", (4, 4), (255, 0, 0))], size=2)[0, :, 0, 0]
    tensor([255,   0,   0], dtype=torch.uint8)
    """

    def array(image: PILImage.Image) -> np.ndarray:
        image = to_rgb(image)
        return np.asarray(image if size is None else image.resize((size, size), PILImage.Resampling.BICUBIC))

    return torch.from_numpy(np.stack([array(image) for image in images])).movedim(-1, 1).contiguous()


def crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Shift each image by cropping it out of a copy padded with zeros.

    Args:
        images: Shape `(N, C, H, W)`, any dtype.
        offsets: Upper row and left column of each crop in the padded image, shape `(N, 2)`, integers in
            `[0, 2 padding]`; `padding` leaves the image where it is.
        padding: Zeros added on each side, in pixels.

    Returns:
        The crops, of the shape and dtype of `images`; equal to torchvision's `F.crop(F.pad(image))` image by image.

    >>> crop(torch.tensor([[[[1, 2], [3, 4]]]]), torch.tensor([[1, 2]]), padding=1)
    tensor([[[[2, 0],
              [4, 0]]]])
    """
    count, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    rows = offsets[:, :1] + torch.arange(height)  # (N, H)
    columns = offsets[:, 1:] + torch.arange(width)  # (N, W)
    index = (rows[:, :, None] * (width + 2 * padding) + columns[:, None]).reshape(count, 1, -1)
    return padded.flatten(2).gather(2, index.expand(-1, channels, -1)).view_as(images)


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror some images from left to right.

    Args:
        images: Shape `(N, C, H, W)`.
        mirrored: Which ones, shape `(N,)`, bool.

    >>> flip(torch.tensor([[[[1, 2]]], [[[3, 4]]]]), torch.tensor([True, False])).flatten()
    tensor([2, 1, 3, 4])
    """
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


class TensorRows(Dataset):
    """A labelled data set in two tensors, from which a `DataLoader` takes whole batches by one index operation.

    Args:
        inputs: First dimension N.
        labels: Class indices, shape `(N,)`.
        name: Name of the model's input.

    Raises:
        ValueError: If the lengths differ.

    >>> rows = TensorRows(torch.eye(3), torch.tensor([0, 1, 2]), name="features")
    >>> batch = next(iter(torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=whole_batch)))
    >>> batch["features"].shape, batch["labels"]
    (torch.Size([2, 3]), tensor([0, 1]))
    """

    def __init__(self, inputs: Tensor, labels: Tensor, name: str = "pixel_values") -> None:
        if len(inputs) != len(labels):
            raise ValueError(f"Expected one label per row, found {len(inputs)} rows and {len(labels)} labels.")
        self.inputs, self.labels, self.name = inputs, labels, name

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one row as it is stored, without augmentation, so that equal images compare equal."""
        return {self.name: self.inputs[index], "labels": self.labels[index]}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the batch of these rows, as the model takes it; torch's `DataLoader` calls this."""
        index = torch.as_tensor(indices)
        return {self.name: self.batch(index), "labels": self.labels[index]}

    def batch(self, index: Tensor) -> Tensor:
        """Return the model inputs of these rows."""
        return self.inputs[index]


class ImageRows(TensorRows):
    """`TensorRows` of images that are normalised, and in training cropped and flipped at random, batch by batch.

    The crop and the flip of an image follow from the seed, the epoch and the image's index alone. So they depend
    neither on the order of the rows nor on torch's global random state, and a run that resumes, also within an epoch,
    meets the same images as one that was never interrupted. accelerate's data loaders, and so the Trainer, announce
    each epoch by `set_epoch`; a loop of your own must call it.

    Args:
        inputs: Pixels, uint8, shape `(N, C, H, W)`, as `stack_images` returns.
        labels: Class indices, shape `(N,)`.
        mean: Subtracted from pixels in [0, 1]; one number per channel, or one for all.
        std: Then divided by; likewise.
        crop_padding: Zeros around an image out of which a crop of its size is taken, in pixels; 0 for no crop.
        horizontal_flip: Mirror each image with a probability of one half.
        seed: Seed of crops and flips.
        name: Name of the model's input.

    Raises:
        ValueError: If `inputs` are not uint8 of four dimensions, the lengths differ, or `crop_padding` is negative.

    >>> rows = ImageRows(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), torch.tensor([7]))
    >>> rows.__getitems__([0])["pixel_values"].unique()
    tensor([1.])
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor,
        *,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        crop_padding: int = 0,
        horizontal_flip: bool = False,
        seed: int = 0,
        name: str = "pixel_values",
    ) -> None:
        if inputs.dtype != torch.uint8 or inputs.ndim != 4:
            raise ValueError(
                f"Expected uint8 pixels of shape (N, C, H, W), found {inputs.dtype} of shape {tuple(inputs.shape)}. "
                "Decode images with stack_images."
            )
        if crop_padding < 0:
            raise ValueError(f"crop_padding must be a number of pixels from 0, found {crop_padding}.")
        super().__init__(inputs, labels, name)
        center, spread = (torch.tensor(value).reshape(-1, 1, 1) for value in (mean, std))
        self._scale, self._shift = 1 / (255 * spread), -center / spread
        self.crop_padding, self.horizontal_flip, self.seed = crop_padding, horizontal_flip, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw every image's crop and flip anew for this epoch."""
        seed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator().manual_seed(seed)
        self._offsets = torch.randint(2 * self.crop_padding + 1, (len(self), 2), generator=generator)
        self._mirrored = torch.rand(len(self), generator=generator) < 0.5

    def batch(self, index: Tensor) -> Tensor:
        """Return the model inputs of these rows: cropped, flipped, normalised; float32, shape `(n, C, H, W)`."""
        images = self.inputs[index]
        if self.crop_padding:
            images = crop(images, self._offsets[index], self.crop_padding)
        if self.horizontal_flip:
            images = flip(images, self._mirrored[index])
        return images * self._scale + self._shift


def whole_batch(batch: Any) -> Any:
    """Return the batch unchanged: a data collator for `TensorRows`, which yields whole batches."""
    return batch
