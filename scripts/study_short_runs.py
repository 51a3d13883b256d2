"""Study of calibration after short fine-tunes: every setting, method and seed, and its tables.

python scripts/study_short_runs.py run --reuters FOLDER     # all of it: some hours on two cores
python scripts/study_short_runs.py run --settings digits_15 --methods cross_entropy paper --seeds 0
python scripts/study_short_runs.py run --settings cnn_5 digits_15 --methods ablations
python scripts/study_short_runs.py table                    # Markdown, from the runs that are there
python scripts/study_short_runs.py summary                  # a line a setting: ECE and accuracy of each method
python scripts/study_short_runs.py differences              # from cross-entropy, paired by seed

A run whose report is there is not repeated, so several of these commands may share the work. Seeds change the split,
the initial weights and the order of the samples; runs of one seed differ in the method alone. Test data are read once,
after training.
"""

import argparse
import json
import math
import shlex
from pathlib import Path

import numpy as np
import torch

from hf_adafocal.report.comparison import paired_difference, verdict
from hf_adafocal.report.tables import COLUMNS, comparison_table
from hf_adafocal.runs.arguments import parse_arguments
from hf_adafocal.runs.finetune import finetune
from hf_adafocal.runs.tasks import TASKS
from hf_adafocal.training.smoothing_control import schedule

DEVICE = [] if torch.cuda.is_available() else ["--use_cpu", "true"]  # bf16 on a CPU wants it said
CNN = "--max_length 64"
FEW = "--max_train_samples 3000"
MINILM = (
    f"{FEW} --max_length 48 --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --learning_rate 2e-4 "
    "--bf16 true"
)
RESNET = (
    "--dataset cifar10 --image_size 32 --architecture resnet10t --horizontal_flip true --ood noise "
    "--learning_rate 3e-3 --model_args"
) + ' \'{"channels": [32, 64, 96, 128], "stem_width": 16}\''
DIGITS = "--ood noise"
SETTINGS = {
    "minilm_3": ("text", f"{MINILM} --num_train_epochs 3"),
    "cnn_5": ("text", f"{CNN} --num_train_epochs 5"),
    "cnn_10": ("text", f"{CNN} {FEW} --num_train_epochs 10"),
    "cnn_30": ("text", f"{CNN} {FEW} --num_train_epochs 30"),
    "digits_50": ("vision", f"{DIGITS} --num_train_epochs 50"),
    "digits_15": ("vision", f"{DIGITS} --num_train_epochs 15"),
    "cifar_3": ("vision", f"{RESNET} --max_train_samples 5000 --num_train_epochs 3"),
    "cifar_15": ("vision", f"{RESNET} --max_train_samples 3000 --num_train_epochs 15"),
}
EPS = "--loss adaptive_label_smoothing"
METHODS = {
    "cross_entropy": "--loss cross_entropy",
    "label_smoothing": "--loss label_smoothing --smoothing 0.05",
    "focal_3": "--loss focal --focal_gamma 3",
    "flsd_53": "--loss flsd_53",
    "paper": "--loss adafocal",
    "adaptive_smoothing": EPS,
}
HELD_OUT = {200: 0.0177, 500: 0.0442, 1000: 0.0884, 5000: 0.442}  # of the 11,314 texts; 3,000 are trained on
ABLATIONS = {  # meant for cnn_10, a run of 940 steps
    **{f"smoothing_gain_{gain}": f"{EPS} --steering_gain {gain}" for gain in (1, 4, 8)},
    **{f"smoothing_calibration_{size}": f"{EPS} --holdout_fraction {share}" for size, share in HELD_OUT.items()},
}


