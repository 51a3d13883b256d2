"""Models and data that are not a plain module and a list: sharded, checkpointed, adapted, streamed, searched over."""

import json

import numpy as np
import pytest
import tiny
import torch
from accelerate import PartialState, debug_launcher
from accelerate.utils import DistributedType
from datasets import IterableDataset
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_adafocal import AdaFocalLoss, AdaFocalTrainer


def weights(model) -> torch.Tensor:
    parameters = (parameter.detach() for parameter in model.parameters())
    return torch.cat([(p.full_tensor() if isinstance(p, DTensor) else p).flatten().clone() for p in parameters])


def updates(run) -> list[int]:
    """Steps after which gamma moved."""
    return [update["step"] for update in run.adaptive_callback.history[1:]]


def train_on_two(folder, sharded, resume_from_checkpoint=None):
    torch.set_num_threads(1)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "epoch"}
    if sharded:
        settings |= {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}}
    args = tiny.arguments(folder, ddp_find_unused_parameters=False, **settings)
    if sharded and args.world_size == 2:
        # accelerate takes FSDP for accelerators only: on CPUs it falls back to DDP without a word.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    run = tiny.trainer(folder, args=args, eval_dataset=tiny.token_dataset(61, seed=1))
    run.train(resume_from_checkpoint=resume_from_checkpoint)
    result = {
        "distributed_type": run.accelerator.distributed_type.value,
        "sharded": sum(isinstance(parameter, DTensor) for parameter in run.model.parameters()),
        "gammas": run.loss.gammas.tolist(),
        "edges": run.loss.edges.tolist(),
        "evaluation": {
            name: [entry[name] for entry in run.state.log_history if name in entry]
            for name in ("eval_nll", "eval_ece", "eval_ada_ece", "eval_accuracy")
        },
        "weights": weights(run.model).tolist(),
    }
    (folder / f"rank-{run.args.process_index}.json").write_text(json.dumps(result))


def ranks(folder):
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow  # two launches: test_distributed.py has the fast ones
@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this release of torch does not run on the CPU"
)
class TestFullySharded:
    """FSDP2 on two processes (gloo)."""

    @pytest.fixture(scope="class")
    def runs(self, tmp_path_factory):
        sharded, one, resumed = (tmp_path_factory.mktemp(name) for name in ("sharded", "one", "resumed"))
        debug_launcher(train_on_two, args=(sharded, True), num_processes=2)
        debug_launcher(train_on_two, args=(resumed, True, str(sharded / "checkpoint-6")), num_processes=2)
        args = tiny.arguments(one, per_device_train_batch_size=8)
        run = tiny.trainer(one, args=args, eval_dataset=tiny.token_dataset(61, seed=1))
        run.train()
        return ranks(sharded), ranks(resumed), run

    def test_the_model_is_sharded_and_the_ranks_agree_to_the_bit(self, runs):
        first, second = runs[0]
        assert first["distributed_type"] == "FSDP" and first["sharded"] > 0
        assert first == second

    def test_gammas_metrics_and_weights_are_those_of_one_process(self, runs):
        (sharded, _), _, one = runs
        assert one.loss.gammas.ne(1).all()
        assert sharded["gammas"] == pytest.approx(one.loss.gammas.tolist(), rel=1e-5)
        assert sharded["edges"] == pytest.approx(one.loss.edges.tolist(), rel=1e-5)
        for name, values in sharded["evaluation"].items():
            expected = [entry[name] for entry in one.state.log_history if name in entry]
            assert len(values) == 2 and values == pytest.approx(expected, rel=1e-4)
        expected = weights(one.model)
        assert (torch.tensor(sharded["weights"]) - expected).norm() / expected.norm() < 1e-5

    def test_it_resumes_with_its_table(self, runs):
        sharded, resumed, _ = runs
        assert resumed[0]["sharded"] > 0
        assert resumed == sharded  # to the bit, the log before the checkpoint included


