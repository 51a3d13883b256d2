"""Several losses and seeds side by side: what is refused before training, and which finished runs are kept."""

import json
import shutil

import pytest
from datasets import load_dataset

from hf_adafocal import cli
from hf_adafocal.losses.registry import LOSSES
from hf_adafocal.runs import compare as module
from hf_adafocal.runs.compare import compare
from hf_adafocal.runs.run_record import FILE
from hf_adafocal.runs.tasks import ImageTask, TextTask

pytestmark = pytest.mark.usefixtures("blank_pictures", "few_digits")

pytest.importorskip("timm", reason="timm is the extra `vision`")
pytest.importorskip("matplotlib", reason="matplotlib is the extra `plots`")

QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--num_train_epochs", "1", "--max_train_samples", "64"]


@pytest.fixture
def warnings(caplog):
    import transformers

    transformers.utils.logging.enable_propagation()
    caplog.set_level("WARNING")
    yield caplog
    transformers.utils.logging.disable_propagation()


class TestCompare:
    @pytest.mark.slow
    def test_runs_of_one_seed_differ_in_the_loss_alone(self, tmp_path):
        line = [*QUICK, "--focal_gamma", "2"]
        reports = compare(ImageTask, line, ["cross_entropy", "focal"], [0, 1], tmp_path)
        assert {loss: [report.seed for report in runs] for loss, runs in reports.items()} == {
            "cross_entropy": [0, 1], "focal": [0, 1],
        }  # fmt: skip
        assert reports["focal"][0].loss == {"name": "focal", "gamma": 2.0}
        assert reports["focal"][0].splits == reports["cross_entropy"][0].splits
        assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"
        *table, blank, verdict = (tmp_path / "comparison.md").read_text().splitlines()
        assert len(table) == 2 + 2 * 2 and blank == "" and verdict.startswith("2 seeds")
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
            "cross_entropy-0", "cross_entropy-1", "focal-0", "focal-1",
        }  # fmt: skip

    @pytest.mark.slow
    def test_rows_are_those_before_folding_whatever_calibrate_at_end_says(self, tmp_path):
        tests = []
        for flag in ("true", "false"):
            line = [*QUICK, "--num_train_epochs", "3", "--calibrate_at_end", flag]
            (report,) = compare(ImageTask, line, ["cross_entropy"], [0], tmp_path / flag)["cross_entropy"]
            tests.append(report.to_dict()["test"])
        for name in ("raw", "temperature_scaled"):
            assert tests[0][name] == pytest.approx(tests[1][name], rel=1e-3)

    def test_the_command_prints_the_table_and_the_verdict(self, tmp_path, capsys):
        line = ["compare", "vision", "--losses", "focal", "--seeds", "0", "--folder", str(tmp_path), *QUICK]
        assert cli.main(line) == 0
        table = capsys.readouterr().out.splitlines()[-4:]
        assert table[-2].startswith("| focal | 1     | none")


