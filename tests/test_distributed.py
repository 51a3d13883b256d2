"""Two real processes (gloo) against one."""

import json

import pytest
import tiny
import torch
from accelerate import debug_launcher


def train(folder, batch_size):
    torch.set_num_threads(1)
    run = tiny.trainer(
        folder,
        eval_dataset=tiny.token_dataset(61, seed=1),  # a last batch that is padded for the second process
        per_device_train_batch_size=batch_size,
        ddp_find_unused_parameters=False,
    )
    run.train()
    result = {
        "world_size": run.args.world_size,
        "gammas": run.loss.gammas.tolist(),
        "edges": run.loss.edges.tolist(),
        "evaluations": [
            {name: entry[name] for name in ("eval_loss", "eval_nll", "eval_ece", "eval_ada_ece", "eval_accuracy")}
            for entry in run.state.log_history
            if "eval_ece" in entry
        ],
    }
    (folder / f"rank-{run.args.process_index}.json").write_text(json.dumps(result))


def test_two_processes_give_the_gammas_and_metrics_of_one(tmp_path):
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    debug_launcher(train, args=(tmp_path / "two", 4), num_processes=2)
    train(tmp_path / "one", 8)
    first, second = (json.loads((tmp_path / "two" / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    one = json.loads((tmp_path / "one" / "rank-0.json").read_text())
    assert (first["world_size"], one["world_size"]) == (2, 1)
    assert first == second  # to the bit
    assert first["gammas"] == pytest.approx(one["gammas"], rel=1e-5)
    assert first["edges"] == pytest.approx(one["edges"], rel=1e-5)
    for here, there in zip(first["evaluations"], one["evaluations"], strict=True):
        assert here == pytest.approx(there, rel=1e-5)
