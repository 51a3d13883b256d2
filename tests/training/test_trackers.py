"""Pictures in trackers."""

import io
import sys
import types

import pytest
import tiny
from PIL import Image
from transformers import TrainerState

from hf_adafocal.training.trackers import PictureCallback

pytest.importorskip("matplotlib", reason="matplotlib is the extra `plots`")

from matplotlib.figure import Figure  # noqa: E402

RELIABILITY, GAMMA = "calibration/eval_reliability", "calibration/gamma"


class TestTensorBoard:
    @staticmethod
    def read(folder):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        accumulator = EventAccumulator(str(folder), size_guidance={"images": 0})
        accumulator.Reload()
        return accumulator

    @pytest.fixture(scope="class")
    def trained(self, tmp_path_factory):
        pytest.importorskip("tensorboard")
        folder = tmp_path_factory.mktemp("run")
        patch = pytest.MonkeyPatch()
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
        run = tiny.trainer(folder, report_to="tensorboard")
        run.train()
        patch.undo()
        return run, self.read(folder / "events")

    @pytest.fixture(scope="class")
    def events(self, trained):
        return trained[1]

    def test_each_evaluation_has_its_reliability_diagram_at_its_step(self, events):
        assert [entry.step for entry in events.Images(RELIABILITY)] == [6, 12]

    def test_gamma_is_drawn_once_at_the_end(self, events):
        assert [entry.step for entry in events.Images(GAMMA)] == [12]
        assert sorted(events.Tags()["images"]) == [RELIABILITY, GAMMA]

    def test_the_pictures_can_be_seen(self, events):
        for tag in (RELIABILITY, GAMMA):
            picture = Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string))
            assert min(picture.size) > 300 and len(picture.convert("L").getcolors(256)) > 10

    def test_the_numbers_are_there_as_the_run_logged_them(self, trained):
        run, events = trained
        logged = [entry for entry in run.state.log_history if "eval_ece" in entry]
        assert len(logged) == 2
        for name in ("ece", "ada_ece", "nll", "accuracy"):
            read = [(entry.step, entry.value) for entry in events.Scalars(f"eval/{name}")]
            assert read == [(entry["step"], pytest.approx(entry[f"eval_{name}"], rel=1e-6)) for entry in logged]

    def test_the_smoothing_of_an_adaptive_label_smoothing_is_drawn(self, tmp_path, monkeypatch):
        pytest.importorskip("tensorboard")
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
        tiny.trainer(tmp_path, report_to="tensorboard", loss="adaptive_label_smoothing").train()
        events = self.read(tmp_path / "events")
        assert [entry.step for entry in events.Images("calibration/smoothing")] == [12]

    def test_a_loss_that_does_not_adapt_has_reliability_diagrams_alone(self, tmp_path, monkeypatch):
        pytest.importorskip("tensorboard")
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
        tiny.trainer(tmp_path, report_to="tensorboard", loss="focal").train()
        assert self.read(tmp_path / "events").Tags()["images"] == [RELIABILITY]


class Recorded:
    """A tracker that keeps what it is given."""

    def __init__(self, name, monkeypatch):
        self.rows = []
        image = lambda pixels, caption: (pixels.shape[-1], caption)  # noqa: E731
        self.module = types.SimpleNamespace(run=True, log=self.rows.append, Image=image)
        monkeypatch.setitem(sys.modules, name, self.module)


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_each_evaluation_and_the_end_are_one_call_with_the_step(tracker, monkeypatch):
    recorded = Recorded(tracker, monkeypatch)
    figure = Figure()
    callback = PictureCallback(
        lambda prefix: {"reliability": figure, "other": figure}, lambda: {"gamma": figure}, lambda: None
    )
    args, state = types.SimpleNamespace(report_to=[tracker]), TrainerState(is_world_process_zero=True)
    for state.global_step, prefix in ((6, "eval"), (12, "test")):
        callback.on_log(args, state, None, logs={"loss": 1.0})
        callback.on_evaluate(args, state, None, metrics={f"{prefix}_runtime": 1.0})
    callback.on_log(args, state, None, logs={"train_runtime": 9.0, "train_loss": 1.0})
    assert [(row["train/global_step"], sorted(set(row) - {"train/global_step"})) for row in recorded.rows] == [
        (6, ["calibration/eval_other", "calibration/eval_reliability"]),
        (12, ["calibration/test_other", "calibration/test_reliability"]),
        (12, ["calibration/gamma"]),
    ]
    assert recorded.rows[0]["calibration/eval_other"] == (3, "optimizer step 6")


def test_other_processes_log_nothing(monkeypatch):
    recorded = Recorded("trackio", monkeypatch)
    callback = PictureCallback(pytest.fail, lambda: pytest.fail("drawn"), lambda: None)
    args, state = types.SimpleNamespace(report_to=["trackio"]), TrainerState(is_world_process_zero=False)
    callback.on_evaluate(args, state, None, metrics={"eval_runtime": 1.0})
    callback.on_log(args, state, None, logs={"train_runtime": 9.0})
    assert recorded.rows == []


def test_without_a_tracker_nothing_is_drawn(tmp_path, monkeypatch):
    from hf_adafocal.report import plots

    monkeypatch.setattr(plots, "reliability_diagram", lambda *_: pytest.fail("a picture nobody sees"))
    tiny.trainer(tmp_path).train()


def test_wandb_gets_them(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    tiny.trainer(tmp_path, report_to="wandb").train()
    wandb.finish()
    drawn = list(tmp_path.glob("wandb/offline-run-*/files/media/images/calibration/*.png"))
    assert sorted(path.name.rpartition("_")[0].partition("_")[0] for path in drawn) == ["eval", "eval", "gamma"]
    assert all(min(Image.open(path).size) > 300 for path in drawn)


def test_trackio_gets_them(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    logged, log = [], trackio.log
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr(trackio, "log", lambda values: (logged.append(values), log(values)))
    run = tiny.trainer(tmp_path, report_to="trackio", logging_steps=6)
    run.train()
    rows = [values for values in logged if any(tag.startswith("calibration/") for tag in values)]
    assert [(sorted(row), row["train/global_step"]) for row in rows] == [
        ([RELIABILITY, "train/global_step"], 6),
        ([RELIABILITY, "train/global_step"], 12),
        ([GAMMA, "train/global_step"], 12),
    ]
    assert all(isinstance(row[tag], trackio.Image) for row in rows for tag in row if tag.startswith("calibration/"))
