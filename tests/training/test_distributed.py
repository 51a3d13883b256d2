"""Two real processes (gloo) against one: the same tables, the same metrics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import language
import numpy as np
import pytest
import tiny
import torch
from accelerate import debug_launcher

from hf_adafocal.metrics.scores import calibration_report
from hf_adafocal.training import recorder

SCRIPTS = Path(__file__).parents[2] / "scripts"
METRICS = ("eval_loss", "eval_nll", "eval_brier", "eval_accuracy", "eval_ece", "eval_ada_ece", "eval_refinement")
TAILS = (1, 7, 8, 9, 21)  # sizes that leave the last batch, or the second process, short of samples
ALL = 4_000_000
# How two processes evaluate: settings, samples from which a histogram counts, whether the set is a stream.
PADDED = {
    "made even": ({}, ALL, False),
    "training drops the last batch": ({"dataloader_drop_last": True}, ALL, False),
    "not made even in training": ({"accelerator_config": {"even_batches": False}}, ALL, False),
    "batches are split": ({"accelerator_config": {"split_batches": True}}, ALL, False),
    "in a histogram": ({"streaming_calibration": True}, ALL, False),
    "a stream": ({}, ALL, True),
    "a stream, in a histogram": ({"streaming_calibration": True}, ALL, True),
    "a stream, from eight samples in a histogram": ({}, 8, True),
}
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
}


def evaluations(log: list[dict]) -> list[list[float]]:
    return [[entry[name] for name in METRICS] for entry in log if "eval_ece" in entry]


def train(folder, batch_size: int, world_size: int) -> None:
    """Train on 96 samples, 12 updates; write what this rank ended with.

    In float64, in which the order of sums moves no confidence across the edge of a bin.
    """
    torch.set_num_threads(1)
    run = tiny.trainer(
        folder,
        tiny.bert().double(),
        train_dataset=tiny.token_dataset(96),
        eval_dataset=tiny.token_dataset(61, seed=1),  # a last batch that is padded for the second process
        num_train_epochs=4,
        eval_strategy="steps",
        eval_steps=2,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        ddp_find_unused_parameters=False,
    )
    assert run.args.world_size == world_size
    tables, set_table = [], run.loss.set_table

    def recorded(edges, gammas):
        set_table(edges, gammas)
        tables.append([run.loss.edges.tolist(), run.loss.gammas.tolist()])

    run.loss.set_table = recorded
    run.train()
    result = {
        "tables": tables,
        "evaluations": evaluations(run.state.log_history),
        "weights": [parameter.detach().flatten().tolist() for parameter in run.model.parameters()],
    }
    (folder / f"rank-{run.args.process_index}.json").write_text(json.dumps(result))


def evaluate_tails(folder) -> None:
    """Metrics of sets of all sizes, in all ways."""
    torch.set_num_threads(1)
    result = {}
    for way, (settings, most_samples, streams) in PADDED.items():
        recorder.MOST_SAMPLES = most_samples
        run = tiny.trainer(folder, per_device_eval_batch_size=4, **settings)
        assert run.args.world_size == 2
        sets = [tiny.token_dataset(size, seed=size) for size in TAILS]
        result[way] = []
        for rows in sets:
            metrics = run.evaluate(rows.to_iterable_dataset() if streams else rows)
            result[way].append(metrics | {"collector": type(run.recorder.samples["eval"]).__name__})
    (folder / f"rank-{run.args.process_index}.json").write_text(json.dumps(result))


def train_classwise(folder, batch_size: int) -> None:
    """Two epochs with a table for each class; write them."""
    torch.set_num_threads(1)
    run = tiny.trainer(
        folder,
        tiny.bert(num_labels=4).double(),
        loss="classwise_adafocal",
        eval_dataset=tiny.token_dataset(61, seed=1),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        ddp_find_unused_parameters=False,
    )
    run.train()
    (folder / f"rank-{run.args.process_index}.json").write_text(json.dumps(run.loss.table()))


def train_language_models(folder, batch_size: int, world_size: int) -> None:
    """Train a causal model and an encoder-decoder on rows with unequal numbers of labels; write how they ended."""
    torch.set_num_threads(1)
    result = {}
    for name, (make, labels) in language.MODELS.items():
        settings = {"per_device_train_batch_size": batch_size, "per_device_eval_batch_size": batch_size}
        run = language.ours(
            folder,
            language.built(make).double(),
            language.sentences(32, 0, labels),
            language.sentences(19, 1, labels),
            loss="adafocal",
            ddp_find_unused_parameters=False,
            **settings,
        )
        assert run.args.world_size == world_size
        run.train()
        result[name] = [
            language.weights(run.model).tolist(),
            run.loss.gammas.tolist(),
            *evaluations(run.state.log_history),
        ]
    (folder / f"rank-{run.args.process_index}.json").write_text(json.dumps(result))


def ranks(folder) -> tuple[dict, dict]:
    return tuple(json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1))


class TestTraining:
    @pytest.fixture(scope="class")
    def runs(self, tmp_path_factory):
        """One process with batches of 16; both ranks of two with batches of 8."""
        one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
        debug_launcher(train, args=(two, 8, 2), num_processes=2)
        train(one, 16, 1)
        return json.loads((one / "rank-0.json").read_text()), *ranks(two)

    def test_two_processes_give_the_table_of_one_after_every_update(self, runs):
        one, first, _ = runs
        assert len(one["tables"]) == len(first["tables"]) == 12
        for mine, theirs in zip(one["tables"], first["tables"], strict=True):
            for here, there in zip(mine, theirs, strict=True):  # edges, gammas
                np.testing.assert_allclose(here, there, rtol=0, atol=1e-6)
        assert one["tables"][0] != one["tables"][-1]

    def test_two_processes_give_the_metrics_of_one(self, runs):
        one, first, _ = runs
        assert len(one["evaluations"]) == 12
        np.testing.assert_allclose(one["evaluations"], first["evaluations"], rtol=0, atol=1e-6)

    def test_the_two_ranks_agree_to_the_bit(self, runs):
        _, first, second = runs
        assert first["tables"] == second["tables"] and first["weights"] == second["weights"]
        assert first["evaluations"] == second["evaluations"]

    def test_two_processes_give_the_tables_of_classes_of_one(self, tmp_path):
        one, two = tmp_path / "one", tmp_path / "two"
        for folder in (one, two):
            folder.mkdir()
        debug_launcher(train_classwise, args=(two, 8), num_processes=2)
        train_classwise(one, 16)
        expected, (first, second) = json.loads((one / "rank-0.json").read_text()), ranks(two)
        assert first == second and sum(first["class_counts"]) == 61 and len(first["class_gammas"]) == 4
        for name, values in expected.items():
            np.testing.assert_allclose(first[name], values, rtol=0, atol=1e-6)


class TestLanguageModels:
    def test_two_processes_give_the_weights_gammas_and_metrics_of_one(self, tmp_path):
        one, two = tmp_path / "one", tmp_path / "two"
        for folder in (one, two):
            folder.mkdir()
        debug_launcher(train_language_models, args=(two, 4, 2), num_processes=2)
        train_language_models(one, 8, 1)
        expected, (first, second) = json.loads((one / "rank-0.json").read_text()), ranks(two)
        assert first == second and expected.keys() == language.MODELS.keys()
        for name in expected:
            for here, there in zip(first[name], expected[name], strict=True):
                np.testing.assert_allclose(here, there, rtol=0, atol=1e-5, err_msg=name)


class TestPaddedTail:
    @pytest.fixture(scope="class")
    def ways(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("tails")
        debug_launcher(evaluate_tails, args=(folder,), num_processes=2)
        return ranks(folder)

    @pytest.mark.parametrize("way", PADDED)
    def test_every_sample_counts_once(self, ways, way):
        first, second = (found[way] for found in ways)
        for size, mine, theirs in zip(TAILS, first, second, strict=True):
            expected = calibration_report(*tiny.probabilities(tiny.bert(), tiny.token_dataset(size, seed=size)), 5)
            for name in ("nll", "accuracy", "brier", "ece", "ada_ece"):
                assert mine[f"eval_{name}"] == theirs[f"eval_{name}"]
                if "histogram" not in way or name != "ada_ece":  # whose edges are rounded there
                    assert mine[f"eval_{name}"] == pytest.approx(expected[name], abs=1e-6), (size, name)
            assert mine["eval_loss"] == mine["eval_nll"]
        assert mine["collector"] == ("HistogramCollector" if "histogram" in way else "SampleCollector")


@pytest.mark.slow
class TestLaunchers:
    """The scripts as users launch them; 160 samples, so that no batch of 32 is short."""

    SETTINGS = {
        **{"use_cpu": "true", "disable_tqdm": "true", "num_train_epochs": 2, "save_strategy": "epoch"},
        **{"max_train_samples": 160, "lr_scheduler_type": "constant", "warmup_steps": 0},
        **{"baseline": "none", "ddp_find_unused_parameters": "false"},
    }

    def finished(self, folder, launcher: list[str], batch_size: int) -> tuple[list, list, int]:
        """Tables and metrics after every update, and the samples of an optimizer step."""
        settings = {**self.SETTINGS, "output_dir": str(folder), "per_device_train_batch_size": batch_size}
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        subprocess.run(
            [sys.executable, *launcher, str(SCRIPTS / "train_vision.py"), *flags],
            check=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        saved = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
        tables = [json.loads(path.read_text())["stateful_callbacks"]["adafocal"] for path in saved]
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        report = json.loads((folder / "report.json").read_text())
        random_states = sorted(path.name for path in saved[-1].parent.glob("rng_state*"))
        return (
            [[*table["edges"], *table["gammas"]] for table in tables],
            evaluations(log),
            report["training"]["batch_size"],
            random_states,
        )

    @pytest.fixture(scope="class")
    def one_process(self, tmp_path_factory):
        pytest.importorskip("timm", reason="timm is the extra `vision`")
        return self.finished(tmp_path_factory.mktemp("one"), [], 32)

    @pytest.mark.parametrize("launcher", LAUNCHERS)
    def test_two_processes_give_the_tables_and_metrics_of_one(self, tmp_path, one_process, launcher):
        tables, metrics, batch_size, files = self.finished(tmp_path, ["-m", *LAUNCHERS[launcher]], 16)
        assert (one_process[3], files) == (["rng_state.pth"], ["rng_state_0.pth", "rng_state_1.pth"])
        assert batch_size == one_process[2] == 32 and len(tables) == 2
        np.testing.assert_allclose(tables, one_process[0], rtol=0, atol=1e-6)
        np.testing.assert_allclose(metrics, one_process[1], rtol=0, atol=1e-6)
