"""One run from arguments to a report, and several of them side by side."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, set_seed
from transformers.utils import logging

from hf_adafocal.data.loading import HUB_IDS
from hf_adafocal.data.overlap import drop_overlap
from hf_adafocal.losses.registry import LOSSES
from hf_adafocal.metrics.ood import ood_report
from hf_adafocal.report.comparison import verdict
from hf_adafocal.report.files import add_baselines, pictures, save_report, versions
from hf_adafocal.report.tables import comparison_table, split_report
from hf_adafocal.runs.tasks import Task
from hf_adafocal.scaling.fit import Scaling
from hf_adafocal.training.arguments import AdaFocalTrainingArguments
from hf_adafocal.training.trainer import AdaFocalTrainer

logger = logging.get_logger(__name__)


def parse_arguments(
    task_class: type[Task], arguments: Sequence[str] | None = None
) -> tuple[Task, AdaFocalTrainingArguments]:
    """Read a task and its training arguments from a command line.

    Args:
        task_class: The kind of task.
        arguments: The command line; that of the process if left out.
    """
    arguments = list(arguments) if arguments is not None else None
    task, _ = HfArgumentParser(task_class, add_help=False).parse_args_into_dataclasses(
        arguments, return_remaining_strings=True
    )
    parser = HfArgumentParser((task_class, AdaFocalTrainingArguments))
    parser.set_defaults(**task.training_defaults)
    return parser.parse_args_into_dataclasses(arguments)


def finetune(task: Task, args: AdaFocalTrainingArguments) -> dict[str, Any]:
    """Train, report on the test split, and save everything in `args.output_dir`.

    The folder then holds the checkpoint, `report.json`, a card, `reliability.png` and, if gamma moved, `gamma.png`.

    Returns:
        The report: `test` (see `evaluation.split_report`), `ood` if the task has such inputs (`dataset`, and two
        `ood.ood_report`s, `raw` and `temperature_scaled`), `loss`, `gamma` and `smoothing` (after each update),
        `splits` (size and hash of each), `held_out` (which of them gamma, the scaling and the report saw), `overlap`
        (the policy, and how many rows splits share), `seed`, `training`, `versions`.

    Raises:
        ValueError: If train, calibration and test share rows by content and `args.split_overlap` is "error".
    """
    with args.main_process_first(desc="reading the data"):
        prepared = task.prepare(args.seed)
    splits = prepared.splits
    train, check = drop_overlap(
        splits.train,
        {"calibration": splits.calibration, "test": splits.test},
        args.split_overlap,
        blank_tokens=getattr(prepared.processing_class, "all_special_ids", ()),
    )
    set_seed(args.seed)
    trainer = AdaFocalTrainer(
        prepared.model_init(),
        args,
        train_dataset=train,
        calibration_dataset=splits.calibration,
        processing_class=prepared.processing_class,
        data_collator=prepared.data_collator,
    )
    outcome = trainer.train(resume_from_checkpoint=_resume_from(args.resume_from_checkpoint))
    calibration = trainer.predict(splits.calibration, metric_key_prefix="calibration")
    test = trainer.predict(splits.test, metric_key_prefix="test")

    history = [] if trainer.adaptive_callback is None else trainer.adaptive_callback.history
    report = {
        "test": split_report(test[:2], calibration[:2], args.num_bins),
        "loss": {
            "name": args.loss,
            **args.loss_settings,
        },
        "gamma": [update for update in history if "gammas" in update],
        "smoothing": [update for update in history if "smoothing" in update],
        "splits": {
            role: {"size": len(part), "hash": getattr(check.fingerprints[role], "hash", None)}
            for role, part in (("train", train), ("calibration", splits.calibration), ("test", splits.test))
        },
        "held_out": {"gamma": "calibration", "scaling": "calibration", "report": "test"},
        "overlap": {"policy": args.split_overlap, "rows": check.overlap},
        "seed": args.seed,
        "training": {
            "dataset": HUB_IDS.get(task.dataset, task.dataset),
            "model": type(trainer.model).__name__,
            "epochs": args.num_train_epochs,
            "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "learning_rate": args.learning_rate,
            "runtime_seconds": outcome.metrics["train_runtime"],
        },
        "versions": versions(),
    }
    if splits.ood is not None:
        out = trainer.predict(splits.ood, metric_key_prefix="ood").predictions
        scaling = Scaling.from_dict(report["test"]["scaling"])
        report["ood"] = {
            "dataset": task.ood,
            "raw": ood_report(test.predictions, out),
            "temperature_scaled": ood_report(*map(scaling.apply, (test.predictions, out))),
        }
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        save_report(args.output_dir, report, test[:2])
    return report


def compare(
    task_class: type[Task],
    arguments: Sequence[str],
    losses: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    reuse: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """Fine-tune once for each loss and seed; save `comparison.md` (table, verdict) and `comparison.png` in `folder`.

    Args:
        task_class: The kind of task.
        arguments: Command line of every run, as for the training scripts.
        losses: Names in `LOSSES`; "adafocal:paper" and "adafocal:temperature" name the update rule too.
        seeds: Seeds of split, initial weights and order; runs of one seed differ in the loss alone.
        folder: Holds one folder a run, `<loss>-<seed>`.
        reuse: Take the `report.json` of a run that is there instead of repeating it.

    Returns:
        For each loss the reports of `finetune`, one a seed.

    Raises:
        ValueError: If a loss is unknown, before anything is trained.
    """
    unknown = {loss.partition(":")[0] for loss in losses} - set(LOSSES)
    if unknown:
        raise ValueError(f"losses must be among {', '.join(LOSSES)}; found {', '.join(sorted(unknown))}.")
    folders = {loss: {seed: folder / f"{loss.replace(':', '-')}-{seed}" for seed in seeds} for loss in losses}
    reports: dict[str, list[dict[str, Any]]] = {loss: [] for loss in losses}
    for seed in seeds:
        for loss in losses:
            name, _, rule = loss.partition(":")
            output = folders[loss][seed]
            finished = output / "report.json"
            flags = ["--loss", name, "--seed", str(seed), "--output_dir", str(output)]
            task, args = parse_arguments(task_class, [*arguments, *flags])
            if reuse and finished.exists():
                logger.warning(f"Reusing {finished}")
                reports[loss].append(json.loads(finished.read_text()))
            else:
                reports[loss].append(finetune(task, args))
    if args.process_index == 0:
        add_baselines({loss: list(by_seed.values()) for loss, by_seed in folders.items()})
        tests = {loss: [report["test"] for report in runs] for loss, runs in reports.items()}
        texts = filter(None, (comparison_table(tests), verdict(tests)))
        (folder / "comparison.md").write_text("\n\n".join(texts) + "\n")
        _draw_comparison(folder, tests)
    return reports


def _resume_from(value: str | None) -> str | bool | None:
    """A path, or the word true or false of a command line."""
    return {"true": True, "false": None}.get(str(value).lower(), value)


def _draw_comparison(folder: Path, tests: dict[str, list[dict]]) -> None:
    plots = pictures()
    if plots is None:
        return
    errors = {
        loss: {
            title: [100 * run[name]["ece"] for run in runs]
            for name, title in (("raw", "as trained"), ("temperature_scaled", "temperature scaled"))
        }
        for loss, runs in tests.items()
    }
    plots.comparison_chart(errors).savefig(folder / "comparison.png")
