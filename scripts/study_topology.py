"""Study: what the topological term and AdaFocal do for 3D segmentation, on volumes with known Betti numbers.

python scripts/study_topology.py --folder results/topology            # resumable: one JSON file per run
python scripts/study_topology.py --folder results/topology --table    # Markdown tables of the runs in the folder

Each seed draws its own volumes and weights. Cross-entropy, focal loss and AdaFocal train for the same steps with the
same batches; the runs with the term start from the weights (and the gamma table) of their base at half of the run.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from hf_adafocal import AdaFocalLoss, CombinedLoss, CrossEntropyLoss, FocalLoss, calibrate, fit_temperature
from hf_adafocal.data.volumes import synthetic_volumes
from hf_adafocal.metrics.segmentation import count_dense, dense_intervals, dense_metrics
from hf_adafocal.models import UNet3DConfig, UNet3DForSemanticSegmentation

BASES = {"cross_entropy": CrossEntropyLoss, "focal": lambda: FocalLoss(2.0), "adafocal": AdaFocalLoss}
WEIGHTS = (0.001, 0.01)
METRICS = (
    "dice", "betti_0_error", "betti_1_error", "betti_2_error", "pixel_ece", "foreground_ece", "image_ece", "nll"
)  # fmt: skip
SIZES = {"train": 48, "calibration": 16, "test": 32}


def tensors(part: str, seed: int) -> torch.utils.data.TensorDataset:
    """Return the volumes and labels of one split as tensors."""
    offset = 1 + list(SIZES).index(part)
    volumes = synthetic_volumes(SIZES[part], 24, seed=1000 * seed + offset)
    return torch.utils.data.TensorDataset(
        torch.from_numpy(volumes.images)[:, None], torch.from_numpy(volumes.labels).long()
    )


def measure(model: torch.nn.Module, data: dict, temperature: float = 1.0) -> dict[str, float]:
    """Compute metrics of the test volumes at a temperature, and the ends of their intervals."""
    images, labels = data["test"].tensors
    with torch.no_grad():
        logits = torch.cat([model(batch).logits for batch in images.split(8)]) / temperature
    nll = float(torch.nn.functional.cross_entropy(logits, labels))
    confidence, predicted = logits.softmax(1).max(1)
    counts = count_dense(confidence.numpy(), predicted.numpy(), labels.numpy(), 2, betti=temperature == 1)
    return {**dense_metrics(counts), "nll": nll, "intervals": dense_intervals(counts, num_resamples=200)}


def train(model, loss, data, steps: range, total: int, seed: int, epoch: int) -> None:
    """Train from the first to the last of `steps`; gamma is updated every `epoch` steps."""
    images, labels = data["train"].tensors
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    for step in steps:
        rate = 1e-2 * min(1, (step - steps.start + 1) / 10, (total - step) / (0.7 * total))
        optimizer.param_groups[0]["lr"] = rate
        rows = np.random.default_rng([seed, step]).choice(len(images), 4, replace=False)
        optimizer.zero_grad()
        loss(model(images[rows]).logits, labels[rows]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % epoch == 0 and loss.adaptive is not None:
            calibrate(model, torch.utils.data.DataLoader(data["calibration"], 8), loss)


def run(seed: int, base: str, folder: Path, steps: int, weights=WEIGHTS) -> None:
    """Run one seed and base loss: without the term, and with it at each weight from halfway on."""
    arms = [base, *(f"{base}+{weight}" for weight in weights if base != "cross_entropy")]
    files = {arm: folder / f"{arm}-{seed}.json" for arm in arms}
    if all(file.exists() for file in files.values()):
        return
    data = {part: tensors(part, seed) for part in SIZES}
    torch.manual_seed(seed)
    model, loss, half = UNet3DForSemanticSegmentation(UNet3DConfig(num_labels=2)), BASES[base](), steps // 2
    train(model, loss, data, range(half), steps, seed, epoch=9)
    middle = {name: value.clone() for name, value in model.state_dict().items()}
    table = {name: value.clone() for name, value in loss.state_dict().items()}
    at_half = measure(model, data)
    for arm, file in files.items():
        if file.exists():
            continue
        model.load_state_dict(middle)
        loss.load_state_dict(table)
        term = arm.partition("+")[2]
        used = CombinedLoss("topological_focal", loss, auxiliary_weight=float(term)) if term else loss
        train(model, used, data, range(half, steps), steps, seed, epoch=9)
        images, labels = data["calibration"].tensors
        with torch.no_grad():
            logits = torch.cat([model(batch).logits for batch in images.split(8)])
        temperature = fit_temperature(logits.movedim(1, -1).reshape(-1, 2), labels.reshape(-1))
        row = {"arm": arm, "seed": seed, "steps": steps, "temperature": temperature, "dice_at_half": at_half["dice"]}
        row |= {"before": measure(model, data), "after": measure(model, data, temperature)}
        file.write_text(json.dumps(row, indent=1) + "\n")
        shown = {name: round(row["before"][name], 4) for name in METRICS}
        print(arm, seed, "dice at half", round(at_half["dice"], 3), "T", round(temperature, 3), shown, flush=True)


def tables(folder: Path) -> str:
    """Render means over seeds that all settings have, and paired differences with 95 % intervals of Student's t."""
    runs = {(row["arm"], row["seed"]): row for row in map(json.loads, map(Path.read_text, folder.glob("*.json")))}
    arms = [*BASES, *(f"{base}+{weight}" for base in ("focal", "adafocal") for weight in WEIGHTS)]
    seeds = sorted({seed for _, seed in runs if all((arm, seed) in runs for arm in arms)})
    if len(seeds) < 2:
        raise SystemExit(f"The tables need two seeds with all of {', '.join(arms)}; found {seeds}.")
    values = {
        (arm, when, name): np.array([runs[arm, seed][when][name] for seed in seeds])
        for arm in arms
        for when in ("before", "after")
        for name in METRICS
        if name in runs[arm, seeds[0]][when]
    }
    half = {arm: np.array([runs[arm, seed]["dice_at_half"] for seed in seeds]) for arm in BASES}
    lines = [f"{len(seeds)} seeds: {', '.join(map(str, seeds))}. Dice at half of the run: "]
    lines[0] += ", ".join(f"{arm} {value.mean():.3f}" for arm, value in half.items())
    lines += ["", "| loss | T | " + " | ".join(METRICS) + " |", "| --- " * (len(METRICS) + 2) + "|"]
    for arm in arms:
        for when, temperature in (("before", "1"), ("after", "fitted")):
            if when == "after":
                mean = np.mean([runs[arm, seed]["temperature"] for seed in seeds])
                temperature = f"{mean:.2f}"
            cells = [
                f"{values[arm, when, name].mean():.4f}" if (arm, when, name) in values else "" for name in METRICS
            ]
            lines.append(f"| {arm} | {temperature} | " + " | ".join(cells) + " |")
    lines += ["", "| difference | seeds | " + " | ".join(METRICS) + " |", "| --- " * (len(METRICS) + 2) + "|"]
    pairs = [(f"{base}+{weight}", "before", base, "before") for base in ("focal", "adafocal") for weight in WEIGHTS]
    pairs += [(one, "before", "cross_entropy", "before") for one in arms if one != "cross_entropy"]
    pairs += [("adafocal", "before", "focal", "before"), ("cross_entropy", "after", "cross_entropy", "before")]
    pairs += [("adafocal", when, "cross_entropy", "after") for when in ("before", "after")]
    for one, first, other, second in pairs:
        cells, both = [], sorted({seed for _, seed in runs if {(one, seed), (other, seed)} <= runs.keys()})
        reach = float(stats.t.ppf(0.975, len(both) - 1)) / np.sqrt(len(both))
        for name in METRICS:
            if {first, second} != {"before"} and name.startswith("betti"):
                cells.append("")
                continue
            difference = np.array([runs[one, seed][first][name] - runs[other, seed][second][name] for seed in both])
            cells.append(f"{difference.mean():+.4f} ± {reach * difference.std(ddof=1):.4f}")
        title = f"{one}{' with T' * (first == 'after')} - {other}{' with T' * (second == 'after')}"
        lines.append(f"| {title} | {len(both)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(tables(options.folder))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for base in BASES:
            run(seed, base, options.folder, options.steps)


if __name__ == "__main__":
    main()
