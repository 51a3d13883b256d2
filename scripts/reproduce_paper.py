"""Train AdaFocal and its baselines for the paper's number of epochs: runs, tables and calibration curves.

python scripts/reproduce_paper.py run --data FOLDER                     # small settings, main methods, three seeds
python scripts/reproduce_paper.py run --data FOLDER --settings small_texts --methods all
python scripts/reproduce_paper.py run --data FOLDER --settings news --methods cross_entropy adafocal --seeds 0
python scripts/reproduce_paper.py table                                 # Markdown, from the committed reports
python scripts/reproduce_paper.py figure                                # PNG, from the committed reports

FOLDER holds `20_newsgroups`, `reuters_r8` and `cifar10`, each a data set for `datasets.load_dataset`. Every run goes
through `AdaFocalTrainer` with one thread, two runs at a time. A run whose report is there is not repeated, and one
that was interrupted goes on from its last complete checkpoint. Seeds change the split, the initial weights and the
order of the samples; runs of one seed differ in the method alone. Settings were fixed before the test split was read;
nothing was chosen by it. The test curve is recorded for the figure alone.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from paper_settings import ABLATIONS, DATA, FIGURE, MAIN, METHODS, SETTINGS, Parts, Setting
from paper_tables import figure, tables
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from hf_adafocal import AdaFocalTrainer, AdaFocalTrainingArguments
from hf_adafocal.data.tensor_rows import TensorRows, whole_batch
from hf_adafocal.metrics import calibration_report, entropy_score, expected_calibration_error, ood_auroc, softmax
from hf_adafocal.preserved_state import evaluating
from hf_adafocal.report.facts import versions
from hf_adafocal.scaling.fit import fit_temperature
from hf_adafocal.training.checkpoints import last_complete_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["small_texts", "small_texts_sum", "small_images", "small_images_sum"]
REPORTS = ROOT / "model_cards" / "paper"


def main() -> None:
    """Parse the command line and run, tabulate or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "table", "figure"))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SMALL)
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, "all"), default=list(MAIN))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--folder", type=Path, default=Path("runs/paper"), help="checkpoints of unfinished runs")
    parser.add_argument("--reports", type=Path, default=REPORTS)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if options.verb == "table":
        print(tables(options.reports))
    elif options.verb == "figure":
        figure(options.reports, options.reports / "length.png")
    elif options.data is None:
        parser.error("run needs --data, the folder of the data sets")
    else:
        methods = (
            [name for name in METHODS if name not in ABLATIONS] if options.methods == ["all"] else options.methods
        )
        work = [(s, m, seed) for seed in options.seeds for s in options.settings for m in methods]
        run_all(work, options.data, options.folder, options.reports, options.jobs)


