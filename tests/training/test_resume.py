"""A run that stops at a checkpoint and goes on is the run that did not stop, to the bit."""

import inspect
import itertools
import json
import math
import shutil

import pytest
import run_tiny
import tiny
import torch
from accelerate import debug_launcher
from transformers import Trainer

from hf_adafocal.runs.arguments import parse_arguments
from hf_adafocal.runs.finetune import finetune
from hf_adafocal.runs.tasks import ImageTask

STRATEGIES = {
    "both after each epoch": {"eval_strategy": "epoch", "save_strategy": "epoch"},
    "within an epoch": {"eval_steps": 3, "save_steps": 3},
    "saved at other steps than evaluated": {"eval_steps": 3, "save_steps": 4},
    "saved by steps, evaluated after each epoch": {"eval_strategy": "epoch", "save_steps": 3},
    "saved after each epoch, evaluated by steps": {"eval_steps": 4, "save_strategy": "epoch"},
    "accumulated, with a short last step": {"eval_steps": 1, "save_steps": 1, "gradient_accumulation_steps": 4},
    "stopped within an epoch": {"eval_strategy": "epoch", "save_steps": 5, "max_steps": 10},
    "a loss without a table": {"eval_strategy": "epoch", "save_steps": 6, "loss": "focal"},
}


def loads_the_optimizer_onto_a_numbered_cpu() -> bool:
    """The first releases of transformers 5 do, with more than one process, and torch then raises."""
    source = inspect.getsource(Trainer._load_optimizer_and_scheduler)
    return 'map_location = self.args.device if self.args.world_size > 1 else "cpu"' in source


def checkpoints(folder) -> list[str]:
    return [str(path) for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))]


def read_state(folder) -> dict:
    return json.loads((folder / "trainer_state.json").read_text())


def resumed_on_each_rank(folder, settings) -> None:
    """The uninterrupted run, then two resumed from each of its checkpoints; each rank writes all outcomes."""
    torch.set_num_threads(1)
    whole = run_tiny.build(folder / "run", **settings)
    whole.train()
    results = [run_tiny.outcome(whole)]
    for checkpoint, restore in itertools.product(checkpoints(folder / "run"), (False, True)):
        settings["restore_callback_states_from_checkpoint"] = restore
        run = run_tiny.build(folder / "again", seed_of_weights=9, **settings)
        run.train(resume_from_checkpoint=checkpoint)
        results.append(run_tiny.outcome(run))
    (folder / f"rank-{whole.args.process_index}.json").write_text(json.dumps(results))


