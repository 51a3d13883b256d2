"""Time and peak memory of AdaFocal against cross-entropy on TRL's fused head, which makes no logits of all tokens.

python scripts/benchmark_tokens.py                  # vocabularies 32,000 and 128,256; needs the extra `sft`
python scripts/benchmark_tokens.py --device cuda --tokens 8192

Each round times both once, in a new order; the ratio is the median over rounds of AdaFocal's time by cross-entropy's.
"""

import argparse
import random
import statistics
import time
from functools import partial

import torch
from benchmark import peak_bytes
from trl.kernels import ChunkedLogProbFunction

from hf_adafocal.losses import AdaFocalLoss
from hf_adafocal.losses.functional import modulate

VOCABULARIES = (32_000, 128_256)
HIDDEN = 256


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    adafocal = AdaFocalLoss().to(options.device)
    adafocal.set_table(torch.linspace(0, 1, 16) ** 0.5, torch.linspace(-2, 4, 15))
    losses = {"cross_entropy": lambda ce: ce, "adafocal": lambda ce: modulate(ce, adafocal.gamma)}
    print("| tokens x vocabulary | loss | time | time / CE | peak memory | memory / CE |\n| --- " + "| --- " * 5 + "|")
    for vocabulary in VOCABULARIES:
        hidden = torch.randn(options.tokens, HIDDEN, device=options.device, requires_grad=True)
        weight = (0.1 * torch.randn(vocabulary, HIDDEN, device=options.device)).requires_grad_()
        labels = torch.randint(vocabulary, (options.tokens,), device=options.device)

        def step(loss, hidden=hidden, weight=weight, labels=labels) -> None:
            hidden.grad = weight.grad = None
            log_p = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, ("log_probs",))[
                0
            ]
            loss(-log_p).sum().backward()

        times: dict[str, list[float]] = {name: [] for name in losses}
        for loss in losses.values():  # warm-up
            step(loss)
        for _ in range(options.rounds):
            for name in random.sample(list(losses), len(losses)):
                start = time.perf_counter()
                step(losses[name])
                if options.device != "cpu":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
        memory = {}
        for name, loss in losses.items():
            hidden.grad = weight.grad = None  # or the pass that is measured would begin with less than nothing
            memory[name] = peak_bytes(partial(step, loss), options.device != "cpu")
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(values, times["cross_entropy"], strict=True))
            share = memory[name] / memory["cross_entropy"]
            print(
                f"| {options.tokens} x {vocabulary} | {name} | {statistics.median(values):.3f} s | {ratio:.3f} | "
                f"{memory[name] / 2**20:.0f} MiB | {share:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
