"""`calibrate` for loops without a Trainer, and the example that uses it."""

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import tiny
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler
from transformers import AutoModelForImageClassification, DefaultDataCollator
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_adafocal import AdaFocalLoss, ClasswiseAdaFocalLoss, CrossEntropyLoss, FLSD53Loss, calibrate
from hf_adafocal.data.loading import Splits
from hf_adafocal.metrics.scores import calibration_report

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_no_trainer.py"


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state in singletons."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class Pairs(Dataset):
    """Noise with a label; reading a sample draws from every source of randomness."""

    def __init__(self, size=61, num_classes=3, restless=False):
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(size, 4, generator=generator)
        self.labels = torch.randint(num_classes, (size,), generator=generator)
        self.restless = restless

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if self.restless:
            random.random(), np.random.random(), torch.rand(1)
        return self.inputs[index], self.labels[index]


class Answers(nn.Module):
    """Returns its input as logits, in the shape of output asked for."""

    def __init__(self, form=lambda logits: SequenceClassifierOutput(logits=logits)):
        super().__init__()
        self.form = form

    def forward(self, logits):
        return self.form(logits)


def bert_loader(size=61, **settings) -> DataLoader:
    data = tiny.token_dataset(size, seed=1)
    return DataLoader(data, **{"batch_size": 16, "collate_fn": DefaultDataCollator(), **settings})


def table(loss) -> torch.Tensor:
    return torch.cat([loss.edges, loss.gammas]).clone()


class TestMeasurement:
    def test_the_metrics_are_those_of_a_plain_forward_pass(self):
        model = tiny.bert()
        expected = calibration_report(*tiny.probabilities(model, tiny.token_dataset(61, seed=1)), 5)
        found = calibrate(model, bert_loader(), AdaFocalLoss(num_bins=5)).metrics
        assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-5)
        assert set(found) == {"accuracy", "nll", "brier", "ece", "ada_ece"}

    def test_the_table_follows_the_rule_of_the_paper(self):
        model, loss = tiny.bert(), AdaFocalLoss(num_bins=1)
        p, y = tiny.probabilities(model, tiny.token_dataset(61, seed=1))
        gap = p.max(1).mean() - (p.argmax(1) == y).mean()
        calibrate(model, bert_loader(), loss)
        assert loss.gammas.tolist() == pytest.approx([np.exp(gap)], rel=1e-5)  # lambda 1, gamma 1 before
        assert loss.edges.tolist() == pytest.approx([p.max(1).min(), p.max(1).max()], rel=1e-5)

    def test_the_statistics_are_those_the_table_moved_by(self):
        loss, other = AdaFocalLoss(num_bins=5), AdaFocalLoss(num_bins=5)
        statistics = calibrate(tiny.bert(), bert_loader(), loss).statistics
        other.update(statistics.edges, statistics.gap)
        assert statistics.count.sum() == 61
        assert torch.equal(table(loss), table(other)) and not torch.equal(table(loss), table(AdaFocalLoss(num_bins=5)))

    def test_tables_of_classes_follow_the_samples_predicted_as_each(self):
        model, loss = tiny.bert(num_labels=4), ClasswiseAdaFocalLoss(num_bins=1)
        model.classifier.bias.data[3] = -50.0
        p, y = tiny.probabilities(model, tiny.token_dataset(61, seed=1))
        statistics = calibrate(model, bert_loader(), loss).statistics
        predicted = p.argmax(1)
        counts, expected = np.bincount(predicted, minlength=4), [1.0] * 4
        for k in np.flatnonzero(counts):
            of_class = predicted == k
            gap = p.max(1)[of_class].mean() - (y[of_class] == k).mean()
            expected[k] = reference.updated_gamma(1.0, gap)
        assert np.count_nonzero(counts) >= 2 and counts[3] == 0
        assert loss.class_counts.tolist() == statistics.class_counts.tolist() == counts.tolist()
        np.testing.assert_allclose(loss.class_gammas[:, 0], expected, rtol=1e-5)

    def test_statistics_of_classes_are_computed_only_for_a_loss_with_tables_of_classes(self):
        assert calibrate(tiny.bert(), bert_loader(), AdaFocalLoss(num_bins=5)).statistics.class_gap is None

    @pytest.mark.parametrize(
        "form",
        [
            lambda logits: logits,
            lambda logits: (logits, "hidden states"),
            lambda logits: {"logits": logits},
            lambda logits: type("Output", (), {"logits": logits}),
        ],
        ids=["tensor", "tuple", "dict", "object"],
    )
    def test_every_form_of_output_and_batch_gives_the_same(self, form):
        logits, labels = torch.randn(20, 3), torch.randint(3, (20,))
        pairs = calibrate(Answers(), [(logits, labels)]).metrics
        assert calibrate(Answers(form), [{"logits": logits, "labels": labels}]).metrics == pairs
        assert calibrate(Answers(form), [[{"logits": logits}, labels]]).metrics == pairs

    def test_labels_that_the_loss_ignores_do_not_count(self):
        logits, labels = torch.randn(40, 3), torch.randint(3, (40,))
        batch = {"logits": logits, "labels": torch.where(torch.arange(40) < 25, labels, 7)}
        found = calibrate(Answers(), [batch], AdaFocalLoss(num_bins=5, ignore_index=7))
        assert found.metrics == calibrate(Answers(), [(logits[:25], labels[:25])], AdaFocalLoss(num_bins=5)).metrics

    def test_every_token_and_every_pixel_counts(self):
        logits, labels = torch.randn(2, 6, 4, 3), torch.randint(3, (2, 6, 4))
        flat = calibrate(Answers(), [(logits.flatten(0, 2), labels.flatten())]).metrics
        assert calibrate(Answers(), [(logits.flatten(1, 2), labels.flatten(1))]).metrics == pytest.approx(flat)
        assert calibrate(Answers(), [(logits.movedim(-1, 1), labels)]).metrics == pytest.approx(flat)

    @pytest.mark.parametrize("loss", [None, CrossEntropyLoss(), FLSD53Loss(), nn.CrossEntropyLoss()])
    def test_a_loss_that_does_not_adapt_gets_the_metrics_and_stays_as_it_is(self, loss):
        before = {name: buffer.clone() for name, buffer in loss.named_buffers()} if loss is not None else {}
        found = calibrate(tiny.bert(), bert_loader(), loss).metrics
        assert found == calibrate(tiny.bert(), bert_loader(), AdaFocalLoss()).metrics
        assert all(torch.equal(buffer, before[name]) for name, buffer in (loss.named_buffers() if before else ()))

    def test_a_prepared_dataloader_with_a_sampler_is_counted_in_full(self):
        # gather_for_metrics would cut the last batch to 61 % 16 = 13 of its samples.
        sampler = SubsetRandomSampler(range(47))
        accelerator = Accelerator(cpu=True)
        model, loader = accelerator.prepare(tiny.bert(), bert_loader(sampler=sampler, batch_size=16))
        assert calibrate(model, loader, accelerator=accelerator).statistics.count.sum() == 47


