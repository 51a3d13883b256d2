"""Ways to share a run among processes other than plain data parallelism, on two processes (gloo) of the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import accelerate
import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator, PartialState, debug_launcher
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, DistributedType
from packaging.version import Version
from transformers import Qwen2Config, Qwen2ForSequenceClassification, set_seed

from hf_adafocal.metrics.scores import calibration_report
from hf_adafocal.training.loop import calibrate
from hf_adafocal.training.processes import DataProcesses, check_sequences_are_whole

CONFIG = {
    **{"vocab_size": tiny.VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "intermediate_size": 32, "num_labels": 3, "pad_token_id": 0},
}


def facts(run, **more) -> dict:
    """What a run has logged and ended with."""
    log = run.state.log_history
    return more | {
        "rows": len(run.recorder.calibration) if run.recorder.calibration is not None else None,
        "table": run.loss.table() if run.plan.adaptive is not None else None,
        "training": [[entry["loss"], entry["grad_norm"]] for entry in log if "grad_norm" in entry],
        "evaluations": [[entry["eval_loss"], entry["eval_ece"]] for entry in log if "eval_ece" in entry],
    }


def written(folder, run, **more) -> None:
    (folder / f"rank-{run.args.process_index}.json").write_text(json.dumps(facts(run, **more)))


def ranks(folder) -> tuple[dict, dict]:
    return tuple(json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1))


def accelerators() -> None:
    """accelerate shards models over accelerators only, so two processes of the CPU must pass for some."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def train_tensor_parallel(folder, saved, settings) -> None:
    """Train a Qwen2 whose layers are split over two processes, or whole on one."""
    torch.set_num_threads(1)
    args = tiny.arguments(folder, ddp_find_unused_parameters=False, **settings)
    shared = args.world_size == 2
    if shared:
        accelerators()
    model = Qwen2ForSequenceClassification.from_pretrained(saved, **({"tp_plan": "auto"} if shared else {}))
    run = tiny.trainer(folder, model, args)
    slices = []
    if run.plan.adaptive.follows == "temperature":
        measure = run.adaptive_callback.measure
        run.adaptive_callback.measure = lambda indices: slices.append(measure(indices)) or slices[-1]
    run.train()
    written(folder, run, size=run.get_tp_size(), slices=[sums.tolist() for sums in slices])


@pytest.mark.skipif(
    Version(accelerate.__version__) <= Version("1.12"),
    reason="this accelerate splits no layers",
)
class TestTensorParallel:
    """A Qwen2 with `tp_plan="auto"`: both processes see every batch, and nothing may count twice."""

    @pytest.fixture(
        scope="class", params=["adafocal", pytest.param("adaptive_label_smoothing", marks=pytest.mark.slow)]
    )
    def runs(self, request, tmp_path_factory):
        saved, one, two = (tmp_path_factory.mktemp(name) for name in ("saved", "one", "two"))
        set_seed(0)
        Qwen2ForSequenceClassification(Qwen2Config(**CONFIG)).save_pretrained(saved)
        settings = {"loss": request.param, "num_train_epochs": 4, "gradient_accumulation_steps": 2}
        if request.param == "adafocal":
            settings["average_tokens_across_devices"] = False
        debug_launcher(train_tensor_parallel, args=(two, saved, settings), num_processes=2)
        train_tensor_parallel(one, saved, settings)
        return json.loads((one / "rank-0.json").read_text()), *ranks(two)

    def test_loss_gradient_and_metrics_are_those_of_one_process(self, runs):
        one, first, _ = runs
        assert (one["size"], first["size"]) == (1, 2)
        assert len(one["training"]) == 12 and len(one["evaluations"]) == 4
        np.testing.assert_allclose(first["training"], one["training"], rtol=1e-4)
        np.testing.assert_allclose(first["evaluations"], one["evaluations"], rtol=1e-4)

    def test_every_sample_is_collected_once(self, runs):
        assert [run["rows"] for run in runs] == [60, 60, 60]

    def test_slices_of_the_calibration_set_are_those_of_one_process(self, runs):
        one, first, second = runs
        assert first["slices"] == second["slices"]
        for mine, theirs in zip(first["slices"], one["slices"], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-3)
        if "smoothing" in one["table"]:
            assert one["slices"]

    def test_the_table_is_that_of_one_process_and_the_same_on_both(self, runs):
        one, first, second = runs
        assert first == second
        for name, values in one["table"].items():
            np.testing.assert_allclose(first["table"][name], values, rtol=0, atol=1e-4)


