"""Adaptive label smoothing in training: what moves epsilon, and that training does not notice the measurement."""

import copy
import json
import logging
import math
import random

import numpy as np
import pytest
import run_tiny
import tiny
import torch
from accelerate import debug_launcher
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    DefaultDataCollator,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)

from hf_adafocal import AdaFocalTrainer
from hf_adafocal.losses import AdaptiveLabelSmoothingLoss
from hf_adafocal.losses.batch_loss import CombinedLoss
from hf_adafocal.training import smoothing_control
from hf_adafocal.training.smoothing_callback import SmoothingCallback

SMOOTHING = "adaptive_label_smoothing"
OURS = {"loss": SMOOTHING, "eval_strategy": "no"}
STEPS = [3, 5, 7, 9, 11]  # of 12, from the first on


def build(folder, model=None, **settings) -> AdaFocalTrainer:
    """12 steps and 5 updates, each on 16 of 60 samples, so that the fourth slice begins the permutation anew."""
    settings = {**OURS, **settings}
    if SMOOTHING in (settings["loss"], settings.get("auxiliary_base")):
        settings = {"calibration_steps": 2, "calibration_samples": 16, **settings}
    return tiny.trainer(folder, model, **settings)


def trained(folder, model=None, **settings) -> AdaFocalTrainer:
    run = build(folder, model, **settings)
    run.train()
    return run


def updates(run) -> list[dict]:
    return [entry for entry in run.state.log_history if "slice_temperature" in entry]


def trajectory(run) -> list[tuple[float, float]]:
    return [(entry["smoothing"], entry["slice_temperature"]) for entry in updates(run)]


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(mine == theirs and torch.equal(values, others) for (mine, values), (theirs, others) in pairs)


@pytest.fixture
def warnings(caplog):
    """What transformers logs, as text."""
    logging.getLogger("transformers").propagate = True
    caplog.set_level("WARNING")
    return caplog


class Norms(nn.Module):
    """Tokens through a batch norm that trains, one that is frozen, and dropout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm, self.frozen = nn.Embedding(tiny.VOCABULARY, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(6, tiny.NUM_CLASSES))

    def forward(self, input_ids, labels=None):
        return {"logits": self.head(self.frozen(self.norm(self.embedding(input_ids).mean(1))))}

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self


class Restless(torch.utils.data.Dataset):
    """Rows with tokens masked at random, by every source of randomness."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        row = self.data[index]
        for place, draw in enumerate((random.random(), np.random.random(), torch.rand(()).item()), 1):
            if draw < 0.3:
                row["input_ids"][place] = 0
        return row


def dropout():
    return tiny.bert(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)


def restless():
    return {
        "train_dataset": Restless(tiny.token_dataset(48)),
        "eval_dataset": Restless(tiny.token_dataset(60, seed=1)),
    }


CASES = {
    "dropout": (dropout, dict),
    "batch norm, one of them frozen": (Norms, dict),
    "data drawn at random": (dropout, restless),
    "accumulated": (dropout, lambda: {"gradient_accumulation_steps": 2, "num_train_epochs": 4}),
    "evaluated too": (dropout, lambda: {"eval_strategy": "steps", "eval_steps": 5}),
}


