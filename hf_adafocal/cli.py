"""The command `hf-adafocal`: train, compare, evaluate, scale, card, push, publish-metric, gate.

Exit codes: 0 done, 1 a gate is not passed, 2 it could not be done (one line says why).
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: The command line; that of the process if left out.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not options.passes_on:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return options.run(options, rest)
    except (ValueError, OSError) as error:
        return _failed(options.verb, error)
    except Exception as error:
        if type(error).__name__ == "PushError":  # of hub.client, which a gate need not import
            return _failed(options.verb, error)
        traceback.print_exc()  # a fault of this package; Python's own exit code 1 would mean "gate not passed"
        return 2


def _failed(verb: str, error: Exception) -> int:
    print(f"hf-adafocal {verb}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


class _Verb(argparse.ArgumentParser):
    """Parser of one command; `--help` also shows the arguments that it passes on."""

    passed_on: Callable[[], str] | None = None  # text that is costly to make

    def format_help(self) -> str:
        passed_on = "" if self.passed_on is None else self.passed_on()
        text, example, epilog = super().format_help().rpartition("example: ")
        return f"{text}{passed_on}\n{example}{epilog}"


class _Version(argparse.Action):
    """Print the version, read from the installed distribution only when asked for, and exit."""

    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import version

        print(f"hf-adafocal {version('hf-adafocal')}")
        parser.exit()


def _data_arguments() -> str:
    from hf_adafocal.runs.arguments import TRAINING_ONLY, data_help
    from hf_adafocal.runs.tasks import TASKS

    return data_help(TASKS, hidden=TRAINING_ONLY)


def _training_arguments() -> str:
    from hf_adafocal.runs.arguments import data_help, loss_help
    from hf_adafocal.runs.tasks import TASKS

    return f"{data_help(TASKS)}\n{loss_help()}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-adafocal", description="Calibrated fine-tuning for Hugging Face models.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=_Verb)

    def verb(name, run, summary, description, example, passed_on=None):
        added = verbs.add_parser(
            name, help=summary, allow_abbrev=False, description=description, epilog=f"example: {example}"
        )
        added.set_defaults(run=run, passes_on=passed_on is not None)
        added.passed_on = passed_on
        return added

    train = verb(
        "train", _train, "fine-tune a text, image or segmentation model and report its calibration",
        "Fine-tune a classifier with AdaFocal or another loss; write checkpoint, report, pictures and model card. The "
        "arguments below describe data, model and loss.",
        "hf-adafocal train text --dataset FOLDER --model_name_or_path distilbert/distilbert-base-uncased",
        passed_on=_training_arguments,
    )  # fmt: skip
    train.add_argument("task", choices=("text", "vision", "segmentation"))

    compare = verb(
        "compare", _compare, "fine-tune with several losses and seeds, print one table and a verdict",
        "Fine-tune with several losses and seeds; print one table and a verdict, draw one figure. All other arguments "
        "go to every run, as in `hf-adafocal train`; settings of one loss go to that loss.",
        "hf-adafocal compare vision --losses cross_entropy adafocal --seeds 0 1 2", passed_on=_training_arguments,
    )  # fmt: skip
    compare.add_argument("task", choices=("text", "vision", "segmentation"))
    compare.add_argument(
        "--losses",
        nargs="+",
        default=["cross_entropy", "focal", "flsd_53", "adafocal", "adaptive_label_smoothing"],
        help="names of losses, or all (default: cross_entropy focal flsd_53 adafocal adaptive_label_smoothing)",
    )
    compare.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds, one run each (default: 0 1 2)"
    )
    compare.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/compare"),
        help="output folder, a subfolder per run (default: runs/compare)",
    )
    compare.add_argument(
        "--reuse", action="store_true", help="keep finished runs that were trained with the same arguments and data"
    )

    evaluate = verb(
        "evaluate", _evaluate, "measure a checkpoint, trained with us or not: report.json, pictures, a table",
        "Measure the calibration of any local or Hub checkpoint on the test split of a data set, as it is and with a "
        "temperature fitted on the calibration split. Of a run of this package, data set, columns, length and seed "
        "are known; the arguments below describe other data.",
        "hf-adafocal evaluate text my/checkpoint --dataset 20_newsgroups", passed_on=_data_arguments,
    )  # fmt: skip
    evaluate.add_argument(
        "--output",
        type=Path,
        help="folder of the report (default: that of the run; runs/evaluate/NAME for other checkpoints)",
    )
    evaluate.add_argument(
        "--predictions",
        type=Path,
        help="also write the probabilities and labels of the test split, as `gate` reads them: .parquet or .npz",
    )
    scale = verb(
        "scale", _scale, "fit a temperature and fold it into the classifier head",
        "Fit a scaling on the calibration split, write a checkpoint with it folded in, and measure that. Any stock "
        "pipeline then gives calibrated scores.",
        "hf-adafocal scale vision runs/vision --output runs/vision-calibrated", passed_on=_data_arguments,
    )  # fmt: skip
    scale.add_argument("--output", type=Path, required=True, help="folder of the new checkpoint")
    scale.add_argument(
        "--method",
        choices=("temperature", "platt", "vector"),
        default="temperature",
        help="one temperature (default), a factor and an offset for two classes, or a factor and an offset per class",
    )
    for measured in (evaluate, scale):
        measured.add_argument("task", choices=("text", "vision", "segmentation"))
        measured.add_argument("checkpoint", help="checkpoint: a local folder or a Hub id")
        measured.add_argument("--seed", type=int, help="seed of the splits (default: that of the run, or 0)")
        measured.add_argument("--num-bins", type=int, default=15, help="bins of the metrics (default: 15)")
        measured.add_argument("--batch-size", type=int, default=64, help="batch size of the evaluation (default: 64)")
        measured.add_argument(
            "--split-overlap",
            choices=("error", "warn", "skip"),
            default="error",
            help="what to do if calibration and test split share rows: error (default), warn, skip",
        )

    card = verb(
        "card", _card, "write or renew the model card of a run folder from its report.json",
        "Write README.md from report.json. Only the block between the markers is replaced.",
        "hf-adafocal card runs/vision --repo-id me/digits --license apache-2.0",
    )  # fmt: skip
    card.add_argument("folder", type=Path)
    card.add_argument("--title", help="first heading of the card (default: as it is; of a new one the folder's name)")
    card.add_argument("--repo-id", help="Hub repository of the checkpoint, namespace/name")
    card.add_argument("--license", help="licence of the checkpoint, as the Hub spells it")
    card.add_argument("--language", help="language of the data, as the Hub codes it")
    card.add_argument("--base-model", help="Hub id of the checkpoint that was fine-tuned")
    card.add_argument("--datasets", nargs="+", help="Hub ids of the data")
    card.add_argument("--tags", nargs="+", help="further tags")
    card.add_argument("--benchmark-task", help="report the accuracy as a result of this task of a Hub benchmark")

    push = verb(
        "push", _push, "push a run folder to the Hub",
        "Push checkpoint, card, report and pictures in one commit; repeat it after any failure. The token comes from "
        "HF_TOKEN or `hf auth login`.",
        "hf-adafocal push runs/vision me/digits --private",
    )  # fmt: skip
    push.add_argument("folder", type=Path)
    push.add_argument("repo_id", help="Hub repository, namespace/name")
    push.add_argument("--private", action="store_true")
    push.add_argument("--revision", help="branch, created if it is missing")
    push.add_argument(
        "--include", nargs="+", default=(), metavar="PATTERN", help="push further files, such as '*.onnx', too"
    )
    push.add_argument("--license", help="licence of the checkpoint, as the Hub spells it (apache-2.0, cc-by-4.0, ...)")
    push.add_argument("--benchmark-task", help="report the accuracy as a result of this task of a Hub benchmark")
    push.add_argument(
        "--include-training-state", action="store_true", help="also push optimizer state and event files"
    )

    space = verb(
        "publish-metric", _publish_metric, "publish a metric as a Space, for evaluate.load",
        "Publish one of the package's metrics as a Space; `evaluate.load('NAMESPACE/NAME')` then works anywhere.",
        "hf-adafocal publish-metric ece me",
    )  # fmt: skip
    space.add_argument("name", help="metric: ece, ada_ece, ...")
    space.add_argument("namespace", help="user or organisation")
    space.add_argument(
        "--sdk", choices=("gradio", "static"), default="gradio", help="kind of Space; static has no input widget"
    )
    space.add_argument("--private", action="store_true")

    gate = verb(
        "gate", _gate, "check predictions against a limit on ECE",
        "Print ECE and its confidence interval. Exit code 0: the upper end is within the limit; 1: it is above; 2: "
        "the predictions cannot be used.",
        "hf-adafocal gate --max-ece 0.03 --confidence 0.95 predictions.parquet",
    )  # fmt: skip
    gate.add_argument("predictions", type=Path, help="a .parquet, .csv, .tsv, .jsonl, .npz or .npy file")
    gate.add_argument("--max-ece", type=float, required=True, help="largest ECE that passes, a fraction in [0, 1]")
    gate.add_argument("--confidence", type=float, default=0.95, help="level of the two-sided interval (default 0.95)")
    gate.add_argument("--num-bins", type=int, default=15, help="bins of equal width (default 15)")
    columns = gate.add_mutually_exclusive_group()
    columns.add_argument(
        "--pair-columns",
        nargs=2,
        metavar=("CONFIDENCE", "CORRECT"),
        help="columns of the confidence and the 0/1 outcome (default: confidence correct)",
    )
    columns.add_argument(
        "--probability-columns",
        nargs=2,
        metavar=("PROBABILITIES", "LABEL"),
        help="columns of the class probabilities and the label (default: probabilities label)",
    )
    gate.add_argument(
        "--group-column",
        help="column of groups whose samples are not independent, such as the image of a pixel (default: group if the "
        "file has it)",
    )
    return parser


# Each verb imports what it needs: `gate` numpy, the others torch and transformers.


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    from hf_adafocal.runs.finetune import train
    from hf_adafocal.runs.tasks import TASKS

    train(TASKS[options.task], rest, prog=f"hf-adafocal train {options.task}")
    return 0


def _compare(options: argparse.Namespace, rest: list[str]) -> int:
    from hf_adafocal.losses.registry import LOSSES
    from hf_adafocal.runs.compare import compare
    from hf_adafocal.runs.tasks import TASKS

    losses = list(LOSSES) if options.losses == ["all"] else options.losses
    compare(TASKS[options.task], rest, losses, options.seeds, options.folder, options.reuse)
    print((options.folder / "comparison.md").read_text(), end="")
    return 0


def _evaluate(options: argparse.Namespace, rest: list[str]) -> int:
    from hf_adafocal.runs.run_record import record_or_report

    output = options.output
    if output is None:
        ours = record_or_report(options.checkpoint) is not None
        output = Path(options.checkpoint) if ours else Path("runs/evaluate") / Path(options.checkpoint).resolve().name
    return _measure(options, rest, options.checkpoint, output, options.predictions)


def _scale(options: argparse.Namespace, rest: list[str]) -> int:
    from hf_adafocal.runs.evaluate import scale_checkpoint

    task, seed = _task(options, rest, options.checkpoint)
    scale_checkpoint(task, options.output, method=options.method, seed=seed, batch_size=options.batch_size)
    return _measure(options, rest, str(options.output), options.output)


def _measure(
    options: argparse.Namespace, rest: list[str], checkpoint: str, output: Path, predictions: Path | None = None
) -> int:
    from hf_adafocal.report.files import save_report
    from hf_adafocal.report.tables import report_table
    from hf_adafocal.runs.evaluate import evaluate_checkpoint

    task, seed = _task(options, rest, checkpoint)
    report = evaluate_checkpoint(
        task,
        seed,
        num_bins=options.num_bins,
        batch_size=options.batch_size,
        split_overlap=options.split_overlap,
        predictions=predictions,
        folder=output,
    )
    save_report(output, report)
    print(report_table(report))
    print(f"\nSaved in {output}: report.json, README.md and pictures")
    return 0


def _task(options: argparse.Namespace, rest: list[str], checkpoint: str):
    """Return the task that a command line and the checkpoint's run describe, and the seed of its splits."""
    from hf_adafocal.runs.run_record import task_of_checkpoint

    prog = f"hf-adafocal {options.verb} {options.task}"
    task, seed = task_of_checkpoint(options.task, checkpoint, rest, prog)
    return task, seed if options.seed is None else options.seed


