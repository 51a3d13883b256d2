"""Defaults of the metrics: the same for all of them, and what a call without the argument uses."""

import dataclasses
import inspect

import numpy as np
import pytest

from hf_adafocal import metrics
from hf_adafocal.metrics import binning, bootstrap, classwise, intervals, ood, scores, segmentation
from hf_adafocal.metrics.bin_free import debiased_calibration_error
from hf_adafocal.metrics.entities import entity_report
from hf_adafocal.metrics.gate import calibration_gate, samples_needed
from hf_adafocal.metrics.groups import count_groups, grouped_error_interval

# Name, default, and another value that gives another result.
DEFAULTS = {
    "num_bins": (15, 16),
    "scheme": ("equal_width", "equal_mass"),
    "norm": ("l1", "l2"),
    "level": (0.95, 0.96),
    "confidence_level": (0.95, 0.96),
    "num_resamples": (1000, 999),
    "seed": (0, 1),
    "ignore_index": (-100, 0),
    "temperature": (1.0, 1.5),
    "recall": (0.95, 0.8),
}
RANDOM = np.random.default_rng(0)
CONFIDENCE = RANDOM.random(200)
PAIRS = CONFIDENCE, (RANDOM.random(200) < CONFIDENCE**2).astype(int)
ROWS = RANDOM.dirichlet(np.ones(3), 200), RANDOM.integers(3, size=200)
IMAGES = ROWS[0].max(1).reshape(8, 1, 25), ROWS[0].argmax(1).reshape(8, 1, 25), ROWS[1].reshape(8, 1, 25)
COUNTS = segmentation.count_dense(*IMAGES, 3, betti=False)
OTHER_COUNTS = segmentation.count_dense(IMAGES[0] ** 2, *IMAGES[1:], 3, betti=False)
GROUPS = count_groups(*PAIRS, np.arange(200) % 5, np.arange(16) / 15)

CALLS = {
    debiased_calibration_error: (*PAIRS,),
    binning.equal_width_edges: (),
    binning.equal_mass_edges: (CONFIDENCE,),
    binning.binned: (*PAIRS,),
    binning.gap_norm: (binning.binned(*PAIRS),),
    bootstrap.bootstrap_interval: (np.mean, CONFIDENCE),
    bootstrap.report_intervals: (ROWS[0][:40], ROWS[1][:40]),
    bootstrap.paired_test: (np.mean, (CONFIDENCE,), (CONFIDENCE**2,)),
    bootstrap.paired_calibration_error_test: (CONFIDENCE, PAIRS[1], CONFIDENCE**2, PAIRS[1]),
    classwise.classwise_calibration_error: ROWS,
    classwise.class_adaptive_calibration_error: ROWS,
    entity_report: (ROWS[0].reshape(20, 10, 3), ROWS[1].reshape(20, 10), ["O", "B-A", "I-A"]),
    calibration_gate: (*PAIRS,),
    samples_needed: (CONFIDENCE,),
    grouped_error_interval: (GROUPS,),
    intervals.calibration_error_interval: PAIRS,
    intervals.classwise_error_interval: ROWS,
    ood.energy_score: (np.log(ROWS[0]),),
    ood.ood_fpr95: (CONFIDENCE, CONFIDENCE**2),
    scores.calibration_error: PAIRS,
    scores.expected_calibration_error: ROWS,
    scores.adaptive_calibration_error: ROWS,
    scores.maximum_calibration_error: (np.stack([1 - CONFIDENCE, CONFIDENCE], axis=1), PAIRS[1]),
    scores.calibration_report: ROWS,
    scores.binary_expected_calibration_error: PAIRS,
    scores.binary_adaptive_calibration_error: PAIRS,
    scores.binary_maximum_calibration_error: PAIRS,
    scores.binary_calibration_report: PAIRS,
    segmentation.count_dense: (*IMAGES, 3),
    segmentation.dense_intervals: (COUNTS,),
    segmentation.dense_differences: (COUNTS, OTHER_COUNTS),
}
REQUIRED = {calibration_gate: {"max_ece": 0.02}, samples_needed: {"max_ece": 0.3}}


def options_of(function):
    return [p.name for p in inspect.signature(function).parameters.values() if p.default is not p.empty]


def plain(result):
    """A result whose parts can be compared, arrays as lists."""
    if dataclasses.is_dataclass(result):
        return plain(dataclasses.astuple(result))
    if isinstance(result, np.ndarray):
        return result.tolist()
    if isinstance(result, dict):
        return {name: plain(value) for name, value in result.items()}
    return [plain(value) for value in result] if isinstance(result, list | tuple) else result


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__name__)
def test_a_call_without_options_uses_the_defaults_that_all_metrics_share(function):
    names = [name for name in options_of(function) if name in DEFAULTS]
    expected = {name: DEFAULTS[name][0] for name in names}
    if function is debiased_calibration_error:
        expected["scheme"] = "equal_mass"
    required = REQUIRED.get(function, {})
    found = plain(function(*CALLS[function], **required))
    assert names and found == plain(function(*CALLS[function], **required, **expected))
    for name in names:
        other = next(value for value in DEFAULTS[name] if value != expected[name])
        assert found != plain(function(*CALLS[function], **required, **{name: other})), name


def test_every_public_function_with_a_shared_default_is_among_them():
    public = (getattr(metrics, name) for name in metrics.__all__)
    found = {f for f in public if inspect.isfunction(f) and DEFAULTS.keys() & options_of(f)}
    assert found and found <= CALLS.keys()
