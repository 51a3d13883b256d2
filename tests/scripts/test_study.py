"""The tables of the study of short runs, from reports with known numbers."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "study_short_runs.py"
SEEDS = [0, 1, 2]


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study_short_runs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(loss: dict, ece: float, scaled: float, accuracy: float) -> dict:
    metrics = {"accuracy": accuracy, "nll": 1.0, "brier": 0.5, "ada_ece": ece}
    return {
        "test": {"temperature": 1.5, "raw": {**metrics, "ece": ece}, "temperature_scaled": {**metrics, "ece": scaled}},
        "loss": loss,
        "splits": {"train": {"size": 3000}, "calibration": {"size": 1131}, "test": {"size": 7532}},
        "training": {"batch_size": 32, "epochs": 10.0},
    }


CROSS_ENTROPY, PAPER = {"name": "cross_entropy"}, {"name": "adafocal", "num_bins": 15}
SMOOTHING = {"name": "adaptive_label_smoothing"}


@pytest.fixture
def folder(tmp_path):
    for seed, (ece, ours) in enumerate(((0.30, 0.04), (0.32, 0.05), (0.34, 0.06))):
        for name, content in (
            ("cross_entropy", report(CROSS_ENTROPY, ece, 0.03, 0.5)),
            ("adaptive_smoothing", report(SMOOTHING, ours, 0.04, 0.48)),
        ):
            path = tmp_path / "cnn_10" / f"{name}-{seed}" / "report.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(content))
    return tmp_path


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


class TestTables:
    def test_the_summary_has_the_means_and_leaves_out_what_was_not_run(self, study, folder):
        head, _, line = study.summary(
            folder, ["cnn_10"], ["cross_entropy", "adaptive_smoothing", "paper"], SEEDS
        ).splitlines()
        assert cells(head) == ["setting", "cross_entropy + T", "cross_entropy", "adaptive_smoothing", "paper"]
        assert cells(line) == ["cnn_10", "3.0 (50.0)", "32.0 (50.0)", "5.0 (48.0)", ""]

    def test_differences_are_those_of_runs_of_one_seed(self, study, folder):
        *_, line = study.differences(folder, ["cnn_10"], ["cross_entropy", "adaptive_smoothing"], SEEDS).splitlines()
        # 4 - 30, 5 - 32, 6 - 34: -26, -27, -28; a standard error of 1 / sqrt 3, t(2) = 4.303
        assert cells(line) == [
            "cnn_10", "adaptive_smoothing", "-27.00 points (-29.48 to -24.52)", "+2.00 points (-0.48 to +4.48, noise)",
            "-2.00 points (-2.00 to -2.00)",
        ]  # fmt: skip

    def test_a_table_has_the_verdict_under_it(self, study, folder, monkeypatch, capsys):
        monkeypatch.setattr("sys.argv", ["study", "table", "--settings", "cnn_10", "--folder", str(folder)])
        study.main()
        printed = capsys.readouterr().out
        assert "### cnn_10" in printed and "| extra compute % |" in printed and "OOD" not in printed
        assert (
            "Whether a temperature is enough these seeds leave open: cross_entropy with a fitted temperature"
            in printed
        )


class TestExtraCompute:
    def test_an_update_costs_forward_passes_of_a_third_of_a_step(self, study):
        # 940 steps; 5 % of 3 x 940 x 32 passes are 4,512, enough for 20 updates on a 20th (225 samples)
        assert study.extra_compute(report(SMOOTHING, 0, 0, 0)) == pytest.approx(20 * 225 / (3 * 30000))

    def test_the_papers_rule_needs_the_whole_set_each_epoch(self, study):
        assert study.extra_compute(report(PAPER, 0, 0, 0)) == pytest.approx(1131 / (3 * 3000))

    def test_a_fixed_loss_needs_none(self, study):
        assert study.extra_compute(report(CROSS_ENTROPY, 0, 0, 0)) == 0


def test_every_method_and_ablation_parses(study, tmp_path):
    for kind, settings in study.SETTINGS.values():
        for flags in {**study.METHODS, **study.ABLATIONS}.values():
            line = study.shlex.split(f"{settings} {flags}")
            task, args = study.parse_arguments(
                study.TASKS[kind], [*line, "--output_dir", str(tmp_path), *study.DEVICE]
            )
            assert args.build_loss() is not None and task.max_train_samples in (None, 3000, 5000)


def test_a_finished_run_is_not_repeated(study, folder, monkeypatch):
    monkeypatch.setattr(study, "finetune", lambda *_: pytest.fail("it was trained again"))
    study.run("cnn_10", "cross_entropy", 0, folder, None)
