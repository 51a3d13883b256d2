"""What every test shares: one thread, one seed, and the numbers of the authors' own code."""

import json
import random
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("repeatable")

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN, SHARED_DATA = SHARED / "golden", SHARED / "data"


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def golden():
    """Load `<name>.json`: values that the authors' code gave, kept beside the checkout."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden values: {GOLDEN.parent.name}/{GOLDEN.name} does not stand beside the checkout")
    return lambda name: json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture
def shared_data():
    """The folder of real data sets that is kept beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data: {SHARED_DATA.parent.name}/{SHARED_DATA.name} does not stand beside the checkout")
    return SHARED_DATA
