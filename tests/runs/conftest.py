"""Runs on digits evaluate a third of the held-out images, and draw pictures only where a test asks for them."""

import functools

import pytest
from datasets import DatasetDict

from hf_adafocal.data import loading

HELD_OUT = {"calibration": 200, "test": 300}


@pytest.fixture(scope="module", autouse=True)
def few_digits():
    """The sizes of the held-out splits by role; the training split is the whole one."""

    @functools.cache
    def few(seed, whole=loading._digits):
        parts = whole(seed)
        rows = {"train": len(parts["train"]), "validation": HELD_OUT["calibration"], "test": HELD_OUT["test"]}
        return DatasetDict({name: part.select(range(rows[name])) for name, part in parts.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_digits", few)
        yield HELD_OUT


@pytest.fixture
def no_pictures(monkeypatch):
    """Reports are saved without diagrams, which take a quarter of the time of a short run."""
    monkeypatch.setattr("hf_adafocal.report.files.draw", lambda *_: None)
