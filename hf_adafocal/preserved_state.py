"""A look at the model in the middle of training that training does not notice."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module is in the mode it was in, frozen ones too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def random_state_kept(generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Put back the random state of Python, numpy and torch, and of these generators."""
    python, of_numpy = random.getstate(), np.random.get_state()
    states = [generator.get_state() for generator in generators]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices, device_type="cuda"):  # the CPU's state too
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(of_numpy)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
