"""A run that is killed, wherever it is, goes on from its last complete checkpoint and ends as if nothing had been."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import run_tiny
import tiny
import torch
from accelerate import debug_launcher
from transformers import Trainer, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from hf_adafocal.training.checkpoints import check_checkpoint, last_complete_checkpoint

# Six moments, spread over the three things a run does: which one is under way, and what share of it is done.
MOMENTS = [
    pytest.param(phase, round(float(share), 3), marks=[pytest.mark.slow] if index else [])
    for phase, count, seed in (("train", 2, 1), ("evaluate", 1, 2), ("save", 3, 3))
    for index, share in enumerate(np.random.default_rng(seed).random(count))
]


def exit_code(folder, **settings) -> int:
    """Run `run_tiny.main` in a process of its own: 0, or the signal that ended it, negative."""
    process = multiprocessing.get_context("fork").Process(target=run_tiny.main, args=(str(folder),), kwargs=settings)
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"The run in {folder} with {settings} neither ends nor dies.")
    return process.exitcode


def outcome(folder, rank: int = 0) -> dict:
    result = json.loads((Path(folder) / f"outcome-{rank}.json").read_text())
    return {name: value for name, value in result.items() if name != "marks"}


def moment(marks: list[int], share: float) -> int:
    """The call at which a share of a phase is done, where each of its turns counts the same."""
    turn, part = divmod(share * (len(marks) - 1), 1)
    start, end = marks[int(turn) : int(turn) + 2]
    return start + max(1, int(part * 0.98 * (end - start)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outcome of a run that nothing disturbs, and how many calls each turn of each phase makes."""
    for name in ("warm-up", "run"):  # the first run also imports
        folder = tmp_path_factory.mktemp(name)
        run_tiny.main(str(folder))
    return outcome(folder), json.loads((folder / "outcome-0.json").read_text())["marks"]