def _card(options: argparse.Namespace, rest: list[str]) -> int:
    from hf_adafocal.report.card import write_card
    from hf_adafocal.report.files import FILE, read_report

    report = read_report(options.folder)
    if report is None:
        raise ValueError(f"{options.folder} holds no {FILE}; run `hf-adafocal evaluate` first.")
    names = ("title", "repo_id", "license", "language", "base_model", "datasets", "tags")
    given = {name: getattr(options, name) for name in names}
    if options.repo_id is not None:
        given["name"] = options.repo_id.rpartition("/")[2]
    print(write_card(options.folder, report, **given))
    if options.benchmark_task:
        from hf_adafocal.report.eval_results import write_eval_results

        print(write_eval_results(options.folder, report, options.benchmark_task))
    return 0


def _push(options: argparse.Namespace, rest: list[str]) -> int:
    from hf_adafocal.hub.push import push_run

    pushed = push_run(
        options.folder,
        options.repo_id,
        private=options.private,
        revision=options.revision,
        include=options.include,
        include_training_state=options.include_training_state,
        license=options.license,
        benchmark_task=options.benchmark_task,
    )
    for path, reason in pushed.left_out.items():
        print(f"left out {path}: {reason}")
    print(f"{'pushed to' if pushed.new_commit else 'nothing new for'} {pushed.url}")
    return 0


def _publish_metric(options: argparse.Namespace, rest: list[str]) -> int:
    from hf_adafocal.hub.spaces import publish_metric

    print(publish_metric(options.name, options.namespace, sdk=options.sdk, private=options.private).url)
    return 0


def _gate(options: argparse.Namespace, rest: list[str]) -> int:
    from hf_adafocal.metrics.gate import calibration_gate
    from hf_adafocal.metrics.prediction_files import read_groups, read_predictions

    confidence, correct = read_predictions(
        options.predictions,
        pair_columns=options.pair_columns,
        probability_columns=options.probability_columns,
    )
    result = calibration_gate(
        confidence,
        correct,
        max_ece=options.max_ece,
        confidence_level=options.confidence,
        num_bins=options.num_bins,
        groups=read_groups(options.predictions, options.group_column),
    )
    print(result.message)
    return 0 if result.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
