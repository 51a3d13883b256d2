"""Model card of a checkpoint from its report.

The card owns the block between its two markers and the results it measured in the metadata. What a person writes
around the block, and every other key and result, stays.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from hf_adafocal.report import card_text
from hf_adafocal.report.atomic import write_atomically
from hf_adafocal.report.card_text import has_names
from hf_adafocal.report.facts import DataSource
from hf_adafocal.report.schema import Report
from hf_adafocal.report.stock_card import is_stock, without_stock
from hf_adafocal.report.tables import METRICS, escape
from hf_adafocal.report.weights import weights_hash
from hf_adafocal.upload_selection import EXAMPLE

CARD = "README.md"
START = "<!-- calibration report of hf-adafocal: the text down to its end marker is replaced by the next one -->"
END = "<!-- end of the calibration report of hf-adafocal -->"
OVERLAY = "overlay.png"
PICTURES = {
    "reliability.png": "Accuracy against confidence, with the number of samples in each bin",
    OVERLAY: "Image, label, prediction, confidence and error of one test image",
    "gamma.png": "Gamma of each confidence bin over training",
    "smoothing.png": "Smoothing of the labels over training",
}
HUB_METRICS = {key: "brier_score" if key == "brier" else key for key in METRICS}  # `metric_type` on the Hub
MOST_LABELS = 100  # in the metadata
SOURCE = ("hf-adafocal", "https://github.com/hf-adafocal/hf_adafocal")  # of the results that the card owns


class StaleReportError(ValueError):
    """Raised when a report describes other weights than those in its folder."""


def write_card(folder: str | Path, report: Report, **options: Any) -> Path:
    """Write or renew `README.md` of a run folder; options are those of `model_card`.

    Pictures are shown if they lie in the folder. An existing README keeps everything outside the block.

    Returns:
        The path of the card.

    Raises:
        StaleReportError: If the folder holds weights that are not those the report describes.
    """
    folder = Path(folder)
    check_current(folder, report)
    path = folder / CARD
    existing = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else None
    pictures = [name for name in (*PICTURES, EXAMPLE) if (folder / name).exists()]
    facts = replace(report, model=replace(report.model, custom_code=report.model.custom_code or _has_code(folder)))
    if EXAMPLE not in pictures:
        facts = replace(facts, examples=tuple(found for found in report.examples if found["input"] != EXAMPLE))
    options = {"name": folder.resolve().name, **options}
    write_atomically(path, model_card(facts, existing=existing, pictures=pictures, **options))
    return path


def check_current(folder: str | Path, report: Report) -> None:
    """Raise `StaleReportError` if a folder holds weights that are not those a report describes."""
    if is_stale(folder, report):
        raise StaleReportError(
            f"The report describes other weights than those in {folder}: measure them with `hf-adafocal evaluate`, or "
            "with `write_report` of the trainer."
        )


def is_stale(folder: str | Path, report: Report) -> bool:
    """Whether a folder holds weights that are not those a report describes."""
    if report.weights is None:
        return False
    found = weights_hash(folder)
    return found is not None and found != report.weights


def model_card(
    report: Report,
    *,
    name: str,
    title: str | None = None,
    repo_id: str | None = None,
    existing: str | None = None,
    pictures: Sequence[str] = (),
    license: str | None = None,
    language: str | None = None,
    tags: str | Sequence[str] | None = None,
    base_model: str | None = None,
    datasets: str | Sequence[str] | None = None,
) -> str:
    """Write the text of a model card.

    Args:
        report: As `build_report` makes it.
        name: Of the model.
        title: First heading of the card; of a new card the name if left out.
        repo_id: Where the checkpoint is going to live, for the example; else the name.
        existing: Text of the card there is. A block of ours in it is replaced, what the Trainer generated is removed;
            a card that a person wrote gets the block at its end.
        pictures: Names of `PICTURES`, and of the example, that lie beside the card.
        license: Licence of the checkpoint, as the Hub spells it.
        language: Language of the data, as the Hub codes it, where the report does not tell.
        tags: Further tags.
        base_model: Hub id of the checkpoint that was fine-tuned, where the report does not tell.
        datasets: Hub ids of the data, where the report does not tell.

    Returns:
        The card with its metadata.

    Raises:
        ValueError: If the metadata of the card there is cannot be read.
    """
    card = _parsed(existing or f"---\n{{}}\n---\n\n# {escape(name)}\n")
    stock, data = is_stock(card.text), cast(ModelCardData, card.data)
    data.license = data.license or license
    data.language = data.language or report.language or language
    data.base_model = data.base_model or report.model.base_model or base_model
    data.datasets = _union(data.datasets, _union(datasets, [])) or None
    data.tags = _union(data.tags, _union(tags, [])) or None
    _merge_metadata(data, report, name, stock)
    block = f"{START}\n\n{_block(report, repo_id or name, pictures)}\n\n{END}"
    text = without_stock(card.text)
    if title is not None:
        text = f"# {escape(title)}\n" + re.sub(r"\A\s*# .*\n", "", text)
    if START in text and END in text:
        before, after = _around(text)
        text = before + block + after
    elif stock:
        heading, _, rest = text.lstrip().partition("\n")
        if not heading.startswith("# "):
            heading, rest = f"# {escape(name)}", text
        text = f"{heading}\n\n{block}\n" + (f"\n{rest.strip()}\n" if rest.strip() else "")
    else:
        text = f"{text.rstrip()}\n\n{block}\n"
    return _assembled(data, text)


def without_report(existing: str) -> str:
    r"""Remove calibration report and results from a card, for weights that were not measured.

    What a person wrote stays; what the Trainer generated goes, too.

    Args:
        existing: Text of the card.

    Raises:
        ValueError: If its metadata cannot be read.

    >>> print(without_report(f"---\nlicense: mit\n---\n# Mine\n\n{START}\nECE 3.1 %\n{END}\n"))
    ---
    license: mit
    ---
    <BLANKLINE>
    # Mine
    <BLANKLINE>
    """
    card = _parsed(existing)
    data, stock, text = cast(ModelCardData, card.data), is_stock(card.text), without_stock(card.text)
    data.eval_results = _results_of_others(data, stock) or None
    if data.eval_results is None:
        data.model_name = None  # it belongs to the results
    if START in text and END in text:
        text = "\n\n".join(part.strip() for part in _around(text)).rstrip() + "\n"
    return _assembled(data, text)


def with_license(existing: str, license: str) -> str:
    r"""Set the licence in the metadata of a card.

    >>> print(with_license("# Mine\n", "mit"))
    ---
    license: mit
    ---
    <BLANKLINE>
    # Mine
    <BLANKLINE>
    """
    card = _parsed(existing if existing.startswith("---") else f"---\n{{}}\n---\n\n{existing}")
    cast(ModelCardData, card.data).license = license
    return _assembled(card.data, card.text)


def names_license(existing: str) -> bool:
    """Whether the metadata of a card name a licence."""
    front_matter = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", existing, flags=re.DOTALL)
    return front_matter is not None and re.search(r"(?m)^license:\s*\S", front_matter[1]) is not None


def _around(text: str) -> tuple[str, str]:
    """Return the text before and after the generated block."""
    before, rest = text.split(START, 1)
    return before, rest.rsplit(END, 1)[1]


def _assembled(data: Any, text: str) -> str:
    return f"---\n{data.to_yaml().strip()}\n---\n{text if text.startswith(chr(10)) else chr(10) + text}"


def _results_of_others(data: ModelCardData, stock: bool) -> list[EvalResult]:
    """Return the results that neither this package nor the Trainer wrote."""
    return [
        result
        for result in data.eval_results or []
        if result.source_name != SOURCE[0] and not (stock and result.source_name is None)
    ]


def _parsed(text: str) -> ModelCard:
    try:
        return ModelCard(text)
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(
            f"The metadata of README.md cannot be read: {' '.join(str(error).split())} Repair the lines between its "
            "two `---`, or move the file away."
        ) from error


def _merge_metadata(data: ModelCardData, report: Report, name: str, stock: bool) -> None:
    model = report.model
    data.model_name = data.model_name or " ".join(name.split())
    data.library_name = data.library_name or ("peft" if model.adapter else "transformers")
    data.pipeline_tag = data.pipeline_tag or model.task
    sources = (report.trained_on, report.evaluated_on)
    data.datasets = _union(data.datasets, [source.hub_id for source in sources if source]) or None
    data.tags = _union(data.tags, ["calibration", "hf-adafocal", (report.loss or {}).get("name")])
    widget = _widget(report)
    if widget and not data.get("widget"):
        data["widget"] = widget
    if has_names(model.labels) and len(model.labels) <= MOST_LABELS:
        data["labels"] = [" ".join(label.split()) for label in model.labels]
    ours = _results(report)
    measured = {(result.dataset_type, result.dataset_split, result.metric_type) for result in ours}
    kept = [
        result
        for result in _results_of_others(data, stock)
        if (result.dataset_type, result.dataset_split, result.metric_type) not in measured
    ]
    data.eval_results = kept + ours or None
    data.metrics = _union(data.metrics, [result.metric_type for result in ours]) or None


def _results(report: Report) -> list[EvalResult]:
    values = report.metrics
    source = report.evaluated_on or DataSource(f"{report.test.split} set")  # the model-index needs a name
    return [
        EvalResult(
            task_type=report.model.task or "other",
            dataset_type=source.hub_id or source.name,
            dataset_name=source.name,
            dataset_split=report.test.split,
            metric_type=HUB_METRICS[key],
            metric_name=column.heading.removesuffix(" %")
            + (f" ({int(values['num_bins'])} bins)" if "CE" in column.heading else ""),
            metric_value=values[key],
            source_name=SOURCE[0],
            source_url=SOURCE[1],
        )
        for key, column in METRICS.items()
        if key in values and (key != "mce" or card_text.shows_mce(report))
    ]


def _widget(report: Report) -> list[dict[str, Any]]:
    """Convert examples to the format of the Hub's widget."""
    task = report.model.task or ""
    if not task.startswith(("text", "token", "image", "audio")):
        return []
    key = "text" if task.startswith(("text", "token")) else "src"
    return [{key: example["input"]} for example in report.examples]


