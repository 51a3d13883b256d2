"""The command `hf-adafocal`: parse and dispatch."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code.

    Args:
        arguments: The command line; that of the process if left out.
    """
    parser = argparse.ArgumentParser(prog="hf-adafocal", description="Calibrated fine-tuning for Hugging Face models.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    compare = verbs.add_parser(
        "compare",
        help="fine-tune with several losses and seeds, print one table",
        allow_abbrev=False,
        description="Fine-tune with several losses and seeds; print one table and draw one figure. All other "
        "arguments go to every run, as for scripts/train_text.py and scripts/train_vision.py.",
        epilog="example: hf-adafocal compare vision --losses cross_entropy adafocal --seeds 0 1 2",
    )
    compare.add_argument("task", choices=("text", "vision"))
    compare.add_argument("--losses", nargs="+", default=["cross_entropy", "focal", "flsd_53", "adafocal"])
    compare.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    compare.add_argument("--folder", type=Path, default=Path("runs/compare"), help="one folder a run goes in here")
    compare.add_argument("--reuse", action="store_true", help="take runs that are finished instead of repeating them")
    gate = verbs.add_parser(
        "gate",
        help="check predictions against a limit on ECE",
        allow_abbrev=False,
        description="Print ECE and its bootstrap interval. Exit code 0: the upper end is within the limit; 1: it is "
        "above; 2: the predictions cannot be used.",
        epilog="example: hf-adafocal gate --max-ece 0.03 --confidence 0.95 predictions.parquet",
    )
    gate.add_argument("predictions", type=Path, help="a .parquet, .csv or .npz file")
    gate.add_argument("--max-ece", type=float, required=True, help="the limit, a fraction in [0, 1]")
    gate.add_argument("--confidence", type=float, default=0.95, help="level of the two-sided interval (default 0.95)")
    gate.add_argument("--num-bins", type=int, default=15, help="bins of one width (default 15)")
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
    options, rest = parser.parse_known_args(arguments)
    if options.verb == "compare":
        return _compare(options, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return _gate(options)


def _compare(options: argparse.Namespace, rest: list[str]) -> int:
    from hf_adafocal.finetune import compare  # imports torch and transformers
    from hf_adafocal.tasks import TASKS

    compare(TASKS[options.task], rest, options.losses, options.seeds, options.folder, options.reuse)
    print((options.folder / "comparison.md").read_text(), end="")
    return 0


def _gate(options: argparse.Namespace) -> int:
    from hf_adafocal.gate import calibration_gate, read_predictions  # imports numpy

    try:
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
    except ValueError as error:
        print(f"hf-adafocal gate: {error}", file=sys.stderr)
        return 2
    print(result.message)
    return 0 if result.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