class TestOneProcess:
    @pytest.mark.parametrize(
        ("strategy", "restore"),
        [
            *((strategy, False) for strategy in STRATEGIES),
            *((strategy, True) for strategy in ("within an epoch", "both after each epoch", "a loss without a table")),
        ],
    )
    def test_resuming_from_any_checkpoint_gives_the_uninterrupted_run(self, tmp_path, strategy, restore):
        if strategy == "stopped within an epoch" and not hasattr(Trainer, "_run_epoch"):
            pytest.skip("without Trainer._run_epoch the resumed run takes one more step: test_private_hooks.py")
        settings = {
            **{"num_train_epochs": 2, "restore_callback_states_from_checkpoint": restore},
            **STRATEGIES[strategy],
        }
        whole = run_tiny.build(tmp_path / "run", **settings)
        whole.train()
        expected, stops = run_tiny.outcome(whole), checkpoints(tmp_path / "run")
        assert len(stops) >= 2
        for stop in stops:
            run = run_tiny.build(tmp_path / "again", seed_of_weights=9, **settings)
            run.train(resume_from_checkpoint=stop)
            assert run_tiny.outcome(run) == expected, stop

    def test_the_runs_compared_differ_in_every_part_where_the_data_order_differs(self, tmp_path):
        first, second = (run_tiny.build(tmp_path, save_strategy="no", data_seed=seed) for seed in (1, 2))
        first.train(), second.train()
        one, other = run_tiny.outcome(first), run_tiny.outcome(second)
        assert [name for name in one if one[name] == other[name]] == ["world_size"]

    @pytest.mark.parametrize("eval_strategy", ["epoch", "steps"])
    def test_an_evaluation_before_the_first_resumed_step_moves_nothing(self, tmp_path, eval_strategy):
        settings = {"eval_strategy": eval_strategy, "eval_steps": 3, "save_steps": 3, "eval_on_start": True}
        whole = run_tiny.build(tmp_path / "run", **settings)
        whole.train()
        run = run_tiny.build(tmp_path / "again", **settings)
        run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
        one, other = run_tiny.outcome(whole), run_tiny.outcome(run)
        assert (one["weights"], one["table"]) == (other["weights"], other["table"])

    def test_data_drawn_at_random_are_resumed_from_the_end_of_an_epoch(self, tmp_path):
        def masked(rows):
            tokens = torch.tensor(rows["input_ids"])
            return {**rows, "input_ids": tokens.masked_fill(torch.rand(tokens.shape) < 0.2, 0).tolist()}

        settings = {
            **{"train_dataset": tiny.token_dataset(48).with_transform(masked), "remove_unused_columns": False},
            **STRATEGIES["both after each epoch"],
        }
        whole, run = (run_tiny.build(tmp_path / name, **settings) for name in ("run", "again"))
        whole.train()
        run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
        assert run_tiny.outcome(run) == run_tiny.outcome(whole)

    def test_the_mean_loss_of_several_steps_is_all_that_differs_in_the_log(self, tmp_path):
        whole, run = (run_tiny.build(tmp_path / name, logging_steps=5) for name in ("run", "again"))
        whole.train()
        run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        one, other = run_tiny.outcome(whole), run_tiny.outcome(run)
        changed = [
            (mine["step"], name)
            for mine, theirs in zip(one.pop("log"), other.pop("log"), strict=True)
            for name in mine
            if mine[name] != theirs[name]
        ]
        assert changed == [(5, "loss")] and one == other

    def test_a_checkpoint_at_the_end_of_an_epoch_holds_its_evaluation(self, tmp_path):
        run_tiny.build(tmp_path, eval_strategy="epoch", save_steps=6).train()
        states = [read_state(tmp_path / f"checkpoint-{step}") for step in (6, 12, 18)]
        assert [state["stateful_callbacks"]["adafocal"]["updates"] for state in states] == [1, 2, 3]
        assert all("gamma_mean" in state["log_history"][-1] for state in states)


class TestTwoProcesses:
    @pytest.mark.skipif(
        loads_the_optimizer_onto_a_numbered_cpu(), reason="this Trainer cannot resume several processes on CPUs"
    )
    def test_resuming_from_any_checkpoint_gives_the_uninterrupted_run(self, tmp_path):
        settings = {
            **STRATEGIES["saved at other steps than evaluated"],
            **{"num_train_epochs": 2, "per_device_train_batch_size": 4},
        }
        debug_launcher(resumed_on_each_rank, args=(tmp_path, settings), num_processes=2)
        first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
        whole, *resumed = first
        assert whole["world_size"] == 2 and len(resumed) == 2 * 3
        assert all(run == whole for run in resumed)
        for mine, theirs in zip(first, second, strict=True):
            assert {**mine, "log": None} == {**theirs, "log": None}


