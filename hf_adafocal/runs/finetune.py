"""Fine-tune a model on a task, and write checkpoint, report, pictures and card into one folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import set_seed

from hf_adafocal.data.loading import HUB_IDS, LANGUAGES
from hf_adafocal.data.overlap import SplitCheck, drop_overlap
from hf_adafocal.report.schema import Report
from hf_adafocal.report.tables import report_table
from hf_adafocal.report.weights import weights_hash
from hf_adafocal.runs import run_record
from hf_adafocal.runs.arguments import parse_arguments
from hf_adafocal.runs.examples import make_examples
from hf_adafocal.runs.tasks import Prepared, Task
from hf_adafocal.scaling.folding import load_classifier
from hf_adafocal.training.arguments import AdaFocalTrainingArguments
from hf_adafocal.training.trainer import AdaFocalTrainer


def train(task_class: type[Task], arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Fine-tune as a command line says and print the table of the report.

    Args:
        task_class: The kind of task.
        arguments: The command line; that of the process if left out.
        prog: Name of the program, for `--help`.
    """
    task, args = parse_arguments(task_class, arguments, prog)
    report = finetune(task, args)
    if args.process_index == 0:
        print(report_table(report))
    PartialState().destroy_process_group()


def finetune(task: Task, args: AdaFocalTrainingArguments) -> Report:
    """Train on a task, measure the test split, and save everything in `args.output_dir`.

    The folder then holds the checkpoint, `report.json`, the model card, `reliability.png`, `gamma.png` if gamma moved,
    and `run_arguments.json` (which is never pushed). Training rows that stand in the calibration or test split are
    handled as `args.split_overlap` says.

    Args:
        task: The task.
        args: Training arguments, with `output_dir`.

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
        processing_class=prepared.processing_class,
        data_collator=prepared.data_collator,
    )
    outcome = trainer.train(resume_from_checkpoint=_resume_from(args.resume_from_checkpoint))
    trainer.save_model(_internal_call=True)  # it is uploaded with its report, and once
    trainer.save_state()
    dataset = HUB_IDS.get(task.dataset, task.dataset)
    (examples,) = broadcast_object_list(
        [make_examples(task, prepared, load_classifier(folder), folder) if trainer.is_world_process_zero() else ()]
    )
    parts = {"train": train_split, "calibration": splits.calibration, "test": splits.test}
    report = trainer.write_report(
        splits.test,
        ood=None if splits.ood is None else (task.ood, splits.ood),
        weights=weights_hash(folder),
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


def _resume_from(value: str | bool | None) -> str | bool | None:
    """Read a path, or the word true or false of a command line."""
    return {"true": True, "false": None}.get(str(value).lower(), value)
