"""Cost of the topological term: CPU seconds per sample, forward and backward, and its share of a training step.

python scripts/benchmark_topology.py
"""

import time

import numpy as np
import torch
from scipy import ndimage

from hf_adafocal import FocalLoss
from hf_adafocal.data.volumes import synthetic_volumes
from hf_adafocal.losses.topology import topological_distance
from hf_adafocal.models import UNet3DConfig, UNet3DForSemanticSegmentation


def seconds(function, repeats: int = 3) -> float:
    """Measure the minimum CPU time of a call."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def two_classes(scores) -> torch.Tensor:
    """Make two-class logits of one sample from scores of the foreground."""
    scores = torch.as_tensor(np.asarray(scores), dtype=torch.float32)
    return torch.stack([torch.zeros_like(scores), scores])[None].requires_grad_()


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    volumes = synthetic_volumes(4, 32, seed=1)
    labels = torch.from_numpy(volumes.labels).long()
    square = ndimage.gaussian_filter(random.normal(size=(256, 256)), 2) * 40
    cases = {
        "32^3, as a network predicts": (8 * (ndimage.gaussian_filter(volumes.images[0], 1) - 0.35), labels[:1]),
        "32^3, noise": (random.normal(size=(32, 32, 32)), labels[:1]),
        "256^2, smooth": (square, torch.from_numpy(square > 0).long()[None]),
        "256^2, noise": (random.normal(size=(256, 256)), torch.from_numpy(square > 0).long()[None]),
    }
    print("| sample | construction | seconds |\n| --- | --- | --- |")
    for name, (scores, of_label) in cases.items():
        for construction in "VT":
            logits = two_classes(scores)
            cost = seconds(
                lambda z=logits, y=of_label, c=construction: topological_distance(z, y, construction=c).backward()
            )
            print(f"| {name} | {construction} | {cost:.3f} |", flush=True)
    model, images = (
        UNet3DForSemanticSegmentation(UNet3DConfig(num_labels=2)),
        torch.from_numpy(volumes.images)[:, None],
    )
    plain = seconds(lambda: FocalLoss()(model(images).logits, labels).backward())
    whole = seconds(lambda: topological_distance(model(images).logits, labels).backward())
    print(
        f"\n3D U-Net, 4 volumes of 32^3: {plain:.2f} s per step with focal loss, {whole:.2f} s with the term instead: "
        f"{1 - plain / whole:.0%} of the step."
    )


if __name__ == "__main__":
    main()
