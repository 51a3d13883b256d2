"""Context managers that restore module modes and random states after a forward pass in the middle of training."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; afterwards every module, frozen ones too, is in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def random_state_kept(generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Restore the random state of Python, NumPy, torch (CPU and accelerators) and the given generators afterwards."""
    python, of_numpy = random.getstate(), np.random.get_state()
    states = [generator.get_state() for generator in generators]
    kind = _accelerator_in_use()
    devices = range(getattr(torch, kind).device_count()) if kind is not None else ()
    with torch.random.fork_rng(devices, device_type=kind or "cuda"):  # the CPU's state too
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(of_numpy)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def _accelerator_in_use() -> str | None:
    """Return the type of the accelerator whose random state must be kept; None if none was used yet."""
    if not torch.accelerator.is_available():
        return None
    kind = torch.accelerator.current_accelerator()
    module = None if kind is None else getattr(torch, kind.type, None)
    if kind is None or not hasattr(module, "get_rng_state"):
        return None
    initialized = getattr(module, "is_initialized", None)  # looking must not create a CUDA context
    return kind.type if initialized is None or initialized() else None
