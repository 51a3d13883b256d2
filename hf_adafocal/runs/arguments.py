"""Command-line arguments of training runs: parsing, `--help`, and which settings belong to which loss."""

import argparse
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_adafocal.runs.tasks import Task
from hf_adafocal.training.arguments import (
    BATCH_LOSSES,
    LOSS_ARGUMENTS,
    STEERING_ARGUMENTS,
    AdaFocalTrainingArguments,
    per_sample_part,
)

AnyTask = TypeVar("AnyTask", bound=Task)

EPILOG = (
    "All arguments of transformers.TrainingArguments are accepted too (--num_train_epochs, --learning_rate, "
    "--output_dir, ...): https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
)
# Arguments of tasks that change nothing where a checkpoint is evaluated, whose processor is its own.
TRAINING_ONLY = {"model_name_or_path", "max_train_samples", "vocab_size"}
TRAINING_ONLY |= {"architecture", "model_args", "image_size", "random_shift", "horizontal_flip"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show one spelling of each argument, and its default unless it is None or the help text names it."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0 or not action.option_strings:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {self._format_args(action, 'VALUE')}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, argparse.SUPPRESS) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def parse_arguments(
    task_class: type[AnyTask],
    arguments: Sequence[str] | None = None,
    prog: str | None = None,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> tuple[AnyTask, AdaFocalTrainingArguments]:
    """Read a task and its training arguments from a command line; the task's own defaults go before the general ones.

    Args:
        task_class: The kind of task.
        arguments: The command line; that of the process if left out.
        prog: Name of the program, for `--help`.
        parents: Parsers of further arguments, which are accepted and shown by `--help`.

    Raises:
        ValueError: If an argument is unknown or out of range.

    >>> from hf_adafocal.runs.tasks import ImageTask
    >>> task, args = parse_arguments(ImageTask, ["--loss", "focal", "--use_cpu", "true"])
    >>> task.dataset, args.loss, args.num_train_epochs
    ('digits', 'focal', 100)
    """
    arguments = list(arguments) if arguments is not None else None
    first = HfArgumentParser(cast(Any, task_class), add_help=False, allow_abbrev=False)
    task, *_ = first.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    parser = training_parser(task_class, prog, parents)
    # Pinned memory speeds copies to an accelerator up; without one torch warns at every start.
    parser.set_defaults(dataloader_pin_memory=torch.accelerator.is_available(), **cast(Task, task).training_defaults)
    return cast(Any, parser.parse_args_into_dataclasses(arguments)[:2])


def training_parser(
    task_class: type[Task], prog: str | None = None, parents: Sequence[argparse.ArgumentParser] = ()
) -> HfArgumentParser:
    """Build the parser of a training command, whose `--help` shows this package's arguments alone."""
    parser = HfArgumentParser(
        cast(Any, (task_class, AdaFocalTrainingArguments)),
        prog=prog,
        usage="%(prog)s [--argument value ...]",
        description=_first_line(task_class),
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        parents=list(parents),
    )
    own = own_names(AdaFocalTrainingArguments, TrainingArguments)
    for action in parser._actions:
        if action.dest in own_names(TrainingArguments):
            action.help = argparse.SUPPRESS
    _group(parser, "data and model", own_names(task_class))
    _group(parser, "loss and calibration", own)
    return parser


def task_parser(task_class: type[Task], prog: str | None = None, **defaults: Any) -> HfArgumentParser:
    """Build the parser of a task's own arguments.

    Args:
        task_class: The kind of task.
        prog: Name of the program, for `--help`.
        **defaults: Values to take where the command line has none.
    """
    parser = HfArgumentParser(
        cast(Any, task_class),
        prog=prog,
        usage="%(prog)s [--argument value ...]",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(**defaults)
    return parser


def data_help(tasks: Mapping[str, type[Task]], *, hidden: Collection[str] = ()) -> str:
    """Return the help text of the tasks' own arguments: those that all share, then those of each kind.

    Args:
        tasks: Kinds of tasks, by name.
        hidden: Arguments to leave out.
    """
    shared = own_names(Task) - {"dataset"}  # of which each kind has its own default
    parts = []
    for title, task_class, names in [
        ("data arguments", next(iter(tasks.values())), shared),
        *((f"of {kind} alone", task, own_names(task) - shared) for kind, task in tasks.items()),
    ]:
        parser = task_parser(task_class)
        formatter = HelpFormatter("", max_help_position=28)
        formatter.start_section(title)
        formatter.add_arguments([action for action in parser._actions if action.dest in names.difference(hidden)])
        formatter.end_section()
        parts.append(formatter.format_help())
    return "\n".join(parts)


def loss_help() -> str:
    """Return the help text of the arguments of loss and calibration, and where the others are described."""
    parser = HfArgumentParser(cast(Any, AdaFocalTrainingArguments), formatter_class=HelpFormatter)
    own = own_names(AdaFocalTrainingArguments, TrainingArguments)
    formatter = HelpFormatter("", max_help_position=28)
    formatter.start_section("loss and calibration")
    formatter.add_arguments([action for action in parser._actions if action.dest in own])
    formatter.end_section()
    formatter.add_text(EPILOG)
    return formatter.format_help()


def own_names(dataclass: type, base: type | None = None) -> set[str]:
    """Return the fields of a dataclass that its base does not have."""
    names = {field.name for field in dataclasses.fields(dataclass)}
    return names if base is None else names - own_names(base)


def settings_by_loss(arguments: Sequence[str], losses: Iterable[str]) -> dict[str, list[str]]:
    """Give each loss the part of a command line that it uses, so that one command line serves several losses.

    Args:
        arguments: A command line, in which settings of a loss may stand (`--focal_gamma 2`).
        losses: Names of losses.

    Returns:
        For each loss the command line without the settings of other losses.

    Raises:
        ValueError: If none of the losses uses a setting.

    >>> settings_by_loss(["--seed", "1", "--focal_gamma", "2"], ["cross_entropy", "focal"])
    {'cross_entropy': ['--seed', '1'], 'focal': ['--seed', '1', '--focal_gamma', '2']}
    """
    users = {name: set(argument.losses) for name, argument in LOSS_ARGUMENTS.items()}
    users |= dict.fromkeys(STEERING_ARGUMENTS, {"adaptive_label_smoothing"})
    users |= dict.fromkeys(("auxiliary_weight", "auxiliary_base"), set(BATCH_LOSSES))
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in users:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", default=None)
    given, rest = parser.parse_known_args(list(arguments))
    settings = {name: value for name, value in vars(given).items() if value is not None}
    used = {loss: {loss, per_sample_part(loss, settings.get("auxiliary_base"))} for loss in losses}
    unused = [name for name in settings if not any(users[name] & names for names in used.values())]
    if unused:
        raise ValueError(
            f"--{unused[0]} is a setting of {' or '.join(sorted(users[unused[0]]))}, and none of the losses "
            f"{', '.join(used)} uses it. Leave it out, or add such a loss."
        )
    return {
        loss: [*rest, *(word for name in settings if users[name] & names for word in (f"--{name}", settings[name]))]
        for loss, names in used.items()
    }


def _group(parser: argparse.ArgumentParser, title: str, names: set[str]) -> None:
    """Show the arguments of these names under a title of their own."""
    group = parser.add_argument_group(title)
    for action in list(parser._optionals._group_actions):
        if action.dest in names:
            parser._optionals._group_actions.remove(action)
            group._group_actions.append(action)


def _first_line(documented: type) -> str:
    return (documented.__doc__ or "").strip().splitlines()[0]
