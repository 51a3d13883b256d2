"""Which checkpoint of a run to keep: the last one, or the best by NLL, accuracy, ECE or refinement.

python scripts/study_checkpoint_choice.py run --newsgroups FOLDER --minilm FOLDER     # about an hour on two cores
python scripts/study_checkpoint_choice.py table                                      # Markdown, from the runs there

Every run is evaluated after each epoch. The calibration split alone chooses the checkpoint and fits its temperature;
the test split is measured beside it and chooses nothing. A run whose file is there is not repeated.
"""

import argparse
import json
import shlex
from pathlib import Path

import numpy as np
from transformers import TrainerCallback, set_seed

from hf_adafocal import AdaFocalTrainer
from hf_adafocal.metrics import calibration_report, softmax
from hf_adafocal.runs.finetune import parse_arguments
from hf_adafocal.runs.tasks import TASKS
from hf_adafocal.scaling import fit_temperature_scaling

FEW = "--max_train_samples 3000"
TEST_SAMPLES = {"news_minilm": 2000}  # the first of the shuffled test split, for time; elsewhere all of it
SETTINGS = {
    "digits": ("vision", "--num_train_epochs 50 --lr_scheduler_type cosine"),
    "news_cnn": ("text", f"--dataset NEWSGROUPS --max_length 64 {FEW} --num_train_epochs 15"),
    "news_minilm": (
        "text",
        "--dataset NEWSGROUPS --model_name_or_path MINILM --max_length 32 --max_train_samples 2000 "
        "--num_train_epochs 5 --learning_rate 2e-4",
    ),
}
LOSSES = ("cross_entropy", "adafocal")
CHOICES = {"last": None, "nll": min, "accuracy": max, "ece": min, "refinement": min}


class Recorder(TrainerCallback):
    """Measure both held-out splits after each epoch.

    Args:
        splits: With `calibration` and `test`.
    """

    def __init__(self, splits) -> None:
        self.splits, self.trainer, self.epochs = splits, None, []

    def on_epoch_end(self, args, state, control, **kwargs):
        """Record metrics as trained and with the temperature of this epoch's calibration split."""
        of_choice, calibration = self.trainer.measure(self.splits.calibration, "choice")
        scaling = fit_temperature_scaling(*calibration)
        _, (logits, labels) = self.trainer.measure(self.splits.test, "report")
        rows = {"raw": softmax(logits), "scaled": softmax(scaling.apply(np.asarray(logits, dtype=float)))}
        self.epochs.append(
            {
                "calibration": {
                    **{name: of_choice[name] for name in ("nll", "accuracy", "ece")},
                    "refinement": scaling.nll_after,
                },
                "temperature": 1 / scaling.scale,
                **{name: calibration_report(p, labels) for name, p in rows.items()},
            }
        )


def main() -> None:
    """Run or tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "table"))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--losses", nargs="+", default=list(LOSSES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("model_cards/checkpoint_choice"))
    parser.add_argument("--newsgroups", default="20_newsgroups", help="20 Newsgroups: a Hub id or a local folder")
    parser.add_argument(
        "--minilm", default="sentence-transformers/all-MiniLM-L6-v2", help="a Hub id or a local folder"
    )
    options = parser.parse_args()
    if options.verb == "table":
        print(table(options.folder, options.settings, options.losses, options.seeds))
        return
    names = {"NEWSGROUPS": options.newsgroups, "MINILM": options.minilm}
    for seed in options.seeds:
        for setting in options.settings:
            for loss in options.losses:
                run(setting, loss, seed, options.folder, names)


def run(setting: str, loss: str, seed: int, folder: Path, names: dict[str, str]) -> None:
    """Train once and write the metrics of each epoch's checkpoint."""
    file = folder / f"{setting}-{loss}-{seed}.json"
    if file.exists():
        return
    kind, settings = SETTINGS[setting]
    line = [names.get(word, word) for word in shlex.split(settings)]
    line += ["--loss", loss, "--seed", str(seed), "--output_dir", "runs/checkpoint_choice", "--use_cpu", "true"]
    line += ["--disable_tqdm", "true", "--save_strategy", "no", "--report_to", "none", "--calibrate_at_end", "false"]
    task, args = parse_arguments(TASKS[kind], line)
    prepared = task.prepare(seed)
    test = prepared.splits.test.shuffle(seed=0)
    kept = test.select(range(min(len(test), TEST_SAMPLES.get(setting, len(test)))))
    splits = prepared.splits._replace(test=kept)
    set_seed(seed)
    recorder = Recorder(splits)
    recorder.trainer = AdaFocalTrainer(
        prepared.model_init(),
        args,
        train_dataset=prepared.splits.train,
        calibration_dataset=prepared.splits.calibration,
        processing_class=prepared.processing_class,
        data_collator=prepared.data_collator,
        callbacks=[recorder],
    )
    recorder.trainer.train()
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(recorder.epochs) + "\n")


def chosen(epochs: list[dict], choice: str) -> dict:
    """Return the epoch that a criterion chooses on the calibration split; the first one of a tie."""
    pick = CHOICES[choice]
    return epochs[-1] if pick is None else pick(epochs, key=lambda epoch: epoch["calibration"][choice])


def table(folder: Path, settings: list[str], losses: list[str], seeds: list[int]) -> str:
    """Render means over seeds on the test split; differences from the choice by NLL are paired by seed."""
    lines = [
        "| setting | loss | seeds | kept by | epoch | accuracy % | NLL, T folded | ECE %, T folded | "
        "ECE % as trained | accuracy - by NLL |",
        "| --- " * 10 + "|",
    ]
    for setting in settings:
        for loss in losses:
            files = [folder / f"{setting}-{loss}-{seed}.json" for seed in seeds]
            runs = [json.loads(file.read_text()) for file in files if file.exists()]
            if not runs:
                continue
            by_nll = np.array([chosen(epochs, "nll")["scaled"]["accuracy"] for epochs in runs])
            for choice in CHOICES:
                kept = [chosen(epochs, choice) for epochs in runs]
                epoch = np.mean([epochs.index(one) + 1 for epochs, one in zip(runs, kept, strict=True)])
                accuracy = np.array([one["scaled"]["accuracy"] for one in kept])
                nll, ece = (np.mean([one["scaled"][key] for one in kept]) for key in ("nll", "ece"))
                raw = np.mean([one["raw"]["ece"] for one in kept])
                differences = ", ".join(f"{100 * difference:+.2f}" for difference in accuracy - by_nll)
                lines.append(
                    f"| {setting} | {loss} | {len(runs)} | {choice} | {epoch:.1f} | {100 * accuracy.mean():.2f} | "
                    f"{nll:.3f} | {100 * ece:.2f} | {100 * raw:.2f} | {differences} |"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