class TestTrainingGoesOnAsIfNothingHappened:
    def test_every_module_is_in_the_mode_it_was_in(self):
        class Watched(nn.Linear):
            def forward(self, inputs):
                seen.append((self.training, torch.is_grad_enabled()))
                return super().forward(inputs)

        seen = []
        model = nn.Sequential(Watched(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()), nn.Linear(4, 3))
        model[1][0].eval()  # a frozen norm in a model that trains
        before = [module.training for module in model.modules()]
        assert calibrate(model, DataLoader(Pairs(), 16)).metrics == calibrate(model, DataLoader(Pairs(), 16)).metrics
        assert [module.training for module in model.modules()] == before and len(set(before)) == 2
        assert set(seen) == {(False, False)} and torch.is_grad_enabled()

    def test_modes_are_restored_after_an_error_too(self):
        model = nn.Linear(5, 3)
        with pytest.raises(RuntimeError):
            calibrate(model, DataLoader(Pairs(), 16))
        assert model.training

    @pytest.mark.parametrize("prepared", [False, True])
    @pytest.mark.parametrize("shuffle", ["no", "global", "shared generator"])
    def test_no_random_state_moves(self, shuffle, prepared):
        generator = torch.Generator() if shuffle == "shared generator" else None
        loader = DataLoader(Pairs(restless=True), 16, shuffle=shuffle != "no", generator=generator)
        accelerator = Accelerator(cpu=True) if prepared else None
        loader = accelerator.prepare(loader) if prepared else loader
        model = nn.Sequential(nn.Linear(4, 3), nn.Dropout())

        def states():
            shared = [generator.get_state().tolist()] if generator is not None else []
            return (
                random.getstate(),
                np.random.get_state()[1].tolist(),
                np.random.get_state()[2],
                torch.get_rng_state().tolist(),
                shared,
            )

        before = repr(states())
        calibrate(model, loader, accelerator=accelerator)
        assert repr(states()) == before
        list(loader)
        assert repr(states()) != before  # reading the data without care does move them

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_the_random_state_of_the_gpu_does_not_move(self):
        class Noisy(nn.Linear):
            def forward(self, inputs):
                return super().forward(inputs) + torch.rand(1, device=inputs.device)

        model = Noisy(4, 3).cuda()
        state = torch.cuda.get_rng_state()
        calibrate(model, DataLoader(Pairs(), 16))
        assert torch.equal(torch.cuda.get_rng_state(), state)

    def test_the_weights_are_those_of_a_run_without_it(self):
        def weights(calibrated):
            torch.manual_seed(0)
            model = tiny.bert(hidden_dropout_prob=0.3).train()
            optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
            for batch in bert_loader(48, shuffle=True):
                if calibrated:
                    calibrate(model, bert_loader(shuffle=True))
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

        assert torch.equal(weights(calibrated=True), weights(calibrated=False))


