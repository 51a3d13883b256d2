"""Speed and memory, as ratios to a baseline measured in the same process.

python scripts/benchmark.py losses                  # forward + backward of each loss against F.cross_entropy
python scripts/benchmark.py losses --device cuda --rounds 200
python scripts/benchmark.py losses --tokens         # AdaFocal against cross-entropy on TRL's fused head (extra `sft`)
python scripts/benchmark.py metrics                 # each metric against the peers that have it: values and times
python scripts/benchmark.py trainer                 # steps and evaluations of AdaFocalTrainer by the stock Trainer's

Each round times every candidate once, in a new order, so that a busy machine slows all of them alike; the ratio of a
candidate is the median over rounds of its time by the baseline's time in the same round.

On Linux set MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=40000000000 for `losses` on the CPU: else large
tensors are mapped anew in some calls and not in others, and that is what the ratios then show.
"""

import argparse
import random
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np
import sklearn.metrics
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, StackDataset

from hf_adafocal.losses.layout import classes_second
from hf_adafocal.losses.registry import PER_SAMPLE_LOSSES
from hf_adafocal.metrics import classwise
from hf_adafocal.metrics import scores as metrics

SHAPES = ((128, 10), (4096, 20), (4096, 1000), (512, 32000))
TOKENS = (8, 128, 1000)  # texts, tokens, classes
BASELINE = "F.cross_entropy"
METRIC_SHAPES = ((10_000, 10), (50_000, 100), (50_000, 1000))
NUM_BINS = 15
SLOW = 2.0  # seconds: from there on one call is timed, not one a round
ONE_MAX = "one max"
OURS = "hf_adafocal"
STOCK = "Trainer"
STEPS, BATCH = 12, 32  # of a timed piece of training
SAMPLES, CLASSES = 50_000, 1000  # of an evaluation
IMAGES = 1024  # of an evaluation by a network
VIT = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512, "image_size": 32,
    "patch_size": 8, "num_labels": CLASSES,
}  # fmt: skip


def candidates(device: str) -> dict[str, Callable]:
    """Return the losses by name, the baseline first; AdaFocal has the table of a trained run."""
    losses: dict[str, Callable] = {BASELINE: F.cross_entropy}
    losses |= {name: loss().to(device) for name, loss in PER_SAMPLE_LOSSES.items()}
    losses["adafocal"].set_table(torch.linspace(0, 1, 16) ** 0.5, torch.linspace(-2, 4, 15))
    try:
        from kornia.losses import focal_loss
    except ImportError:
        print("kornia (extra `bench`) is missing: its focal loss is left out")
    else:
        losses["kornia focal"] = lambda logits, labels: focal_loss(logits, labels, None, 3.0, "mean")
    return losses


def step(loss: Callable, logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Run one forward and backward pass."""
    logits.grad = None
    loss(logits, labels).backward()


def seconds(loss: Callable, logits: torch.Tensor, labels: torch.Tensor, repeats: int) -> float:
    """Measure the time of one pass, the mean of `repeats`."""
    if logits.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step(loss, logits, labels)
    if logits.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def peak_bytes(function: Callable, on_gpu: bool) -> int:
    """Measure the peak memory of a call, beyond what was allocated before it."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def benchmark_losses(device: str, rounds: int) -> None:
    """Print a Markdown table of time and peak memory of each loss, as ratios to the baseline."""
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
        memory = {}
        for name, loss in losses.items():
            logits.grad = None
            memory[name] = peak_bytes(partial(step, loss, logits, labels), logits.is_cuda)
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(values, times[BASELINE], strict=True))
            cells = (
                f"{shape[0]} x {shape[1]}", name, f"{1e6 * statistics.median(values):.0f} us", f"{ratio:.2f}",
                f"{memory[name] / memory[BASELINE]:.2f}",
            )  # fmt: skip
            print("| " + " | ".join(cells) + " |", flush=True)


def benchmark_tokens(device: str, rounds: int) -> None:
    """Print what AdaFocal of token logits, classes last, takes as rows and with the classes moved second."""
    adafocal = candidates(device)["adafocal"]
    logits = torch.randn(TOKENS, device=device, requires_grad=True)
    labels = torch.randint(TOKENS[-1], TOKENS[:-1], device=device)
    layouts: dict[str, Callable] = {
        "F.cross_entropy, rows": lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten()),
        "adafocal, rows": lambda logits, labels: adafocal(*classes_second(logits, labels)),
        "adafocal, classes second": lambda logits, labels: adafocal(logits.movedim(-1, 1), labels),
    }
    print(f"\n| tokens {TOKENS} | time | by the first |\n| --- | --- | --- |")
    times = interleaved(layouts, lambda loss: seconds(loss, logits, labels, 3), rounds)
    for name, (spent, ratio) in times.items():
        print(f"| {name} | {1e3 * spent:.1f} ms | {ratio:.2f} |", flush=True)


