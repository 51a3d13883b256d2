"""Pictures in trackers."""

import io

import pytest
import tiny
from PIL import Image

pytest.importorskip("matplotlib", reason="matplotlib is the extra `plots`")


class TestTensorBoard:
    @pytest.fixture(scope="class")
    def events(self, tmp_path_factory):
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        folder = tmp_path_factory.mktemp("run")
        patch = pytest.MonkeyPatch()
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
        tiny.trainer(folder, report_to="tensorboard").train()
        patch.undo()
        accumulator = EventAccumulator(str(folder / "events"), size_guidance={"images": 0})
        accumulator.Reload()
        return accumulator

    def test_each_evaluation_has_its_reliability_diagram_at_its_step(self, events):
        assert [entry.step for entry in events.Images("calibration/eval_reliability")] == [6, 12]

    def test_the_pictures_can_be_seen(self, events):
        for tag in ("calibration/eval_reliability", "calibration/eval_gamma"):
            picture = Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string))
            assert min(picture.size) > 300 and len(picture.convert("L").getcolors(256)) > 10

    def test_the_numbers_are_there_as_well(self, events):
        assert {"eval/ece", "eval/ada_ece", "eval/nll"} <= set(events.Tags()["scalars"])


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
    drawn = list(tmp_path.glob("wandb/offline-run-*/files/media/images/calibration/eval_reliability_*.png"))
    assert len(drawn) == 2 and all(min(Image.open(path).size) > 300 for path in drawn)


def test_trackio_gets_them(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    logged = []
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr(trackio, "log", lambda values, *_, **__: logged.append(values))
    run = tiny.trainer(tmp_path, report_to="trackio")
    run.train()
    found = [values["calibration/eval_reliability"] for values in logged if "calibration/eval_reliability" in values]
    assert len(found) == 2 and all(isinstance(entry, trackio.Image) for entry in found)