class TestKilled:
    @pytest.mark.parametrize(("phase", "share"), MOMENTS)
    def test_a_run_killed_at_a_random_moment_ends_as_the_undisturbed_one(self, tmp_path, undisturbed, phase, share):
        expected, marks = undisturbed
        assert exit_code(tmp_path, kill=(phase, moment(marks[phase], share))) == -signal.SIGKILL
        assert not (tmp_path / "outcome-0.json").exists()
        assert exit_code(tmp_path) == 0
        assert outcome(tmp_path) == expected

    def test_a_run_killed_again_and_again_ends_as_the_undisturbed_one(self, tmp_path, undisturbed):
        expected, marks = undisturbed
        reached = []
        for phase in ("train", "save", "evaluate", "save"):
            assert exit_code(tmp_path, kill=(phase, moment(marks[phase], 0.2))) == -signal.SIGKILL
            last = last_complete_checkpoint(tmp_path)
            reached.append(int(last.rpartition("-")[2]))
        assert reached == [2, 4, 8, 10]
        assert exit_code(tmp_path) == 0
        assert outcome(tmp_path) == expected

    def test_a_checkpoint_cut_short_by_the_kill_is_passed_over(self, tmp_path, undisturbed):
        expected, marks = undisturbed
        in_the_fifth_of_nine = moment(marks["save"], 4.5 / 9)
        assert exit_code(tmp_path, kill=("save", in_the_fifth_of_nine)) == -signal.SIGKILL
        half, complete = get_last_checkpoint(str(tmp_path)), last_complete_checkpoint(tmp_path)
        assert Path(half).is_dir() and int(half.rpartition("-")[2]) == int(complete.rpartition("-")[2]) + 2
        with pytest.raises(ValueError, match=f"{half}.* is (missing|not complete)"):
            run_tiny.build(tmp_path).train(resume_from_checkpoint=half)
        assert exit_code(tmp_path) == 0
        assert outcome(tmp_path) == expected

    def test_true_resumes_from_the_last_complete_checkpoint(self, tmp_path, undisturbed):
        expected, marks = undisturbed
        assert exit_code(tmp_path, kill=("save", moment(marks["save"], 4.5 / 9))) == -signal.SIGKILL
        run = run_tiny.build(tmp_path)
        run.train(resume_from_checkpoint=True)
        assert run_tiny.outcome(run) == expected

    def test_true_without_a_complete_checkpoint_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match="holds no complete checkpoint to resume from"):
            run_tiny.build(tmp_path).train(resume_from_checkpoint=True)

    def test_the_state_of_an_earlier_run_does_not_vouch_for_a_checkpoint_cut_short(self, tmp_path, monkeypatch):
        run_tiny.build(tmp_path).train()
        check_checkpoint(tmp_path / "checkpoint-2")

        def killed(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(Trainer, "_save_scaler", killed)  # between the optimizer and the random state
        with pytest.raises(KeyboardInterrupt):
            run_tiny.build(tmp_path, data_seed=7).train()
        with pytest.raises(ValueError, match="trainer_state.json is missing"):
            check_checkpoint(tmp_path / "checkpoint-2")


def states_saved(folder) -> None:
    """Train on a rank whose partner is slow, and note what stands in the folder when the state is written."""
    torch.set_num_threads(1)
    run = run_tiny.build(folder, num_train_epochs=1, save_steps=4, per_device_train_batch_size=4)
    save, write, seen = Trainer._save_rng_state, TrainerState.save_to_json, []

    def slow(trainer, output_dir):
        time.sleep(0.3 * trainer.args.process_index)
        save(trainer, output_dir)

    def noted(state, path):
        seen.append(sorted(file.name for file in Path(path).parent.glob("rng_state*")))
        write(state, path)

    Trainer._save_rng_state, TrainerState.save_to_json = slow, noted
    run.train()
    (folder / f"seen-{run.args.process_index}.json").write_text(json.dumps([run.args.world_size, seen]))


def test_the_state_is_written_when_every_process_has_saved_its_random_state(tmp_path):
    debug_launcher(states_saved, args=(tmp_path,), num_processes=2)
    world_size, seen = json.loads((tmp_path / "seen-0.json").read_text())
    assert world_size == 2 and seen == [["rng_state_0.pth", "rng_state_1.pth"]] * 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run with checkpoints of steps 6 and 12."""
    folder = tmp_path_factory.mktemp("finished")
    tiny.trainer(folder, save_strategy="epoch").train()
    return folder


@pytest.fixture
def run_folder(tmp_path, finished):
    return shutil.copytree(finished, tmp_path / "run")


class TestLastCompleteCheckpoint:
    def test_it_is_the_last_one_if_all_are_complete(self, run_folder):
        assert last_complete_checkpoint(run_folder) == get_last_checkpoint(str(run_folder))

    def test_steps_are_compared_as_numbers(self, run_folder):
        assert last_complete_checkpoint(str(run_folder)) == str(run_folder / "checkpoint-12")

    def test_nothing_else_is_a_checkpoint(self, run_folder):
        (run_folder / "checkpoint-99").touch()
        (run_folder / "checkpoint-best").mkdir()
        shutil.copytree(run_folder / "checkpoint-6", run_folder / "checkpoint-99-copy")
        assert last_complete_checkpoint(run_folder) == str(run_folder / "checkpoint-12")

    def test_of_no_checkpoint_and_of_no_folder_it_is_none(self, tmp_path):
        assert last_complete_checkpoint(tmp_path) is None
        assert last_complete_checkpoint(tmp_path / "absent") is None

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("model.safetensors", "holds no weights (model.safetensors"),
            ("optimizer.pt", "holds no optimizer"),
            ("scheduler.pt", "holds no scheduler"),
            ("rng_state.pth", "holds no random state"),
            ("trainer_state.json", "trainer_state.json is missing"),
        ],
    )
    def test_a_missing_part_is_passed_over_and_named(self, run_folder, caplog, name, reason):
        (run_folder / "checkpoint-12" / name).unlink()
        assert last_complete_checkpoint(run_folder) == str(run_folder / "checkpoint-6")
        assert f"passed over: {run_folder / 'checkpoint-12'}" in caplog.text and reason in caplog.text

    @pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
    def test_a_file_cut_short_is_passed_over_and_named(self, run_folder, caplog, share):
        last = run_folder / "checkpoint-12"
        files = sorted(path for path in last.iterdir())
        assert len(files) == 7
        for path in files:
            content = path.read_bytes()
            path.write_bytes(content.rstrip()[: int(share * len(content.rstrip()))])
            caplog.clear()
            assert last_complete_checkpoint(run_folder) == str(run_folder / "checkpoint-6"), path.name
            assert f"passed over: {path} cannot be read" in caplog.text
            path.write_bytes(content)
        assert last_complete_checkpoint(run_folder) == str(last)

    def test_without_any_complete_checkpoint_it_is_none_and_names_them_all(self, run_folder, caplog):
        for step in (6, 12):
            (run_folder / f"checkpoint-{step}" / "optimizer.pt").unlink()
        assert last_complete_checkpoint(run_folder) is None
        assert all(f"checkpoint-{step} is not complete: it holds no optimizer" in caplog.text for step in (6, 12))

    def test_a_complete_checkpoint_is_found_without_a_warning(self, run_folder, caplog):
        last_complete_checkpoint(run_folder)
        assert not caplog.records

    def test_weights_in_shards_are_complete_with_all_their_shards(self, run_folder, caplog):
        last = run_folder / "checkpoint-12"
        (last / "model.safetensors").unlink()
        tiny.bert().save_pretrained(last, max_shard_size="4KB")
        assert last_complete_checkpoint(run_folder) == str(last)
        next(last.glob("model-00002-of-*.safetensors")).unlink()
        assert last_complete_checkpoint(run_folder) == str(run_folder / "checkpoint-6")
        assert "model-00002-of-" in caplog.text

    def test_an_adapter_is_weights(self, run_folder):
        last = run_folder / "checkpoint-12"
        (last / "model.safetensors").rename(last / "adapter_model.safetensors")
        assert last_complete_checkpoint(run_folder) == str(last)

    def test_weights_alone_cannot_be_resumed_from(self, tmp_path, caplog):
        tiny.trainer(tmp_path, save_strategy="epoch", save_only_model=True).train()
        assert last_complete_checkpoint(tmp_path) is None
        assert "it holds no optimizer" in caplog.text


def command(folder, *launcher, **settings) -> list[str]:
    return [sys.executable, *launcher, run_tiny.__file__, str(folder), json.dumps(settings)]


def finish(words: list[str]) -> None:
    result = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr[-3000:]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
class TestRealProcesses:
    def test_ten_kills_from_outside_leave_the_run_as_it_was(self, tmp_path):
        """Of a run of 900 steps that also deletes old checkpoints; each kill follows a checkpoint, after a while."""
        settings = {"num_train_epochs": 150, "save_total_limit": 2}
        finish(command(tmp_path / "whole", **settings))
        folder, reached = tmp_path / "killed", []
        for delay in np.random.default_rng(4).uniform(0.05, 0.5, 10):
            (folder / "started").unlink(missing_ok=True)
            process = subprocess.Popen(
                command(folder, **settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
            )
            while not (folder / "started").exists():
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(delay)
            process.kill()
            assert process.wait() == -signal.SIGKILL
            reached.append(last_complete_checkpoint(folder))
        steps = [int(path.rpartition("-")[2]) for path in reached]
        assert steps == sorted(set(steps)) and steps[-1] < 900, steps
        finish(command(folder, **settings))
        assert outcome(folder) == outcome(tmp_path / "whole")

    @pytest.mark.parametrize("phase", run_tiny.PHASES)
    def test_one_of_two_processes_is_killed(self, tmp_path, phase):
        settings = {"per_device_train_batch_size": 4}
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
        whole, folder = tmp_path / "whole", tmp_path / "killed"
        finish(command(whole, *launcher, **settings))
        at = moment(json.loads((whole / "outcome-1.json").read_text())["marks"][phase], 0.55)
        kill = command(folder, *launcher, **settings, kill=[phase, at], rank_to_kill=1)
        killed = subprocess.run(kill, capture_output=True, text=True, env=environment())
        assert killed.returncode != 0 and "SIGKILL" in killed.stderr
        assert last_complete_checkpoint(folder) is not None and not (folder / "outcome-0.json").exists()
        finish(command(folder, *launcher, **settings))
        assert outcome(whole)["world_size"] == 2
        assert [outcome(folder, rank) for rank in (0, 1)] == [outcome(whole, rank) for rank in (0, 1)]
