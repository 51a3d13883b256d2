"""Random states that a measurement during training puts back, on accelerators that stand in for real ones."""

from unittest.mock import create_autospec

import pytest
import torch

from hf_adafocal.preserved_state import random_state_kept

COUNTS = {"cuda": 2, "xpu": 2, "mps": 1}


@pytest.fixture(params=COUNTS)
def accelerator(request, monkeypatch):
    """States of the devices of an accelerator whose functions have their real signatures."""
    kind, module = request.param, getattr(torch, request.param)
    states = [torch.tensor([device]) for device in range(COUNTS[kind])]
    stand_ins = {
        "get_rng_state": lambda device: states[device].clone(),
        "set_rng_state": lambda state, device: states[device].copy_(state),
        "device_count": lambda: len(states),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(module, name, create_autospec(getattr(module, name), side_effect=stand_in))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    return module, states


def moved(states):
    with random_state_kept():
        for state in states:
            state += 10
        torch.rand(1)
    return [state.item() for state in states]


def test_those_of_all_devices_are_put_back(accelerator, monkeypatch):
    module, states = accelerator
    if hasattr(module, "is_initialized"):
        monkeypatch.setattr(module, "is_initialized", lambda: True)
    before = torch.get_rng_state()
    assert moved(states) == list(range(len(states)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_device_that_was_never_used_is_not_touched(accelerator, monkeypatch):
    module, states = accelerator
    if not hasattr(module, "is_initialized"):
        pytest.skip("its state can be read without making anything")
    monkeypatch.setattr(module, "is_initialized", lambda: False)
    assert moved(states) == [device + 10 for device in range(len(states))]
    module.get_rng_state.assert_not_called()
