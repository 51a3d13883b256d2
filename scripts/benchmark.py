"""Speed and memory, as ratios to a baseline measured in the same process.

python scripts/benchmark.py losses                  # forward + backward of each loss against F.cross_entropy
python scripts/benchmark.py losses --device cuda --rounds 200

Each round times every candidate once, in a new order, so that a busy machine slows all of them alike; the ratio of a
candidate is the median over rounds of its time by the baseline's time in the same round.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from hf_adafocal.losses import LOSSES

SHAPES = ((128, 10), (4096, 20), (4096, 1000), (512, 32000))
BASELINE = "F.cross_entropy"


def candidates(device: str) -> dict[str, Callable]:
    """Losses by name, the baseline first; AdaFocal with the uneven table of a trained run."""
    losses: dict[str, Callable] = {BASELINE: F.cross_entropy}
    losses |= {name: loss().to(device) for name, loss in LOSSES.items()}
    losses["adafocal"].set_table(torch.linspace(0, 1, 16) ** 0.5, torch.linspace(-2, 4, 15))
    try:
        from kornia.losses import focal_loss
    except ImportError:
        print("kornia (extra `bench`) is missing: its focal loss is left out")
    else:
        losses["kornia focal"] = lambda logits, labels: focal_loss(logits, labels, None, 3.0, "mean")
    return losses


def step(loss: Callable, logits: torch.Tensor, labels: torch.Tensor) -> None:
    """One forward and backward pass."""
    logits.grad = None
    loss(logits, labels).backward()


def seconds(loss: Callable, logits: torch.Tensor, labels: torch.Tensor, repeats: int) -> float:
    """Time of one pass, the mean of `repeats`."""
    if logits.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step(loss, logits, labels)
    if logits.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def peak_bytes(loss: Callable, logits: torch.Tensor, labels: torch.Tensor) -> int:
    """Most bytes held at once during one pass, beyond logits and labels; the gradient of the logits counts."""
    logits.grad = None
    if logits.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, logits, labels)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(loss, logits, labels)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def benchmark_losses(device: str, rounds: int) -> None:
    """Print a Markdown table: time and peak memory of each loss by those of the baseline."""
    losses = candidates(device)
    print("| logits | loss | time | time / CE | peak memory / CE |\n| --- | --- | --- | --- | --- |")
    for shape in SHAPES:
        logits = torch.randn(shape, device=device, requires_grad=True)
        labels = torch.randint(shape[1], shape[:1], device=device)
        for loss in losses.values():  # warm-up
            seconds(loss, logits, labels, 3)
        repeats = max(1, round(2e-3 / seconds(F.cross_entropy, logits, labels, 3)))
        times: dict[str, list[float]] = {name: [] for name in losses}
        for _ in range(rounds):
            for name in random.sample(list(losses), len(losses)):
                times[name].append(seconds(losses[name], logits, labels, repeats))
        memory = {name: peak_bytes(loss, logits, labels) for name, loss in losses.items()}
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(values, times[BASELINE], strict=True))
            cells = (
                f"{shape[0]} x {shape[1]}", name, f"{1e6 * statistics.median(values):.0f} us", f"{ratio:.2f}",
                f"{memory[name] / memory[BASELINE]:.2f}",
            )  # fmt: skip
            print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("losses",))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    benchmark_losses(options.device, options.rounds)


if __name__ == "__main__":
    main()