class TestErrors:
    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            ([], "dataloader is empty"),
            ([(torch.randn(4, 3), torch.full((4,), -100))], r"Every label of the calibration set is ignored \(-100\)"),
            (
                [(torch.tensor([[0.0, 1.0], [0.0, np.nan]]), torch.tensor([0, 0]))],
                "1 of 2 samples of the calibration set have logits that are NaN or infinite",
            ),
            ([(torch.tensor([[0.0, np.inf]]), torch.tensor([1]))], "1 of 1 samples .* Check the learning rate"),
            ([{"logits": torch.zeros(1, 2), "label": torch.zeros(1)}], r"dict with `labels` .* \['label', 'logits'\]"),
            ([torch.zeros(1, 2)], "found Tensor"),
            ([(torch.zeros(4, 3), torch.zeros(3, dtype=torch.long))], r"found \(4, 3\) and \(3,\)"),
        ],
    )
    def test_what_cannot_be_measured_is_an_error_and_leaves_the_table(self, batches, message):
        loss = AdaFocalLoss(num_bins=2)
        with pytest.raises(ValueError, match=message):
            calibrate(Answers(), batches, loss)
        assert torch.equal(table(loss), table(AdaFocalLoss(num_bins=2)))


def calibrate_on_two_processes(folder):
    torch.set_num_threads(1)
    accelerator, loss = Accelerator(cpu=True), AdaFocalLoss(num_bins=5)
    assert accelerator.num_processes == 2
    model, loader = accelerator.prepare(tiny.bert(), bert_loader(batch_size=8))
    found = calibrate(model, loader, loss, accelerator)
    result = {"metrics": found.metrics, "count": int(found.statistics.count.sum()), "table": table(loss).tolist()}
    messages = {}
    sampled = accelerator.prepare(bert_loader(sampler=SubsetRandomSampler(range(40))))
    for name, arguments in {
        "no accelerator": (model, loader),
        "unprepared": (model, bert_loader(), loss, accelerator),
        "sampler": (model, sampled, loss, accelerator),
    }.items():
        with pytest.raises(ValueError) as error:
            calibrate(*arguments)
        messages[name] = str(error.value)
    subset = Subset(tiny.token_dataset(61, seed=1), range(40))
    exact = accelerator.prepare(DataLoader(subset, 16, collate_fn=DefaultDataCollator()))
    messages["subset"] = int(calibrate(model, exact, None, accelerator).statistics.count.sum())
    result["messages"] = messages
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    debug_launcher(calibrate_on_two_processes, args=(folder,), num_processes=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


class TestTwoProcesses:
    def test_the_table_is_that_of_one_process_and_the_same_on_both_to_the_bit(self, two_processes):
        loss = AdaFocalLoss(num_bins=5)
        one = calibrate(tiny.bert(), bert_loader(), loss)
        assert two_processes[0] == two_processes[1]
        assert two_processes[0]["count"] == 61  # three samples pad the last batch
        assert two_processes[0]["metrics"] == pytest.approx(one.metrics, rel=1e-6)
        assert two_processes[0]["table"] == pytest.approx(table(loss).tolist(), rel=1e-6)

    def test_what_would_be_counted_wrong_is_refused(self, two_processes):
        messages = two_processes[0]["messages"]
        assert "one of 2 processes" in messages["no accelerator"]
        assert "each of 2 processes would read every sample" in messages["unprepared"]
        assert "samples 40 of 61 samples" in messages["sampler"] and messages["subset"] == 40


def script():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("train_no_trainer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Blanked(Dataset):
    """Sequences in which every reading blanks tokens at random."""

    def __init__(self, data):
        self.data, self.read = data, []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        tokens = torch.tensor(self.data[index]["input_ids"])
        tokens = tokens.where(torch.rand(len(tokens)) > 0.1, 0)
        self.read.append((index, tokens.tolist()))
        return {"input_ids": tokens, "labels": self.data[index]["labels"]}


class TinyTask:
    """117 sequences to train on, so 8 steps of 16 the last of which has 5.

    In float64, so that runs that differ in rounding alone stay together.
    """

    def __init__(self, dtype=torch.float64, **model):
        # In evaluation mode, as `from_pretrained` returns a model; on the second process with other weights.
        self.model_init = lambda: tiny.bert(torch.initial_seed(), **model).to(dtype).eval()
        self.train = Blanked(tiny.token_dataset(117))

    def prepare(self, seed):
        calibration, test = tiny.token_dataset(61, 1), tiny.token_dataset(75, 2)
        nothing_to_save = SimpleNamespace(save_pretrained=lambda folder: None)
        return Splits(self.train, calibration, test), self.model_init, nothing_to_save, DefaultDataCollator()


SGD = {
    "num_train_epochs": 3, "per_device_train_batch_size": 16, "optimizer": "SGD", "learning_rate": 0.5,
    "lr_scheduler_type": "constant", "weight_decay": 0.0,
}  # fmt: skip


def run(folder, task=None, **settings):
    """A short run of the example; model, loss and measurements."""
    module = script()
    command = [text for name, value in {**SGD, **settings}.items() for text in (f"--{name}", str(value))]
    _, args = module.parse_arguments([*command, "--use_cpu", "--output_dir", str(folder)])
    return module.train(task or TinyTask(), args)


def outcome(model, loss, measurements) -> dict:
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return {
        "weights": weights.tolist(),
        "gammas": loss.gammas.tolist(),
        "edges": loss.edges.tolist(),
        "history": [
            [*found.metrics.values(), *found.statistics.edges, *found.statistics.gap] for found in measurements
        ],
    }


def distance(found, expected, start) -> float:
    """How far two runs ended from each other, by how far they came."""
    found, expected, start = (torch.tensor(result["weights"]) for result in (found, expected, start))
    return ((found - expected).norm() / (expected - start).norm()).item()


DIGITS = ["--use_cpu", "--max_train_samples", "117", "--num_train_epochs", "2"]
RESUMABLE = {
    "optimizer": "AdamW", "learning_rate": 5e-3, "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
}  # fmt: skip


def example_on_two_processes(folder):
    torch.set_num_threads(1)
    results = {"whole": outcome(*run(folder, per_device_train_batch_size=8, per_device_eval_batch_size=16))}
    assert AcceleratorState().num_processes == 2
    task = TinyTask(torch.float32, hidden_dropout_prob=0.1)
    results["uninterrupted"] = outcome(*run(folder, task, checkpointing_steps=6, **RESUMABLE))
    results["resumed"] = outcome(*run(folder, task, resume_from_checkpoint=folder / "step_6", **RESUMABLE))
    (folder / f"{AcceleratorState().process_index}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def examples_on_two_processes(tmp_path_factory):
    """The runs of each of two processes."""
    folder = tmp_path_factory.mktemp("examples")
    debug_launcher(example_on_two_processes, args=(folder,), num_processes=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run in one process."""
    return outcome(*run(tmp_path_factory.mktemp("whole")))


class TestExample:
    @pytest.mark.parametrize(("size", "steps"), [(8, 2), (4, 4)])
    def test_micro_batches_that_make_one_batch_give_its_run(self, tmp_path, whole, size, steps):
        start = outcome(*run(tmp_path, learning_rate=0.0, num_train_epochs=1))
        split = outcome(*run(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps))
        assert distance(split, whole, start) < 1e-6
        assert split["gammas"] == pytest.approx(whole["gammas"], rel=1e-6)
        np.testing.assert_allclose(split["history"], whole["history"], rtol=1e-6)

    @pytest.mark.parametrize("sizes", [(8, 8), (4, 4, 4, 4), (3, 13), (1, 9, 4, 2)])
    def test_unequal_micro_batches_with_ignored_labels_give_the_gradient_of_their_mean_loss(self, sizes):
        inputs = torch.tensor(tiny.token_dataset(16)["input_ids"][:])
        labels = torch.tensor(tiny.token_dataset(16)["labels"][:]).where(torch.arange(16) % 5 > 0, -100)
        accelerator, loss = Accelerator(cpu=True), AdaFocalLoss(num_bins=5)
        loss.set_table(torch.linspace(0, 1, 6) ** 2, torch.linspace(-2, 4, 5))
        expected, found = tiny.bert(), tiny.bert()
        mean = loss(expected(input_ids=inputs).logits, labels)  # over 12 labels
        mean.backward()
        batches = [
            {"input_ids": part, "labels": of_part}
            for part, of_part in zip(inputs.split(sizes), labels.split(sizes), strict=True)
        ]
        value = script().accumulate_gradient(accelerator, found, loss, batches)
        assert value.item() == pytest.approx(mean.item(), rel=1e-5)
        for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
            assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm() + 1e-8

    def test_a_run_resumed_at_any_checkpoint_is_the_uninterrupted_one_to_the_bit(self, tmp_path):
        # With augmentation, dropout, momentum and a schedule; checkpoints within an epoch and at its end.
        task = TinyTask(torch.float32, hidden_dropout_prob=0.1)
        whole = outcome(*run(tmp_path, task, checkpointing_steps=4, **RESUMABLE))
        for step in (4, 8, 20):
            resumed = outcome(*run(tmp_path, task, resume_from_checkpoint=tmp_path / f"step_{step}", **RESUMABLE))
            assert resumed == {**whole, "history": whole["history"][step // 8 :]}

    def test_a_sample_is_read_alike_whoever_reads_it_and_otherwise_in_each_epoch(self, tmp_path):
        first, second = TinyTask(), TinyTask()
        model, _, _ = run(tmp_path, first, num_train_epochs=2)
        run(tmp_path, second, num_train_epochs=2, per_device_train_batch_size=3)
        assert model.training
        assert first.train.read == second.train.read
        epochs = [dict(first.train.read[:117]), dict(first.train.read[117:])]
        assert set(epochs[0]) == set(epochs[1]) == set(range(117))
        assert sum(epochs[0][index] != epochs[1][index] for index in range(117)) > 50

    def test_reading_a_sample_leaves_the_random_state(self):
        data = script().SeededReads(Blanked(tiny.token_dataset(3)), seed=0)
        state = torch.get_rng_state()
        data[1]
        assert torch.equal(torch.get_rng_state(), state)

    def test_processes_that_do_not_know_of_each_other_are_an_error(self, tmp_path, monkeypatch):
        Accelerator(cpu=True)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="pass --use_cpu"):
            run(tmp_path)

    def test_a_task_brings_settings_of_its_own_and_the_user_goes_first(self):
        task, args = script().parse_arguments(["--task", "text", "--learning_rate", "0.5", "--max_length", "9"])
        assert (task.dataset, task.max_length, args.learning_rate) == ("20_newsgroups", 9, 0.5)
        assert args.num_train_epochs == task.training_defaults["num_train_epochs"]
        with pytest.raises(ValueError, match="--no_such_thing"):
            script().parse_arguments(["--no_such_thing", "1"])

    def test_two_processes_of_half_the_batch_give_the_run_of_one(self, examples_on_two_processes, whole):
        first, second = (results["whole"] for results in examples_on_two_processes)
        assert first == second  # to the bit
        assert first["gammas"] == pytest.approx(whole["gammas"], rel=1e-6)
        np.testing.assert_allclose(first["history"], whole["history"], rtol=1e-6)  # after every update, and the test
        np.testing.assert_allclose(first["weights"], whole["weights"], atol=1e-7)

    def test_two_processes_resume_to_the_bit_within_an_epoch(self, examples_on_two_processes):
        for results in examples_on_two_processes:
            history = results["uninterrupted"]["history"][1:]  # step 6 is the second of the second epoch
            assert results["resumed"] == {**results["uninterrupted"], "history": history}

    def test_the_command_of_the_docstring_trains_on_digits_and_saves_a_model_to_load(self, tmp_path, capsys):
        pytest.importorskip("timm", reason="timm is the extra `vision`")
        module = script()
        model, _, measurements = module.train(*module.parse_arguments([*DIGITS, "--output_dir", str(tmp_path)]))
        assert len(measurements) == 3 and measurements[-1].statistics.count.sum() == 997
        assert capsys.readouterr().out.count("'ada_ece'") == 3
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))

    @pytest.mark.slow
    def test_torchrun_gives_the_numbers_of_one_process(self, tmp_path):
        pytest.importorskip("timm", reason="timm is the extra `vision`")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        launchers = {1: [], 2: ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]}
        printed = []
        for processes, launcher in launchers.items():
            sizes = ["--per_device_train_batch_size", str(32 // processes), "--output_dir", str(tmp_path)]
            command = [sys.executable, *launcher, str(SCRIPT), *DIGITS, *sizes]
            result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            printed.append([float(number) for number in re.findall(r"(?:accuracy|nll)': ([\d.]+)", result.stdout)])
        assert len(printed[0]) == 6
        assert printed[1] == pytest.approx(printed[0], rel=1e-5)
