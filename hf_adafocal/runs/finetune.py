"""Fine-tune a model on a task, and write checkpoint, report, pictures and card into one folder."""

import argparse
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import set_seed

from hf_adafocal.data.loading import BUILT_IN, HUB_IDS, LANGUAGES
from hf_adafocal.data.overlap import SplitCheck, drop_overlap
from hf_adafocal.losses.registry import LOSSES
from hf_adafocal.report.comparison import results_in_words
from hf_adafocal.report.files import baseline_rows, save_report
from hf_adafocal.report.schema import Report
from hf_adafocal.report.tables import results_table
from hf_adafocal.report.weights import weights_hash
from hf_adafocal.runs import run_record
from hf_adafocal.runs.arguments import parse_arguments, settings_by_loss
from hf_adafocal.runs.dense import add_dense_metrics, dense_table, difference_table
from hf_adafocal.runs.examples import make_examples
from hf_adafocal.runs.tasks import Prepared, SegmentationTask, Task
from hf_adafocal.scaling.folding import load_classifier
from hf_adafocal.training.arguments import AdaFocalTrainingArguments
from hf_adafocal.training.processes import end_process_group
from hf_adafocal.training.trainer import AdaFocalTrainer


def train(task_class: type[Task], arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Fine-tune as a command line says, and print the results next to those of a baseline.

    The baseline is trained first, with the same arguments but the loss, into a folder beside the run's.

    Args:
        task_class: The kind of task.
        arguments: The command line; that of the process if left out. `--baseline` names the loss of the baseline.
        prog: Name of the program, for `--help`.

    Raises:
        ValueError: If an argument is unknown or out of range: before anything is trained.
        OSError: If the data or the checkpoint cannot be had.
        SystemExit: In place of these two where the command line is that of the process, with their message.
    """
    try:
        _train(task_class, arguments, prog)
    except (ValueError, OSError) as error:
        if arguments is not None:
            raise
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from error


def _train(task_class: type[Task], arguments: Sequence[str] | None, prog: str | None) -> None:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument(
        "--baseline",
        choices=("none", *LOSSES),
        metavar="LOSS",
        help="Train with this loss first, under the same arguments, for the printed table and the card; none for no "
        "baseline (default: cross_entropy on the built-in digits, none elsewhere).",
    )
    options, line = own.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--loss", default="adafocal")
    chosen.add_argument("--dataset", default=inspect.signature(task_class).parameters["dataset"].default)
    run, _ = chosen.parse_known_args(line)
    baseline = options.baseline or ("cross_entropy" if run.dataset in BUILT_IN else "none")
    compared = baseline not in ("none", run.loss)
    lines = settings_by_loss(line, [run.loss, baseline]) if compared else {run.loss: line}
    task, args = parse_arguments(task_class, lines[run.loss], prog, [own])
    beside = None
    if compared:
        line = [*lines[baseline], "--loss", baseline, "--output_dir", f"{args.output_dir}-{baseline}"]
        line += ["--push_to_hub", "false", "--resume_from_checkpoint", "false"]
        beside = finetune(*parse_arguments(task_class, line, prog))
    report = finetune(task, args, baselines={} if beside is None else baseline_rows(beside, baseline))
    if args.process_index == 0:
        print(results_table(report, beside))
        if task_class is SegmentationTask:
            print(f"\n{dense_table(report)}")
            if compared:
                folders = {run.loss: [str(args.output_dir)], baseline: [f"{args.output_dir}-{baseline}"]}
                print(f"\n{difference_table(folders, baseline)}")
        print(f"\n{results_in_words(report, beside)}")
    end_process_group()


def finetune(
    task: Task, args: AdaFocalTrainingArguments, *, baselines: Mapping[str, Mapping[str, float]] | None = None
) -> Report:
    """Train on a task, measure the test split, and save everything in `args.output_dir`.

    The folder then holds the checkpoint, `report.json`, the model card, `reliability.png`, `gamma.png` if gamma moved,
    and `run_arguments.json` (which is never pushed). Training rows that stand in the calibration or test split are
    handled as `args.split_overlap` says.

    Args:
        task: The task.
        args: Training arguments, with `output_dir`.
        baselines: Metrics of other models on the same test split, by title, for the report.

    Returns:
        The report, on every process.

    Raises:
        ValueError: If the calibration and test split share rows by content, or train shares rows with them and
            `args.split_overlap` is "error".

    ```python
    from hf_adafocal.runs.arguments import parse_arguments
    from hf_adafocal.runs.tasks import ImageTask

    report = finetune(*parse_arguments(ImageTask, ["--output_dir", "runs/digits", "--num_train_epochs", "5"]))
    ```
    """
    folder = Path(args.output_dir or ".")
    prepared, train_split, check = _prepare(task, args)
    splits = prepared.splits
    if args.should_save:
        (folder / run_record.FILE).unlink(missing_ok=True)  # until it is finished, this run is nothing to be reused
    set_seed(args.seed)
    trainer = AdaFocalTrainer(
        prepared.model_init(),
        args,
        train_dataset=train_split,
        calibration_dataset=splits.calibration,
        processing_class=_saved_by_trainer(prepared.processing_class),
        data_collator=prepared.data_collator,
    )
    outcome = trainer.train(resume_from_checkpoint=_resume_from(args.resume_from_checkpoint))
    trainer.save_model(_internal_call=True)  # it is uploaded with its report, and once
    trainer.save_state()
    dataset = HUB_IDS.get(task.dataset, task.dataset)
    examples: tuple[dict[str, Any], ...] = ()
    if trainer.is_world_process_zero() and not hasattr(trainer.network, "peft_config"):  # a pipeline loads no adapter
        examples = make_examples(task, prepared, load_classifier(folder), folder)
    (examples,) = broadcast_object_list([examples])
    parts = {"train": train_split, "calibration": splits.calibration, "test": splits.test}
    report = trainer.write_report(
        splits.test,
        ood=None if splits.ood is None else (task.ood, splits.ood),
        weights=weights_hash(folder),
        baselines=baselines,
        trained_on=dataset,
        evaluated_on=dataset,
        language=LANGUAGES.get(task.dataset),
        examples=examples,
        splits={
            role: {"size": len(part), "hash": getattr(check.fingerprints[role], "hash", None)}
            for role, part in parts.items()
        },
        overlap={"policy": args.split_overlap, "rows": check.overlap, "dropped": check.dropped},
        training={"runtime_seconds": outcome.metrics["train_runtime"], "task": run_record.published(task)},
    )
    if isinstance(task, SegmentationTask) and trainer.is_world_process_zero():
        report, _ = add_dense_metrics(
            report,
            trainer.network,
            splits.test,
            prepared.data_collator,
            construction=args.topology_construction or "V",
            folder=folder,
        )
        save_report(folder, report)
    if trainer.is_world_process_zero():
        run_record.RunRecord.of(task, args).save(folder)
    if args.push_to_hub:
        trainer.push_to_hub()
    return report


def split_hashes(task: Task, args: AdaFocalTrainingArguments) -> dict[str, str]:
    """Return the content hash of each split that a run would use, by role; empty if they are not to be read."""
    _, _, check = _prepare(task, args)
    return {role: found.hash for role, found in check.fingerprints.items() if found is not None}


def _prepare(task: Task, args: AdaFocalTrainingArguments) -> tuple[Prepared, Any, SplitCheck]:
    """Load and encode the data; return it with the training split that shares no rows with the others."""
    with args.main_process_first(desc="reading the data"):
        prepared = task.prepare(args.seed)
    splits = prepared.splits
    train_split, check = drop_overlap(
        splits.train,
        {"calibration": splits.calibration, "test": splits.test},
        args.split_overlap,
        blank_tokens=getattr(prepared.processing_class, "all_special_ids", ()),
    )
    return prepared, train_split, check


def _saved_by_trainer(processor: Any) -> Any:
    """Return the tokenizer or image processor; None for a timm one, whose saving only warns (config.json holds it)."""
    return None if type(processor).__name__ == "TimmWrapperImageProcessor" else processor


def _resume_from(value: str | bool | None) -> str | bool | None:
    """Read a path, or the word true or false of a command line."""
    return {"true": True, "false": None}.get(str(value).lower(), value)
