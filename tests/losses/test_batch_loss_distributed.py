"""Two real processes (gloo) with a loss that looks at a batch: the batch is a process's own, the scale is shared."""

import pytest
import tiny
import torch
from accelerate import debug_launcher

from hf_adafocal import AdaFocalLoss, CombinedLoss


def weights_after_training(folder, term, accumulation):
    """Weights after three steps of 8 samples, in micro-batches of 4; each process writes its own."""
    torch.set_num_threads(1)
    run = tiny.trainer(
        folder, loss=CombinedLoss(term, AdaFocalLoss(num_bins=5), auxiliary_weight=0.5), max_steps=3, optim="sgd",
        learning_rate=0.5, max_grad_norm=0.0, per_device_train_batch_size=4, gradient_accumulation_steps=accumulation,
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    run.train()
    flat = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    torch.save(flat, folder / f"rank-{run.args.process_index}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("term", ["mmce", "soft_ece", "aurc"])
def test_two_processes_train_as_one_that_accumulates_their_micro_batches(tmp_path, term):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    debug_launcher(weights_after_training, args=(two, term, 1), num_processes=2)
    weights_after_training(one, term, 2)
    alone, first, second = (torch.load(path) for path in (one / "rank-0.pt", two / "rank-0.pt", two / "rank-1.pt"))
    start = torch.cat([p.detach().flatten() for p in tiny.bert().parameters()])
    assert torch.equal(first, second)
    assert (first - alone).norm() < 1e-4 * (alone - start).norm()