class TestTrainingDoesNotNotice:
    @pytest.mark.parametrize("case", CASES)
    def test_without_gain_a_run_is_that_of_cross_entropy_to_the_bit(self, tmp_path, case):
        model, settings = CASES[case]
        settings = {"split_overlap": "skip", "logging_steps": 5}

        def run(**more):
            return trained(tmp_path, model(), **{**settings, **CASES[case][1](), **more})

        looked = run(steering_gain=0.0)
        assert [entry["step"] for entry in updates(looked)] == STEPS and looked.loss.smoothing == 0
        assert same_bits(looked.model, run(loss="cross_entropy").model)
        never = run(calibration_steps=1000)
        assert updates(never) == [] and same_bits(looked.model, never.model)
        assert not same_bits(looked.model, run().model)  # with the gain it is another run

    def test_every_module_is_in_the_mode_it_was_in(self, tmp_path):
        class Mode(TrainerCallback):
            def __init__(self, freeze):
                self.freeze, self.seen = freeze, []

            def on_step_end(self, args, state, control, model=None, **kwargs):
                if self.freeze:
                    model.norm.eval()  # the Trainer thaws it before the next step
                self.seen.append({name: module.training for name, module in model.named_modules()})

        class Watched(Norms):
            def forward(self, input_ids, labels=None):
                looks.append({self.training, self.norm.training, self.head[0].training, torch.is_grad_enabled()})
                return super().forward(input_ids, labels)

        looks, before, after = [], Mode(freeze=True), Mode(freeze=False)
        run = build(tmp_path, Watched(), callbacks=[before])  # ahead of the rule's own
        run.add_callback(after)
        run.train()
        assert before.seen == after.seen and len(after.seen) == 12
        assert [after.seen[2][name] for name in ("", "norm", "frozen", "head.0")] == [True, False, False, True]
        # Measurements of one batch each and the comparison with the model's own loss; the steps.
        assert looks.count({False}) == 5 + 1 and looks.count({True}) == 12


