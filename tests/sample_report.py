"""A report of an over-confident model, to be written, read and shown."""

import numpy as np

from hf_adafocal.metrics.scores import softmax
from hf_adafocal.report.facts import ModelFacts
from hf_adafocal.report.schema import Report, build_report
from hf_adafocal.scaling.fit import Scaling

MODEL = ModelFacts("BertForSequenceClassification", "text-classification", ("a", "b", "c", "d"), "google/bert")
SUPPORTED = Scaling(0.4, 0.0, 1.5, 1.2, 300)


def predictions(sharpness=3.0, size=300, seed=0):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(size, 4))
    labels = (softmax(logits).cumsum(1) < generator.random((size, 1))).sum(1)
    return sharpness * logits, labels


def report(folded: bool = False, **changes) -> Report:
    """A report of an over-confident model on 300 samples."""
    known = {
        "model": MODEL,
        "loss": {"name": "adafocal", "num_bins": 15, "gamma_max": 20.0},
        "adaptation": [
            {"step": 0, "gammas": [1.0, 1.0]},
            {"step": 10, "gammas": [1.0, 1.5]},
            {"step": 20, "gammas": [-0.25, 2.5]},
        ],
        "splits": {"train": 1000, "calibration": 300, "test": 300},
        "held_out": {"adaptation": "calibration", "scaling": "calibration"},
        "seed": 3,
        "trained_on": "me/news",
        "evaluated_on": "me/news",
        "language": "en",
        "training": {"epochs": 3.0, "batch_size": 16, "learning_rate": 5e-5},
        "num_resamples": 50,
        **changes,
    }
    test = known.pop("test", predictions())
    if folded:
        return build_report((SUPPORTED.apply(test[0]), test[1]), folded=SUPPORTED, **known)
    return build_report(test, scaling=known.pop("scaling", SUPPORTED), **known)
