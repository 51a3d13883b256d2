"""Rows with a variable number of options, padded with -inf to those of their batch or of the whole set."""

import numpy as np
import pytest
import tiny
import torch
from accelerate import debug_launcher
from loss_names import ANY_SHAPE
from scipy.optimize import minimize_scalar

from hf_adafocal import AdaFocalTrainer, fit_temperature
from hf_adafocal.losses.registry import LOSSES, PER_SAMPLE_LOSSES
from hf_adafocal.report.facts import ModelFacts
from hf_adafocal.report.schema import build_report

MOST = 6


def questions(size, seed):
    """Two to six options of four features each; the right one mostly has the largest first feature."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(size):
        options = generator.normal(size=(int(generator.integers(2, MOST + 1)), 4)).astype("float32")
        likely = int(options[:, 0].argmax())
        label = likely if generator.random() < 0.7 else int(generator.integers(len(options)))
        rows.append({"options": options, "labels": label})
    return rows


class Padded:
    """Collator that pads to the most options of the batch, or of the set."""

    def __init__(self, most=None):
        self.most = most

    def __call__(self, rows):
        most = self.most or max(len(row["options"]) for row in rows)
        options = np.full((len(rows), most, 4), np.nan, dtype="float32")
        for place, row in enumerate(rows):
            options[place, : len(row["options"])] = row["options"]
        return {"options": torch.tensor(options), "labels": torch.tensor([row["labels"] for row in rows])}


class Chooser(torch.nn.Module):
    """One score per option."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.score = torch.nn.Linear(4, 1, bias=False)  # one bias for all options changes nothing but rounding

    def forward(self, options, labels=None):
        there = options.isfinite().all(-1)
        scores = self.score(options.nan_to_num(0.0)).squeeze(-1)
        return {"logits": scores.masked_fill(~there, -torch.inf)}


def build(folder, most, loss="adafocal", **settings):
    settings = {"remove_unused_columns": False, "label_names": ["labels"], "learning_rate": 0.1, **settings}
    return AdaFocalTrainer(
        Chooser(), tiny.arguments(folder, loss=loss, **settings), train_dataset=questions(32, 0),
        eval_dataset=questions(50, 1), data_collator=Padded(most),
    )  # fmt: skip


def alone(run, dataset):
    """Logits of each row's own options by single forward passes."""
    run.model.eval()
    with torch.no_grad():
        return [run.model(torch.tensor(row["options"])[None])["logits"][0].double().numpy() for row in dataset]


@pytest.mark.parametrize("name", PER_SAMPLE_LOSSES)
def test_each_row_has_the_loss_of_its_own_options(name):
    loss = PER_SAMPLE_LOSSES[name](reduction="none")
    logits, labels = torch.randn(12, MOST), torch.arange(12) % 2
    counts = 2 + torch.arange(12) % (MOST - 1)
    padded = logits.masked_fill(torch.arange(MOST) >= counts[:, None], -torch.inf)
    found = loss(padded, labels)
    for row in range(12):
        expected = loss(logits[row : row + 1, : counts[row]], labels[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ANY_SHAPE)
def test_options_that_no_row_has_leave_every_loss_as_it_is(name):
    logits, labels = torch.randn(12, 3), torch.arange(12) % 3
    torch.manual_seed(0)
    expected = LOSSES[name]()(logits, labels)
    torch.manual_seed(0)
    found = LOSSES[name]()(torch.cat([logits, torch.full((12, 2), -torch.inf)], dim=1), labels)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", sorted({*ANY_SHAPE} - {"classwise_adafocal"}))  # an option's place is no class
def test_a_run_is_the_same_padded_to_its_batches_and_to_the_whole_set(tmp_path, name):
    runs = [build(tmp_path, most, name) for most in (None, MOST)]
    for run in runs:
        run.train()
    found, expected = (run.evaluate() for run in runs)
    for metric in ("nll", "accuracy", "brier", "ece", "ada_ece", "temperature", "refinement"):
        assert found[f"eval_{metric}"] == pytest.approx(expected[f"eval_{metric}"], abs=1e-5), metric
    for mine, theirs in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_metrics_and_temperature_are_those_of_each_rows_own_options(tmp_path):
    run = build(tmp_path, None)
    run.train()
    found = run.evaluate()
    rows, labels = alone(run, run.eval_dataset), [row["labels"] for row in run.eval_dataset]

    def nll(temperature):
        pairs = zip(rows, labels, strict=True)
        return float(np.mean([np.log(np.exp((z - z[y]) / temperature).sum()) for z, y in pairs]))

    best = minimize_scalar(lambda log_t: nll(np.exp(log_t)), bounds=(-3, 3), method="bounded")
    assert found["eval_nll"] == pytest.approx(nll(1.0), abs=1e-6)
    assert found["eval_accuracy"] == np.mean([z.argmax() == y for z, y in zip(rows, labels, strict=True)])
    assert found["eval_temperature"] == pytest.approx(np.exp(best.x), rel=2e-3)
    _, (logits, kept) = run.measure(run.eval_dataset, "kept")
    assert logits.shape == (50, MOST) and kept.tolist() == labels
    assert fit_temperature(logits, kept) == pytest.approx(np.exp(best.x), rel=1e-3)
    report = build_report((logits, kept), (logits, kept), model=ModelFacts("Chooser"), num_resamples=10)
    assert report.test.raw["nll"] == pytest.approx(nll(1.0), abs=1e-6)
    assert report.test.temperature_scaled["nll"] == pytest.approx(best.fun, abs=1e-6)


def measure(folder, size):
    """Evaluate with batches of different width on the processes; write what this one has."""
    torch.set_num_threads(1)
    run = build(folder, None, per_device_eval_batch_size=size, ddp_find_unused_parameters=False)
    metrics, (logits, labels) = run.measure(run.eval_dataset, "eval")
    run.evaluate()
    torch.save((metrics, logits, labels), folder / f"{run.args.world_size}-{run.args.process_index}.pt")


def test_two_processes_whose_batches_differ_in_width_measure_what_one_does(tmp_path):
    debug_launcher(measure, args=(tmp_path, 3), num_processes=2)
    measure(tmp_path, 6)
    expected, first, second = (
        torch.load(tmp_path / name, weights_only=False) for name in ("1-0.pt", "2-0.pt", "2-1.pt")
    )
    assert np.array_equal(first[1], second[1]) and np.array_equal(first[2], expected[2])
    np.testing.assert_allclose(first[1], expected[1], rtol=1e-6)
    for name in ("nll", "accuracy", "ece", "ada_ece", "temperature"):
        assert first[0][name] == pytest.approx(expected[0][name], abs=1e-6), name
