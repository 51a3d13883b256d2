"""A 3D U-Net on a real volume: a lesion in a magnetic resonance scan."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DefaultDataCollator

from hf_adafocal import AdaFocalTrainer, AdaFocalTrainingArguments
from hf_adafocal.metrics.segmentation import dense_metrics
from hf_adafocal.models import UNet3DConfig, UNet3DForSemanticSegmentation
from hf_adafocal.runs.dense import add_dense_metrics, measure_images

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def patches():
    """Blocks of the scan as training, calibration and test split: the dark fields of a checkerboard train."""
    with np.load(Path(__file__).parent.parent / "samples" / "brain_lesion" / "volume.npz") as volume:
        image, label = volume["image"].astype(np.float32), volume["label"].astype(np.int64)
    image = (image - image.mean()) / image.std()
    parts = [[], [], []]
    for row in range(4):
        for column in range(4):
            block = slice(None), slice(24 * row, 24 * row + 24), slice(24 * column, 24 * column + 24)
            found = {"pixel_values": image[block][None], "labels": label[block]}
            if (row + column) % 2:
                mirrored = [{name: np.flip(part, -1).copy() for name, part in found.items()}]
                parts[0] += [found, *mirrored]
            else:
                parts[2 - (row // 2 + column // 2) % 2].append(found)
    return parts


@pytest.mark.parametrize("loss", ["adafocal", "topological_focal"])
def test_a_lesion_is_found_in_held_out_blocks_of_the_scan(patches, tmp_path, loss):
    if loss == "topological_focal":
        pytest.importorskip("gudhi")
    train, calibration, test = patches
    torch.manual_seed(0)
    model = UNet3DForSemanticSegmentation(UNet3DConfig(num_labels=2))
    own = {} if loss == "adafocal" else {"auxiliary_base": "adafocal"}
    args = AdaFocalTrainingArguments(
        str(tmp_path), loss=loss, num_train_epochs=40, learning_rate=1e-2, lr_scheduler_type="cosine", use_cpu=True,
        per_device_train_batch_size=4, eval_strategy="epoch", save_strategy="no", disable_tqdm=True,
        report_to="none", seed=0, **own,
    )  # fmt: skip
    trainer = AdaFocalTrainer(model, args, train_dataset=train, calibration_dataset=calibration)
    before = dense_metrics(measure_images(model, test, DefaultDataCollator())[0])
    trainer.train()
    assert trainer.adaptive_callback.updates == 40
    report, counts = add_dense_metrics(trainer.write_report(test), model, test, DefaultDataCollator(), folder=tmp_path)
    found = report.metrics
    assert counts.num_images == len(test) == 4 and counts.num_pixels == 4 * 12 * 24 * 24
    assert found["dice"] > 0.5 > before["dice"]
    assert found["foreground_ece"] > found["pixel_ece"]  # the background hides the lesion's error
    low, high = report.test.intervals["raw"]["dice"]
    assert low <= found["dice"] <= high and (tmp_path / "overlay.png").exists()