class TestBestModel:
    """The best checkpoint here is that of the highest ECE, which is not the last one."""

    def build(self, folder, **settings):
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_ece", "greater_is_better": True}
        return run_tiny.build(folder, **{"eval_steps": 2, **best, **settings})

    def run(self, folder, **settings):
        run = self.build(folder, **settings)
        run.train()
        return run

    def test_the_table_comes_back_with_the_best_weights(self, tmp_path):
        run = self.run(tmp_path)
        best = run.state.best_global_step
        assert best < 18
        saved = read_state(tmp_path / f"checkpoint-{best}")["stateful_callbacks"]["adafocal"]
        last = read_state(tmp_path / "checkpoint-18")["stateful_callbacks"]["adafocal"]
        assert (saved["updates"], last["updates"]) == (best // 2, 9) and saved["gammas"] != last["gammas"]
        assert (run.loss.edges.tolist(), run.loss.gammas.tolist()) == (saved["edges"], saved["gammas"])
        run.save_state()
        assert read_state(tmp_path)["stateful_callbacks"]["adafocal"] == saved

    def test_resuming_finds_the_same_best_table(self, tmp_path):
        whole, again = self.run(tmp_path), self.build(tmp_path)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
        assert run_tiny.outcome(again) == run_tiny.outcome(whole)

    def test_it_says_which_table_it_is(self, tmp_path, caplog):
        caplog.set_level("INFO", logger="hf_adafocal")
        run = self.run(tmp_path)
        updates = run.state.best_global_step // 2
        assert f"the loss's table after {updates} updates from the best checkpoint, {tmp_path}" in caplog.text

    def test_without_it_the_table_is_the_last_one(self, tmp_path):
        run = self.run(tmp_path, load_best_model_at_end=False)
        last = read_state(tmp_path / "checkpoint-18")["stateful_callbacks"]["adafocal"]
        assert run.loss.gammas.tolist() == last["gammas"]


# What a hand, a full disk or another run can leave, and how the error names it.
GAMMAS, EDGES = (rf"does not fit this run's loss: {name} must be finite" for name in ("gammas", "edges"))
DAMAGES = {
    "a gamma is missing": (lambda table: table["gammas"].pop(), rf"{GAMMAS} numbers of shape \(5,\)"),
    "an edge too many": (lambda table: table["edges"].append(1.0), rf"{EDGES} numbers of shape \(6,\)"),
    "gamma is NaN": (lambda table: table["gammas"].__setitem__(2, math.nan), rf"{GAMMAS}.*nan"),
    "gamma is infinite": (lambda table: table["gammas"].__setitem__(2, math.inf), rf"{GAMMAS}.*inf"),
    "gamma is a text": (lambda table: table["gammas"].__setitem__(2, "1.0"), GAMMAS),
    "gammas are one number": (lambda table: table.update(gammas=1.0), rf"{GAMMAS}.*found 1.0"),
    "edges descend": (lambda table: table["edges"].reverse(), "adafocal in .* edges must ascend"),
    "an edge is NaN": (lambda table: table["edges"].__setitem__(1, math.nan), rf"{EDGES}.*nan"),
    "updates are negative": (lambda table: table.update(updates=-1), r"adafocal\.updates in .* whole number .*-1"),
    "updates are a fraction": (
        lambda table: table.update(updates=1.5),
        r"adafocal\.updates in .* whole number .*1\.5",
    ),
    "updates are a truth value": (lambda table: table.update(updates=True), r"adafocal\.updates in .* whole number"),
    "a field is missing": (lambda table: table.pop("edges"), r"adafocal in .* lacks \['edges'\]"),
    "the history is missing": (lambda table: table.pop("history"), r"adafocal in .* lacks \['history'\]"),
    "the history is no list": (lambda table: table.update(history="all"), r"adafocal\.history in .* must be a list"),
    "an update has no step": (
        lambda table: table["history"][-1].pop("step"),
        r"adafocal\.history in .* must be a list of updates",
    ),
}


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """The checkpoint of step 6 of a run, to be copied before it is damaged."""
    folder = tmp_path_factory.mktemp("run")
    tiny.trainer(folder, num_train_epochs=1, save_strategy="epoch").train()
    return folder / "checkpoint-6"


class TestDamagedState:
    def refused(self, checkpoint, message, **settings):
        """Resuming is an error that names the file, and neither a file, the table nor the weights change."""
        before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
        run = tiny.trainer(checkpoint.parent / "again", **settings)
        run.loss.set_table([0, *[0.5] * (run.loss.num_bins - 1), 1], [3.0] * run.loss.num_bins)
        table = {name: buffer.clone() for name, buffer in run.loss.named_buffers()}
        weights = [parameter.detach().clone() for parameter in run.model.parameters()]
        with pytest.raises(ValueError, match=message) as error:
            run.train(resume_from_checkpoint=str(checkpoint))
        assert str(checkpoint / "trainer_state.json") in str(error.value)
        assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
        assert all(torch.equal(buffer, table[name]) for name, buffer in run.loss.named_buffers())
        assert all(map(torch.equal, weights, run.model.parameters()))
        assert not any((checkpoint.parent / "again").iterdir())

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_damaged_table_is_an_error_that_names_file_and_field(self, tmp_path, saved_run, damage):
        change, message = DAMAGES[damage]
        checkpoint = shutil.copytree(saved_run, tmp_path / "checkpoint-6")
        state = read_state(checkpoint)
        change(state["stateful_callbacks"]["adafocal"])
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        self.refused(checkpoint, message)

    def test_another_number_of_bins_is_an_error_that_names_file_and_field(self, tmp_path, saved_run):
        checkpoint = shutil.copytree(saved_run, tmp_path / "checkpoint-6")
        self.refused(checkpoint, rf"{EDGES} numbers of shape \(8,\)", num_bins=7)

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
    def test_a_truncated_file_is_an_error_that_names_it(self, tmp_path, saved_run, share):
        checkpoint = shutil.copytree(saved_run, tmp_path / "checkpoint-6")
        text = (saved_run / "trainer_state.json").read_text().rstrip()
        (checkpoint / "trainer_state.json").write_text(text[: int(share * len(text))])
        self.refused(checkpoint, r"trainer_state\.json cannot be read: ")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[]", "must be an object with a whole `global_step`"),
            ('{"global_step": 1.5}', "must be an object with a whole `global_step`"),
            ('{"global_step": 6, "stateful_callbacks": []}', "stateful_callbacks in .* must be an object"),
            ('{"global_step": 6, "stateful_callbacks": {"adafocal": 3}}', "adafocal in .* must be an object, found 3"),
        ],
    )
    def test_what_is_not_the_state_of_a_run_is_an_error(self, tmp_path, saved_run, content, message):
        checkpoint = shutil.copytree(saved_run, tmp_path / "checkpoint-6")
        (checkpoint / "trainer_state.json").write_text(content)
        self.refused(checkpoint, message)

    def test_a_missing_file_is_an_error_that_names_it(self, tmp_path, saved_run):
        checkpoint = shutil.copytree(saved_run, tmp_path / "checkpoint-6")
        (checkpoint / "trainer_state.json").unlink()
        self.refused(checkpoint, r"trainer_state\.json is missing")


