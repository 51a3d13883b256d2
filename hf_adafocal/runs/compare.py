"""Fine-tune with several losses and seeds, and compare the results in a table, a summary in words and a picture."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_adafocal.losses.registry import LOSSES
from hf_adafocal.report.atomic import write_atomically
from hf_adafocal.report.comparison import verdict
from hf_adafocal.report.files import add_baselines, pictures, read_report
from hf_adafocal.report.schema import RAW, SCALED, Report
from hf_adafocal.report.tables import COLUMNS as MAIN_COLUMNS
from hf_adafocal.report.tables import Column, comparison_table
from hf_adafocal.runs.arguments import parse_arguments, settings_by_loss
from hf_adafocal.runs.dense import COLUMNS as DENSE_COLUMNS
from hf_adafocal.runs.dense import difference_table
from hf_adafocal.runs.finetune import finetune, split_hashes
from hf_adafocal.runs.run_record import RunRecord, read_record
from hf_adafocal.runs.tasks import SegmentationTask, Task
from hf_adafocal.training.arguments import AdaFocalTrainingArguments

logger = logging.get_logger(__name__)

OWN_ARGUMENTS = ("--loss", "--seed", "--output_dir")  # that a comparison sets for each run


def compare(
    task_class: type[Task],
    arguments: Sequence[str],
    losses: Sequence[str],
    seeds: Sequence[int],
    folder: str | Path,
    reuse: bool = False,
) -> dict[str, list[Report]]:
    """Fine-tune once per loss and seed; save `comparison.md` (table and summary) and `comparison.png`.

    Reports compare the scores as trained, before a temperature was folded, whatever `calibrate_at_end` says.

    Args:
        task_class: The kind of task.
        arguments: Command line of every run, as for the training commands. Settings of one loss (`--focal_gamma`) go
            to the losses that use them.
        losses: Names in `LOSSES`, each once.
        seeds: Seeds of split, initial weights and order, each once; runs of one seed differ in the loss alone.
        folder: Holds a folder per run, `<loss>-<seed>`.
        reuse: Keep finished runs that were trained with the same arguments; others are trained again.

    Returns:
        For each loss its reports, one per seed.

    Raises:
        ValueError: If a loss is unknown, a loss or seed is named twice, or an argument is wrong: before anything is
            trained.
    """
    folder = Path(folder)
    _check_names(losses, seeds, arguments)
    lines = settings_by_loss(arguments, losses)
    runs: dict[tuple[str, int], tuple[Task, AdaFocalTrainingArguments]] = {}
    for seed in seeds:
        for loss in losses:
            own = ["--loss", loss, "--seed", str(seed), "--output_dir", str(folder / f"{loss}-{seed}")]
            runs[loss, seed] = parse_arguments(task_class, [*lines[loss], *own])
    reports: dict[str, list[Report]] = {loss: [] for loss in losses}
    contents: dict[int, dict[str, str]] = {}  # of the splits, by seed
    for (loss, _), (task, args) in runs.items():
        finished = _finished(task, args, contents) if reuse else None
        reports[loss].append(finetune(task, args) if finished is None else finished)
    if next(iter(runs.values()))[1].process_index == 0:
        tests = {loss: [report.to_dict()["test"] for report in found] for loss, found in reports.items()}
        folders = {loss: [folder / f"{loss}-{seed}" for seed in seeds] for loss in losses}
        add_baselines(folders)
        columns: list[Column] = list(MAIN_COLUMNS)
        texts = [verdict(tests)]
        if issubclass(task_class, SegmentationTask):
            rows = [run[kind] for runs_of_loss in tests.values() for run in runs_of_loss for kind in (RAW, SCALED)]
            columns += [column for column in DENSE_COLUMNS if all(column.key in row for row in rows)]
            texts.append(difference_table(folders))
        texts = list(filter(None, (comparison_table(tests, columns), *texts)))
        write_atomically(folder / "comparison.md", "\n\n".join(texts) + "\n")
        _draw(folder, tests)
    return reports


def _check_names(losses: Sequence[str], seeds: Sequence[int], arguments: Sequence[str]) -> None:
    """Reject unknown, missing or repeated losses and seeds, and arguments that a comparison sets itself."""
    unknown = sorted(set(losses) - set(LOSSES))
    if unknown:
        raise ValueError(f"losses must be among {', '.join(LOSSES)}; found {', '.join(unknown)}.")
    for name, given in (("loss", losses), ("seed", seeds)):
        if not given:
            raise ValueError(f"A comparison needs at least one {name}.")
        twice = [str(value) for value, count in Counter(given).items() if count > 1]
        if twice:
            raise ValueError(f"Each {name} counts once, found {', '.join(twice)} more than once.")
    for word in arguments:
        name = word.partition("=")[0].replace("-", "_").replace("__", "--", 1)
        if name in OWN_ARGUMENTS:
            raise ValueError(f"A comparison sets {name} for each run itself: use --losses, --seeds and --folder.")
        if name in (
            "--push_to_hub",
            "--hub_model_id",
        ):  # each run would replace the one before, and lack its baselines
            raise ValueError(f"A comparison pushes none of its runs, found {name}: push one with `hf-adafocal push`.")


def _finished(task: Task, args: AdaFocalTrainingArguments, contents: dict[int, dict[str, str]]) -> Report | None:
    """Return the report of a finished run with the same arguments and data; None, with the reason in the log, else."""
    folder = Path(args.output_dir or ".")
    record, report = read_record(folder), read_report(folder)
    if record is None or report is None:
        if folder.exists():
            logger.warning(f"{folder} holds no finished run, so it is trained again.")
        return None
    differences = record.differences(RunRecord.of(task, args))
    if not differences:
        if args.seed not in contents:
            contents[args.seed] = split_hashes(task, args)
        saved = {role: part.get("hash") for role, part in report.splits.items()}
        differences = [
            f"other rows in {role}" for role, now in contents[args.seed].items() if saved.get(role) not in (None, now)
        ]
    if differences:
        logger.warning(f"{folder} was trained otherwise, so it is trained again: {', '.join(differences)}.")
        return None
    logger.warning(f"Reusing {folder}")
    return report


def _draw(folder: Path, tests: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    plots = pictures()
    if plots is None:
        return
    titles = {"raw": "as trained", "temperature_scaled": "temperature scaled"}
    errors = {
        loss: {title: [100 * run[name]["ece"] for run in runs] for name, title in titles.items()}
        for loss, runs in tests.items()
    }
    picture = io.BytesIO()
    plots.comparison_chart(errors).savefig(picture, format="png")
    write_atomically(folder / "comparison.png", picture.getvalue())
