"""Time and peak memory of AdaFocal against cross-entropy on TRL's fused head: `benchmark.py losses --tokens`."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from trl.kernels import ChunkedLogProbFunction

from hf_adafocal.losses import AdaFocalLoss
from hf_adafocal.losses.functional import modulate

VOCABULARIES = (32_000, 128_256)
HIDDEN, CHUNK = 256, 32_768


def benchmark_tokens(
    device: str, rounds: int, tokens: int, peak_bytes: Callable, vocabularies: Sequence[int] = VOCABULARIES
) -> None:
    """Print a Markdown table: forward and backward of the language model's head and the loss, for each vocabulary.

    Each round times both losses once, in a new order; the ratio is the median over rounds. On the CPU it is processor
    time, which other jobs stretch less than they stretch the clock's.

    Args:
        device: Where to run.
        rounds: How often.
        tokens: Of a batch.
        peak_bytes: Most bytes held during a call, as `benchmark.peak_bytes`.
        vocabularies: Sizes of the head.
    """
    adafocal = AdaFocalLoss().to(device)
    adafocal.set_table(torch.linspace(0, 1, 16) ** 0.5, torch.linspace(-2, 4, 15))
    losses = {"cross_entropy": lambda ce: ce, "adafocal": lambda ce: modulate(ce, adafocal.gamma)}
    kind = "processor time" if device == "cpu" else "time"
    print(f"| tokens x vocabulary | loss | {kind} | {kind} / CE | peak memory | memory / CE |\n{'| --- ' * 6}|")
    for vocabulary in vocabularies:
        hidden = torch.randn(tokens, HIDDEN, device=device, requires_grad=True)
        weight = (0.1 * torch.randn(vocabulary, HIDDEN, device=device)).requires_grad_()
        labels = torch.randint(vocabulary, (tokens,), device=device)

        def step(loss, hidden=hidden, weight=weight, labels=labels) -> None:
            hidden.grad = weight.grad = None
            settings = (1.0, CHUNK, None, 1.0, ("log_probs",))
            (log_p, *_) = ChunkedLogProbFunction.apply(hidden, weight, None, labels, *settings)
            loss(-log_p).sum().backward()

        times: dict[str, list[float]] = {name: [] for name in losses}
        for loss in losses.values():  # warm-up
            step(loss)
        for _ in range(rounds):
            for name in random.sample(list(losses), len(losses)):
                times[name].append(seconds(partial(step, losses[name]), device))
        memory = {}
        for name, loss in losses.items():
            hidden.grad = weight.grad = None  # or the pass that is measured would begin with less than nothing
            memory[name] = peak_bytes(partial(step, loss), device != "cpu")
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(values, times["cross_entropy"], strict=True))
            share = memory[name] / memory["cross_entropy"]
            print(
                f"| {tokens} x {vocabulary} | {name} | {statistics.median(values):.3f} s | {ratio:.3f} | "
                f"{memory[name] / 2**20:.0f} MiB | {share:.3f} |",
                flush=True,
            )


def seconds(function: Callable, device: str) -> float:
    """Processor time of a call on the CPU, elapsed time on another device."""
    if device == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start