class Weights(TrainerCallback):
    """Copies the model's weights after every step, before the rule looks at them."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = copy.deepcopy(model.state_dict())


def temperature_by_differences(logits: np.ndarray, labels: np.ndarray) -> float:
    """The slice temperature, from differences of the NLL with its prior on 1 / T, and no formula of a derivative."""

    def penalised(inverse):
        scaled = inverse * logits
        nll = np.log(np.exp(scaled).sum(1)) - scaled[np.arange(len(labels)), labels]
        return nll.sum() + 16 * (inverse - 1) ** 2 / 2

    h = 1e-4
    slope = (penalised(1 + h) - penalised(1 - h)) / (2 * h)
    curvature = (penalised(1 + h) - 2 * penalised(1) + penalised(1 - h)) / h**2
    inverse = 1 - slope / curvature
    return min(max(1 / inverse, math.exp(-0.3)), math.exp(0.3)) if inverse > 0 else math.exp(0.3)


def expected_trajectory(model, weights, slices, predict, gain=2.0):
    """Smoothing and temperature after each update, by plain forward passes and a slow loop."""
    eps, expected = 0.0, []
    for share, (step, indices) in enumerate(slices, 1):  # of 1 + 2 + 3 + 4 + 5, and of half the gain: 5 of 10 updates
        model.load_state_dict(weights[step])
        model.eval()
        with torch.no_grad():
            temperature = temperature_by_differences(*predict(model, indices))
        eps = min(max(eps + gain / 2 * share / 15 * math.log(temperature), -0.1), 0.5)
        expected.append((eps, temperature))
    return expected


def rolling(size, of_update, seed=42):
    """The indices of each update: the permutation, again and again."""
    order = np.random.default_rng(seed).permutation(size).tolist() * 20
    return [(step, order[k * of_update : (k + 1) * of_update]) for k, step in enumerate(STEPS)]


class TestTrajectory:
    @pytest.mark.parametrize("settings", [{}, {"data_seed": 7}, {"steering_gain": 0.5}])
    def test_the_smoothing_moves_as_a_slow_loop_says(self, tmp_path, settings):
        data, weights = tiny.token_dataset(60, seed=1), Weights()
        run = trained(tmp_path, eval_dataset=data, callbacks=[weights], learning_rate=2e-2, **settings)

        def predict(model, indices):
            logits = model(input_ids=torch.tensor([data[index]["input_ids"] for index in indices])).logits
            return logits.double().numpy(), np.array([data[index]["labels"] for index in indices])

        slices = rolling(60, 16, settings.get("data_seed", 42))
        gain = settings.get("steering_gain", 2.0)
        expected = expected_trajectory(tiny.bert(), weights.after, slices, predict, gain)
        np.testing.assert_allclose(trajectory(run), expected, rtol=1e-4, atol=1e-4)
        assert len({eps for eps, _ in expected}) >= 3
        assert run.loss.smoothing.item() == updates(run)[-1]["smoothing"]

    def test_every_counted_token_is_a_sample(self, tmp_path):
        generator = np.random.default_rng(0)
        rows = [generator.integers(1, tiny.VOCABULARY, length).tolist() for length in generator.integers(3, 9, 60)]
        labels = [[token % 3 if token % 5 else -100 for token in row] for row in rows]
        data, weights = Dataset.from_dict({"input_ids": rows, "labels": labels}), Weights()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0}, unk_token="[PAD]")), pad_token="[PAD]"
        )
        model = BertForTokenClassification(tiny.bert().config)
        args = tiny.arguments(tmp_path, calibration_steps=2, calibration_samples=16, split_overlap="skip", **OURS)
        run = AdaFocalTrainer(
            model,
            args,
            train_dataset=data.select(range(48)),
            eval_dataset=data,
            data_collator=DataCollatorForTokenClassification(tokenizer),
            callbacks=[weights],
        )
        run.train()

        def predict(model, indices):  # each alone, without padding
            scores = [model(input_ids=torch.tensor([rows[index]])).logits[0] for index in indices]
            flat = np.array([label for index in indices for label in labels[index]])
            return torch.cat(scores).double().numpy()[flat != -100], flat[flat != -100]

        expected = expected_trajectory(model, weights.after, rolling(60, 16), predict)
        np.testing.assert_allclose(trajectory(run), expected, rtol=1e-4, atol=1e-4)

    def test_steps_are_those_of_the_optimizer(self, tmp_path):
        settings = {"optim": "sgd", "learning_rate": 0.5}
        whole = trained(tmp_path, **settings)
        parts = trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
        assert [entry["step"] for entry in updates(parts)] == STEPS
        np.testing.assert_allclose(trajectory(parts), trajectory(whole), rtol=1e-4, atol=1e-4)


class TestRecord:
    def test_each_update_of_the_default_plan_is_logged_at_its_step_and_no_other(self, tmp_path):
        run = trained(tmp_path, num_train_epochs=40, calibration_steps=None, calibration_samples=None)
        logged = [entry for entry in run.state.log_history if "smoothing" in entry]
        # 5 % of the compute of 240 steps of 8 samples is 4 looks of 64; from step 19 on, 221 / 5 steps apart
        assert [entry["step"] for entry in logged] == [63, 107, 152, 196] and logged == updates(run)

    def test_the_training_loss_of_those_steps_is_logged_as_ever(self, tmp_path):
        run = trained(tmp_path, steering_gain=0.0)
        plain = trained(tmp_path, loss="cross_entropy")
        losses = [[entry["loss"] for entry in found.state.log_history if "loss" in entry] for found in (run, plain)]
        assert losses[0] == losses[1] and len(losses[0]) == 12


def state_of(checkpoint) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text())


class TestLabelSmoothing:
    def smoothed(self, folder, **settings):
        return build(folder, save_strategy="steps", save_steps=6, **settings)

    def test_eps_moves_by_its_own_gain_and_is_logged_and_saved(self, tmp_path):
        run = self.smoothed(tmp_path, learning_rate=2e-2)
        run.train()
        logged, eps = updates(run), 0.0
        assert [entry["step"] for entry in logged] == STEPS
        for share, entry in enumerate(logged, 1):
            eps = min(max(eps + 2.0 / 2 * share / 15 * math.log(entry["slice_temperature"]), -0.1), 0.5)
            assert entry["smoothing"] == pytest.approx(eps, abs=1e-6)
        saved = state_of(tmp_path / "checkpoint-12")["stateful_callbacks"]["adafocal"]
        assert (saved["smoothing"], saved["updates"]) == (run.loss.smoothing.item(), 5) and saved["smoothing"] != 0
        assert saved["history"] == [
            {"step": 0, "smoothing": 0.0},
            *({"step": entry["step"], "smoothing": entry["smoothing"]} for entry in logged),
        ]

    @pytest.mark.parametrize(("score", "limit"), [(20.0, -0.1), (-20.0, 0.5)])
    def test_at_a_limit_it_stays_and_is_restored_to_the_bit(self, tmp_path, score, limit):
        runs = [self.smoothed(tmp_path, steering_gain=100.0) for _ in range(2)]
        for run in runs:
            run.adaptive_callback.measure = lambda indices: torch.tensor([score, 1.0, 16.0])
        runs[0].train()
        limit = np.float32(limit).item()  # -0.1 is below -0.1 there
        assert [entry["smoothing"] for entry in updates(runs[0])] == [limit] * 5
        saved = state_of(tmp_path / "checkpoint-6")["stateful_callbacks"]["adafocal"]
        assert (saved["smoothing"], saved["updates"]) == (limit, 2)
        runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert runs[1].loss.smoothing.item() == limit and same_bits(runs[0].model, runs[1].model)

    @pytest.mark.parametrize("damage", ["much", None, math.nan, 0.6, -0.2])
    def test_what_no_run_writes_is_not_restored(self, tmp_path, damage):
        run = self.smoothed(tmp_path)
        with pytest.raises(ValueError, match="adafocal in there does not fit this run's loss"):
            run.adaptive_callback.check_saved({"smoothing": damage, "updates": 1, "history": []}, "there")
        assert run.loss.smoothing.item() == 0


RESUMED = {
    **OURS,
    **{"calibration_steps": 3, "calibration_samples": 24, "save_steps": 5},  # updates after 4, 7, 10, 13 and 16 of 18
}


class TestResume:
    @pytest.mark.parametrize("restore", [False, True], ids=["plain", "restore_callback_states"])
    def test_resuming_from_any_checkpoint_gives_the_uninterrupted_run(self, tmp_path, restore):
        settings = {**RESUMED, "restore_callback_states_from_checkpoint": restore}
        whole = run_tiny.build(tmp_path / "run", **settings)
        whole.train()
        assert [entry["step"] for entry in updates(whole)] == [4, 7, 10, 13, 16]
        assert len({entry["slice_temperature"] for entry in updates(whole)}) == 5
        for step in (5, 10, 15):
            run = run_tiny.build(tmp_path / "again", seed_of_weights=9, **settings)
            run.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
            assert run_tiny.outcome(run) == run_tiny.outcome(whole), step

    def test_the_best_checkpoint_brings_its_smoothing_back(self, tmp_path):
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_ece", "greater_is_better": True}
        often = {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 3}
        run = run_tiny.build(tmp_path, **{**RESUMED, **best, **often})
        run.train()
        assert run.state.best_global_step < 16
        saved, last = (
            state_of(tmp_path / f"checkpoint-{step}")["stateful_callbacks"]["adafocal"]
            for step in (run.state.best_global_step, 18)
        )
        assert run.loss.smoothing.item() == saved["smoothing"] != last["smoothing"]
        assert run.state.stateful_callbacks["adafocal"] == saved

    @pytest.mark.parametrize(
        ("first", "second"), [("adafocal", "adaptive_label_smoothing")[::step] for step in (1, -1)]
    )
    def test_a_checkpoint_of_another_adaptive_loss_is_refused(self, tmp_path, first, second):
        settings = {"eval_strategy": "epoch", "num_train_epochs": 1, "save_strategy": "epoch"}
        trained(tmp_path, loss=first, **settings)
        run = build(tmp_path, loss=second, **settings)
        before = copy.deepcopy(run.model)
        with pytest.raises(ValueError, match=r"adafocal in .*checkpoint-6.* lacks .*settings of the saved run"):
            run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert same_bits(run.model, before)

    def test_a_checkpoint_of_cross_entropy_starts_afresh_and_says_so(self, tmp_path, warnings):
        trained(tmp_path, loss="cross_entropy", save_strategy="epoch")
        run = build(tmp_path)
        run.loss.steer(0.3)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert "fresh start: {'smoothing': 0.0}" in warnings.text
        assert [entry["step"] for entry in updates(run)] == [7, 9, 11]


def steered(folder, batch_size: int, samples: int) -> None:
    """12 steps of 16 samples, 5 updates on slices of 61; each rank writes what it logged."""
    torch.set_num_threads(1)
    run = build(
        folder,
        train_dataset=tiny.token_dataset(96),
        eval_dataset=tiny.token_dataset(61, seed=1),
        per_device_train_batch_size=batch_size,
        calibration_samples=samples,
        learning_rate=2e-2,
        ddp_find_unused_parameters=False,
    )
    run.train()
    result = {"trajectory": trajectory(run), "weights": [p.sum().item() for p in run.model.parameters()]}
    (folder / f"rank-{run.args.process_index}.json").write_text(json.dumps(result))


def with_a_bad_token(folder) -> None:
    """One calibration sample, of one rank, has NaN logits; each rank writes the error."""
    torch.set_num_threads(1)
    run = diverged(folder, ddp_find_unused_parameters=False)
    try:
        run.train()
    except ValueError as error:
        (folder / f"rank-{run.args.process_index}.json").write_text(json.dumps(str(error)))


def diverged(folder, **settings):
    bad = tiny.VOCABULARY - 1
    model, data = tiny.bert(), tiny.token_dataset(60, seed=1)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[bad] = torch.nan
    rows = [[min(token, bad - 1) for token in row] for row in data["input_ids"]]
    rows[7][3] = bad
    train = tiny.token_dataset(48)
    spared = [[min(token, bad - 1) for token in row] for row in train["input_ids"]]
    return build(
        folder,
        model,
        train_dataset=Dataset.from_dict({"input_ids": spared, "labels": train["labels"]}),
        eval_dataset=Dataset.from_dict({"input_ids": rows, "labels": data["labels"]}),
        **{"calibration_samples": 60, "weight_decay": 0.0, **settings},
    )


def ranks(folder) -> tuple:
    return tuple(json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1))


class TestTwoProcesses:
    def test_both_end_with_the_smoothing_of_one(self, tmp_path):
        one, two = tmp_path / "one", tmp_path / "two"
        one.mkdir(), two.mkdir()
        debug_launcher(steered, args=(two, 8, 17), num_processes=2)  # 8 samples of the 17 for each
        steered(one, 16, 16)
        expected, (first, second) = json.loads((one / "rank-0.json").read_text()), ranks(two)
        assert first == second and len(first["trajectory"]) == 5
        np.testing.assert_allclose(first["trajectory"], expected["trajectory"], rtol=1e-3, atol=1e-3)

    def test_where_one_finds_nan_both_stop(self, tmp_path):
        debug_launcher(with_a_bad_token, args=(tmp_path,), num_processes=2)
        assert all("logits of the calibration set must be finite" in error for error in ranks(tmp_path))


class Sure(nn.Module):
    """Gives the class that the first token names a lead over the others; the optimizer has nothing to learn."""

    def __init__(self, lead):
        super().__init__()
        self.lead, self.shift = lead, nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, labels=None):
        return {"logits": self.lead * nn.functional.one_hot(input_ids[:, 0] - 1, 3).float() + self.shift}


def told(size, errors=0, seed=0) -> Dataset:
    """The first token tells the class, but for some."""
    labels, generator = np.arange(size) % 3, np.random.default_rng(seed)
    tokens = generator.integers(10, tiny.VOCABULARY, (size, tiny.LENGTH))
    tokens[:, 0] = 1 + (labels + (np.arange(size) < errors)) % 3
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()})


class TestGuards:
    @pytest.mark.parametrize(
        ("lead", "errors", "lowest", "highest"),
        [
            (50.0, 0, -1e-6, 1e-6),  # right and certain: no news
            (10.0, 0, -0.005, 0.0),
            (math.log(2 * 58 / 2), 2, -1e-4, 1e-4),  # right 58 times of 60, and sure of it to 58 / 60
            (10.0, 2, 0.08, 0.34),  # over-confident
            (2.0, 2, -0.11, -0.09),  # under-confident
        ],
    )
    def test_an_accurate_model_moves_eps_by_its_confidence_alone(self, tmp_path, lead, errors, lowest, highest):
        data = {"train_dataset": told(48, seed=1), "eval_dataset": told(60, errors)}
        run = trained(tmp_path, Sure(lead), calibration_samples=60, **data)
        assert len(updates(run)) == 5 and lowest <= run.loss.smoothing.item() <= highest

    @pytest.mark.parametrize(("size", "samples"), [(60, 1000), (60, None), (7, None), (7, 16), (1, 5)])
    def test_a_slice_is_at_most_the_calibration_set(self, tmp_path, size, samples):
        run, seen = build(tmp_path, eval_dataset=tiny.token_dataset(size, seed=1), calibration_samples=samples), []
        measure = run.adaptive_callback.measure
        run.adaptive_callback.measure = lambda indices: seen.append(sorted(indices)) or measure(indices)
        run.train()
        assert seen == [list(range(size))] * 5 and abs(run.loss.smoothing.item()) > 0

    def test_it_can_look_after_each_step(self, tmp_path):
        run = trained(tmp_path, calibration_steps=1)
        assert [entry["step"] for entry in updates(run)] == list(range(2, 12))

    @pytest.mark.parametrize("settings", [{"max_steps": 9, "calibration_steps": None}, {"calibration_steps": 12}])
    def test_a_run_too_short_leaves_the_loss_alone_and_says_so(self, tmp_path, settings, warnings):
        run = trained(tmp_path, **settings)
        assert f"A run of {run.state.max_steps} steps is too short to steer the loss" in warnings.text
        assert updates(run) == [] and run.loss.smoothing == 0
        assert run.state.stateful_callbacks["adafocal"]["updates"] == 0

    def test_bfloat16_on_the_cpu_moves_the_smoothing_almost_alike(self, tmp_path):
        slow = {"learning_rate": 1e-4, "steering_gain": 0.5}
        half, whole = trained(tmp_path, bf16=True, **slow), trained(tmp_path, **slow)
        np.testing.assert_allclose(trajectory(half), trajectory(whole), atol=0.02)
        assert trajectory(half) != trajectory(whole)

    @pytest.mark.slow
    def test_compiled_it_moves_the_smoothing_alike(self, tmp_path):
        compiled = trained(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
        np.testing.assert_allclose(trajectory(compiled), trajectory(trained(tmp_path)), rtol=1e-4, atol=1e-4)

    def test_logits_that_are_not_finite_stop_the_run_and_say_why(self, tmp_path):
        run = diverged(tmp_path)
        with pytest.raises(ValueError, match="logits of the calibration set must be finite.*learning rate"):
            run.train()
        assert run.state.global_step == 3 and run.loss.smoothing == 0 and run.model.training

    def test_a_run_after_another_starts_afresh(self, tmp_path):
        run = trained(tmp_path, learning_rate=0.0)
        first = trajectory(run)
        run.train()
        assert trajectory(run) == first and first[-1][0] != 0


class Swapping(torch.optim.SGD):
    """Notes the mode of each look and each step, as an optimizer with weights of its own for evaluation would."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mode, self.stepped_in = None, set()

    def eval(self):
        self.mode = "eval"

    def train(self):
        self.mode = "train"

    def step(self, *args, **kwargs):
        self.stepped_in.add(self.mode)
        return super().step(*args, **kwargs)


