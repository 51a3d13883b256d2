"""A model card that shows how calibrated a checkpoint is, from its report.

The card owns the block between its two markers and the results it measured in the metadata. What a user writes around
the block, and every other key and result, stays.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from hf_adafocal.report.schema import Report
from hf_adafocal.report.tables import METRICS, report_table

START = "<!-- calibration report of hf-adafocal: the text down to its end marker is replaced by the next one -->"
END = "<!-- end of the calibration report of hf-adafocal -->"
STOCK = "<!-- This model card has been generated automatically according to the information the Trainer had access to."
PICTURES = {
    "reliability.png": "Accuracy against confidence, with the number of samples in each bin",
    "gamma.png": "Gamma of each confidence bin over training",
    "smoothing.png": "Smoothing of the labels over training",
}
LOSS_NAMES = {
    "adafocal": "AdaFocal",
    "cross_entropy": "cross-entropy",
    "focal": "focal loss",
    "flsd_53": "FLSD-53",
    "adaptive_label_smoothing": "adaptive label smoothing",
}

HUB_METRICS = {key: "brier_score" if key == "brier" else key for key in METRICS}  # `metric_type` on the Hub


def write_card(folder: str | Path, report: Report, **options) -> Path:
    """Write or renew `README.md` of a run folder; options are those of `model_card`.

    Pictures are shown if they lie in the folder. An existing README keeps everything outside the block.

    Returns:
        The path of the card.
    """
    folder = Path(folder)
    path = folder / "README.md"
    existing = path.read_text() if path.exists() else None
    pictures = [name for name in PICTURES if (folder / name).exists()]
    path.write_text(model_card(report, existing=existing, pictures=pictures, name=folder.resolve().name, **options))
    return path


def _as_before(report: Report) -> dict[str, Any]:
    """The report in the shape that the template still reads."""
    document = report.to_dict()
    source = report.trained_on or report.evaluated_on
    return {
        **document,
        "split": report.test.split,
        "drove_gamma": report.held_out.get("adaptation") == report.test.split,
        "gamma": [update for update in report.adaptation if "gammas" in update],
        "smoothing": [update for update in report.adaptation if "smoothing" in update],
        "training": {
            "model": report.model.architecture,
            **({"dataset": source.name} if source else {}),
            **report.training,
        },
    }


def model_card(
    report: Report,
    *,
    name: str,
    repo_id: str | None = None,
    existing: str | None = None,
    pictures: Sequence[str] = (),
    license: str | None = None,
) -> str:
    """The text of a card.

    Args:
        report: As `build_report` makes it.
        name: Title of a new card.
        repo_id: Where the checkpoint is going to live, for the example; else the name.
        existing: Text of the card there is; a stock card of the Trainer and one without the block get it at the end.
        pictures: Names of `PICTURES` that lie beside the card.
        license: Licence of the checkpoint, as the Hub spells it.
    """
    card = ModelCard(existing) if existing else ModelCard(f"---\n{{}}\n---\n\n# {name}\n")
    table = report_table(report, tuple(METRICS), intervals=tuple(METRICS), mark=True)
    facts = _as_before(report)
    _merge_metadata(card.data, facts, name, license)
    block = f"{START}\n\n{_block(facts, table, repo_id or name, pictures)}\n\n{END}"
    text = card.text
    if START in text and END in text:
        before, rest = text.split(START, 1)
        text = before + block + rest.split(END, 1)[1]
    else:
        text = f"{text.rstrip()}\n\n{block}\n"
    return f"---\n{card.data.to_yaml().strip()}\n---\n{text if text.startswith(chr(10)) else chr(10) + text}"


def _merge_metadata(data: ModelCardData, report: Mapping[str, Any], name: str, license: str | None) -> None:
    training = report.get("training", {})
    data.model_name = data.model_name or name
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or task_of(report)
    data.license = data.license or license
    dataset = str(training.get("dataset", "unknown"))
    data.tags = _union(data.tags, ["calibration", "hf-adafocal", report.get("loss", {}).get("name")])
    ours = _results(report, dataset)
    measured = {(result.dataset_type, result.dataset_split, result.metric_type) for result in ours}
    kept = [
        result
        for result in data.eval_results or []
        if (result.dataset_type, result.dataset_split, result.metric_type) not in measured
    ]
    data.eval_results = kept + ours
    data.metrics = _union(data.metrics, [result.metric_type for result in ours])


def _results(report: Mapping[str, Any], dataset: str) -> list[EvalResult]:
    values = report["test"][_shipped(report)]
    bins = values.get("num_bins", 15)
    return [
        EvalResult(
            task_type=task_of(report),
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=report.get("split", "test"),
            metric_type=HUB_METRICS[key],
            metric_name=column.heading.removesuffix(" %") + (f" ({bins} bins)" if "CE" in column.heading else ""),
            metric_value=values[key],
        )
        for key, column in METRICS.items()
        if key in values
    ]


def task_of(report: Mapping[str, Any]) -> str:
    """The Hub's name of the task, from the model's class."""
    model = str(report.get("training", {}).get("model", ""))
    for part, task in (("Image", "image-classification"), ("Token", "token-classification")):
        if part in model:
            return task
    return "text-classification"


def _shipped(report: Mapping[str, Any]) -> str:
    """Which of the report's two results is that of the checkpoint's own scores."""
    return "temperature_scaled" if report.get("folded") else "raw"


def _block(report: Mapping[str, Any], table: str, repo_id: str, pictures: Sequence[str]) -> str:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    template = environment.from_string(files("hf_adafocal.report").joinpath("card_template.md").read_text())
    test, loss, shipped = report["test"], report.get("loss", {}), _shipped(report)
    baselines = report.get("baselines", {})
    return template.render(
        values=test[shipped],
        ece_interval=test.get("intervals", {}).get(shipped, {}).get("ece"),
        resamples=test.get("intervals", {}).get("num_resamples"),
        temperature=test.get("temperature"),
        folded=shipped == "temperature_scaled",
        table=table,
        pictures=[{"file": name, "alt": PICTURES[name]} for name in pictures],
        task=task_of(report),
        repo_id=repo_id,
        loss=LOSS_NAMES.get(loss.get("name"), loss.get("name", "an unknown loss")),
        settings={name: value for name, value in loss.items() if name != "name"},
        gamma=report.get("gamma"),
        smoothing=report.get("smoothing"),
        by_temperature=False,
        signal="temperature of slices of" if report.get("smoothing") else "calibration gap on",
        training=report.get("training", {}),
        seed=report.get("seed"),
        sizes={
            role: part["size"] if isinstance(part, Mapping) else part
            for role, part in report.get("splits", {}).items()
        },
        overlap={parts: rows for parts, rows in report.get("overlap", {}).get("rows", {}).items() if rows},
        split=report.get("split", "test"),
        drove_gamma=report.get("drove_gamma", False),
        unchecked=report.get("overlap", {}).get("policy") == "skip",
        versions=report.get("versions", {}),
        better=[name for name, values in baselines.items() if values["ece"] < test[shipped]["ece"]],
    ).strip()


def _union(present: Any, added: Sequence[str | None]) -> list[str]:
    present = [present] if isinstance(present, str) else list(present or [])
    return present + [name for name in added if name and name not in present]
