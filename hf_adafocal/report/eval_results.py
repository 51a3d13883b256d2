"""Entries of `.eval_results/`, by which the Hub shows a result on the leaderboard of a registered benchmark."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_adafocal.report.atomic import write_atomically
from hf_adafocal.report.schema import Report

FOLDER = ".eval_results"
_OF_WEIGHTS = ", weights "  # followed by their hash


def write_eval_results(folder: str | Path, report: Report, task_id: str, **options: Any) -> Path:
    """Write the accuracy of a report as a benchmark result; options are those of `eval_results_entry`.

    Args:
        folder: Of the checkpoint.
        report: As `eval_results_entry`.
        task_id: As `eval_results_entry`.
        **options: As `eval_results_entry`.

    Returns:
        Path of the file, `.eval_results/<owner>__<data set>.yaml`.

    Raises:
        ImportError: As `eval_results_entry`.
        ValueError: As `eval_results_entry`.
    """
    name, text = eval_results_entry(report, task_id, **options)
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    return path


def eval_results_entry(
    report: Report,
    task_id: str,
    *,
    dataset_revision: str | None = None,
    source_url: str | None = None,
    source_name: str | None = None,
) -> tuple[str, str]:
    """Build the result of a report on a benchmark, with date, revision, source and the hash of the weights.

    Args:
        report: Measured on a data set of the Hub.
        task_id: Task of the benchmark, as its own `eval.yaml` names it.
        dataset_revision: Commit of the data set, 40 hexadecimal digits.
        source_url: Where the evaluation can be looked up.
        source_name: What that place is called; needs `source_url`.

    Returns:
        Path in the folder of the checkpoint, `.eval_results/<owner>__<data set>.yaml`, and the text of the file.

    Raises:
        ImportError: If huggingface_hub is older than 2.0, which knows no such entries.
        ValueError: If the data set is not on the Hub, the revision is no commit, or a source has a name alone.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    source = report.evaluated_on
    if source is None or source.hub_id is None:
        found = "unknown data" if source is None else source.name
        raise ValueError(f"Only results on a data set of the Hub can be entered as a benchmark's, found {found}.")
    if dataset_revision is not None and not re.fullmatch(r"[0-9a-f]{40}", dataset_revision):
        raise ValueError(f"dataset_revision must be a commit of 40 hexadecimal digits, found {dataset_revision!r}.")
    notes = f"accuracy in %, ECE {100 * report.metrics['ece']:.2f} %"
    entry = EvalResultEntry(
        dataset_id=source.hub_id,
        task_id=task_id,
        value=round(100 * report.metrics["accuracy"], 4),
        dataset_revision=dataset_revision,
        date=report.date,
        source_url=source_url,
        source_name=source_name,
        notes=notes if report.weights is None else f"{notes}{_OF_WEIGHTS}{report.weights}",
    )
    text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, width=1000)
    return f"{FOLDER}/{source.hub_id.replace('/', '__')}.yaml", text


def results_of_other_weights(files: Mapping[str, Path], weights: str | None) -> list[str]:
    """Return the paths of entries of this package that are of other weights than those of a hash.

    Args:
        files: Files of a checkpoint by their path in its folder.
        weights: `weights_hash` of the checkpoint.
    """
    found = {}
    for path, source in files.items():
        if path.startswith(f"{FOLDER}/"):
            found[path] = re.search(rf"{_OF_WEIGHTS}([0-9a-f]{{32}})", source.read_text(encoding="utf-8"))
    return [path for path, match in found.items() if match is not None and match[1] != weights]