def _block(report: Report, repo_id: str, pictures: Sequence[str]) -> str:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    template = environment.from_string(files("hf_adafocal.report").joinpath("card_template.md").read_text("utf-8"))
    main, others = card_text.tables(report)
    values, adapted = report.metrics, next((name for name in pictures if name in card_text.ADAPTATION), None)
    overlap = card_text.overlap_sentences(report)
    dropped = [sentence for sentence in overlap if "were dropped" in sentence]
    limits = [card_text.reuse_sentence(report), *(sentence for sentence in overlap if sentence not in dropped)]
    return template.render(
        does=card_text.what_it_does(report),
        good=card_text.how_good(report),
        decision=card_text.decision(report),
        snippet=card_text.snippet(report, repo_id),
        scaling=report.scaling_outcome,
        pooler=card_text.pooler_sentence(report),
        calibrated=report.folded,
        main_table=main,
        other_table=others,
        detection=card_text.detection_table(report),
        other_inputs=escape((report.ood or {}).get("dataset", "")),
        samples=f"{int(values['num_samples']):,}",
        num_bins=int(values["num_bins"]),
        split=escape(report.test.split),
        resamples=bool(report.test.intervals),
        example=EXAMPLE if EXAMPLE in pictures and report.examples else None,
        reliability=("100%" if len(report.test.rows()) > 1 else "55%") if "reliability.png" in pictures else None,
        adaptation=card_text.adaptation_sentence(report),
        loss=card_text.loss_name(report),
        settings=card_text.loss_settings(report),
        training=_training(report),
        splits=card_text.splits_sentence(report),
        dropped=dropped,
        adapted_picture=adapted,
        dense=card_text.dense_sentence(values, report.test.intervals.get(report.shipped, {})),
        overlay=OVERLAY in pictures,
        adapted_alt=PICTURES.get(adapted or "", ""),
        limits=list(filter(None, limits)),
        weights=report.weights,
        versions=", ".join(f"{escape(library)} {escape(v)}" for library, v in report.versions.items()),
    ).strip()


def _training(report: Report) -> str:
    names = {"epochs": "{} epochs", "batch_size": "batches of {}", "learning_rate": "learning rate {}"}
    known = {key: report.training[key] for key in names if key in report.training}
    shown = [names[key].format(escape(card_text.short(value))) for key, value in known.items()]
    return ", ".join(shown if report.seed is None else [*shown, f"seed {report.seed}"])


def _has_code(folder: Path) -> bool:
    """Whether the checkpoint comes with custom code, which `from_pretrained` runs only with `trust_remote_code`."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("auto_map"))


def _union(present: Any, added: Sequence[str | None]) -> list[str]:
    present = [present] if isinstance(present, str) else list(present or [])
    for name in added:
        if name and name not in present:
            present.append(name)
    return present
