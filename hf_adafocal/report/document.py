"""JSON form of a report, and its validation when it is read back."""

from typing import Any

import numpy as np

from hf_adafocal.metrics.binning import BinStats, equal_width_edges
from hf_adafocal.report.facts import DataSource, ModelFacts
from hf_adafocal.report.fields import FieldError, Fields
from hf_adafocal.report.schema import BINS, RAW, SCALED, SCHEMA_VERSION, Report, Results
from hf_adafocal.scaling.fit import Scaling

NEEDED_METRICS = ("num_samples", "num_bins", "accuracy", "nll", "ece")


def to_document(report: Report) -> dict[str, Any]:
    """Convert a report to JSON; unknown values are left out."""
    test, model = report.test, report.model
    results = {
        "split": test.split,
        **test.rows(),
        "temperature": test.temperature,
        "scaling": None if test.scaling is None else test.scaling.to_dict(),
        "scaling_outcome": report.scaling_outcome,
        "pooler": report.pooler,
        "bins": dict(BINS),
        "intervals": None
        if not test.intervals
        else {
            "level": 0.95,
            "num_resamples": test.num_resamples,
            **{row: {name: list(ends) for name, ends in found.items()} for row, found in test.intervals.items()},
        },
        "reliability": {row: _bins(stats) for row, stats in test.reliability.items()},
        "majority": test.majority,
    }
    document = {
        "schema_version": SCHEMA_VERSION,
        "test": _known(results),
        "model": _known({**vars(model), "labels": list(model.labels)}),
        "folded": report.folded,
        "weights": report.weights,
        **{
            name: None if source is None else _known(vars(source))
            for name, source in (("trained_on", report.trained_on), ("evaluated_on", report.evaluated_on))
        },
        "language": report.language,
        "loss": report.loss,
        "adaptation": list(report.adaptation),
        "splits": {role: _known(part) for role, part in report.splits.items()},
        "held_out": report.held_out,
        "overlap": report.overlap,
        "ood": report.ood,
        "baselines": report.baselines,
        "seed": report.seed,
        "training": report.training,
        "examples": list(report.examples),
        "versions": report.versions,
        "date": report.date,
    }
    return _known(document)


def from_document(document: Any) -> Report:
    """Read the report that `to_document` wrote; raises `ValueError` that names the field."""
    fields = Fields(document)
    if "schema_version" not in fields:
        raise FieldError(
            "schema_version is missing: this is no report, or one of an older version. Measure the checkpoint anew "
            "with `hf-adafocal evaluate`."
        )
    found = fields.integer("schema_version")
    if found != SCHEMA_VERSION:
        raise FieldError(
            f"schema_version must be {SCHEMA_VERSION}, found {found}: install the version of hf-adafocal that wrote "
            "the report, or measure the checkpoint anew with `hf-adafocal evaluate`."
        )
    optional: dict[str, Any] = {}
    for name, read in (("weights", fields.text), ("language", fields.text), ("date", fields.text)):
        if name in fields:
            optional[name] = read(name)
    for name in ("trained_on", "evaluated_on"):
        if name in fields:
            optional[name] = _source(fields.fields(name))
    for name in ("training", "overlap", "ood"):
        if name in fields:
            optional[name] = _object(fields, name)
    if "loss" in fields:
        fields.fields("loss").text("name")
        optional["loss"] = _object(fields, "loss")
    if "adaptation" in fields:
        optional["adaptation"] = tuple(fields.list_of("adaptation", _update))
    if "splits" in fields:
        optional["splits"] = fields.map_of("splits", _split)
    for name in ("held_out", "versions"):
        if name in fields:
            inner = fields.fields(name)
            optional[name] = {key: inner.text(key) for key in inner.value}
    if "baselines" in fields:
        optional["baselines"] = fields.map_of("baselines", _metrics)
    if "seed" in fields:
        optional["seed"] = fields.integer("seed")
    if "examples" in fields:
        optional["examples"] = tuple(fields.list_of("examples", _example))
    folded = fields.boolean("folded") if "folded" in fields else False
    report = Report(_results(fields.fields("test")), _model(fields.fields("model")), folded=folded, **optional)
    _check_overlap(fields, report)
    fields.refuse_others()
    if report.shipped not in report.test.rows():
        raise FieldError(
            f"test.{report.shipped} is missing: with folded {str(folded).lower()} these are the metrics of the "
            "checkpoint's own scores."
        )
    if report.folded and report.test.scaling is None:
        raise FieldError("test.scaling is missing: folded is true, so there must be a scaling.")
    return report


def _results(fields: Fields) -> Results:
    rows = {name: _metrics(fields.fields(name)) for name in (RAW, SCALED) if name in fields}
    optional: dict[str, Any] = {}
    if "scaling" in fields:
        optional["scaling"] = _scaling(fields.fields("scaling"))
    if "temperature" in fields:
        fields.number("temperature")  # for readers of the JSON; the scaling holds it
    if "scaling_outcome" in fields:
        fields.text("scaling_outcome")  # likewise
    if "pooler" in fields:
        fields.json("pooler")
    if "bins" in fields:
        fields.json("bins")
    if "intervals" in fields:
        inner = fields.fields("intervals")
        optional["num_resamples"] = inner.integer("num_resamples")
        if inner.number("level") != 0.95:
            raise FieldError(f"{inner.path}.level must be 0.95, found {inner.number('level')}.")
        optional["intervals"] = {name: _intervals(inner.fields(name)) for name in (RAW, SCALED) if name in inner}
        inner.refuse_others()
    if "reliability" in fields:
        inner = fields.fields("reliability")
        optional["reliability"] = {name: _stats(inner.fields(name)) for name in (RAW, SCALED) if name in inner}
        inner.refuse_others()
    if "majority" in fields:
        optional["majority"] = _share(fields, "majority")
    results = Results(fields.text("split"), rows.get(RAW), rows.get(SCALED), **optional)
    fields.refuse_others()
    return results


