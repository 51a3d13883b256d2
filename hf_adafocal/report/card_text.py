"""Sentences of a model card, computed from a report."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import constants

from hf_adafocal.report.schema import RAW, SCALED, Report
from hf_adafocal.report.tables import METRICS, escape, report_table, scores_titles
from hf_adafocal.upload_selection import EXAMPLE

MAIN = ("accuracy", "nll", "ece", "ada_ece")
LEAST_IN_A_BIN = 20  # samples; below, the largest gap of a bin (MCE) is noise
SHOWN_LABELS = 12
ADAPTATION = ("gamma.png", "smoothing.png")  # pictures of how the loss adapted
LOSS_NAMES = {
    "adafocal": "AdaFocal",
    "cross_entropy": "cross-entropy",
    "focal": "focal loss",
    "flsd_53": "FLSD-53",
    "adaptive_label_smoothing": "adaptive label smoothing",
    "label_smoothing": "label smoothing",
    "inverse_focal": "inverse focal loss",
    "dual_focal": "dual focal loss",
}
_DOES = {
    "text-classification": ("Text classifier", "text"),
    "image-classification": ("Image classifier", "image"),
    "token-classification": ("Token classifier", "token"),
    "image-segmentation": ("Image segmenter", "pixel"),
    "audio-classification": ("Audio classifier", "recording"),
    "video-classification": ("Video classifier", "video"),
}


def code(text: Any) -> str:
    """Quote text as a Python string literal."""
    return _harmless(json.dumps(" ".join(str(text).split()), ensure_ascii=False))


def _harmless(literal: str) -> str:
    """Escape HTML comments and Markdown fences in a Python literal."""
    return literal.replace("<!--", "\\u003c!--").replace("-->", "--\\u003e").replace("```", "\\u0060``")


def what_it_does(report: Report) -> str:
    """Describe task, classes, origin and data in one or two sentences."""
    title, _ = _DOES.get(report.model.task or "", ("Classifier", "sample"))
    labels = report.model.labels
    classes = f" with {len(labels)} classes" if labels else ""
    if report.model.single_output:
        positive = f", that of {escape(labels[0])}" if has_names(labels) else ""
        classes = f" with two classes and one output, the logit of the positive class{positive}"
    elif has_names(labels):
        shown = [escape(label) for label in labels[:SHOWN_LABELS]]
        more = len(labels) - len(shown)
        classes += f": {', '.join(shown)}" + (f" and {more} more" if more else "")
    text = f"{title}{classes}."
    origin = []
    if report.model.base_model:
        base = escape(report.model.base_model)
        origin.append(f"fine-tuned from [{base}](https://huggingface.co/{report.model.base_model})")
    elif report.trained_on or report.loss:
        origin.append("trained")
    if report.trained_on:
        origin.append(f"on {_data(report.trained_on)}")
    if report.loss:
        origin.append(f"with {loss_name(report)}")
    if origin:
        words = " ".join(origin)
        text += f" {words[0].upper()}{words[1:]}."
    if report.evaluated_on and report.evaluated_on != report.trained_on:
        text += f" Evaluated on {_data(report.evaluated_on)}."
    return text


def has_names(labels: Sequence[str]) -> bool:
    """Whether the classes have names other than the default `LABEL_0`, ...

    >>> has_names(["LABEL_0", "LABEL_1"])
    False
    """
    return bool(labels) and not all(re.fullmatch(r"LABEL_\d+", label) for label in labels)


def how_good(report: Report) -> str:
    """Compare accuracy with the most frequent class, then state the calibration error, with their intervals."""
    values, ends = report.metrics, report.test.intervals.get(report.shipped, {})
    majority, accuracy = report.test.majority, ends.get("accuracy")
    _, kind = _DOES.get(report.model.task or "", ("", "sample"))
    right = (
        f"On {int(values['num_samples']):,} {escape(report.test.split)} {kind}s it is right in "
        f"{_percent(values['accuracy'])} % of cases"
    )
    if accuracy:
        right += f" (95 % interval {_percent(accuracy[0])} to {_percent(accuracy[1])})"
    off = f"its confidence is off by {_percent(values['ece'])} percentage points on average"
    if "ece" in ends:
        off += f" (95 % interval {_percent(ends['ece'][0])} to {_percent(ends['ece'][1])})"
    if majority is None:
        return f"{right}, and {off}."
    if at_chance(report):
        return (
            f"{right}: no better than always naming the most frequent class, which would be right in "
            f"{_percent(majority)} %. It has learned nothing that this split could show, whatever its calibration "
            f"({off})."
        )
    return f"{right}; always naming the most frequent class would be right in {_percent(majority)} %. I{off[1:]}."


def at_chance(report: Report) -> bool:
    """Whether the accuracy is not significantly different from that of always predicting the most frequent class."""
    if report.test.majority is None:
        return False
    low = report.test.intervals.get(report.shipped, {}).get("accuracy", (report.metrics["accuracy"],))[0]
    return low <= report.test.majority


def decision(report: Report) -> str:
    """Recommend a baseline if it is better calibrated or, beyond the interval, more accurate."""
    values, ends = report.metrics, report.test.intervals.get(report.shipped, {})
    highest = ends.get("accuracy", (values["accuracy"],))[-1]
    better = {
        title: found
        for title, found in report.baselines.items()
        if found["ece"] < values["ece"] or found["accuracy"] > highest
    }
    if not better:
        return ""
    title, found = min(better.items(), key=lambda entry: (entry[1]["accuracy"] <= highest, entry[1]["ece"]))
    text = (
        f"**Which to take:** on the same split {escape(title)} has an ECE of {_percent(found['ece'])} % at "
        f"{_percent(found['accuracy'])} % accuracy, this model {_percent(values['ece'])} % at "
        f"{_percent(values['accuracy'])} %."
    )
    lowest_error, highest_error = ends.get("ece", (values["ece"], values["ece"]))
    if found["accuracy"] > highest and found["ece"] <= highest_error:
        even = "" if found["ece"] < lowest_error else " as far as these samples tell"
        return f"{text} The other one is more accurate, beyond the interval, and no worse calibrated{even}: take that."
    if found["accuracy"] > highest:
        return f"{text} Take the other one where accuracy matters more than confidence."
    if "ece" in ends and found["ece"] >= lowest_error:
        return f"{text} The difference lies inside the interval: there is no evidence for either."
    if found["accuracy"] >= values["accuracy"]:
        return f"{text} The other one is better in both: take that."
    return f"{text} Take the other one where confidence matters more than accuracy."


def adaptation_sentence(report: Report) -> str:
    """State which setting of the loss was adapted during training, how often, and its final value."""
    updates = [update for update in report.adaptation if update["step"] > 0]
    if not updates:
        return "The loss had fixed settings: nothing adapted during training." if report.loss else ""
    split = report.held_out.get("adaptation", "calibration")
    last, count = updates[-1], f"{len(updates)} time{'s' if len(updates) > 1 else ''}"
    if "gammas" in last:
        low, high = min(last["gammas"]), max(last["gammas"])
        return (
            f"Gamma of each confidence bin moved {count}, by the calibration gap on the {escape(split)} split; it "
            f"ended between {low:.2f} and {high:.2f}."
        )
    return (
        f"The smoothing of the labels moved {count}, by the temperature of slices of the {escape(split)} split; it "
        f"ended at {last['smoothing']:.3f}."
    )


def reuse_sentence(report: Report) -> str:
    """State which choices were made on the same samples that are reported; empty if none."""
    adapted = "the smoothing" if any("smoothing" in update for update in report.adaptation) else "gamma"
    names = {"adaptation": adapted, "scaling": "the temperature", "selection": "the choice of the checkpoint"}
    if report.test.scaling is None:
        names.pop("scaling")
    elif report.test.scaling.method == "platt":
        names["scaling"] = "Platt scaling"
    reused = [names[use] for use, split in report.held_out.items() if split == report.test.split and use in names]
    if not reused:
        return ""
    text, verb = _joined(reused), "was" if len(reused) == 1 else "were"
    return (
        f"{text[0].upper()}{text[1:]} {verb} chosen on the samples measured here, so these numbers are optimistic. "
        "Measure on a test split of its own: `hf-adafocal evaluate`."
    )


def splits_sentence(report: Report) -> str:
    """State the sizes of the splits."""
    return ", ".join(f"{part['size']:,} {escape(role)}" for role, part in report.splits.items())


def overlap_sentences(report: Report) -> list[str]:
    """State how many rows splits share or were dropped, or that this was not checked."""
    overlap, sentences = report.overlap, []
    shared = [f"{rows} rows of {escape(pair)}" for pair, rows in overlap.get("rows", {}).items() if rows]
    dropped = overlap.get("dropped", 0)
    if dropped:
        sentences.append(f"{dropped:,} training rows whose inputs stand in a held-out split were dropped.")
    elif shared:
        sentences.append(
            f"Splits overlap, by request: {', '.join(shared)}. What was measured on data that the model was fitted to "
            "is optimistic."
        )
    if overlap.get("policy") == "skip":
        sentences.append("Whether the splits share rows was not checked.")
    return sentences


def pooler_sentence(report: Report) -> str:
    """Describe the settings of a server that scales logits itself; empty if there are none."""
    if report.pooler is None:
        return ""
    activation = "sigmoid" if report.model.single_output else "softmax"
    numbers = json.dumps({name: float(f"{value:.6g}") for name, value in report.pooler.items()})
    return (
        f"vLLM gives the scores of the second row, `{activation}((logits - logit_mean) / logit_sigma)`, with "
        f"`--pooler-config '{numbers}'`."
    )


def loss_name(report: Report) -> str:
    """Return the name of the loss as people write it."""
    name = (report.loss or {}).get("name", "")
    return LOSS_NAMES.get(name, escape(name))


def loss_settings(report: Report) -> str:
    """List the settings of the loss, separated by commas."""
    return ", ".join(
        f"{escape(name)} {escape(short(value))}" for name, value in (report.loss or {}).items() if name != "name"
    )


def tables(report: Report) -> tuple[str, str]:
    """Render the table of the four main metrics, and the table of the others ("" if there are none)."""
    others = [key for key in METRICS if key not in MAIN and any(key in row for row in report.test.rows().values())]
    if "mce" in others and not shows_mce(report):
        others.remove("mce")
    main = report_table(report, MAIN, intervals=("accuracy", "ece"), mark=True)
    return main, report_table(report, others, intervals=others, mark=True) if others else ""


def shows_mce(report: Report) -> bool:
    """Whether every non-empty bin holds enough samples for MCE to be more than noise."""
    bins = [stats.count[stats.count > 0] for stats in report.test.reliability.values()]
    return bool(bins) and min(int(count.min()) for count in bins) >= LEAST_IN_A_BIN


def detection_table(report: Report) -> list[tuple[str, str]]:
    """Return the AUROC of out-of-distribution detection by confidence, in percent, with the titles of the scores."""
    if report.ood is None:
        return []
    titles = scores_titles(report)
    found = ((titles[row], report.ood.get(row, {}).get("max_softmax_auroc")) for row in (RAW, SCALED))
    return [(title, _percent(value)) for title, value in found if value is not None]


def snippet(report: Report, repo_id: str) -> dict[str, Any]:
    """Render installation, the code that loads and calls the model, and its output."""
    if report.model.architecture == VOLUMES:
        return _volume_snippet(report, repo_id)
    task = report.model.task or "text-classification"
    image = task.startswith(("image", "video"))
    example = report.examples[0] if report.examples else {}
    given = example.get("input", "image.png" if image else "audio.wav" if "audio" in task else "Some text.")
    if given == EXAMPLE and "/" in repo_id:
        given = f"{constants.ENDPOINT}/{repo_id}/resolve/main/{EXAMPLE}"
    packages = ["transformers", "torch"] + (["torchvision"] if image else [])
    packages += ["timm"] if report.model.architecture.startswith("Timm") else []
    lines: Sequence[str]
    if report.model.adapter:
        packages.append("peft")
        auto = {
            "text-classification": "AutoPeftModelForSequenceClassification",
            "token-classification": "AutoPeftModelForTokenClassification",
        }.get(task, "AutoPeftModel")
        labels = f", num_labels={len(report.model.labels)}" if report.model.labels else ""
        lines = [
            f"from peft import {auto}",
            "from transformers import AutoTokenizer, pipeline",
            "",
            f"model = {auto}.from_pretrained({code(repo_id)}{labels})",
            f"tokenizer = AutoTokenizer.from_pretrained({code(repo_id)})",
            f"classify = pipeline({code(task)}, model=model, tokenizer=tokenizer)",
        ]
    else:
        trust = ", trust_remote_code=True" if report.model.custom_code else ""
        lines = [
            "from transformers import pipeline",
            "",
            f"classify = pipeline({code(task)}, model={code(repo_id)}{trust})",
        ]
    if task not in ("text-classification", "image-classification", "audio-classification"):
        return {"packages": " ".join(packages), "lines": [*lines, f"print(classify({code(given)}))"], "printed": []}
    scores: Mapping[str, float] = example.get("scores", {})
    printed = [_harmless(f"# {' '.join(label.split())}: {score:.3f}") for label, score in scores.items()]
    call = [f"for found in classify({code(given)}):", """    print(f"{found['label']}: {found['score']:.3f}")"""]
    return {"packages": " ".join(packages), "lines": [*lines, *call], "printed": printed}


def _volume_snippet(report: Report, repo_id: str) -> dict[str, Any]:
    """Render the code for a network that no pipeline takes: it has volumes as input."""
    trust = ", trust_remote_code=True" if report.model.custom_code else ""
    lines = [
        "import torch",
        "from transformers import AutoModelForSemanticSegmentation",
        "",
        f"model = AutoModelForSemanticSegmentation.from_pretrained({code(repo_id)}{trust})",
        "volumes = torch.rand(1, model.config.num_channels, 24, 24, 24)  # your intensities, scaled as in training",
        "with torch.no_grad():",
        "    probabilities = model(volumes).logits.softmax(1)",
        "confidence, prediction = probabilities.max(1)  # of each voxel",
        "for number, name in model.config.id2label.items():",
        '    print(f"{name}: {(prediction == number).sum()} voxels")',
    ]
    return {"packages": "transformers torch", "lines": lines, "printed": []}


def _data(source: Any) -> str:
    name = escape(source.name)
    return f"[{name}](https://huggingface.co/datasets/{source.hub_id})" if source.hub_id else name


def _joined(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def short(value: Any) -> str:
    """Format a number with four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


VOLUMES = "UNet3DForSemanticSegmentation"  # the architecture whose inputs are volumes
DENSE = {
    "dice": "Dice of the foreground classes",
    "iou": "IoU",
    "foreground_ece": "ECE of pixels whose label or prediction is not background",
    "image_ece": "mean ECE of single images",
    "betti_0_error": "error of the number of components per image",
    "betti_1_error": "of loops",
    "betti_2_error": "of cavities",
}


def dense_sentence(metrics: Mapping[str, float], intervals: Mapping[str, Sequence[float]]) -> str | None:
    """Summarise the per-image results of a segmentation model; None for other models."""
    if "num_images" not in metrics:
        return None
    shown = []
    for name in (name for name in DENSE if name in metrics):
        ends = " to ".join(f"{end:.3f}" for end in intervals.get(name, ()))
        shown.append(f"{DENSE[name]} {metrics[name]:.3f}" + (f" ({ends})" if ends else ""))
    return (
        f"The samples are {int(metrics['num_samples']):,} pixels of {int(metrics['num_images']):,} images, and pixels "
        f"of one image are not independent. Image by image, with 95 % intervals that resample images: "
        f"{'; '.join(shown)}."
    )