def collect_in_groups(folder) -> None:
    """What two processes that share their batches, and two that do not, collect."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that this one was forked from
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    found = []
    for group_size in (1, 2):
        processes = DataProcesses(accelerator, group_size)
        rows = torch.full((2 + rank * (group_size == 1), 1), float(rank if group_size == 1 else 7))
        gathered = processes.gather(rows, pad_index=-1.0)
        found.append([processes.count, processes.index, gathered.flatten().tolist(), processes.sum(rows[0]).tolist()])
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


class TestDataProcesses:
    def test_processes_that_share_their_batches_count_as_one(self, tmp_path):
        debug_launcher(collect_in_groups, args=(tmp_path,), num_processes=2)
        first, second = ranks(tmp_path)
        assert first == [[2, 0, [0, 0, -1, 1, 1, 1], [1]], [1, 0, [7, 7], [7]]]
        assert second == [[2, 1, [0, 0, -1, 1, 1, 1], [1]], [1, 0, [7, 7], [7]]]

    def test_of_four_processes_in_pairs_the_first_of_each_pair_counts(self, monkeypatch):
        class Four:
            """An accelerator of four processes, whose gather returns their ranks."""

            num_processes, process_index, even_batches = 4, 3, True
            gather = staticmethod(lambda rows: torch.arange(4.0).repeat_interleave(len(rows))[:, None])
            reduce = staticmethod(lambda values: values)

        processes = DataProcesses(Four(), 2)
        assert (processes.count, processes.index) == (2, 1)
        assert processes.gather(torch.zeros(3, 1)).flatten().tolist() == [0, 0, 0, 2, 2, 2]
        assert processes.sum(torch.ones(2)).tolist() == [0, 0]  # the third process adds for this one


@pytest.mark.skipif(not hasattr(accelerate, "ParallelismConfig"), reason="this accelerate splits no sequences")
class TestSplitSequences:
    @pytest.mark.parametrize("kind", ["context", "sequence"])
    def test_a_trainer_is_refused_before_anything_is_built(self, tmp_path, kind):
        config = accelerate.ParallelismConfig(**{f"{kind[0]}p_size": 2})
        with pytest.raises(ValueError, match=f"found {kind} parallelism over 2 processes"):
            tiny.trainer(tmp_path, parallelism_config=config)

    def test_tensor_and_data_parallelism_are_not(self):
        check_sequences_are_whole(accelerate.ParallelismConfig(tp_size=2, dp_shard_size=2))
        check_sequences_are_whole(None)


# Samples, batch size of a process and settings of accelerate.
UNEVEN = {
    "short last batch": (14, 4, {"even_batches": False}),
    "one has no last batch": (12, 4, {"even_batches": False}),
    "split, short last batch": (14, 8, {"even_batches": False, "split_batches": True}),
    "split, one sample left": (9, 8, {"even_batches": False, "split_batches": True}),
    "split and made even": (14, 8, {"split_batches": True}),
}


def train_on_uneven_batches(folder, ways) -> None:
    torch.set_num_threads(1)
    found = {}
    for way in ways:
        size, batch_size, config = UNEVEN[way]
        run = tiny.trainer(
            folder,
            train_dataset=tiny.token_dataset(size),
            eval_dataset=tiny.token_dataset(33, seed=1),
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=4,
            ddp_find_unused_parameters=False,
            accelerator_config=config,
        )
        try:
            run.train()
            error = ""
        except ValueError as raised:
            error = str(raised)
        found[way] = facts(run, error=error, steps=run.state.global_step)
    (folder / f"rank-{run.args.process_index}.json").write_text(json.dumps(found))


class TestBatchesThatAreNotMadeEven:
    @pytest.fixture(scope="class")
    def runs(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("two")
        debug_launcher(train_on_uneven_batches, args=(folder, list(UNEVEN)), num_processes=2)
        return ranks(folder)

    def test_unequal_last_batches_of_training_count_each_sample_once(self, tmp_path, runs):
        """14 samples: 4 and 4, then 4 and 2 on two processes; one has 8 and 6."""
        train_on_uneven_batches(tmp_path, ["split, short last batch"])
        expected = json.loads((tmp_path / "rank-0.json").read_text())["split, short last batch"]
        for way in ("short last batch", "split, short last batch"):
            first, second = (found[way] for found in runs)
            assert first == second and first["rows"] == 33 and first["steps"] == 4 and not first["error"]
            np.testing.assert_allclose(first["training"], expected["training"], rtol=1e-4)
            np.testing.assert_allclose(first["evaluations"], expected["evaluations"], rtol=1e-4)

    def test_split_and_made_even_they_are_trained_on(self, runs):
        first, second = (found["split and made even"] for found in runs)
        assert first == second and first["steps"] == 4 and not first["error"]

    @pytest.mark.parametrize("way", ["one has no last batch", "split, one sample left"])
    def test_an_unequal_number_of_them_is_refused_before_the_first_step(self, runs, way):
        for found in runs:
            assert "found [2, 1]" in found[way]["error"] and found[way]["steps"] == 0


def calibrate_in_a_loop(folder, sizes) -> None:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
    model, found = accelerator.prepare(tiny.bert()), []
    for size in sizes:
        rows = tiny.token_dataset(size, seed=size).with_format("torch")
        loader = accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=4))
        found.append(calibrate(model, loader, accelerator=accelerator).metrics)
    (folder / f"rank-{accelerator.process_index}.json").write_text(json.dumps(found))


class TestALoopWithBatchesThatAreNotMadeEven:
    def test_every_sample_counts_once_however_many_batches_a_process_has(self, tmp_path):
        sizes = (3, 4, 9, 21)  # the second process has none, none, one fewer, and one fewer
        debug_launcher(calibrate_in_a_loop, args=(tmp_path, sizes), num_processes=2)
        first, second = ranks(tmp_path)
        assert first == second
        for size, found in zip(sizes, first, strict=True):
            expected = calibration_report(*tiny.probabilities(tiny.bert(), tiny.token_dataset(size, seed=size)))
            for name in ("nll", "accuracy", "brier", "ece"):
                assert found[name] == pytest.approx(expected[name], abs=1e-6), (size, name)


def train_without_a_shared_disk(folder) -> None:
    """Each rank has a folder of its own, as on machines of their own; only the first one's is written."""
    torch.set_num_threads(1)
    rank = torch.distributed.get_rank()
    run = tiny.trainer(
        folder / f"machine-{rank}",
        per_device_train_batch_size=4,
        ddp_find_unused_parameters=False,
        save_strategy="epoch",
        num_train_epochs=5,
        learning_rate=0.1,
        load_best_model_at_end=True,
    )
    run.train()
    written(folder, run, best=run.state.best_model_checkpoint)


