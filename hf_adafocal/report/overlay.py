"""Picture of a segmentation: image, label, prediction, confidence and error side by side."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure


def overlay(image: np.ndarray, label: np.ndarray, prediction: np.ndarray, confidence: np.ndarray) -> Figure:
    """Draw image, label, prediction, confidence and error of one image, or of the fullest slice of a volume.

    Args:
        image: Grey values, shape `(d1, d2)` or `(d1, d2, d3)`; resized to the label if it is larger or smaller.
        label: Class indices, 0 is background.
        prediction: Class indices, same shape.
        confidence: Probability of the predicted class, same shape, in [0, 1].

    Returns:
        A matplotlib figure with five panels.

    Raises:
        ValueError: If the arrays are no images or volumes of one shape.
    """
    if label.ndim not in (2, 3) or not label.shape == prediction.shape == confidence.shape:
        raise ValueError(
            "label, prediction and confidence must be images or volumes of one shape, found "
            f"{label.shape}, {prediction.shape} and {confidence.shape}."
        )
    if label.ndim == 3:
        at = int((label > 0).sum(axis=(1, 2)).argmax())
        near = round(at * (len(image) - 1) / max(len(label) - 1, 1))
        image, label, prediction, confidence = image[near], label[at], prediction[at], confidence[at]
    figure = Figure(figsize=(12, 2.8), dpi=150, layout="constrained")
    highest = max(int(label.max()), int(prediction.max()), 1)
    panels: list[tuple[str, np.ndarray, dict[str, Any]]] = [
        ("image", image, {"cmap": "gray"}),
        ("label", label, {"cmap": "viridis", "vmin": 0, "vmax": highest}),
        ("prediction", prediction, {"cmap": "viridis", "vmin": 0, "vmax": highest}),
        ("confidence", confidence, {"cmap": "magma", "vmin": 0, "vmax": 1}),
        ("error", label != prediction, {"cmap": "Reds", "vmin": 0, "vmax": 1}),
    ]
    for axes, (title, values, options) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        shown = axes.imshow(values, interpolation="nearest", **options)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
        if title == "confidence":
            figure.colorbar(shown, ax=axes, shrink=0.8)
    return figure
