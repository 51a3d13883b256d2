"""Record of a finished run's arguments in its folder, for later evaluation and for reuse of the run."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hf_adafocal.data.dense import VOLUMES
from hf_adafocal.data.loading import BUILT_IN, HUB_IDS
from hf_adafocal.report.atomic import write_atomically
from hf_adafocal.report.files import read_report
from hf_adafocal.report.schema import Report
from hf_adafocal.runs.arguments import own_names, task_parser
from hf_adafocal.runs.tasks import TASKS, Task
from hf_adafocal.training.arguments import AdaFocalTrainingArguments

FILE = "run_arguments.json"
# Not published with a report: paths of this machine, and what the report tells itself.
PRIVATE = ("dataset", "model_name_or_path", "ood")
# Arguments that change nothing in the result of a run.
WITHOUT_EFFECT = (
    *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "resume_from_checkpoint", "push_to_hub"),
    *("log_level", "log_level_replica", "log_on_each_node", "save_total_limit", "save_only_model"),
    *("logging_strategy", "logging_first_step", "logging_steps", "logging_nan_inf_filter"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("dataloader_persistent_workers", "eval_on_start", "do_train", "do_eval", "do_predict", "skip_memory_metrics"),
)


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The arguments of a run.

    Attributes:
        kind: Kind of task: "text", "vision" or "segmentation".
        task: Arguments of the task.
        training: Training arguments that can change a result; empty if unknown.
        seed: Seed of the run; None if unknown.
    """

    kind: str
    task: dict[str, Any]
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int | None = None

    @classmethod
    def of(cls, task: Task, args: AdaFocalTrainingArguments) -> "RunRecord":
        """Make the record of a run from its arguments."""
        kept = {name: value for name, value in args.to_dict().items() if not _is_without_effect(name)}
        # As they come back from a file: tuples are lists there, and so on.
        return cls(kind_of(task), dataclasses.asdict(task), json.loads(json.dumps(kept, default=str)), args.seed)

    def save(self, folder: str | Path) -> None:
        """Write the record into the folder of the finished run."""
        write_atomically(Path(folder) / FILE, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    def differences(self, asked: "RunRecord") -> list[str]:
        """List the arguments in which another run differs, as "name this -> other"."""
        found = [] if self.kind == asked.kind else [f"task {self.kind} -> {asked.kind}"]
        for ours, theirs in ((self.task, asked.task), (self.training, asked.training)):
            names = [*ours, *(name for name in theirs if name not in ours)]
            found += [
                f"{name} {ours.get(name)} -> {theirs.get(name)}"
                for name in names
                if ours.get(name) != theirs.get(name)
            ]
        return found


def kind_of(task: Task) -> str:
    """Return the name of a task's kind in `TASKS`."""
    return next(kind for kind, task_class in TASKS.items() if isinstance(task, task_class))


def published(task: Task) -> dict[str, Any]:
    """Return the arguments of a task for its report, without local paths."""
    arguments = {name: value for name, value in dataclasses.asdict(task).items() if name not in PRIVATE}
    return {"kind": kind_of(task), **{name: value for name, value in arguments.items() if value is not None}}


def read_record(folder: str | Path) -> RunRecord | None:
    """Read the arguments of a finished run; None if the folder holds none, as when the run is unfinished.

    Raises:
        ValueError: If the file is not a record.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        record = RunRecord(**document)
        if (
            record.kind not in TASKS
            or not isinstance(record.task, Mapping)
            or not isinstance(record.training, Mapping)
        ):
            raise ValueError("it is not the record of a run")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return record


def record_or_report(checkpoint: str | Path) -> RunRecord | None:
    """Return what is known of the run behind a checkpoint: from its record, else from its report.

    A report names no local path, so a data set in a local folder is not known from it.

    Raises:
        ValueError: If the file is damaged.
    """
    record = read_record(checkpoint)
    if record is not None:
        return record
    report = read_report(checkpoint)
    if report is None:
        return None
    task = dict(report.training.get("task", {}))
    kind = task.pop("kind", None)
    if kind not in TASKS:
        return None
    dataset = _dataset_of(report)
    return RunRecord(kind, {**task, **({"dataset": dataset} if dataset else {})}, seed=report.seed)


def task_of_checkpoint(
    kind: str, checkpoint: str, arguments: Sequence[str] = (), prog: str | None = None
) -> tuple[Task, int]:
    """Build the task to evaluate a checkpoint on: arguments of the command line first, then those of its run.

    Args:
        kind: Kind of task: "text", "vision" or "segmentation".
        checkpoint: A local folder or a Hub id.
        arguments: Command line of the task's own arguments.
        prog: Name of the program, for `--help`.

    Returns:
        The task, and the seed of its splits: that of the run, or 0.

    Raises:
        ValueError: If the run was of another kind, or its data set is not known and not given.
    """
    record = record_or_report(checkpoint)
    if record is not None and record.kind != kind:
        raise ValueError(f"{checkpoint} is of the kind {record.kind}, not {kind}.")
    recorded = {} if record is None else record.task
    known = {name: value for name, value in recorded.items() if name in own_names(TASKS[kind])}
    parser = task_parser(TASKS[kind], prog, **known)
    given = {word.partition("=")[0] for word in arguments}
    if "dataset" not in known and not given & {"--dataset", "-h", "--help"}:
        reason = (
            f"{checkpoint} holds no record of a run of hf-adafocal"
            if record is None
            else f"The report of {checkpoint} does not say where its data set is, since it was a local folder"
        )
        raise ValueError(f"{reason}: name the data set with --dataset.")
    task, *_ = parser.parse_args_into_dataclasses([*arguments, "--model_name_or_path", checkpoint])
    return cast(Task, task), 0 if record is None or record.seed is None else record.seed


def _dataset_of(report: Report) -> str | None:
    source = report.trained_on or report.evaluated_on
    if source is None:
        return None
    if source.hub_id is not None:
        return source.hub_id
    return source.name if source.name in (*BUILT_IN, *HUB_IDS, VOLUMES) else None


def _is_without_effect(name: str) -> bool:
    return name in WITHOUT_EFFECT or name.startswith(("hub_", "trackio_", "push_"))