class TestMachinesWithoutASharedDisk:
    def test_the_table_of_the_best_checkpoint_comes_from_the_first_machine(self, tmp_path):
        debug_launcher(train_without_a_shared_disk, args=(tmp_path,), num_processes=2)
        first, second = ranks(tmp_path)
        assert Path(first["best"]).exists() and first["best"] != second["best"]
        saved = json.loads((Path(first["best"]) / "trainer_state.json").read_text())["stateful_callbacks"]["adafocal"]
        assert first["table"] == second["table"] == {name: saved[name] for name in first["table"]}
        last = json.loads((tmp_path / "machine-0/checkpoint-30/trainer_state.json").read_text())
        assert last["stateful_callbacks"]["adafocal"]["gammas"] != saved["gammas"]


ZERO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def train_with_deepspeed(folder, stage) -> None:
    torch.set_num_threads(1)
    settings = {"per_device_train_batch_size": 4}
    if torch.distributed.is_initialized():
        import deepspeed.comm.torch as backend

        backend.build_shm_op = lambda: None  # which would compile a faster all-reduce
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())
        os.environ.pop("ACCELERATE_USE_CPU")
        settings = {
            "per_device_train_batch_size": 2,
            "deepspeed": {**ZERO, "zero_optimization": {"stage": stage}},
        }
    args = tiny.arguments(folder, gradient_accumulation_steps=2, **settings)
    run = tiny.trainer(folder, args=args, eval_dataset=tiny.token_dataset(61, seed=1))
    run.train()
    written(folder, run, kind=run.accelerator.distributed_type.value)


class TestDeepSpeed:
    @pytest.mark.parametrize("stage", [2, 3])
    def test_zero_gives_the_losses_metrics_and_gammas_of_one_process(self, tmp_path, monkeypatch, stage):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        one, two = tmp_path / "one", tmp_path / "two"
        for folder in (one, two):
            folder.mkdir()
        debug_launcher(train_with_deepspeed, args=(two, stage), num_processes=2)
        train_with_deepspeed(one, stage)
        expected, (first, second) = json.loads((one / "rank-0.json").read_text()), ranks(two)
        assert first["kind"] == "DEEPSPEED" and first["rows"] == 61
        assert first["table"] == second["table"]
        losses, of_one = ([loss for loss, _ in found["training"]] for found in (first, expected))
        np.testing.assert_allclose(losses, of_one, rtol=1e-4)
        np.testing.assert_allclose(first["evaluations"], expected["evaluations"], rtol=1e-4)
        np.testing.assert_allclose(first["table"]["gammas"], expected["table"]["gammas"], rtol=1e-4)


class TestEndProcessGroup:
    PROGRAM = """
from pathlib import Path
import torch
from hf_adafocal.training.processes import end_process_group

def threads():
    return len(list(Path("/proc/self/task").iterdir()))

def train():
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(3, 2)).sum().backward()
    model.itself = model  # freed by the garbage collector alone, as a trainer is
    print(threads())

print(threads())
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
train()
end_process_group()
end_process_group()  # does nothing
print(threads())
"""

    @pytest.mark.slow  # a process imports torch
    @pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc, to see the threads")
    def test_the_threads_of_gloo_have_ended(self):
        """One that frees a tensor while the interpreter shuts down aborts the process."""
        ended = subprocess.run([sys.executable, "-c", self.PROGRAM], capture_output=True, text=True, check=True)
        before, during, after = map(int, ended.stdout.split())
        assert before == after < during