def test_an_optimizer_with_weights_for_evaluation_shows_those(tmp_path):
    model = tiny.bert()
    optimizer = Swapping(model.parameters(), lr=0.1)
    args = tiny.arguments(tmp_path, **OURS, calibration_steps=2, calibration_samples=16)
    optimizers = (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    run = AdaFocalTrainer(model, args, train_dataset=tiny.token_dataset(48), eval_dataset=DATA, optimizers=optimizers)
    modes = []
    model.register_forward_hook(lambda module, *_: modes.append((optimizer.mode, module.training)))
    run.train()
    assert modes.count(("eval", False)) == 5 and modes.count(("train", True)) == 12
    assert optimizer.stepped_in == {"train"}


class Rows(torch.utils.data.Dataset):
    def __init__(self, data):
        self.rows = list(data)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class WithWorker(Rows):
    """Rows that say which worker loads them, -1 for the main process."""

    def __getitem__(self, index):
        worker = torch.utils.data.get_worker_info()
        return {**self.rows[index], "worker": -1 if worker is None else worker.id}


DATA, OTHER = tiny.token_dataset(60, seed=1), tiny.token_dataset(30, seed=2)
WAYS = {
    "a set of its own": {"calibration_dataset": DATA, "eval_dataset": OTHER},
    "alone": {"calibration_dataset": DATA, "eval_dataset": None},
    "among the evaluation sets": {"eval_dataset": {"other": OTHER, "calibration": DATA}},
    "evaluated": {"eval_dataset": DATA, "eval_strategy": "steps", "eval_steps": 3},
    "all of them evaluated": {
        **{"eval_dataset": {"calibration": DATA, "other": OTHER}, "calibration_dataset": DATA},
        **{"eval_strategy": "steps", "eval_steps": 3},
    },
    "a dataset of torch": {"eval_dataset": Rows(DATA)},
    "columns kept": {"eval_dataset": DATA, "remove_unused_columns": False},
    "small evaluation batches": {"eval_dataset": DATA, "per_device_eval_batch_size": 3},
    "a transform": {"eval_dataset": DATA.with_transform(lambda rows: {**rows, "number": [7] * len(rows["labels"])})},
    "a streamed evaluation": {"eval_dataset": DATA, "streaming_calibration": True},
}


class TestCalibrationData:
    @pytest.fixture(scope="class")
    def expected(self, tmp_path_factory):
        return trajectory(trained(tmp_path_factory.mktemp("run"), eval_dataset=DATA))

    @pytest.mark.parametrize("way", WAYS)
    def test_however_it_comes_the_smoothing_moves_alike(self, tmp_path, expected, way):
        found = trajectory(trained(tmp_path, split_overlap="skip", **WAYS[way]))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("form", [lambda data: data, Rows], ids=["datasets", "torch"])
    def test_columns_that_the_model_does_not_take_are_left_out(self, tmp_path, form):
        data = form(DATA.add_column("number", [7] * 60))  # the model has no **kwargs to swallow it
        assert trajectory(trained(tmp_path, Norms(), eval_dataset=data)) == trajectory(
            trained(tmp_path, Norms(), eval_dataset=DATA)
        )

    def test_a_collator_of_the_users_gets_the_columns_that_are_kept(self, tmp_path):
        def collate(rows):
            texts.extend(row.pop("text") for row in rows)
            return DefaultDataCollator()(rows)

        texts, data = [], DATA.add_column("text", [str(index) for index in range(60)])
        train = tiny.token_dataset(48).add_column("text", ["train"] * 48)
        args = tiny.arguments(
            tmp_path, calibration_steps=2, calibration_samples=16, remove_unused_columns=False, **OURS
        )
        run = AdaFocalTrainer(tiny.bert(), args, train_dataset=train, eval_dataset=data, data_collator=collate)
        run.train()
        looked = [int(text) for text in texts if text != "train"]
        assert looked == [index for _, indices in rolling(60, 16) for index in indices]

    def test_a_part_carved_from_train_drives_the_smoothing(self, tmp_path):
        settings = {"train_dataset": tiny.token_dataset(64), "calibration_fraction": 0.25}
        run = build(tmp_path, eval_dataset=None, calibration_samples=None, **settings)
        seen, measure = [], run.adaptive_callback.measure
        run.adaptive_callback.measure = lambda indices: seen.extend(indices) or measure(indices)
        run.train()
        assert sorted(set(seen)) == list(range(16)) and len(run.calibration_dataset) == 16
        assert len(updates(run)) == 5 and run.loss.smoothing.item() != 0

    @pytest.mark.skipif(torch.__version__ < "2.7", reason="this torch asks the accelerator that the test pretends")
    def test_slices_are_loaded_by_workers_and_pinned_as_the_arguments_say(self, tmp_path, monkeypatch):
        class Noted(torch.utils.data.DataLoader):
            def __init__(self, *args, **kwargs):
                given.append((kwargs["num_workers"], kwargs["pin_memory"]))
                super().__init__(*args, **{**kwargs, "pin_memory": False})  # there is nothing to pin it for

        given, places = [], []
        monkeypatch.setattr(smoothing_control, "DataLoader", Noted)
        settings = {"dataloader_num_workers": 1, "remove_unused_columns": False, "split_overlap": "skip"}
        run = build(tmp_path, eval_dataset=WithWorker(DATA), **settings)
        prepare = run._prepare_inputs
        monkeypatch.setattr(run, "_prepare_inputs", lambda batch: places.append(batch.pop("worker")) or prepare(batch))
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        run.args.dataloader_pin_memory = True
        run.adaptive_callback.measure(np.arange(16))
        run.args.dataloader_pin_memory, run.args.dataloader_num_workers = False, 0
        run.adaptive_callback.measure(np.arange(16))
        assert given == [(1, True), (0, False)]
        assert [set(found.tolist()) for found in places] == [{0}, {-1}]

    def test_a_stream_cannot_be_sliced(self, tmp_path):
        streamed = IterableDataset.from_generator(lambda: iter(DATA))
        with pytest.raises(ValueError, match="this one is a stream"):
            build(tmp_path, eval_dataset=streamed, split_overlap="skip")


class TestModules:
    @pytest.mark.parametrize("plain", [False, True], ids=["our arguments", "plain ones"])
    def test_a_smoothing_of_the_users_moves_from_where_it_is(self, tmp_path, plain):
        args = TrainingArguments(str(tmp_path), num_train_epochs=10, use_cpu=True) if plain else None
        run = tiny.trainer(tmp_path, args=args, loss=AdaptiveLabelSmoothingLoss(0.1))
        assert type(run.adaptive_callback) is SmoothingCallback
        run.train()
        assert len(updates(run)) == 1 and run.loss.smoothing.item() != np.float32(0.1)
        assert run.adaptive_callback.history[0] == {"step": 0, "smoothing": np.float32(0.1).item()}

    def test_the_base_of_a_combined_loss_moves_alike(self, tmp_path):
        run = trained(tmp_path, loss="mmce", auxiliary_base=SMOOTHING)
        assert isinstance(run.loss, CombinedLoss)
        assert len(updates(run)) == 5 and run.loss.base.smoothing.item() == updates(run)[-1]["smoothing"] != 0


class TestHyperparameterSearch:
    def search(self, folder, *choices):
        """Train with each choice of arguments; what the trials logged."""
        optuna = pytest.importorskip("optuna", reason="optuna (extra `dev`) proposes the trials")
        optuna.logging.set_verbosity(optuna.logging.CRITICAL)
        args = tiny.arguments(folder, **{**OURS, "eval_strategy": "epoch", "calibration_steps": 2})
        run = AdaFocalTrainer(
            args=args, model_init=lambda: tiny.bert(), train_dataset=tiny.token_dataset(48), eval_dataset=DATA
        )
        trials = {}

        class Ended(TrainerCallback):
            def on_train_end(self, args, state, control, **kwargs):
                trials[args.steering_gain] = updates(run)

        run.add_callback(Ended())
        numbers = list(range(len(choices)))
        run.hyperparameter_search(
            lambda trial: choices[trial.suggest_categorical("choice", numbers)],
            n_trials=len(choices),
            backend="optuna",
            sampler=optuna.samplers.GridSampler({"choice": numbers}, seed=0),
        )
        return trials

    def test_each_trial_has_its_own_gain_and_plan(self, tmp_path):
        first = {"steering_gain": 0.0, "calibration_steps": 3, "calibration_samples": 5}
        second = {"steering_gain": 1.0, "calibration_steps": 4, "calibration_samples": 60}
        trials = self.search(tmp_path, first, second)
        assert {gain: [entry["step"] for entry in found] for gain, found in trials.items()} == {
            0.0: [4, 7, 10],
            1.0: [5, 9],
        }
        assert {gain: [entry["smoothing"] != 0 for entry in found] for gain, found in trials.items()} == {
            0.0: [False] * 3,
            1.0: [True] * 2,
        }
