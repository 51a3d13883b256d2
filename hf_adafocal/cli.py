"""The command `hf-adafocal`: parse and dispatch.

Exit codes: 0 done, 1 a gate is not passed, 2 it could not be done (one line says why).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code.

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
    except RuntimeError as error:
        from hf_adafocal.hub.client import PushError

        if not isinstance(error, PushError):
            raise
        return _failed(options.verb, error)


def _failed(verb: str, error: Exception) -> int:
    print(f"hf-adafocal {verb}: {error}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-adafocal", description="Calibrated fine-tuning for Hugging Face models.")
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name, run, summary, description, example, passes_on=False):
        added = verbs.add_parser(
            name, help=summary, allow_abbrev=False, description=description, epilog=f"example: {example}"
        )
        added.set_defaults(run=run, passes_on=passes_on)
        return added

    compare = verb(
        "compare", _compare, "fine-tune with several losses and seeds, print one table and a verdict",
        "Fine-tune with several losses and seeds; print one table and a verdict, draw one figure. All other arguments "
        "go to every run, as for scripts/train_text.py and scripts/train_vision.py.",
        "hf-adafocal compare vision --losses cross_entropy adafocal --seeds 0 1 2", passes_on=True,
    )  # fmt: skip
    compare.add_argument("task", choices=("text", "vision"))
    compare.add_argument(
        "--losses",
        nargs="+",
        default=["cross_entropy", "focal", "flsd_53", "adafocal", "adaptive_label_smoothing"],
        help="names of losses, adafocal:paper for the paper's rule, or all "
        "(default: cross_entropy focal flsd_53 adafocal adaptive_label_smoothing)",
    )
    compare.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    compare.add_argument("--folder", type=Path, default=Path("runs/compare"), help="one folder a run goes in here")
    compare.add_argument("--reuse", action="store_true", help="take runs that are finished instead of repeating them")

    evaluate = verb(
        "evaluate", _evaluate, "measure a checkpoint, trained with us or not: report.json, pictures, a table",
        "Measure the calibration of any local or Hub checkpoint on the test split of a data set, as it is and with a "
        "temperature fitted on the calibration split. Other arguments describe the data: --dataset, --max_length, ...",
        "hf-adafocal evaluate text runs/text --dataset 20_newsgroups --output runs/text", passes_on=True,
    )  # fmt: skip
    evaluate.add_argument("--output", type=Path, help="folder of the report (default: the checkpoint's, if local)")
    scale = verb(
        "scale", _scale, "fit a temperature and fold it into the classifier head",
        "Fit a scaling on the calibration split, write a checkpoint with it folded in, and measure that. Any stock "
        "pipeline then gives calibrated scores.",
        "hf-adafocal scale vision runs/vision --output runs/vision-calibrated", passes_on=True,
    )  # fmt: skip
    scale.add_argument("--output", type=Path, required=True, help="folder of the new checkpoint")
    scale.add_argument("--method", choices=("temperature", "vector"), default="temperature")
    for measured in (evaluate, scale):
        measured.add_argument("task", choices=("text", "vision"))
        measured.add_argument("checkpoint", help="a folder or a Hub id")
        measured.add_argument("--seed", type=int, help="of the splits (default: that of its report, or 0)")
        measured.add_argument("--num-bins", type=int, default=15)
        measured.add_argument("--batch-size", type=int, default=64)
        measured.add_argument("--split-overlap", choices=("error", "warn", "skip"), default="error")

    card = verb(
        "card", _card, "write or renew the model card of a run folder from its report.json",
        "Write README.md from report.json. Only the block between the markers is replaced.",
        "hf-adafocal card runs/vision --repo-id me/digits --license apache-2.0",
    )  # fmt: skip
    card.add_argument("folder", type=Path)
    card.add_argument("--repo-id", help="where the checkpoint is going to live")
    card.add_argument("--license", help="licence of the checkpoint, as the Hub spells it")

    push = verb(
        "push", _push, "push a run folder to the Hub",
        "Push checkpoint, card, report and pictures in one commit; repeat it after any failure. The token comes from "
        "HF_TOKEN or `hf auth login`.",
        "hf-adafocal push runs/vision me/digits --private",
    )  # fmt: skip
    push.add_argument("folder", type=Path)
    push.add_argument("repo_id", help="namespace/name")
    push.add_argument("--private", action="store_true")
    push.add_argument("--revision", help="branch, made if it is missing")
    push.add_argument(
        "--include", nargs="+", default=(), metavar="PATTERN", help="push further files, such as '*.onnx', too"
    )
    push.add_argument("--include-training-state", action="store_true", help="optimizer state and event files too")

    space = verb(
        "publish-metric", _publish_metric, "publish a metric as a Space, for evaluate.load",
        "Publish one of the package's metrics as a Space; `evaluate.load('NAMESPACE/NAME')` then works anywhere.",
        "hf-adafocal publish-metric ece me",
    )  # fmt: skip
    space.add_argument("name", help="ece, ada_ece, ...")
    space.add_argument("namespace", help="user or organisation")
    space.add_argument("--sdk", choices=("gradio", "static"), default="gradio", help="static has no widget")
    space.add_argument("--private", action="store_true")

    gate = verb(
        "gate", _gate, "check predictions against a limit on ECE",
        "Print ECE and its confidence interval. Exit code 0: the upper end is within the limit; 1: it is above; 2: "
        "the predictions cannot be used.",
        "hf-adafocal gate --max-ece 0.03 --confidence 0.95 predictions.parquet",
    )  # fmt: skip
    gate.add_argument("predictions", type=Path, help="a .parquet, .csv, .tsv, .jsonl, .npz or .npy file")
    gate.add_argument("--max-ece", type=float, required=True, help="the limit, a fraction in [0, 1]")
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
    return parser


# Each verb imports what it needs: `gate` numpy, the others torch and transformers.


def _compare(options: argparse.Namespace, rest: list[str]) -> int:
    from hf_adafocal.losses.registry import LOSSES
    from hf_adafocal.runs.finetune import compare
    from hf_adafocal.runs.tasks import TASKS

    losses = list(LOSSES) if options.losses == ["all"] else options.losses
    compare(TASKS[options.task], rest, losses, options.seeds, options.folder, options.reuse)
    print((options.folder / "comparison.md").read_text(), end="")
    return 0


def _evaluate(options: argparse.Namespace, rest: list[str]) -> int:
    output = options.output
    if output is None:
        output = Path(options.checkpoint)
        if not output.is_dir():
            raise ValueError(f"{output} is no local folder: say where the report goes with --output.")
    return _measure(options, rest, options.checkpoint, output)


def _scale(options: argparse.Namespace, rest: list[str]) -> int:
    from hf_adafocal.runs.evaluate import scale_checkpoint

    scale_checkpoint(
        _task(options, rest, options.checkpoint),
        options.output,
        method=options.method,
        seed=_seed(options),
        batch_size=options.batch_size,
    )
    return _measure(options, rest, str(options.output), options.output)


def _measure(options: argparse.Namespace, rest: list[str], checkpoint: str, output: Path) -> int:
    from hf_adafocal.report.files import save_report
    from hf_adafocal.report.tables import report_table
    from hf_adafocal.runs.evaluate import evaluate_checkpoint

    report = evaluate_checkpoint(
        _task(options, rest, checkpoint),
        _seed(options),
        num_bins=options.num_bins,
        batch_size=options.batch_size,
        split_overlap=options.split_overlap,
    )
    save_report(output, report)
    print(report_table(report))
    print(f"\nSaved in {output}: report.json, README.md and pictures")
    return 0


def _task(options: argparse.Namespace, rest: list[str], checkpoint: str):
    from transformers import HfArgumentParser

    from hf_adafocal.runs.tasks import TASKS

    parser = HfArgumentParser(TASKS[options.task], prog=f"hf-adafocal {options.verb} {options.task}")
    (task,) = parser.parse_args_into_dataclasses(["--model_name_or_path", checkpoint, *rest])
    return task


def _seed(options: argparse.Namespace) -> int:
    from hf_adafocal.report.files import read_report

    if options.seed is not None:
        return options.seed
    report = read_report(options.checkpoint)
    return 0 if report is None or report.seed is None else report.seed


def _card(options: argparse.Namespace, rest: list[str]) -> int:
    from hf_adafocal.report.card import write_card
    from hf_adafocal.report.files import FILE, read_report

    report = read_report(options.folder)
    if report is None:
        raise ValueError(f"{options.folder} holds no {FILE}; run `hf-adafocal evaluate` first.")
    print(write_card(options.folder, report, repo_id=options.repo_id, license=options.license))
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
    from hf_adafocal.metrics.prediction_files import read_predictions

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
    )
    print(result.message)
    return 0 if result.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