def run_all(work: list[tuple[str, str, int]], data: Path, folder: Path, reports: Path, jobs: int) -> None:
    """Run several experiments, each in a process with one thread.

    Raises:
        RuntimeError: If runs failed, after the others are done.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that start below
    failed = []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker) as pool:
        running = {pool.submit(run, *one, data, folder, reports): one for one in work}
        for done in as_completed(running):
            name = "{}/{}-{}".format(*running[done])
            try:
                print(time.strftime("%H:%M:%S"), name, done.result(), flush=True)
            except Exception as error:
                failed.append(f"{name}: {error!r}")
                print(failed[-1], flush=True)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(work)} runs failed: " + "; ".join(failed))


def start_worker() -> None:
    """Use one thread, and end with the parent: what it left running would meet the resumed run in one folder."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run(setting_name: str, method: str, seed: int, data: Path, folder: Path, reports: Path) -> str:
    """Train, evaluate and write the report of one run, or resume it.

    Returns:
        A line for the log.
    """
    target = reports / setting_name / f"{method}-{seed}.json"
    if target.exists():
        return "was there"
    setting, output = SETTINGS[setting_name], folder / setting_name / f"{method}-{seed}"
    parts = cached_parts(setting.data, data, folder, seed)
    checkpoint, start = last_complete_checkpoint(output), time.process_time()
    trainer, curve = make_trainer(setting, method, seed, parts, output)
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = None if checkpoint else round(time.process_time() - start)
    report = {
        "setting": setting_name,
        "method": method,
        "seed": seed,
        "command": shlex.join(
            ["python", "scripts/reproduce_paper.py", "run", "--settings", setting_name, "--methods", method]
            + ["--seeds", str(seed), "--data", "FOLDER"]
        ),
        "commit": commit(),
        "versions": versions(),
        "device": ", then ".join(dict.fromkeys(note["device"] for note in curve.notes)),
        "threads": torch.get_num_threads(),
        "cpu_seconds": seconds,
        "training": {"epochs": setting.epochs, "batch_size": setting.batch_size, "optimizer": setting.optimizer}
        | ({"bf16": True} if trainer.args.bf16 else {})
        | setting.recipe
        | METHODS[method],
        "sizes": {role: len(parts[role][1]) for role in ("train", "calibration", "test")},
        **final_report(trainer.model, setting, parts, seed),
        "log": training_log(trainer, curve),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(readable(report))
    partial.replace(target)
    shutil.rmtree(output)
    return "ECE {:.4f} -> {:.4f}, accuracy {:.4f}".format(
        report["raw"]["ece"], report["temperature_scaled"]["ece"], report["raw"]["accuracy"]
    )


def make_trainer(
    setting: Setting, method: str, seed: int, parts: Parts, output: Path
) -> tuple[AdaFocalTrainer, "Curve"]:
    """Build the trainer of one run and the callback that records its curve."""
    rows = {role: setting.rows(parts, role, seed) for role in ("train", "calibration", "test")}
    steps_per_epoch = -(-len(rows["train"]) // setting.batch_size)
    recipe = setting.recipe
    args = AdaFocalTrainingArguments(
        output_dir=str(output),
        num_train_epochs=setting.epochs,
        per_device_train_batch_size=setting.batch_size,
        per_device_eval_batch_size=500,
        max_grad_norm=recipe["max_grad_norm"],
        eval_strategy="epoch",
        save_strategy="epoch" if setting.best_validation else "steps",
        save_steps=setting.save_every * steps_per_epoch,
        save_total_limit=2,
        load_best_model_at_end=setting.best_validation,
        metric_for_best_model="accuracy" if setting.best_validation else None,
        logging_strategy="epoch",
        seed=seed,
        remove_unused_columns=False,  # batches come whole
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=setting.bf16 and torch.cuda.is_available(),
        **METHODS[method],
    )
    torch.backends.cudnn.allow_tf32 = False  # on a GPU too, float32 is float32
    set_seed(seed)
    network = setting.network()
    if setting.optimizer == "adam":
        optimizer = torch.optim.Adam(network.parameters(), recipe["learning_rate"])
        milestones: tuple[int, ...] = ()
    else:
        optimizer = torch.optim.SGD(
            network.parameters(), recipe["learning_rate"], momentum=0.9, weight_decay=recipe["weight_decay"]
        )
        milestones = tuple(round(setting.epochs * share) * steps_per_epoch for share in (3 / 7, 5 / 7))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 ** sum(step >= m for m in milestones))
    curve = Curve(rows["calibration"], rows["test"], setting.curve_every if method in FIGURE else 0)
    trainer = AdaFocalTrainer(
        network,
        args,
        train_dataset=rows["train"],
        eval_dataset=rows["calibration"],
        data_collator=whole_batch,
        optimizers=(optimizer, schedule),
        callbacks=[curve],
    )
    curve.loss = trainer.loss
    return trainer, curve


class Curve(TrainerCallback):
    """Record the gammas in use after each epoch, and every few epochs the calibration of the test split.

    What it notes travels in `trainer_state.json`, so a resumed run has the curve of an uninterrupted one.

    Args:
        calibration: On which the curve's temperatures are fitted.
        test: The test split.
        every: Epochs between readings of the test split; the first ten epochs are all read. 0 for none.
    """

    key = "paper_curve"

    def __init__(self, calibration: TensorRows, test: TensorRows, every: int) -> None:
        self.calibration, self.test, self.every = calibration, test, every
        self.loss: Any = None
        self.notes: list[dict] = []

    def on_train_begin(self, args, state, control, **kwargs):
        """Load the record from the checkpoint."""
        self.notes = state.stateful_callbacks.setdefault(self.key, [])

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        """Record this epoch."""
        epoch = round(state.epoch)
        note: dict[str, Any] = {"epoch": epoch, "device": device()}
        table = self.loss.table() if hasattr(self.loss, "table") else {}
        if "gammas" in table:
            note |= {"gammas": table["gammas"], "edges": table["edges"]}
        if "smoothing" in table:
            note["smoothing"] = table["smoothing"]
        if self.every and (epoch <= 10 or epoch % self.every == 0):
            temperature = fit_temperature(logits_of(model, self.calibration), self.calibration.labels)
            logits, labels = logits_of(model, self.test), self.test.labels.numpy()
            raw, scaled = softmax(logits.numpy()), softmax((logits / temperature).numpy())
            report = calibration_report(raw, labels)
            note["test"] = {name: report[name] for name in ("accuracy", "nll", "ece", "ada_ece")}
            note["test"] |= {"temperature": temperature, "scaled_ece": expected_calibration_error(scaled, labels)}
        self.notes.append(note)
        state.stateful_callbacks[self.key] = self.notes


@torch.no_grad()
def logits_of(model: nn.Module, rows: TensorRows, batch_size: int = 500) -> Tensor:
    """Compute logits in evaluation mode, shape `(N, C)`, without changing the random state."""
    device = next(model.parameters()).device
    with evaluating(model):
        batches = torch.arange(len(rows)).split(batch_size)
        return torch.cat([model(**{rows.name: rows.batch(index).to(device)})["logits"].cpu() for index in batches])


def final_report(model: nn.Module, setting: Setting, parts: Parts, seed: int) -> dict[str, Any]:
    """Compute every column of the tables, before and after a temperature fitted on the calibration split."""
    calibration, test = (setting.rows(parts, role, seed) for role in ("calibration", "test"))
    logits, labels = logits_of(model, test).double(), test.labels.numpy()
    fitted_on = logits_of(model, calibration).double()
    temperature = fit_temperature(fitted_on, calibration.labels)
    others = {
        name: logits_of(model, setting.rows({name: (inputs, torch.zeros(len(inputs)).long())}, name, seed)).double()
        for name, inputs in parts["ood"].items()
    }
    report: dict[str, Any] = {
        "temperature": temperature,
        "calibration": calibration_report(softmax(fitted_on.numpy()), calibration.labels.numpy()),
    }
    for name, t in (("raw", 1.0), ("temperature_scaled", temperature)):
        own = entropy_score((logits / t).numpy())
        auroc = {other: ood_auroc(own, entropy_score((found / t).numpy())) for other, found in others.items()}
        report[name] = calibration_report(softmax((logits / t).numpy()), labels) | {"ood_auroc": auroc}
    return report


def training_log(trainer: AdaFocalTrainer, curve: Curve) -> dict[str, Any]:
    """Collect validation after each epoch, the curve of the test split, and gammas before and after each update."""
    evaluated = [entry for entry in trainer.state.log_history if "eval_ece" in entry]
    log: dict[str, Any] = {
        "validation": {
            name: [rounded(entry[f"eval_{name}"]) for entry in evaluated] for name in ("accuracy", "nll", "ece")
        }
    }
    read = [note for note in curve.notes if "test" in note]
    if read:
        log["test"] = {"epoch": [note["epoch"] for note in read]}
        log["test"] |= {name: [rounded(note["test"][name]) for note in read] for name in read[0]["test"]}
    if curve.notes and "gammas" in curve.notes[0]:
        log["gammas"] = [rounded(note["gammas"]) for note in curve.notes]
        log["bins_of_width_0"] = [len(note["edges"]) - len(set(note["edges"])) for note in curve.notes]
        log["last_edges"] = curve.notes[-1]["edges"]
    if curve.notes and "smoothing" in curve.notes[0]:
        log["smoothing"] = [rounded(note["smoothing"]) for note in curve.notes]
    best = trainer.state.best_model_checkpoint
    if best is not None:
        log["best_epoch"] = round(trainer.state.best_global_step / trainer.state.max_steps * curve.notes[-1]["epoch"])
    return log


def rounded(values: Any) -> Any:
    """Round to four significant digits, which is finer than the differences between seeds."""
    return [rounded(value) for value in values] if isinstance(values, list) else float(f"{values:.4g}")


def readable(report: dict[str, Any]) -> str:
    """Format JSON with one line per entry of the log."""
    log = ",\n".join(f'  "{name}": {json.dumps(value)}' for name, value in report["log"].items())
    rest = [f' "{name}": {json.dumps(value)}' for name, value in report.items() if name != "log"]
    return "{\n" + ",\n".join([*rest, f' "log": {{\n{log}\n }}']) + "\n}\n"


def cached_parts(name: str, data: Path, folder: Path, seed: int) -> Parts:
    """Load the data of a seed, encoded once for all runs."""
    path = folder / "data" / f"{name}-{seed}.pt"
    if not path.exists():
        build, settings = DATA[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(build(data, seed, **settings), partial)
        partial.replace(path)
    return torch.load(path)


def device() -> str:
    """Return the name of the GPU that `make_trainer` uses, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def commit() -> str:
    """Return the current commit, with a mark if files differ from it."""
    described = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude", "*"]
    found = subprocess.run(described, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
