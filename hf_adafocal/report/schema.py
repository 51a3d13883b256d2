"""Typed and versioned schema of a run's report: it is built, checked and converted to JSON here."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_adafocal.metrics.binning import BinStats
from hf_adafocal.metrics.ood import ood_report
from hf_adafocal.report.facts import DataSource, ModelFacts, describe_model, versions
from hf_adafocal.report.fields import is_finite_number
from hf_adafocal.report.measurement import (
    Collected,
    Measured,
    PerSample,
    flat,
    measure_collected,
    measure_logits,
    measure_samples,
    two_columns,
)
from hf_adafocal.scaling.fit import Scaling, fit_temperature_scaling
from hf_adafocal.scaling.platt import fit_platt_scaling

SCHEMA_VERSION = 1
RAW, SCALED = "raw", "temperature_scaled"  # as trained, and with the scaling (a vector scaling too)
BINS = {"ece": "equal_width", "ada_ece": "equal_mass", "classwise_ece": "equal_width", "mce": "equal_width"}


@dataclass(frozen=True)
class Results:
    """Calibration measured on one split.

    Attributes:
        split: Its role: "test", "evaluation", "calibration".
        raw: Metrics of the scores as trained, fractions (NLL in nats), with `num_samples` and `num_bins`; None where
            only the scaled scores of a folded checkpoint were measured.
        temperature_scaled: The same with `scaling`; None without one.
        scaling: Fitted on the calibration split; None if nothing was fitted.
        intervals: For each of the two the 95 % intervals by metric.
        num_resamples: Resamples of the bootstrap behind the intervals.
        reliability: For each of the two the bins of one width of the reliability diagram.
        majority: Share of the most frequent label, the accuracy of always guessing it; None if unknown.
    """

    split: str
    raw: dict[str, float] | None
    temperature_scaled: dict[str, float] | None = None
    scaling: Scaling | None = None
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    num_resamples: int = 0
    reliability: dict[str, BinStats] = field(default_factory=dict)
    majority: float | None = None

    @property
    def temperature(self) -> float | None:
        """T of a temperature scaling; None without one."""
        return None if self.scaling is None else self.scaling.to_dict().get("temperature")

    def rows(self) -> dict[str, dict[str, float]]:
        """Return the measured metrics, by kind of scores."""
        both = {RAW: self.raw, SCALED: self.temperature_scaled}
        return {name: metrics for name, metrics in both.items() if metrics is not None}


@dataclass(frozen=True, eq=False)
class Report:
    """Calibration report of a checkpoint, as `build_report` makes it.

    Attributes:
        test: The measured split.
        model: See `ModelFacts`.
        folded: Whether the scaling is folded into the checkpoint's head, so that its own scores are the scaled ones.
        weights: Hash of the weights it describes (`weights_hash`); None if unknown.
        trained_on: Training data; None if unknown.
        evaluated_on: Data of the measured split; None if unknown.
        language: Language of the data, as the Hub codes it; None if unknown.
        loss: `name` and settings; None for a checkpoint of unknown training.
        adaptation: The loss's settings over training: `{"step": int, "gammas": [...]}` or `{"step": int, "smoothing":
            float}` for each update, in order, from step 0.
        splits: `{"size": int, "hash": str or None}` for each role.
        held_out: Split used for each purpose: "adaptation", "scaling", "selection" (of the checkpoint).
        overlap: `policy`, `rows` (rows that pairs of splits share, by name) and `dropped` (training rows left out).
        ood: `dataset`, and detection metrics of `ood_report` for the scores as trained and scaled.
        baselines: Metrics of other models on the same split, by title.
        seed: Seed of the run; None if unknown.
        training: Epochs, batch size, learning rate and the like; empty if unknown.
        examples: Inputs with the scores they get: `{"input": text or file name, "scores": {label: score}}`.
        versions: Version of each library.
        date: Day of the measurement, ISO 8601.
    """

    test: Results
    model: ModelFacts
    folded: bool = False
    weights: str | None = None
    trained_on: DataSource | None = None
    evaluated_on: DataSource | None = None
    language: str | None = None
    loss: dict[str, Any] | None = None
    adaptation: tuple[dict[str, Any], ...] = ()
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    held_out: dict[str, str] = field(default_factory=dict)
    overlap: dict[str, Any] = field(default_factory=dict)
    ood: dict[str, Any] | None = None
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    seed: int | None = None
    training: dict[str, Any] = field(default_factory=dict)
    examples: tuple[dict[str, Any], ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    date: str | None = None

    @property
    def shipped(self) -> str:
        """Which of the two results describes the checkpoint's own scores: "raw" or "temperature_scaled"."""
        return SCALED if self.folded else RAW

    def __str__(self) -> str:
        """The table of metrics, in Markdown."""
        from hf_adafocal.report.tables import report_table  # which needs this class

        return report_table(self)

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the checkpoint's own scores."""
        return self.test.rows()[self.shipped]

    @property
    def scaling_outcome(self) -> str:
        """State in one sentence what was fitted after training and whether it is part of the checkpoint."""
        scaling, temperature = self.test.scaling, self.test.temperature
        if scaling is None or (temperature == 1 and not self.folded):
            return "Nothing is applied after training."
        samples = "" if scaling.num_samples is None else f", fitted on {scaling.num_samples:,} calibration samples,"
        what = "vector scaling (one factor and one bias per class)"
        if temperature is not None:
            what = f"temperature T = {temperature:.3g}"
        elif scaling.method == "platt":
            what = f"Platt scaling (logit times {scaling.scale:.3g} plus {scaling.bias:.3g})"
        if self.folded:
            return f"The {what}{samples} is folded into the last layer: the scores are calibrated as they come."
        known = None not in (scaling.nll_before, scaling.nll_after, scaling.num_samples)
        if known and not scaling.is_supported():
            return (
                f"Nothing is folded in: {scaling.num_samples:,} calibration samples cannot tell a {what} from leaving "
                "the scores as they are (likelihood-ratio test at 95 %)."
            )
        method = " --method platt" if scaling.method == "platt" else ""
        return (
            f"The scores are those of the trained model. A {what}{samples} gives the second row of the table; "
            f"`hf-adafocal scale{method}` folds it into the checkpoint."
        )

    @property
    def pooler(self) -> dict[str, float] | None:
        """Settings with which the classifier pooler of a server gives the scaled scores of a checkpoint as trained.

        `logit_mean` and `logit_sigma` of vLLM's `PoolerConfig`; None where the scaling is folded, where there is none,
        or where one mean and one sigma do not make it.
        """
        scaling = self.test.scaling
        of_text = self.model.task == "text-classification"
        if scaling is None or self.folded or not of_text or scaling.method == "vector":
            return None
        if scaling.scale == 1 and not scaling.bias:
            return None
        return scaling.pooler() if scaling.method == "temperature" or self.model.single_output else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Report) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Convert the report to JSON, with `schema_version`; `from_dict` reads it back."""
        from hf_adafocal.report.document import to_document

        return to_document(self)

    @classmethod
    def from_dict(cls, document: Any) -> "Report":
        """Read the JSON of a report.

        Raises:
            ValueError: If it is not of this schema; the message names the field.
        """
        from hf_adafocal.report.document import from_document

        return from_document(document)


def build_report(
    test: tuple[Any, Any] | PerSample | Collected,
    calibration: tuple[Any, Any] | None = None,
    *,
    model: Any,
    split: str = "test",
    num_bins: int = 15,
    folded: Scaling | None = None,
    scaling: Scaling | None = None,
    num_resamples: int = 1000,
    weights: str | None = None,
    trained_on: str | None = None,
    evaluated_on: str | None = None,
    language: str | None = None,
    loss: Mapping[str, Any] | None = None,
    adaptation: Sequence[Mapping[str, Any]] = (),
    splits: Mapping[str, Any] | None = None,
    held_out: Mapping[str, str] | None = None,
    overlap: Mapping[str, Any] | None = None,
    ood: tuple[str, Any] | None = None,
    baselines: Mapping[str, Mapping[str, float]] | None = None,
    seed: int | None = None,
    training: Mapping[str, Any] | None = None,
    examples: Sequence[Mapping[str, Any]] = (),
) -> Report:
    """Measure a split and build the report of the run.

    Logits are those of the model as it is now. If its head holds a scaling, pass that as `folded`: the row "as
    trained" is then measured from the logits with the scaling undone. Otherwise a temperature is fitted on
    `calibration` (Platt scaling for a single output), and the row "temperature_scaled" says what that would give.

    Args:
        test: Of the split that is measured: logits `(..., C)` and labels `(...)`, -100 where a token or pixel does not
            count (a `PredictionOutput` sliced `[:2]` fits); or `PerSample` statistics; or `Collected` metrics. C is 1
            for a head with a single output.
        calibration: Logits and labels of the calibration split, likewise; None if there is none.
        model: The model, wrapped or not, or the `ModelFacts` of one.
        split: Role of the measured split: "test", "evaluation", "calibration".
        num_bins: Bins of all binned metrics.
        folded: The scaling inside the model's head, as `recorded_scaling(model)` gives it.
        scaling: A scaling that was fitted before and is not folded, instead of a new temperature.
        num_resamples: Resamples of the bootstrap intervals.
        weights: `weights_hash` of the folder that the weights are saved in.
        trained_on: Training data as the user named it, `DataSource.of` keeps of a path the last folder alone.
        evaluated_on: Data of the measured split, likewise.
        language: Language of the data, as the Hub codes it ("en").
        loss: `name` of the loss and its settings; None if unknown.
        adaptation: The loss's settings over training, from step 0 on: `{"step": int, "gammas": [...]}` or
            `{"step": int, "smoothing": float}`.
        splits: For each role the `size` and, if known, `hash` of its content; or the size alone.
        held_out: Split used for each purpose: `{"adaptation": ..., "scaling": ..., "selection": ...}`. The card warns
            where one of them is the measured split.
        overlap: `policy`, `rows` (rows that pairs of splits share) and `dropped` (training rows left out).
        ood: Name of a set of out-of-distribution inputs and their logits `(M, C)`; needs logits in `test`.
        baselines: Metrics of other models on the same split, by title.
        seed: Seed of the run.
        training: Epochs, batch size, learning rate, runtime and other JSON values.
        examples: Inputs to show: `{"input": text, or "example.png" in the folder, "scores": {label: score}}`, in the
            order in which a pipeline returns the scores.

    Returns:
        The report, checked as one that is read.

    Raises:
        ValueError: If shapes do not fit, a logit is not finite, or a field is not what it must be.

    >>> logits, labels = np.log([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 1])
    >>> report = build_report((logits, labels), model=ModelFacts("BertForSequenceClassification"), num_resamples=10)
    >>> report.metrics["accuracy"], report.shipped
    (0.5, 'raw')
    """
    if folded is not None and scaling is not None:
        raise ValueError("folded and scaling exclude each other: the scaling is inside the head, or it is not.")
    facts = model if isinstance(model, ModelFacts) else describe_model(model)
    fit = fit_platt_scaling if facts.single_output else fit_temperature_scaling
    measured, scaling = _measure(test, calibration, folded, scaling, fit, num_bins, num_resamples)
    report = Report(
        test=Results(
            split=split,
            raw=_finite(measured[RAW].metrics) if RAW in measured else None,
            temperature_scaled=_finite(measured[SCALED].metrics) if SCALED in measured else None,
            scaling=scaling,
            intervals={name: found.intervals for name, found in measured.items() if found.intervals},
            num_resamples=num_resamples,
            reliability={name: found.reliability for name, found in measured.items() if found.reliability is not None},
            majority=None if isinstance(test, PerSample | Collected) else _majority(*test),
        ),
        model=facts,
        folded=folded is not None,
        weights=weights,
        trained_on=None if trained_on is None else DataSource.of(trained_on),
        evaluated_on=None if evaluated_on is None else DataSource.of(evaluated_on),
        language=language,
        loss=None if loss is None else _plain(loss),
        adaptation=tuple(_plain(update) for update in adaptation),
        splits={
            role: {"size": part} if isinstance(part, int) else dict(part) for role, part in (splits or {}).items()
        },
        held_out=dict(held_out or {}),
        overlap=_plain(overlap or {}),
        ood=None if ood is None else _out_of_distribution(*ood, test, folded, scaling),
        baselines={title: _finite(metrics) for title, metrics in (baselines or {}).items()},
        seed=seed,
        training=_plain(training or {}),
        examples=tuple(_plain(example) for example in examples),
        versions=versions(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    return Report.from_dict(report.to_dict())


def _measure(
    test: Any,
    calibration: tuple[Any, Any] | None,
    folded: Scaling | None,
    scaling: Scaling | None,
    fit: Callable[..., Scaling],
    num_bins: int,
    num_resamples: int,
) -> tuple[dict[str, Measured], Scaling | None]:
    """Measure the logits as trained and scaled, and return the scaling between the two."""
    if isinstance(test, PerSample | Collected):
        found = (
            measure_samples(test, num_bins, num_resamples) if isinstance(test, PerSample) else measure_collected(test)
        )
        return ({SCALED: found}, folded) if folded is not None else ({RAW: found}, scaling)
    logits, labels = flat(*test)
    logits = np.asarray(logits, dtype=np.float64)
    if folded is not None:
        rows, scaling = {RAW: folded.undo(logits), SCALED: logits}, folded
    else:
        if scaling is None and calibration is not None:
            scaling = fit(*flat(*calibration))
        rows = {RAW: logits} if scaling is None else {RAW: logits, SCALED: scaling.apply(logits)}
    binary = fit is fit_platt_scaling
    return {
        name: measure_logits(values, labels, num_bins, num_resamples, binary=binary) for name, values in rows.items()
    }, scaling


def _out_of_distribution(
    dataset: str, out: Any, test: Any, folded: Scaling | None, scaling: Scaling | None
) -> dict[str, Any]:
    if isinstance(test, PerSample | Collected):
        raise ValueError("Out-of-distribution metrics need the logits of the measured split, found its metrics alone.")
    inside, outside = (two_columns(np.asarray(logits, dtype=np.float64)) for logits in (flat(*test)[0], out))
    rows = {RAW: (inside, outside)}
    if folded is not None:
        rows = {RAW: (folded.undo(inside), folded.undo(outside)), SCALED: (inside, outside)}
    elif scaling is not None:
        rows[SCALED] = (scaling.apply(inside), scaling.apply(outside))
    name = DataSource.of(dataset).name
    return {"dataset": name, **{row: _finite(ood_report(*logits)) for row, logits in rows.items()}}


def _majority(logits: Any, labels: Any) -> float:
    _, counts = np.unique(flat(logits, labels)[1], return_counts=True)
    return float(counts.max() / counts.sum())


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Convert numbers to Python's own, without NaN and infinity."""
    plain = {name: _plain(value) for name, value in metrics.items()}
    return {name: value for name, value in plain.items() if is_finite_number(value)}


def _plain(value: Any) -> Any:
    """Convert numbers, arrays and tuples to JSON values; entries of objects that are NaN or infinite are left out."""
    if isinstance(value, Mapping):
        plain = {str(name): _plain(inner) for name, inner in value.items()}
        return {name: inner for name, inner in plain.items() if not _not_finite(inner)}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return _plain(value.tolist())
    return value


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not is_finite_number(value)