class TestGradientCheckpointing:
    def test_it_gives_the_weights_and_gammas_of_a_run_without(self, tmp_path):
        runs, calls = {}, {}
        for checkpointing in (False, True):
            model, counted = tiny.bert(), []
            run = tiny.trainer(tmp_path, model, gradient_checkpointing=checkpointing)
            intermediate = model.bert.encoder.layer[0].intermediate
            intermediate.register_forward_hook(lambda m, _, __, counted=counted: counted.append(m.training))
            run.train()
            runs[checkpointing], calls[checkpointing] = run, counted.count(True)
        assert (calls[False], calls[True]) == (12, 24)  # computed again on the way back
        torch.testing.assert_close(weights(runs[True].model), weights(runs[False].model), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(runs[True].loss.gammas, runs[False].loss.gammas, rtol=1e-6, atol=0)
        assert runs[True].loss.gammas.ne(1).all()


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
class TestLora:
    def lora(self, task):
        peft = pytest.importorskip("peft", reason="peft (extra `dev`) adapts the model")
        model = tiny.bert()  # seeds, so the adapters are the same each time
        kind = {"task_type": task} if task else {"modules_to_save": ["classifier"]}
        config = peft.LoraConfig(r=4, target_modules=["query", "value"], lora_dropout=0.0, **kind)
        return peft.get_peft_model(model, config)

    def run(self, folder, task):
        settings = {"num_train_epochs": 3, "save_strategy": "epoch", "learning_rate": 2e-2}
        return tiny.trainer(folder, self.lora(task), **settings)

    def test_only_the_adapter_and_the_head_move_and_gamma_does(self, tmp_path, task):
        run = self.run(tmp_path, task)
        before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
        run.train()
        moved = {name for name, parameter in run.model.named_parameters() if not torch.equal(parameter, before[name])}
        assert moved == {name for name in before if "lora_" in name or "modules_to_save" in name}
        assert any("lora_" in name for name in moved) and len(moved) < len(before)
        assert updates(run) == [6, 12, 18] and run.loss.gammas.ne(1).all()

    def test_evaluation_finds_the_labels_behind_the_adapter(self, tmp_path, task):
        run = self.run(tmp_path, task)
        data = tiny.token_dataset(60, seed=1)
        p, labels = tiny.probabilities(run.model, data)
        assert run.evaluate()["eval_nll"] == pytest.approx(-np.log(p[np.arange(60), labels]).mean(), rel=1e-6)

    def test_it_resumes_from_the_adapters_checkpoint(self, tmp_path, task):
        whole, resumed = self.run(tmp_path, task), self.run(tmp_path, task)
        whole.train()
        assert (tmp_path / "checkpoint-6" / "adapter_model.safetensors").is_file()
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert torch.equal(weights(whole.model), weights(resumed.model))
        assert torch.equal(whole.loss.gammas, resumed.loss.gammas)
        assert torch.equal(whole.loss.edges, resumed.loss.edges)


class TorchStream(torch.utils.data.IterableDataset):
    """Rows one after the other, from the start each time it is iterated."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        yield from self.data


class OneShot(torch.utils.data.IterableDataset):
    """Rows one after the other, once."""

    def __init__(self, data):
        self.rows = iter(list(data))

    def __iter__(self):
        return self.rows


def datasets_stream(data):
    return IterableDataset.from_generator(lambda: iter(data), features=data.features)


@pytest.mark.parametrize("stream", [datasets_stream, TorchStream])
class TestStreams:
    def test_a_streamed_training_set_gives_the_weights_and_gammas_of_the_set(self, tmp_path, stream):
        # A step takes the whole set, so that the order of the rows, shuffled only where there is an index, is no
        # matter; in micro-batches of 16, 16 and 13.
        data = tiny.token_dataset(45)
        settings = {
            "max_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 3,
        }
        whole = tiny.trainer(tmp_path, train_dataset=data, **settings)
        streamed = tiny.trainer(tmp_path, train_dataset=stream(data), **settings)
        for run in (whole, streamed):
            run.train()
            assert updates(run) == [2, 4]
        expected = weights(whole.model)
        assert (expected - weights(tiny.bert())).norm() > 0.1
        assert (weights(streamed.model) - expected).norm() / expected.norm() < 1e-5
        torch.testing.assert_close(streamed.loss.gammas, whole.loss.gammas, rtol=1e-4, atol=0)

    @pytest.mark.parametrize("role", ["eval_dataset", "calibration_dataset"])
    def test_a_streamed_calibration_set_gives_the_gammas_of_the_set(self, tmp_path, stream, role):
        data = tiny.token_dataset(60, seed=1)
        whole = tiny.trainer(tmp_path, **{role: data})
        streamed = tiny.trainer(tmp_path, **{role: stream(data)})
        for run in (whole, streamed):
            run.train()
            assert updates(run) == [6, 12]
        assert torch.equal(whole.loss.gammas, streamed.loss.gammas)
        assert torch.equal(whole.loss.edges, streamed.loss.edges)


class TestStreamThatRunsDry:
    @pytest.mark.parametrize("role", ["eval_dataset", "calibration_dataset"])
    def test_it_is_an_error_and_not_an_update_from_old_numbers(self, tmp_path, role):
        # By default accelerate itself refuses an empty stream.
        run = tiny.trainer(
            tmp_path,
            accelerator_config={"dispatch_batches": False},
            **{role: OneShot(tiny.token_dataset(60, seed=1))},
        )
        with pytest.raises(RuntimeError, match="found no labelled sample. A stream must start anew"):
            run.train()
        assert updates(run) == [6]


class TestWhenGammaMoves:
    def test_an_evaluation_on_start_moves_nothing_in_a_fresh_or_a_resumed_run(self, tmp_path):
        settings = {"num_train_epochs": 3, "save_strategy": "epoch"}
        plain = tiny.trainer(tmp_path / "plain", **settings)
        whole = tiny.trainer(tmp_path / "whole", eval_on_start=True, **settings)
        resumed = tiny.trainer(tmp_path / "whole", eval_on_start=True, **settings)
        plain.train()
        whole.train()
        assert sum("eval_nll" in entry for entry in whole.state.log_history) == 1 + 3
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
        assert updates(plain) == updates(whole) == updates(resumed) == [6, 12, 18]
        assert torch.equal(plain.loss.gammas, whole.loss.gammas)
        assert torch.equal(plain.loss.gammas, resumed.loss.gammas)

    @pytest.mark.parametrize("separate", [False, True])
    def test_by_steps_it_moves_at_each_of_them_and_not_at_the_end_of_an_epoch(self, tmp_path, separate):
        sets = {"calibration_dataset": tiny.token_dataset(60, seed=5)} if separate else {}
        run = tiny.trainer(tmp_path, eval_strategy="steps", eval_steps=9, num_train_epochs=3, **sets)
        run.train()  # epochs end at 6, 12 and 18
        assert updates(run) == [9, 18]

    @pytest.mark.parametrize("separate", [False, True])
    def test_the_users_own_evaluations_after_training_move_nothing(self, tmp_path, separate):
        sets = {"calibration_dataset": tiny.token_dataset(60, seed=5)} if separate else {}
        run = tiny.trainer(tmp_path, **sets)
        run.train()
        table, moved = (run.loss.gammas.clone(), run.loss.edges.clone()), updates(run)
        saved = dict(run.state.stateful_callbacks["adafocal"])
        run.evaluate()
        run.evaluate(run.calibration_dataset)
        run.evaluate(tiny.token_dataset(30, seed=8), metric_key_prefix="test")
        run.predict(run.eval_dataset)
        run.predict(run.eval_dataset, metric_key_prefix="eval")
        run.calibration_statistics()
        assert torch.equal(run.loss.gammas, table[0]) and torch.equal(run.loss.edges, table[1])
        assert updates(run) == moved and run.state.stateful_callbacks["adafocal"] == saved


class Watch(TrainerCallback):
    """What each trial trains with, and the losses it evaluates; added after AdaFocal's callback."""

    def __init__(self, run):
        self.run, self.losses, self.tables, self.nll = run, [], [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.losses.append(self.run.loss)
        if hasattr(self.run.loss, "gammas"):
            self.tables.append((self.run.loss.edges.tolist(), self.run.loss.gammas.tolist()))

    def on_train_end(self, args, state, control, **kwargs):
        self.nll.append([entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry][-1])


class TestHyperparameterSearch:
    def trainer(self, folder, *, compute_metrics=None, loss_module=None, **settings):
        return AdaFocalTrainer(
            args=tiny.arguments(folder, **settings),
            model_init=lambda: tiny.bert(),
            train_dataset=tiny.token_dataset(48),
            eval_dataset=tiny.token_dataset(60, seed=1),
            compute_metrics=compute_metrics,
            loss=loss_module,
        )

    def search(self, folder, grid, *, compute_objective=None, **settings):
        """Try each value of one hyperparameter; returns the trainer, what was watched, and the best trial."""
        optuna = pytest.importorskip("optuna", reason="optuna (extra `dev`) proposes the trials")
        optuna.logging.set_verbosity(optuna.logging.CRITICAL)
        run = self.trainer(folder, **settings)
        watch = Watch(run)
        run.add_callback(watch)
        ((name, values),) = grid.items()
        best = run.hyperparameter_search(
            lambda trial: {name: trial.suggest_categorical(name, values)},
            compute_objective,
            n_trials=2,
            backend="optuna",
            sampler=optuna.samplers.GridSampler(grid, seed=0),
        )
        return run, watch, best

    def test_each_trial_starts_from_a_fresh_table(self, tmp_path):
        run, watch, _ = self.search(tmp_path, {"learning_rate": [4e-3, 5e-3]})
        even = pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
        assert watch.tables == [(even, [1.0] * 5)] * 2
        assert run.loss.gammas.ne(1).all() and updates(run) == [6, 12]

    def test_a_trial_is_the_run_of_its_settings_alone(self, tmp_path):
        _, watch, _ = self.search(tmp_path, {"learning_rate": [4e-3, 5e-3]})
        alone = []
        for learning_rate in (4e-3, 5e-3):
            run = self.trainer(tmp_path, learning_rate=learning_rate)
            run.train()
            alone.append(run.evaluate()["eval_loss"])
        assert sorted(watch.nll) == sorted(alone)  # to the bit
        assert alone[0] != pytest.approx(alone[1], rel=1e-3)

    def test_the_default_objective_is_the_nll(self, tmp_path):
        _, watch, best = self.search(tmp_path, {"learning_rate": [4e-3, 5e-3]})
        assert best.objective == min(watch.nll)

    def test_with_metrics_of_the_user_the_default_objective_is_their_sum(self, tmp_path):
        def compute_metrics(prediction):
            return {"accuracy": 2.0, "cost": 3.0}

        _, _, best = self.search(tmp_path, {"learning_rate": [4e-3, 5e-3]}, compute_metrics=compute_metrics)
        assert best.objective == 5.0

    def test_an_objective_of_the_user_sees_the_calibration_metrics(self, tmp_path):
        run, _, best = self.search(
            tmp_path,
            {"learning_rate": [4e-3, 5e-3]},
            compute_objective=lambda metrics: metrics["eval_ada_ece"],
        )
        last = [entry["eval_ada_ece"] for entry in run.state.log_history if "eval_ada_ece" in entry][-1]
        assert 0 < best.objective <= last

    def test_settings_of_the_loss_can_be_searched(self, tmp_path):
        _, watch, _ = self.search(tmp_path, {"gamma_initial": [0.5, 2.0]})
        assert sorted(gammas for _, gammas in watch.tables) == [[0.5] * 5, [2.0] * 5]
        _, watch, _ = self.search(tmp_path, {"num_bins": [4, 6]})
        assert sorted(len(gammas) for _, gammas in watch.tables) == [4, 6]
        _, watch, _ = self.search(tmp_path, {"focal_gamma": [1.0, 5.0]}, loss="focal")
        assert sorted(loss.gamma for loss in watch.losses) == [1.0, 5.0]

    def test_the_loss_itself_can_be_searched_but_not_for_one_that_adapts_in_another_way(self, tmp_path):
        _, watch, _ = self.search(tmp_path, {"loss": ["focal", "flsd_53"]}, loss="cross_entropy")
        assert {type(loss).__name__ for loss in watch.losses} == {"FocalLoss", "FLSD53Loss"}
        with pytest.raises(ValueError, match="to one that adapts in another way, found '(focal|flsd_53)'"):
            self.search(tmp_path, {"loss": ["focal", "flsd_53"]})

    def test_a_loss_module_of_the_user_stays(self, tmp_path):
        loss = AdaFocalLoss(num_bins=5, gamma_initial=3.0)
        run, watch, _ = self.search(tmp_path, {"learning_rate": [4e-3, 5e-3]}, loss_module=loss)
        assert run.loss is loss
        assert [gammas for _, gammas in watch.tables] == [[3.0] * 5] * 2