def _metrics(fields: Fields) -> dict[str, float]:
    for name in NEEDED_METRICS:
        fields.number(name)
    for name in ("num_samples", "num_bins"):
        if fields.integer(name) < 1:
            raise FieldError(f"{fields.path}.{name} must be at least 1, found {fields.integer(name)}.")
    for name in ("accuracy", "ece"):
        _share(fields, name)
    return fields.metrics()


def _share(fields: Fields, name: str) -> float:
    value = fields.number(name)
    if not 0 <= value <= 1:
        raise FieldError(f"{fields.path}.{name} must be a fraction in [0, 1], found {value}.")
    return value


def _intervals(fields: Fields) -> dict[str, tuple[float, float]]:
    found = {}
    for name in fields.value:
        ends = fields.numbers(name)
        if len(ends) != 2 or ends[0] > ends[1]:
            raise FieldError(f"{fields.path}.{name} must be two ascending numbers, found {ends}.")
        found[name] = (ends[0], ends[1])
    return found


def _bins(stats: BinStats) -> dict[str, list]:
    return {
        "count": stats.count.tolist(),
        "confidence": stats.confidence.tolist(),
        "accuracy": stats.accuracy.tolist(),
    }


def _stats(fields: Fields) -> BinStats:
    columns = {name: np.asarray(fields.numbers(name)) for name in ("count", "confidence", "accuracy")}
    size = len(columns["count"])
    if size == 0 or any(len(column) != size or (column < 0).any() for column in columns.values()):
        raise FieldError(f"{fields.path} must hold three lists of one length, of numbers that are not negative.")
    if columns["count"].sum() == 0 or (columns["count"] != np.floor(columns["count"])).any():
        raise FieldError(f"{fields.path}.count must be whole numbers, not all 0.")
    for name in ("confidence", "accuracy"):
        if (columns[name] > 1).any():
            raise FieldError(f"{fields.path}.{name} must be fractions in [0, 1], found {columns[name].max()}.")
    fields.refuse_others()
    columns["count"] = columns["count"].astype(np.int64)
    return BinStats(edges=equal_width_edges(size), **columns)


def _scaling(fields: Fields) -> Scaling:
    try:
        return Scaling.from_dict(dict(fields.value))
    except (TypeError, ValueError, OverflowError) as error:
        raise FieldError(f"{fields.path} must be a scaling as Scaling.to_dict writes it: {error}") from error


def _model(fields: Fields) -> ModelFacts:
    optional: dict[str, Any] = {}
    for name in ("task", "base_model"):
        if name in fields:
            optional[name] = fields.text(name)
    for name in ("custom_code", "adapter"):
        if name in fields:
            optional[name] = fields.boolean(name)
    if "labels" in fields:
        optional["labels"] = tuple(fields.texts("labels"))
    model = ModelFacts(fields.text("architecture"), **optional)
    fields.refuse_others()
    return model


def _source(fields: Fields) -> DataSource:
    hub_id = fields.text("hub_id") if "hub_id" in fields else None
    source = DataSource(fields.text("name"), hub_id)
    fields.refuse_others()
    return source


def _split(fields: Fields) -> dict[str, Any]:
    size = fields.integer("size")
    if size < 0:
        raise FieldError(f"{fields.path}.size must not be negative, found {size}.")
    split = {"size": size, "hash": fields.text("hash") if "hash" in fields else None}
    fields.refuse_others()
    return split


def _update(fields: Fields) -> dict[str, Any]:
    update: dict[str, Any] = {"step": fields.integer("step")}
    if "gammas" in fields:
        update["gammas"] = fields.numbers("gammas")
        if not update["gammas"]:
            raise FieldError(f"{fields.path}.gammas must hold a number for each bin, found none.")
    else:
        update["smoothing"] = fields.number("smoothing")
    fields.refuse_others()
    return update


def _example(fields: Fields) -> dict[str, Any]:
    example = {"input": fields.text("input"), "scores": {}}
    if "scores" in fields:
        example["scores"] = fields.fields("scores").metrics()
    fields.refuse_others()
    return example


def _check_overlap(fields: Fields, report: Report) -> None:
    if report.overlap:
        overlap = fields.fields("overlap")
        overlap.text("policy")
        if "rows" in overlap:
            rows = overlap.fields("rows")
            for name in rows.value:
                rows.integer(name)
        if "dropped" in overlap:
            overlap.integer("dropped")
        overlap.refuse_others()
    if report.ood is not None:
        found = fields.fields("ood")
        found.text("dataset")
        for name in (RAW, SCALED):
            if name in found:
                found.fields(name).metrics()
        found.refuse_others()


def _object(fields: Fields, name: str) -> dict[str, Any]:
    fields.fields(name)
    return fields.json(name)


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """Drop entries that are None, an empty list or an empty object."""
    return {name: value for name, value in values.items() if value is not None and value not in ({}, [], ())}
