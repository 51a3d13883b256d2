"""Simulate how often `calibration_gate` passes: models above the limit (errors) and calibrated ones (power).

    python scripts/simulate_gate.py --trials 1000 --output model_cards/gate.md

Confidences are drawn anew in each trial, from distributions that are sharp to flat. A model above the limit has its
error in one of four shapes: over-confident everywhere, under-confident everywhere, both in turn from bin to bin, or
all of it in the most frequent bin. The table holds the worst shape. A seed fixes every number.
"""

import argparse
from pathlib import Path

import numpy as np

from hf_adafocal.metrics.gate import samples_needed
from hf_adafocal.metrics.intervals import calibration_error_interval

SIZES = (20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
LIMITS = (0.03, 0.05, 0.1)
EXCESS = 1.001  # a model above the limit has this many times the limit as its true error
BINS = 15
DISTRIBUTIONS = {
    "one value, 0.995": lambda generator, size: np.full(size, 0.995),
    "one value, 0.9": lambda generator, size: np.full(size, 0.9),
    "two values, 0.99 (90 %) and 0.55": lambda generator, size: np.where(generator.random(size) < 0.9, 0.99, 0.55),
    "sharp: 80 % near 0.99, the others 0.4 to 1": lambda generator, size: np.where(
        generator.random(size) < 0.8,
        1 - generator.exponential(0.01, size).clip(0, 0.3),
        generator.uniform(0.4, 1, size),
    ),
    "peaked: Beta(8, 2)": lambda generator, size: generator.beta(8, 2, size),
    "flat: uniform on 0.2 to 1": lambda generator, size: generator.uniform(0.2, 1, size),
}


def rates(confidence: np.ndarray, shape: str, bin_of: np.ndarray, frequent: int, size: float) -> np.ndarray:
    """Return the probability that each sample is correct, for a gap of `size` in the bins of a shape."""
    sign = {
        "over": np.ones(len(confidence)),
        "under": -np.ones(len(confidence)),
        "alternating": np.where(bin_of % 2, 1.0, -1.0),
        "one bin": (bin_of == frequent) * 1.0,
    }[shape]
    return np.clip(confidence - sign * size, 0, 1)


def gap_for(draw, shape: str, frequent: int, target: float) -> float | None:
    """Find the gap at which the true binned error is `target`, by bisection; None if no gap is large enough."""
    confidence = draw(np.random.default_rng(0), 1_000_000)
    bin_of = bins_of(confidence)

    def error(size: float) -> float:
        gap = confidence - rates(confidence, shape, bin_of, frequent, size)
        return float(np.abs(np.bincount(bin_of, gap)).sum() / len(confidence))

    low, high = 0.0, 1.0
    if error(high) < target:
        return None
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if error(middle) >= target else (middle, high)
    return high


def bins_of(confidence: np.ndarray) -> np.ndarray:
    """Return the equal-width bin of each confidence."""
    return np.searchsorted(np.arange(1, BINS) / BINS, confidence)


def share_passed(draw, limit: float, size: int, trials: int, seed: int, shape: str = "", gap: float = 0.0, frequent=0):
    """Compute the share of simulated data sets whose interval ends at or below the limit."""
    generator, passed = np.random.default_rng(seed), 0
    for _ in range(trials):
        confidence = draw(generator, size)
        rate = rates(confidence, shape, bins_of(confidence), frequent, gap) if shape else confidence
        interval = calibration_error_interval(confidence, generator.random(size) < rate, BINS)
        passed += interval.high <= limit
    return passed / trials


def tables(trials: int, seed: int) -> str:
    """Render the two tables as Markdown."""
    head = f"| confidences | limit | {' | '.join(f'{size:,}' for size in SIZES)} |"
    rule = "| --- | ---: |" + " ---: |" * len(SIZES)
    errors, power = [head, rule], [head[:-1] + "| samples named: power |", rule + " ---: |"]
    for name, draw in DISTRIBUTIONS.items():
        frequent = int(np.bincount(bins_of(draw(np.random.default_rng(0), 100_000))).argmax())
        for limit in LIMITS:
            gaps = {
                shape: gap_for(draw, shape, frequent, EXCESS * limit)
                for shape in ("over", "under", "alternating", "one bin")
            }
            worst = [
                max(
                    share_passed(draw, limit, size, trials, seed, shape, gap, frequent)
                    for shape, gap in gaps.items()
                    if gap is not None
                )
                for size in SIZES
            ]
            errors.append(f"| {name} | {limit} | {' | '.join(f'{100 * share:.1f}' for share in worst)} |")
            found = [share_passed(draw, limit, size, trials // 4, seed) for size in SIZES]
            needed = samples_needed(draw(np.random.default_rng(0), 100_000), max_ece=limit, num_bins=BINS)
            at_needed = share_passed(draw, limit, needed, trials // 4, seed)
            cells = " | ".join(f"{100 * share:.0f}" for share in found)
            power.append(f"| {name} | {limit} | {cells} | {needed:,}: {100 * at_needed:.0f} |")
    return PAGE.format(errors="\n".join(errors), power="\n".join(power), trials=trials, quarter=trials // 4, seed=seed)


PAGE = """# How often the calibration gate passes

`calibration_gate` passes if the upper end of the 95 % interval of ECE (15 equal-width bins) is within the limit. It
promises that a model above the limit passes at most 2.5 % of the time, for any number of samples. Printed by
`python scripts/simulate_gate.py --trials {trials}` (seed {seed}).

## Models above the limit

Percent of {trials:,} simulations that pass, by the number of samples, for a true ECE of 1.001 times the limit. Each
number is the worst of four shapes of the error: over-confident everywhere, under-confident everywhere, alternating
from bin to bin, all in the most frequent bin. At a true rate of 2.5 % each, chance alone takes the worst of four to
3.3 % on average, and to 5 % somewhere in a table of this size (400 simulations).

{errors}

## Calibrated models

Percent of {quarter} simulations that pass. The last column is the number of samples that the message of the gate names
for this limit, and the percentage that passes with so many (aim: 90).

{power}

Few samples cannot pass: without a single error 100 samples still leave an error rate of 3.6 % possible. Flat
confidences need the most samples, because every bin must be known; fewer bins (`num_bins`) need fewer.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="simulations per number of the first table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file to write; otherwise the tables are printed")
    options = parser.parse_args()
    page = tables(options.trials, options.seed)
    if options.output:
        options.output.write_text(page)
    else:
        print(page)
