"""What every test shares: one thread, one seed, the numbers of the authors' own code, samples of real data."""

import functools
import gc
import importlib
import io
import json
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
from local_hub import LocalHub
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch, here and in the processes that tests start
gc.disable()  # until the tests are collected
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("repeatable")

TESTS = Path(__file__).parent


def pytest_configure(config):
    """Only `pytest -m gpu` sees a GPU: most tests compare with CPU numbers, and CUDA cannot be used after a fork."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """At most four processes for `-n auto`: each takes more than a gigabyte and a while to start."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def pytest_collection_finish():
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """The tests of a file go to one process, where they share its fixtures; files start in the order below."""
    if config.option.dist == "load":
        from xdist.scheduler import LoadFileScheduling

        config.option.loadscopereorder = False
        return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items):
    """Modules that fork go first: once a compiled loss has run backward, autograd refuses to run in a fork."""
    items.sort(key=lambda item: not hasattr(getattr(item, "module", None), "debug_launcher"))


@pytest.fixture(scope="module", autouse=True)
def imports_out_of_garbage_collections():
    """`Trainer.train` asks for a collection, most of the time of a tiny run if it looks at all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def packages_are_looked_for_once():
    """In each step accelerate asks four times for an optimizer's package that is not installed."""
    if imports := sys.modules.get("accelerate.utils.imports"):
        imports._is_package_available = functools.cache(imports._is_package_available)


@pytest.fixture(autouse=True)
def seed():
    import torch  # late: the process that hands tests to workers of xdist does without

    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # `torch.manual_seed` formats the stack for every kind of device
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(scope="module")
def blank_pictures():
    """Figures are saved as one pixel: drawing takes most of the time of a report."""
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, format="png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda _, file, **__: file.write(pixel.getvalue()))
        yield


@pytest.fixture(scope="module")
def few_digits():
    """Of the digits few are held out, to be evaluated faster; the sizes of the splits."""
    from hf_adafocal.data import loading

    held_out = {"calibration": 200, "test": 300}

    @functools.cache
    def few(seed, whole=loading._digits):
        parts = whole(seed)
        for name, role in {"validation": "calibration", "test": "test"}.items():
            parts[name] = parts[name].select(range(held_out[role]))
        return parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_digits", few)
        yield held_out


@pytest.fixture
def golden():
    """Load `golden/<name>.json`: values that the authors' code gave."""
    return lambda name: json.loads((TESTS / "golden" / f"{name}.json").read_text())


@pytest.fixture
def real_data():
    """The folder with small samples of real data sets."""
    return TESTS / "samples"


@pytest.fixture
def local_hub(monkeypatch, tmp_path):
    """A Hub of this test alone; `huggingface_hub` in this process pushes there as the user `me`, and never waits."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    hub = LocalHub()
    # these were read from the environment when the library was imported
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)  # behind `create_repo` and its like
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no" / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.delenv("HF_OIDC_RESOURCE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub.waits = []
    for module in (_http, importlib.import_module("hf_adafocal.hub.client")):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=hub.waits.append))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # transformers keeps one client, which remembers the address that was in force when it was made
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    huggingface_hub.close_session()
    yield hub
    huggingface_hub.close_session()
    hub.close()