def main() -> None:
    """Run or tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "table", "summary", "differences"))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="names, or ablations")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/study"))
    parser.add_argument("--reuters", type=Path, help="Reuters R8 texts, out of distribution for 20 Newsgroups")
    options = parser.parse_args()
    methods = list(ABLATIONS) if options.methods == ["ablations"] else options.methods
    if options.verb == "run":
        for seed in options.seeds:
            for setting in options.settings:
                for method in methods:
                    run(setting, method, seed, options.folder, options.reuters)
    elif options.verb == "summary":
        print(summary(options.folder, options.settings, methods, options.seeds))
    elif options.verb == "differences":
        print(differences(options.folder, options.settings, methods, options.seeds))
    else:
        for setting in options.settings:
            found = {method: reports(options.folder / setting, method, options.seeds) for method in methods}
            tests = {method: [entry(report) for report in runs] for method, runs in found.items() if runs}
            if tests:
                print(f"\n### {setting}\n\n{comparison_table(tests, columns(tests))}\n\n{verdict(tests)}")


def run(setting: str, method: str, seed: int, folder: Path, reuters: Path | None) -> None:
    """Run one fine-tune and keep only its report and pictures."""
    output = folder / setting / f"{method}-{seed}"
    if (output / "report.json").exists():
        return
    kind, settings = SETTINGS[setting]
    ood = ["--ood", str(reuters)] if kind == "text" and reuters is not None else []
    flags = {**METHODS, **ABLATIONS}[method]
    arguments = [*shlex.split(f"{settings} {flags}"), *ood, "--seed", str(seed), "--output_dir", str(output)]
    finetune(*parse_arguments(TASKS[kind], [*arguments, "--report_to", "none", "--disable_tqdm", "true", *DEVICE]))
    for weights in output.glob("*.safetensors"):
        weights.unlink()


def reports(folder: Path, method: str, seeds: list[int]) -> list[dict]:
    """Read the reports of the seeds that are finished."""
    paths = (folder / f"{method}-{seed}" / "report.json" for seed in seeds)
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def entry(report: dict) -> dict:
    """Return a run's test entry for the tables, with out-of-distribution detection and the extra compute."""
    test = report["test"]
    for scaling in ("raw", "temperature_scaled"):
        if "ood" in report:
            test[scaling]["ood"] = report["ood"][scaling]["max_softmax_auroc"]
        test[scaling]["extra"] = extra_compute(report)
    return test


def columns(tests: dict[str, list[dict]]) -> list[tuple]:
    """Return the columns of every comparison plus out-of-distribution AUROC and extra compute."""
    ood = (
        [("ood", "OOD AUROC %", 100, 1)]
        if all("ood" in test["raw"] for runs in tests.values() for test in runs)
        else []
    )
    extra = [("extra", "extra compute %", 100, 1)] if set(tests) <= set(METHODS) else []
    return [*COLUMNS, *ood, *extra]


def summary(folder: Path, settings: list[str], methods: list[str], seeds: list[int]) -> str:
    """Render mean ECE and accuracy over seeds in percent: each method as trained, cross-entropy with a fitted T."""
    columns = [
        ("cross_entropy", "temperature_scaled", "cross_entropy + T"),
        *((name, "raw", name) for name in methods),
    ]
    lines = ["| setting | " + " | ".join(title for *_, title in columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for setting in settings:
        cells = []
        for method, scaling, _ in columns:
            found = [report["test"][scaling] for report in reports(folder / setting, method, seeds)]
            means = (100 * sum(run[key] for run in found) / max(len(found), 1) for key in ("ece", "accuracy"))
            cells.append("{:.1f} ({:.1f})".format(*means) if found else "")
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(folder: Path, settings: list[str], methods: list[str], seeds: list[int]) -> str:
    """Render the differences of each method from cross-entropy, as trained and with a fitted T: ECE and accuracy."""
    lines = [
        "| setting | method | ECE - CE's | ECE - (CE + T)'s | accuracy - CE's |",
        "| --- | --- | --- | --- | --- |",
    ]
    for setting in settings:
        base = [report["test"] for report in reports(folder / setting, "cross_entropy", seeds)]
        for method in methods:
            runs = [report["test"]["raw"] for report in reports(folder / setting, method, seeds)]
            if method == "cross_entropy" or not runs or len(runs) != len(base):
                continue
            cells = [
                paired_difference(100 * np.array([a[key] - b[scaling][key] for a, b in zip(runs, base, strict=True)]))
                for key, scaling in (("ece", "raw"), ("ece", "temperature_scaled"), ("accuracy", "raw"))
            ]
            lines.append(f"| {setting} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def extra_compute(report: dict) -> float:
    """Return the extra forward passes of a loss relative to the training's compute; one is a third of a training step.

    All runs evaluate the calibration split after each epoch; the paper's rule needs it, the others do it to report.
    """
    training, sizes = report["training"], {role: split["size"] for role, split in report["splits"].items()}
    if report["loss"]["name"] == "adafocal":
        return sizes["calibration"] / (3 * sizes["train"])
    if report["loss"]["name"] != "adaptive_label_smoothing":
        return 0.0
    steps = math.ceil(sizes["train"] / training["batch_size"]) * int(training["epochs"])
    plan = schedule(steps, training["batch_size"], sizes["calibration"])
    return len(plan.steps) * plan.slice_size / (3 * sizes["train"] * training["epochs"])


if __name__ == "__main__":
    main()
