"""Entries of `.eval_results/`, by which the Hub shows a result on the leaderboard of a registered benchmark."""

import re
from pathlib import Path

import yaml

from hf_adafocal.report.atomic import write_atomically
from hf_adafocal.report.schema import Report

FOLDER = ".eval_results"


def write_eval_results(
    folder: str | Path,
    report: Report,
    task_id: str,
    *,
    dataset_revision: str | None = None,
    source_url: str | None = None,
    source_name: str | None = None,
) -> Path:
    """Write the accuracy of a report as a result on a benchmark, with date, revision and source.

    The benchmark's own `eval.yaml` says which tasks it has.

    Args:
        folder: Of the checkpoint.
        report: Measured on a data set of the Hub.
        task_id: Task of the benchmark.
        dataset_revision: Commit of the data set, 40 hexadecimal digits.
        source_url: Where the evaluation can be looked up.
        source_name: What that place is called; needs `source_url`.

    Returns:
        Path of the file, `.eval_results/<owner>__<data set>.yaml`.

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
    entry = EvalResultEntry(
        dataset_id=source.hub_id,
        task_id=task_id,
        value=round(100 * report.metrics["accuracy"], 4),
        dataset_revision=dataset_revision,
        date=report.date,
        source_url=source_url,
        source_name=source_name,
        notes=f"accuracy in %, ECE {100 * report.metrics['ece']:.2f} %",
    )
    path = Path(folder) / FOLDER / f"{source.hub_id.replace('/', '__')}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))
    return path
