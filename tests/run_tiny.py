"""A tiny run with dropout and shuffled data that can be stopped, killed and resumed; also a script of its own.

python run_tiny.py FOLDER '{"kill": ["save", 500], "save_steps": 2}'
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import tiny
import torch
from transformers import TrainerCallback
from transformers.utils import logging

from hf_adafocal.training.checkpoints import last_complete_checkpoint
from hf_adafocal.training.processes import end_process_group

# Where a run can be killed: the method of the Trainer that is then under way.
PHASES = {"train": "training_step", "evaluate": "evaluate", "save": "_save_checkpoint"}
TIMINGS = ("_runtime", "_per_second")


def build(folder, seed_of_weights: int = 0, **settings):
    """A trainer; by default 18 steps, an evaluation every 3 and a checkpoint every 2."""
    defaults = {
        "num_train_epochs": 3,
        "lr_scheduler_type": "linear",
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "ddp_find_unused_parameters": False,
    }
    model = tiny.bert(seed_of_weights, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    return tiny.trainer(folder, model=model, **{**defaults, **settings})


def outcome(run) -> dict:
    """All that two runs must share to be one: every bit of the weights, the table and the log apart from timings.

    The last entry of the log sums up one call of `train`, so it is left out.
    """
    weights = b"".join(tensor.numpy().tobytes() for tensor in run.model.state_dict().values())
    return {
        "world_size": run.args.world_size,
        "weights": hashlib.sha256(weights).hexdigest(),
        "loss": {name: buffer.tolist() for name, buffer in run.loss.named_buffers()},
        "table": run.state.stateful_callbacks.get("adafocal"),
        "log": [
            {name: value for name, value in entry.items() if not name.endswith(TIMINGS)}
            for entry in run.state.log_history
            if "train_runtime" not in entry
        ],
    }


class Killer:
    """Counts the calls that Python makes while a method runs, and kills the process at one of them."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count = at, 0
        self.marks = [0]  # the count after each time that the method ran

    def __call__(self, frame, event, argument) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, run, name: str) -> None:
        method = getattr(run, name)

        def watched(*args, **kwargs):
            sys.setprofile(self)
            try:
                return method(*args, **kwargs)
            finally:
                sys.setprofile(None)
                self.marks.append(self.count)

        setattr(run, name, watched)


class Started(TrainerCallback):
    """Leaves a file when a checkpoint has been written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_save(self, args, state, control, **kwargs):
        self.path.touch()


def main(folder: str, kill: tuple[str, int] = ("never", 0), rank_to_kill: int = 0, **settings) -> None:
    """Train from the last complete checkpoint, and write `outcome-<rank>.json`."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # forked processes share its lock, and one that is killed would keep it
    run = build(folder, **settings)
    dies = run.args.process_index == rank_to_kill
    counts = {phase: Killer(kill[1] if dies and kill[0] == phase else None) for phase in PHASES}
    for phase, killer in counts.items():
        killer.watch(run, PHASES[phase])
    run.add_callback(Started(Path(folder) / "started"))
    run.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    result = {**outcome(run), "marks": {phase: killer.marks for phase, killer in counts.items()}}
    (Path(folder) / f"outcome-{run.args.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
    end_process_group()
