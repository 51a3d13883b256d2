"""A segmentation run from the command line: report, card, picture, checkpoint; and images with masks."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage
from transformers import (
    AutoModelForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from hf_adafocal import cli
from hf_adafocal.metrics.segmentation import DenseCounts, count_dense, dense_differences, dense_metrics
from hf_adafocal.report.comparison import student_interval
from hf_adafocal.report.files import read_report
from hf_adafocal.runs.arguments import parse_arguments
from hf_adafocal.runs.dense import COUNTS, dense_table, difference_table, measure_images
from hf_adafocal.runs.finetune import finetune
from hf_adafocal.runs.tasks import SegmentationTask

QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none", "--num_train_epochs", "2"]


@pytest.fixture(scope="module")
def volume_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volumes")
    line = [*QUICK, "--volume_size", "12", "--max_train_samples", "8", "--output_dir", str(folder)]
    return folder, finetune(*parse_arguments(SegmentationTask, line))


class TestVolumes:
    def test_the_report_has_metrics_of_images_with_intervals(self, volume_run):
        folder, report = volume_run
        assert report.metrics["num_images"] == 32 and report.metrics["num_samples"] == 32 * 12**3
        assert {"foreground_ece", "image_ece", "dice", "betti_2_error"} <= report.metrics.keys()
        assert report.metrics["ece"] == pytest.approx(report.metrics["pixel_ece"], abs=1e-5)
        low, high = report.test.intervals[report.shipped]["foreground_ece"]
        assert low < report.metrics["foreground_ece"] < high
        assert "of 32 images" in dense_table(report)

    def test_card_and_overlay_are_written(self, volume_run):
        folder, _ = volume_run
        card = (folder / "README.md").read_text()
        assert "of 32 images" in card and '<img src="overlay.png"' in card
        assert np.asarray(PILImage.open(folder / "overlay.png")).std() > 10

    @pytest.mark.slow
    def test_the_code_of_the_card_runs_on_a_volume(self, volume_run):
        folder, _ = volume_run
        code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        name = code.split('from_pretrained("')[1].split('"')[0]
        code = code.replace(f'"{name}"', repr(str(folder)))
        # In a process of its own, because the checkpoint's code takes the place of this package's classes.
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        printed = [line.split(" ")[1] for line in ran.stdout.splitlines()]
        assert "pipeline" not in code and sum(map(int, printed)) == 24**3

    def test_the_checkpoint_loads_and_gives_the_metrics_of_the_report(self, volume_run):
        folder, report = volume_run
        model = AutoModelForSemanticSegmentation.from_pretrained(folder)
        task, _ = parse_arguments(SegmentationTask, [*QUICK, "--volume_size", "12", "--output_dir", str(folder)])
        prepared = task.prepare(42)
        counts, shown = measure_images(model, prepared.splits.test, prepared.data_collator)
        assert counts.overlap[:, 1, 0].sum() > 0 and shown["image"].shape == (12, 12, 12)
        assert counts.num_pixels == report.metrics["num_samples"]

    @pytest.mark.slow
    def test_evaluate_repeats_the_report_and_the_gate_counts_images(self, volume_run, tmp_path, capsys):
        folder, report = volume_run
        out, file = tmp_path / "out", tmp_path / "predictions.parquet"
        assert (
            cli.main(["evaluate", "segmentation", str(folder), "--output", str(out), "--predictions", str(file)]) == 0
        )
        found = read_report(out)
        for row, metrics in report.test.rows().items():
            assert found.test.rows()[row] == pytest.approx(metrics, rel=1e-3, abs=1e-6)
        assert found.test.intervals.keys() == report.test.intervals.keys() and (out / "overlay.png").exists()
        capsys.readouterr()
        assert cli.main(["gate", str(file), "--max-ece", "0.5"]) == 0
        answer = capsys.readouterr().out
        assert f"{32 * 12**3} samples in 32 groups" in answer
        ends = [float(end) for end in re.search(r"interval (\S+) to ([^;]+);", answer).groups()]
        assert ends == pytest.approx(report.test.intervals[report.shipped]["ece"], rel=1e-2)

    @pytest.mark.slow
    def test_a_checkpoint_that_left_its_folder_still_knows_its_data(self, volume_run, tmp_path):
        shutil.copytree(volume_run[0], tmp_path / "copy")
        (tmp_path / "copy" / "run_arguments.json").unlink()
        assert cli.main(["evaluate", "segmentation", str(tmp_path / "copy")]) == 0

    @pytest.mark.slow
    def test_scale_folds_a_temperature_into_the_network(self, tmp_path):
        line = [*QUICK, "--volume_size", "12", "--max_train_samples", "8", "--calibrate_at_end", "false"]
        plain = finetune(*parse_arguments(SegmentationTask, [*line, "--output_dir", str(tmp_path / "plain")]))
        assert not plain.folded
        command = ["scale", "segmentation", str(tmp_path / "plain"), "--output", str(tmp_path / "scaled")]
        assert cli.main(command) == 0
        scaled = read_report(tmp_path / "scaled")
        assert scaled.folded and scaled.test.temperature == pytest.approx(plain.test.temperature, rel=1e-3)
        assert scaled.metrics["nll"] == pytest.approx(plain.test.temperature_scaled["nll"], rel=1e-3)
        assert scaled.metrics["betti_0_error"] == plain.metrics["betti_0_error"]

    @pytest.mark.slow
    def test_compare_prints_metrics_of_images_and_differences_over_images(self, tmp_path, capsys):
        line = [*QUICK, "--volume_size", "12", "--max_train_samples", "8"]
        command = ["compare", "segmentation", "--losses", "cross_entropy", "focal", "--folder", str(tmp_path), *line]
        assert cli.main([*command, "--seeds", "0"]) == 0
        text = capsys.readouterr().out
        assert "foreground ECE %" in text and "over the 32 images of one seed" in text
        counts = [DenseCounts.load(tmp_path / f"{loss}-0" / COUNTS) for loss in ("focal", "cross_entropy")]
        test = dense_differences(*counts)["foreground_ece"]
        assert f"{100 * test.difference:.2f} ({100 * test.low:.2f} to {100 * test.high:.2f})" in text

    def test_a_network_that_is_not_there_is_an_error(self, tmp_path):
        task, _ = parse_arguments(SegmentationTask, ["--architecture", "vit", "--output_dir", str(tmp_path)])
        with pytest.raises(ValueError, match="unet3d, for --dataset volumes; found 'vit'"):
            task.prepare(0)


class TestImages:
    def test_a_segformer_is_fine_tuned_on_a_folder_of_images_and_masks(self, tmp_path):
        random = np.random.default_rng(0)
        images, masks = [], []
        for _ in range(20):
            mask = np.zeros((32, 32), dtype=np.uint8)
            row, column = random.integers(4, 16, 2)
            mask[row : row + 10, column : column + 10] = 1
            mask[0] = 255
            noise = random.integers(0, 60, (32, 32, 3))
            images.append(PILImage.fromarray((noise + 150 * (mask == 1)[..., None]).astype(np.uint8)))
            masks.append(PILImage.fromarray(mask))
        rows = Dataset.from_dict({"image": images, "annotation": masks})
        (tmp_path / "data").mkdir()
        rows.cast_column("image", Image()).cast_column("annotation", Image()).to_parquet(
            str(tmp_path / "data" / "train.parquet")
        )
        config = SegformerConfig(
            num_labels=2, hidden_sizes=[8, 8, 8, 8], num_attention_heads=[1, 1, 1, 1], depths=[1, 1, 1, 1],
            decoder_hidden_size=8,
        )  # fmt: skip
        SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "start")
        SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "start")
        line = [*QUICK, "--dataset", str(tmp_path / "data"), "--model_name_or_path", str(tmp_path / "start")]
        line += ["--holdout_fraction", "0.2", "--output_dir", str(tmp_path / "run"), "--learning_rate", "0.01"]
        report = finetune(*parse_arguments(SegmentationTask, line))
        assert report.metrics["num_images"] == 8 and report.metrics["num_samples"] == 8 * 31 * 32
        assert {"dice", "betti_1_error"} <= report.metrics.keys() and (tmp_path / "run" / "overlay.png").exists()
        assert cli.main(["evaluate", "segmentation", str(tmp_path / "run")]) == 0
        assert read_report(tmp_path / "run").metrics == pytest.approx(report.metrics, rel=1e-3, abs=1e-6)


class TestDifferenceTable:
    def test_of_several_seeds_the_intervals_are_over_seeds(self, tmp_path):
        folders, differences = {"focal": [], "cross_entropy": []}, []
        for seed in range(3):
            random = np.random.default_rng(seed)
            labels = random.integers(0, 2, (4, 5, 6))
            found = []
            for loss, runs in folders.items():
                runs.append(tmp_path / f"{loss}-{seed}")
                runs[-1].mkdir()
                counts = count_dense(random.random(labels.shape), random.integers(0, 2, labels.shape), labels, 2)
                counts.save(runs[-1] / COUNTS)
                found.append(dense_metrics(counts)["pixel_ece"])
            differences.append(100 * (found[0] - found[1]))
        low, high = student_interval(np.array(differences))
        text = difference_table(folders)
        assert "over the 3 seeds" in text and f"{np.mean(differences):.2f} ({low:.2f} to {high:.2f})" in text
        assert "cavities" not in text  # of images there are none

    def test_without_a_baseline_there_is_none(self, tmp_path):
        assert difference_table({"focal": [tmp_path]}) == ""