@pytest.mark.usefixtures("blank_pictures", "few_digits")
class TestCommandLine:
    QUICK = (
        *("--use_cpu", "true", "--disable_tqdm", "true", "--num_train_epochs", "2", "--max_train_samples", "160"),
        *("--random_shift", "0", "--save_strategy", "epoch"),
    )

    @pytest.fixture
    def finish(self):
        pytest.importorskip("timm", reason="timm is the extra `vision`")
        return lambda folder, *more: finetune(
            *parse_arguments(ImageTask, [*self.QUICK, "--output_dir", str(folder), *more])
        )

    def test_true_goes_on_from_the_last_complete_checkpoint(self, tmp_path, finish):
        expected = finish(tmp_path)
        first, last = checkpoints(tmp_path)
        (tmp_path / last / "trainer_state.json").unlink()
        (tmp_path / "report.json").unlink()
        report = finish(tmp_path, "--resume_from_checkpoint", "true")
        assert report.adaptation == expected.adaptation and report.metrics == expected.metrics
        steps = [entry["step"] for entry in read_state(tmp_path)["log_history"] if "gamma_mean" in entry]
        assert steps == [int(first[-1]), 2 * int(first[-1])]

    def test_true_without_a_checkpoint_is_an_error_that_names_the_folder(self, tmp_path, finish):
        with pytest.raises(ValueError, match=f"{tmp_path} holds no complete checkpoint"):
            finish(tmp_path, "--resume_from_checkpoint", "true")