def predictions(samples: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Make over-confident float32 probabilities and labels."""
    logits = np.random.default_rng(0).normal(size=(samples, classes)) * 2
    noise = np.random.default_rng(1).gumbel(size=logits.shape)
    return metrics.softmax(1.5 * logits).astype(np.float32), (logits + noise).argmax(axis=1)


def our_metrics(p: np.ndarray, y: np.ndarray) -> dict[str, Callable]:
    """Metrics of this package, by name."""
    return {
        ONE_MAX: lambda: p.max(axis=1).mean(),
        "accuracy": lambda: metrics.accuracy(p, y),
        "nll": lambda: metrics.negative_log_likelihood(p, y),
        "brier": lambda: metrics.brier_score(p, y),
        "ece": lambda: metrics.expected_calibration_error(p, y, NUM_BINS),
        "ece_l2": lambda: metrics.calibration_error(*metrics.top_label(p, y), NUM_BINS, norm="l2"),
        "mce": lambda: metrics.maximum_calibration_error(p, y, NUM_BINS),
        "ada_ece": lambda: metrics.adaptive_calibration_error(p, y, NUM_BINS),
        "classwise_ece": lambda: classwise.classwise_calibration_error(p, y, NUM_BINS),
        "classwise_ece, equal mass": lambda: classwise.classwise_calibration_error(
            p, y, NUM_BINS, scheme="equal_mass"
        ),
        "ace": lambda: classwise.class_adaptive_calibration_error(p, y, NUM_BINS),
        "calibration_report": lambda: metrics.calibration_report(p, y, NUM_BINS)["classwise_ece"],
    }


def scikit_learn(p: np.ndarray, y: np.ndarray) -> dict[str, Callable]:
    """Metrics of scikit-learn: no calibration error; NLL clips probabilities at the dtype's epsilon."""
    classes = np.arange(p.shape[1])
    return {
        "accuracy": lambda: sklearn.metrics.accuracy_score(y, p.argmax(axis=1)),
        "nll": lambda: sklearn.metrics.log_loss(y, p, labels=classes),
        "brier": lambda: sklearn.metrics.brier_score_loss(y, p, labels=classes, scale_by_half=False),
    }


def torchmetrics(p: np.ndarray, y: np.ndarray) -> dict[str, Callable]:
    """Metrics of torchmetrics: bins are [lower, upper), with one more bin for a confidence of 1.0; sums in float32."""
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    p, y, classes = torch.from_numpy(p), torch.from_numpy(y), p.shape[1]
    errors = {
        name: lambda norm=norm: multiclass_calibration_error(p, y, classes, NUM_BINS, norm)
        for name, norm in {"ece": "l1", "ece_l2": "l2", "mce": "max"}.items()
    }
    return {"accuracy": lambda: multiclass_accuracy(p, y, classes, average="micro"), **errors}


def torch_uncertainty(p: np.ndarray, y: np.ndarray) -> dict[str, Callable]:
    """Metrics of torch-uncertainty: torchmetrics' bins; AdaECE cuts sorted samples into equal parts, through ties."""
    from torch_uncertainty.metrics import classification as peer

    p, y, classes = torch.from_numpy(p), torch.from_numpy(y), p.shape[1]

    def value(metric) -> torch.Tensor:
        metric.update(p, y)
        return metric.compute()

    of_classes = {"task": "multiclass", "num_classes": classes, "num_bins": NUM_BINS}
    return {
        "nll": lambda: value(peer.CategoricalNLL()),
        "brier": lambda: value(peer.BrierScore(num_classes=classes)),
        "ece": lambda: value(peer.CalibrationError(**of_classes)),
        "ada_ece": lambda: value(peer.AdaptiveCalibrationError(**of_classes)),
        "classwise_ece": lambda: value(peer.ClasswiseCalibrationError(classes, NUM_BINS)),
    }


def netcal(p: np.ndarray, y: np.ndarray) -> dict[str, Callable]:
    """Metrics of netcal: bins are [lower, upper), the last one closed; its "ACE" is another metric and left out."""
    from netcal.metrics import ECE, MCE

    return {
        "ece": lambda: ECE(NUM_BINS).measure(p, y),
        "mce": lambda: MCE(NUM_BINS).measure(p, y),
        "ada_ece": lambda: ECE(NUM_BINS, equal_intervals=False).measure(p, y),
    }


def relplot(p: np.ndarray, y: np.ndarray) -> dict[str, Callable]:
    """Metrics of relplot: bins are [lower, upper) by division in the input's dtype, with one more bin for 1.0."""
    from relplot.metrics import binnedECE, multiclass_logits_to_confidences

    return {"ece": lambda: binnedECE(*multiclass_logits_to_confidences(p, y, probs=True), NUM_BINS)}


def timed(function: Callable) -> float:
    """Measure the seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def benchmark_metrics(rounds: int) -> None:
    """Print a Markdown table of value and time of each metric, ours first, then other libraries that have it."""
    peers = []
    for peer in (scikit_learn, torchmetrics, torch_uncertainty, netcal, relplot):
        try:
            peer(*predictions(2, 2))
        except ImportError as error:
            print(f"{peer.__name__} (extra `bench`) is left out: {error}")
        else:
            peers.append(peer)
    print("| probabilities | metric | of | value | minus ours | time | time / ours | time / one max |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape in METRIC_SHAPES:
        arrays = predictions(*shape)
        functions = {(name, OURS): function for name, function in our_metrics(*arrays).items()}
        for peer in peers:
            functions |= {(name, peer.__name__): function for name, function in peer(*arrays).items()}
        values = {key: float(function()) for key, function in functions.items()}  # and warm-up
        once = {key: timed(function) for key, function in functions.items()}
        times: dict[tuple[str, str], list[float]] = {key: [] for key in functions}
        for _ in range(rounds):
            for key in random.sample(list(functions), len(functions)):
                times[key].append(timed(functions[key]) if once[key] < SLOW else once[key])
        names = list(our_metrics(*arrays))
        for name, who in sorted(functions, key=lambda key: names.index(key[0])):
            to_ours, to_max = (
                statistics.median(a / b for a, b in zip(times[name, who], times[base], strict=True))
                for base in ((name, OURS), (ONE_MAX, OURS))
            )
            difference = "" if who == OURS else f"{values[name, who] - values[name, OURS]:+.1e}"
            cells = (
                f"{shape[0]} x {shape[1]}", name, who, f"{values[name, who]:.8f}", difference,
                f"{1e3 * statistics.median(times[name, who]):.2f} ms", f"{to_ours:.2f}", f"{to_max:.2f}",
            )  # fmt: skip
            print("| " + " | ".join(cells) + " |", flush=True)


class KnownLogits(nn.Module):
    """Dummy classifier that returns precomputed logits, so that timings exclude the model."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.register_buffer("logits", 3 * torch.randn(4096, CLASSES))

    def forward(self, index: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return some rows of the logits, as a view; with labels also their cross-entropy."""
        logits = self.logits[: len(index)]
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def trainers(losses: list[str], model: Callable[[], nn.Module], data: dict[str, Dataset], **settings) -> dict:
    """Return the stock Trainer, and ours by the name of the loss, each with a model of its own."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from hf_adafocal import AdaFocalTrainer, AdaFocalTrainingArguments

    common = {
        "max_steps": STEPS, "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": 256,
        "eval_strategy": "steps", "eval_steps": 10**9, "save_strategy": "no", "logging_strategy": "no",
        "report_to": "none", "disable_tqdm": True, **settings,
    }  # fmt: skip
    found = {STOCK: Trainer(model(), TrainingArguments(**common), **data)}
    for loss in losses:
        found[loss] = AdaFocalTrainer(model(), AdaFocalTrainingArguments(loss=loss, **common), **data)
    for trainer in found.values():
        trainer.remove_callback(PrinterCallback)
    return found


def step_seconds(trainer) -> float:
    """Measure the time of one training step, the median of a short run, without start-up costs."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if not args.use_cpu:
                torch.cuda.synchronize()
            ticks.append(time.perf_counter())

    ticks: list[float] = []
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    return statistics.median(np.diff(ticks))


def interleaved(candidates: dict, seconds: Callable, rounds: int) -> dict[str, tuple[float, float]]:
    """Time candidates in random order: for each the median time, and its median ratio to the first one's."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():  # warm-up
        seconds(candidate)
    for _ in range(rounds):
        for name in random.sample(list(candidates), len(candidates)):
            times[name].append(seconds(candidates[name]))
    base = times[next(iter(candidates))]
    return {
        name: (statistics.median(values), statistics.median(a / b for a, b in zip(values, base, strict=True)))
        for name, values in times.items()
    }


def traced_bytes(function: Callable) -> tuple[int, int]:
    """Measure the bytes of Python and numpy that a call leaves allocated, and their peak."""
    tracemalloc.start()
    function()
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return left, peak


def share_of_temperature(network: nn.Module, pixels: torch.Tensor, batch: int, rounds: int) -> float:
    """Time the sums behind `eval_temperature` and `eval_refinement` relative to the forward passes of a set."""
    from hf_adafocal.scaling.grid import SumsOnGrid

    on_cpu = pixels.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter  # of processor time other programs take none

    def now() -> float:
        if not on_cpu:
            torch.cuda.synchronize()
        return clock()

    shares = []
    for _ in range(rounds):
        sums, spent = SumsOnGrid(), np.zeros(2)
        for part in pixels.split(batch):
            start = now()
            logits = network(part).logits
            between = now()
            sums.add(logits, torch.arange(len(part), device=part.device) % logits.shape[-1])
            spent += between - start, now() - between
        start = now()
        sums.total()
        shares.append((spent[1] + now() - start) / spent[0])
    return statistics.median(shares)


def benchmark_trainer(device: str, rounds: int) -> None:
    """Print steps per second relative to the stock Trainer's, then the cost of calibration in an evaluation."""
    from transformers import ViTConfig, ViTForImageClassification

    def vit() -> nn.Module:
        return ViTForImageClassification(ViTConfig(**VIT))

    def images(seed: int) -> Dataset:
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(IMAGES, 3, VIT["image_size"], VIT["image_size"], generator=generator)
        return StackDataset(pixel_values=pixels, labels=labels[:IMAGES])

    labels = torch.arange(SAMPLES) % CLASSES
    with tempfile.TemporaryDirectory() as folder:
        settings = {"output_dir": folder, "use_cpu": device == "cpu"}
        data = {"train_dataset": images(0), "eval_dataset": images(1)}
        network = trainers(["cross_entropy", "adafocal"], vit, data, **settings)
        print("| training, small ViT | step | speed / stock |\n| --- | --- | --- |")
        for name, (step_time, ratio) in interleaved(network, step_seconds, rounds).items():
            print(f"| {name} | {1e3 * step_time:.1f} ms | {1 / ratio:.3f} |", flush=True)

        print("\n| temperature and refinement, batches of | by the forward passes |\n| --- | --- |")
        place = torch.device("cpu" if device == "cpu" else "cuda")
        pixels = data["eval_dataset"].datasets["pixel_values"].to(place)
        with torch.no_grad():
            for batch in (8, 32, 256):
                share = share_of_temperature(network["adafocal"].model.to(place).eval(), pixels, batch, rounds)
                print(f"| {batch} | {100 * share:.1f} % |", flush=True)

        samples = {"eval_dataset": StackDataset(index=torch.arange(SAMPLES), labels=labels)}
        known = trainers(["adafocal"], KnownLogits, samples, **settings)
        del network["cross_entropy"]
        print("\n| evaluation | samples | stock | with calibration | ratio | added per sample |")
        print("| --- | --- | --- | --- | --- | --- |")
        for title, pair, size in (("small ViT", network, IMAGES), ("logits known", known, SAMPLES)):
            found = interleaved(pair, lambda trainer: timed(trainer.evaluate), rounds)
            (stock, _), (ours, ratio) = found.values()
            cells = (
                f"{title}, {CLASSES} classes", f"{size}", f"{stock:.2f} s", f"{ours:.2f} s", f"{ratio:.3f}",
                f"{1e6 * (ours - stock) / size:.1f} us",
            )  # fmt: skip
            print("| " + " | ".join(cells) + " |", flush=True)
        (before, least), (held, most) = (traced_bytes(trainer.evaluate) for trainer in known.values())
    print(f"\nCalibration holds {(held - before) / 1e6:.2f} MB, {(most - least) / 1e6:.2f} MB while it counts bins.")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("losses", "metrics", "trainer"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, help="default: 60 for losses, 9 for metrics, 15 for trainer and tokens")
    parser.add_argument("--tokens", type=int, nargs="?", const=1024, help="losses of so many tokens (default: 1,024)")
    options = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    if options.what == "losses" and options.tokens:
        from benchmark_tokens import benchmark_tokens

        benchmark_tokens(options.device, options.rounds or 15, options.tokens, peak_bytes)
    elif options.what == "losses":
        benchmark_losses(options.device, options.rounds or 60)
        benchmark_tokens(options.device, options.rounds or 60)
    elif options.what == "metrics":
        benchmark_metrics(options.rounds or 9)
    else:
        benchmark_trainer(options.device, options.rounds or 15)


if __name__ == "__main__":
    main()
