"""Tables and the figure of `reproduce_paper.py`, made from its reports."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from paper_settings import ABLATIONS, FIGURE, FIGURE_SETTINGS, METHODS, SETTINGS

from hf_adafocal.report.comparison import paired_difference
from hf_adafocal.report.tables import comparison_table

Runs = dict[str, dict[int, dict[str, Any]]]  # of one setting: report by method and seed
RAW, SCALED = "raw", "temperature_scaled"
BASELINE, OURS = "cross_entropy", "adafocal"
COLUMNS = (
    ("error", "error %", 100, 2),
    ("nll", "NLL", 1, 3),
    ("brier", "Brier", 1, 3),
    ("ece", "ECE %", 100, 2),
    ("ada_ece", "AdaECE %", 100, 2),
    ("classwise_ece", "classwise ECE %", 100, 3),
)
TITLES = {
    "cross_entropy": "cross-entropy",
    "flsd_53": "FLSD-53",
    "adafocal": "AdaFocal",
}


def read(folder: Path, setting: str) -> Runs:
    """Read the finished runs of a setting, methods in the order of `METHODS` and seeds in ascending order."""
    runs: Runs = {}
    for method in METHODS:
        for path in sorted((folder / setting).glob(f"{method}-*.json")):
            report = json.loads(path.read_text())
            runs.setdefault(method, {})[report["seed"]] = report
    return {method: dict(sorted(found.items())) for method, found in runs.items()}


def tables(folder: Path) -> str:
    """Render every table as Markdown, of the settings that have reports."""
    found = {setting: runs for setting in SETTINGS if (runs := read(folder, setting))}
    parts = []
    for setting, runs in found.items():
        parts += [f"### {setting}", metrics_table(runs), "Differences from cross-entropy:", differences_table(runs)]
    parts += ["### The loss and the recipe", recipe_table(found)]
    parts += ["### Updates until AdaFocal is better calibrated", crossing_table(found)]
    parts += ["### What holds AdaFocal back", ablation_table(found)]
    parts += ["### Where the gammas end", gamma_table(found)]
    return "\n\n".join(part for part in parts if part)


def metrics_table(runs: Runs) -> str:
    """Render means and standard deviations over seeds on the test split, before and after temperature scaling."""
    tests = {}
    for method, by_seed in runs.items():
        tests[method] = [
            {
                "temperature": report["temperature"],
                **{
                    kind: {
                        **report[kind],
                        "error": 1 - report[kind]["accuracy"],
                        **{f"ood_{name}": auroc for name, auroc in report[kind]["ood_auroc"].items()},
                    }
                    for kind in (RAW, SCALED)
                },
            }
            for report in by_seed.values()
        ]
    first = next(iter(tests.values()))[0][RAW]
    ood = [(name, f"OOD AUROC % {name.removeprefix('ood_')}", 100, 1) for name in first if name.startswith("ood_")]
    ood = [column for column in ood if column[0] != "ood_auroc"]
    return comparison_table(tests, [*COLUMNS, *ood])


def differences_table(runs: Runs) -> str:
    """Render the difference of each method from cross-entropy on the seeds both have, with 95 % intervals."""
    head = ["method", "seeds", "ECE - CE's", "ECE - (CE + T)'s", "ECE + T - (CE + T)'s", "error - CE's"]
    head += ["NLL + T - (CE + T)'s, 1/100 nat"]
    pairs = (("ece", RAW, RAW, 1), ("ece", RAW, SCALED, 1), ("ece", SCALED, SCALED, 1), ("accuracy", RAW, RAW, -1))
    pairs += (("nll", SCALED, SCALED, 1),)
    rows = []
    for method in runs:
        seeds = [seed for seed in runs[method] if seed in runs.get(BASELINE, {})]
        if method == BASELINE or not seeds:
            continue
        cells = [
            difference(runs[method], own, runs[BASELINE], other, key, seeds, sign) for key, own, other, sign in pairs
        ]
        rows.append([method, str(len(seeds)), *cells])
    return markdown(head, rows)


def difference(
    ours: dict[int, dict], own: str, theirs: dict[int, dict], other: str, key: str, seeds: list[int], sign: int = 1
) -> str:
    """Format the difference of two methods, paired by seed, in percentage points."""
    return paired_difference(
        100 * sign * np.array([ours[seed][own][key] - theirs[seed][other][key] for seed in seeds])
    )


def recipe_table(found: dict[str, Runs]) -> str:
    """Compare the two recipes (mean loss; summed loss with clipped gradients) for each method."""
    head = ["setting", "method", "seeds", "ECE % mean", "ECE % sum", "ECE sum - mean", "error sum - mean"]
    head += ["ECE + T sum - mean"]
    rows = []
    for setting, runs in found.items():
        summed = found.get(f"{setting}_sum", {})
        for method in [method for method in runs if method in summed]:
            ours, theirs = summed[method], runs[method]
            seeds = [seed for seed in ours if seed in theirs]
            if not seeds:
                continue
            means = [f"{np.mean([100 * part[seed][RAW]['ece'] for seed in seeds]):.2f}" for part in (theirs, ours)]
            cells = [
                difference(ours, RAW, theirs, RAW, "ece", seeds),
                difference(ours, RAW, theirs, RAW, "accuracy", seeds, -1),
                difference(ours, SCALED, theirs, SCALED, "ece", seeds),
            ]
            rows.append([setting, method, str(len(seeds)), *means, *cells])
    return markdown(head, rows)


def ablation_table(found: dict[str, Runs]) -> str:
    """Compare AdaFocal with another cap, another step size or more calibration samples to AdaFocal as published."""
    head = ["setting", "changed", "seeds", "ECE - AdaFocal's", "ECE + T - AdaFocal's", "error - AdaFocal's"]
    head += ["NLL + T - AdaFocal's, 1/100 nat"]
    pairs = [(setting, setting, method) for setting in found for method in ABLATIONS]
    pairs += [("small_texts", "small_texts_6000", OURS)]
    rows = []
    for setting, changed, method in pairs:
        theirs, ours = found.get(setting, {}).get(OURS, {}), found.get(changed, {}).get(method, {})
        seeds = [seed for seed in ours if seed in theirs]
        if not seeds:
            continue
        cells = [
            difference(ours, kind, theirs, kind, key, seeds, sign)
            for kind, key, sign in ((RAW, "ece", 1), (SCALED, "ece", 1), (RAW, "accuracy", -1), (SCALED, "nll", 1))
        ]
        rows.append([setting, changed if method == OURS else method, str(len(seeds)), *cells])
    return markdown(head, rows)


def crossing_table(found: dict[str, Runs]) -> str:
    """Render for each seed the number of gamma updates after which AdaFocal's test ECE stays below another curve.

    Where it does not to the end, the cell has the share of readings at which it is below.
    """
    head = ["setting", "updates", "than cross-entropy", "than FLSD-53", "than cross-entropy with a temperature"]
    rows = []
    for setting, runs in found.items():
        if OURS not in runs:
            continue
        cells = []
        for method, key in ((BASELINE, "ece"), ("flsd_53", "ece"), (BASELINE, "scaled_ece")):
            cell = []
            for seed in [seed for seed in runs[OURS] if seed in runs.get(method, {})]:
                ours, theirs = (runs[name][seed]["log"]["test"] for name in (OURS, method))
                updates = crossing(ours, theirs, key)
                below = sum(np.array(ours["ece"]) < np.array(theirs[key]))
                cell.append(f"never ({below} of {len(ours['ece'])})" if updates is None else str(updates))
            cells.append(", ".join(cell))
        rows.append([setting, str(SETTINGS[setting].epochs), *cells])
    return markdown(head, rows)


def crossing(ours: dict[str, list], theirs: dict[str, list], key: str) -> int | None:
    """Return the number of updates before the ECE first stays below the other curve for good; None if it does not.

    The reading after epoch e is of weights that were trained with a table moved e - 1 times.
    """
    better = np.array(ours["ece"]) < np.array(theirs[key])
    if not better[-1]:
        return None
    worse = np.flatnonzero(~better)
    return ours["epoch"][worse[-1] + 1 if len(worse) else 0] - 1


def gamma_table(found: dict[str, Runs]) -> str:
    """Render the last gammas of each AdaFocal run by bin, and when they reach the cap."""
    head = [
        "setting",
        "method",
        "seed",
        "gamma of bins 1 to 15",
        "at the cap",
        "five at the cap from epoch",
        "below 0",
    ]
    head += ["epochs with bins of width 0", "late gap", "late change"]
    rows = []
    for setting, runs in found.items():
        for method, seed, report in [(m, s, r) for m in (OURS, *ABLATIONS) for s, r in runs.get(m, {}).items()]:
            gammas, width = np.array(report["log"]["gammas"]), report["log"]["bins_of_width_0"]
            capped = gammas >= 0.999 * report["training"].get("gamma_max", 20.0)
            five = np.flatnonzero(capped.sum(axis=1) >= 5)
            shown = " ".join(f"{gamma:.1f}" for gamma in gammas[-1])
            counts = [capped[-1].sum(), five[0] + 1 if len(five) else "", (gammas[-1] < 0).sum()]
            gap, change = late_gaps(gammas, capped, report["training"].get("gamma_lambda", 1.0))
            rows.append(
                [setting, method, str(seed), shown, *map(str, counts), str(np.count_nonzero(width)), gap, change]
            )
    return markdown(head, rows)


def late_gaps(gammas: np.ndarray, capped: np.ndarray, lambda_: float) -> tuple[str, str]:
    """Summarise the uncapped bins over the last third of a run: mean size of their mean gap, and of its deviation.

    A gap follows from two gammas, `log(g' / g) / lambda`, where neither a limit nor the switch acted.

    Args:
        gammas: Of each epoch, shape `(epochs, bins)`.
        capped: Whether each is at the cap, of that shape.
        lambda_: Step size of the update.

    Returns:
        Both numbers, empty if no bin was free.
    """
    late = slice(len(gammas) - len(gammas) // 3, None)
    free = (~capped[late] & (gammas[late] > 0.2)).all(axis=0)
    if not free.any():
        return "", ""
    gaps = np.diff(np.log(gammas[late][:, free]), axis=0) / lambda_
    return f"{np.abs(gaps.mean(axis=0)).mean():.3f}", f"{gaps.std(axis=0).mean():.3f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Render a Markdown table; empty without rows."""
    if not rows:
        return ""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def figure(folder: Path, path: Path) -> None:
    """Plot ECE of the test split against epochs, mean and range over seeds, above AdaFocal's gammas of one seed.

    Args:
        folder: Of the reports.
        path: Of the PNG.

    Raises:
        ValueError: If no setting of the figure has a report of AdaFocal.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {setting: runs for setting in FIGURE_SETTINGS if OURS in (runs := read(folder, setting))}
    if not found:
        raise ValueError(
            f"{folder}: found no report of AdaFocal in {', '.join(FIGURE_SETTINGS)}. Run one of them first."
        )
    grid = {"height_ratios": (3, 2)}
    picture, axes = plt.subplots(
        2, len(found), figsize=(3.2 * len(found) + 1, 5), sharex="col", sharey="row", squeeze=False,
        layout="constrained", gridspec_kw=grid,
    )  # fmt: skip
    for (setting, runs), (above, below) in zip(found.items(), axes.T, strict=True):
        for color, method in zip(("C3", "C1", "C0"), FIGURE, strict=True):
            logs = [report["log"]["test"] for report in runs.get(method, {}).values()]
            if logs:
                draw_curve(above, logs, "ece", color, TITLES[method])
            if logs and method == BASELINE:
                draw_curve(above, logs, "scaled_ece", "0.4", "cross-entropy + temperature", linestyle="--")
        seed, report = next(iter(runs[OURS].items()))
        gammas = np.array(report["log"]["gammas"])
        for index, line in enumerate(gammas.T):
            below.plot(range(1, len(gammas) + 1), line, color=plt.cm.viridis(index / (gammas.shape[1] - 1)), lw=0.9)
        above.set(title=setting)
        below.set(xlabel="epoch", title=f"AdaFocal, seed {seed}: gamma by bin")
        below.title.set_size("small")
    axes[0, 0].set(ylabel="ECE of the test split, %", ylim=(0, None))
    axes[1, 0].set(ylabel="gamma")
    picture.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    bins = plt.cm.ScalarMappable(plt.Normalize(1, 15), "viridis")
    picture.colorbar(bins, ax=axes, label="bin, low to high", shrink=0.36, anchor=(0, 0.06))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=90)
    plt.close(picture)


def draw_curve(axes: Any, logs: list[dict[str, list]], key: str, color: str, title: str, **style: Any) -> None:
    """Plot the mean over seeds as a line and their range as a band."""
    values = 100 * np.array([log[key] for log in logs])
    axes.plot(logs[0]["epoch"], values.mean(axis=0), color=color, label=title, **style)
    axes.fill_between(logs[0]["epoch"], values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, lw=0)
