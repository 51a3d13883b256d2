"""The command `hf-adafocal`: parse and dispatch."""

import argparse
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
    options, rest = parser.parse_known_args(arguments)
    return _compare(options, rest)


def _compare(options: argparse.Namespace, rest: list[str]) -> int:
    from hf_adafocal.finetune import compare  # imports torch and transformers
    from hf_adafocal.tasks import TASKS

    compare(TASKS[options.task], rest, options.losses, options.seeds, options.folder, options.reuse)
    print((options.folder / "comparison.md").read_text(), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
