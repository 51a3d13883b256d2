"""One run from arguments to a report, and several of them side by side."""

from collections.abc import Sequence
from pathlib import Path

from transformers import HfArgumentParser, set_seed
from transformers.utils import logging

from hf_adafocal.data.loading import HUB_IDS
from hf_adafocal.data.overlap import drop_overlap
from hf_adafocal.losses.registry import LOSSES
from hf_adafocal.report.comparison import verdict
from hf_adafocal.report.files import add_baselines, pictures, read_report, save_report, write_atomically
from hf_adafocal.report.schema import Report, build_report
from hf_adafocal.report.tables import comparison_table
from hf_adafocal.report.weights import weights_hash
from hf_adafocal.runs.tasks import Task
from hf_adafocal.scaling.folding import recorded_scaling
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


def finetune(task: Task, args: AdaFocalTrainingArguments) -> Report:
    """Train, report on the test split, and save everything in `args.output_dir`.

    The folder then holds the checkpoint, `report.json`, a card, `reliability.png` and, if gamma moved, `gamma.png`.

    Returns:
        The report, on every process.

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
    out = None if splits.ood is None else trainer.predict(splits.ood, metric_key_prefix="ood").predictions
    trainer.save_model()
    trainer.save_state()
    report = build_report(
        test[:2],
        calibration[:2],
        model=trainer.model,
        num_bins=args.num_bins,
        folded=recorded_scaling(trainer.model),
        weights=weights_hash(args.output_dir),
        trained_on=HUB_IDS.get(task.dataset, task.dataset),
        evaluated_on=HUB_IDS.get(task.dataset, task.dataset),
        loss={"name": args.loss, **args.loss_settings},
        adaptation=history,
        splits={
            role: {"size": len(part), "hash": getattr(check.fingerprints[role], "hash", None)}
            for role, part in (("train", train), ("calibration", splits.calibration), ("test", splits.test))
        },
        held_out={"adaptation": "calibration", "scaling": "calibration"},
        overlap={"policy": args.split_overlap, "rows": check.overlap},
        ood=None if out is None else (task.ood, out),
        seed=args.seed,
        training={
            "epochs": args.num_train_epochs,
            "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "learning_rate": args.learning_rate,
            "runtime_seconds": outcome.metrics["train_runtime"],
        },
    )
    if trainer.is_world_process_zero():
        save_report(args.output_dir, report)
    return report


def compare(
    task_class: type[Task],
    arguments: Sequence[str],
    losses: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    reuse: bool = False,
) -> dict[str, list[Report]]:
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
    reports: dict[str, list[Report]] = {loss: [] for loss in losses}
    for seed in seeds:
        for loss in losses:
            name, _, rule = loss.partition(":")
            output = folders[loss][seed]
            flags = ["--loss", name, "--seed", str(seed), "--output_dir", str(output)]
            task, args = parse_arguments(task_class, [*arguments, *flags])
            finished = read_report(output) if reuse else None
            if finished is not None:
                logger.warning(f"Reusing the report of {output}")
                reports[loss].append(finished)
            else:
                reports[loss].append(finetune(task, args))
    if args.process_index == 0:
        add_baselines({loss: list(by_seed.values()) for loss, by_seed in folders.items()})
        tests = {loss: [report.to_dict()["test"] for report in runs] for loss, runs in reports.items()}
        texts = filter(None, (comparison_table(tests), verdict(tests)))
        write_atomically(folder / "comparison.md", "\n\n".join(texts) + "\n")
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