class TestRefusals:
    @pytest.mark.parametrize(
        ("losses", "seeds", "more", "message"),
        [
            (["cross_entropy", "hinge"], [0], [], "losses must be among cross_entropy.*found hinge"),
            (["focal", "cross_entropy", "focal"], [0], [], "Each loss counts once, found focal more than once"),
            (["focal"], [0, 1, 0], [], "Each seed counts once, found 0 more than once"),
            ([], [0], [], "needs at least one loss"),
            (["focal"], [], [], "needs at least one seed"),
            (["focal"], [0], ["--no_such_thing", "1"], "--no_such_thing"),
            (["focal"], [0], ["--seed", "3"], "A comparison sets --seed for each run itself"),
            (["focal"], [0], ["--output-dir=x"], "A comparison sets --output_dir for each run itself"),
            (["cross_entropy"], [0], ["--focal_gamma", "2"], "--focal_gamma is a setting of focal, and none of the"),
            (["label_smoothing", "focal"], [0], ["--smoothing", "nan"], "smoothing"),
        ],
    )
    def test_before_anything_is_trained(self, tmp_path, losses, seeds, more, message):
        with pytest.raises(ValueError, match=message):
            compare(ImageTask, [*QUICK, *more], losses, seeds, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_every_loss_parses(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "finetune", lambda *_: pytest.fail("trained"))
        with pytest.raises(pytest.fail.Exception, match="trained"):
            compare(ImageTask, QUICK, list(LOSSES), [0], tmp_path)


class TestReuse:
    @pytest.fixture(scope="class")
    def once(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("once")
        compare(ImageTask, QUICK, ["cross_entropy"], [0], folder)
        return folder

    @pytest.fixture
    def finished(self, once, tmp_path):
        """A folder with a finished run."""
        return shutil.copytree(once, tmp_path, dirs_exist_ok=True)

    @pytest.fixture
    def trained(self, monkeypatch):
        """The runs that are trained, without training them."""
        found = []

        def note(task, args):
            found.append(args.output_dir)
            raise StopIteration

        monkeypatch.setattr(module, "finetune", note)
        return found

    def test_a_finished_run_with_the_same_arguments_is_kept(self, finished, trained):
        before = json.loads((finished / "cross_entropy-0" / "report.json").read_text())
        quiet = [*QUICK, "--logging_steps", "7"]  # changes nothing in the result
        (report,) = compare(ImageTask, quiet, ["cross_entropy"], [0], finished, reuse=True)["cross_entropy"]
        assert report.to_dict() == before and trained == []

    @pytest.mark.parametrize(
        ("more", "reason"),
        [
            (["--num_train_epochs", "50"], "num_train_epochs 1.0 -> 50.0"),
            (["--max_train_samples", "65"], "max_train_samples 64 -> 65"),
            (["--random_shift", "0.125"], "random_shift 0.0 -> 0.125"),
            (["--learning_rate", "0.5"], "learning_rate 0.001 -> 0.5"),
        ],
    )
    def test_other_arguments_train_it_again_and_the_log_says_why(self, finished, trained, warnings, more, reason):
        with pytest.raises(StopIteration):
            compare(ImageTask, [*QUICK, *more], ["cross_entropy"], [0], finished, reuse=True)
        assert len(trained) == 1 and reason in warnings.text

    def test_an_unfinished_run_is_trained_again(self, finished, trained, warnings):
        (finished / "cross_entropy-0" / FILE).unlink()
        with pytest.raises(StopIteration):
            compare(ImageTask, QUICK, ["cross_entropy"], [0], finished, reuse=True)
        assert len(trained) == 1 and "holds no finished run" in warnings.text

    def test_other_rows_under_the_same_name_train_it_again(self, tmp_path, monkeypatch, warnings):
        from datasets import Dataset

        def write(first):
            texts = [" ".join(f"{'no' * (i >> k & 1)}w{k}" for k in range(8)) for i in range(first, first + 60)]
            rows = {"text": texts, "label": [i % 2 for i in range(60)]}
            Dataset.from_dict(rows).to_parquet(str(tmp_path / "data" / "train.parquet"))

        (tmp_path / "data").mkdir()
        write(0)
        line = [*QUICK[:-2], "--dataset", str(tmp_path / "data")]
        compare(TextTask, line, ["cross_entropy"], [0], tmp_path / "runs")
        write(130)
        load_dataset(str(tmp_path / "data"), download_mode="force_redownload")
        monkeypatch.setattr(module, "finetune", lambda *_: pytest.fail("trained"))
        with pytest.raises(pytest.fail.Exception, match="trained"):
            compare(TextTask, line, ["cross_entropy"], [0], tmp_path / "runs", reuse=True)
        assert "other rows in train, other rows in calibration, other rows in test" in warnings.text

    def test_a_run_that_starts_again_is_unfinished_until_its_end(self, finished, monkeypatch):
        monkeypatch.setattr("hf_adafocal.runs.finetune.AdaFocalTrainer", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compare(ImageTask, QUICK, ["cross_entropy"], [0], finished)
        assert not (finished / "cross_entropy-0" / FILE).exists()
