"""Reports of checkpoints that are there already, scalings folded into them, and the commands that do it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForImageClassification, pipeline

from hf_adafocal import cli
from hf_adafocal.data.loading import load_splits
from hf_adafocal.metrics.scores import calibration_report
from hf_adafocal.runs.arguments import parse_arguments
from hf_adafocal.runs.evaluate import class_order, evaluate_checkpoint, scale_checkpoint
from hf_adafocal.runs.finetune import finetune
from hf_adafocal.runs.tasks import ImageTask

pytestmark = pytest.mark.usefixtures("blank_pictures", "few_digits")

pytest.importorskip("timm", reason="timm is the extra `vision`")
pytest.importorskip("matplotlib", reason="matplotlib is the extra `plots`")

QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--num_train_epochs", "5", "--learning_rate", "3e-3"]
QUICK += ["--calibrate_at_end", "false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on digits: its folder and report."""
    folder = tmp_path_factory.mktemp("run")
    return folder, finetune(
        *parse_arguments(ImageTask, [*QUICK, "--output_dir", str(folder), "--seed", "3", "--ood", "noise"])
    ).to_dict()


@pytest.fixture(scope="module")
def scaled(run, tmp_path_factory):
    """The run with a temperature folded in, by the command line."""
    folder = tmp_path_factory.mktemp("scaled") / "digits"
    assert cli.main(["scale", "vision", str(run[0]), "--output", str(folder)]) == 0
    return folder


def task(checkpoint) -> ImageTask:
    return ImageTask(model_name_or_path=str(checkpoint))


def relabelled(folder: Path, target: Path, order) -> Path:
    """The checkpoint with its classes in another order, head and names alike."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    head = model.timm_model.get_classifier()
    with torch.no_grad():
        head.weight.copy_(head.weight[order])
        head.bias.copy_(head.bias[order])
    names = [model.config.id2label[k] for k in order]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: k for k, name in enumerate(names)}
    model.config.label_names = names  # what a timm wrapper saves instead
    model.save_pretrained(target)
    return target


class TestEvaluateCheckpoint:
    def test_it_repeats_the_report_of_the_run(self, run):
        folder, report = run
        found = evaluate_checkpoint(ImageTask(model_name_or_path=str(folder), ood="noise"), seed=3).to_dict()
        for name in ("raw", "temperature_scaled"):
            assert found["test"][name] == pytest.approx(report["test"][name], rel=1e-4)
            assert found["ood"][name] == pytest.approx(report["ood"][name], rel=1e-3)
        for key in ("loss", "adaptation", "splits", "training", "weights", "trained_on", "folded"):
            assert found[key] == report[key]

    def test_the_order_of_the_checkpoints_classes_does_not_matter(self, run, tmp_path):
        order = np.random.default_rng(0).permutation(10)
        other = relabelled(run[0], tmp_path / "other", order.tolist())
        found = evaluate_checkpoint(task(other), seed=3).to_dict()
        assert found["test"]["raw"] == pytest.approx(run[1]["test"]["raw"], rel=1e-4)

    def test_another_seed_makes_another_test_split_and_that_is_said(self, run, caplog):
        import transformers

        transformers.utils.logging.enable_propagation()
        try:
            evaluate_checkpoint(task(run[0]), seed=4)
        finally:
            transformers.utils.logging.disable_propagation()
        assert "it may hold rows that the checkpoint was trained on" in caplog.text

    def test_of_a_folded_checkpoint_it_tells_before_from_now(self, run, scaled):
        found = evaluate_checkpoint(task(scaled), seed=3).to_dict()
        assert found["folded"] is True
        for name in ("raw", "temperature_scaled"):
            assert found["test"][name] == pytest.approx(run[1]["test"][name], rel=1e-3)


class Config:
    def __init__(self, names):
        self.id2label, self.num_labels = dict(enumerate(names)), len(names)


class TestClassOrder:
    names = [str(k) for k in range(10)]

    def test_classes_are_found_by_name(self):
        names = [str(k) for k in (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)]
        assert [names[k] for k in class_order(Config(names), self.names)] == [str(k) for k in range(10)]

    def test_classes_without_names_are_taken_as_they_come(self):
        assert class_order(Config([f"LABEL_{k}" for k in range(10)]), self.names).tolist() == list(range(10))

    @pytest.mark.parametrize(
        "names", [["cat", "dog"], [f"LABEL_{k}" for k in range(9)], [f"no {k}" for k in range(10)]]
    )
    def test_other_classes_are_an_error_that_shows_both(self, names):
        with pytest.raises(
            ValueError, match=rf"has {len(names)} classes \({names[0]}.*the data 10 \(0, 1, 2, 3, 4, \.\.\.\)"
        ):
            class_order(Config(names), self.names)


class TestScaleCheckpoint:
    def test_the_pipeline_gives_the_probabilities_of_the_divided_logits(self, run, scaled):
        folder, report = run
        image = load_splits(seed=3).test[0]["image"].convert("RGB")
        before, after = (pipeline("image-classification", model=str(path)) for path in (folder, scaled))
        p = {entry["label"]: entry["score"] for entry in before(image, top_k=10)}
        expected = {label: score ** (1 / report["test"]["temperature"]) for label, score in p.items()}
        total = sum(expected.values())
        found = {entry["label"]: entry["score"] for entry in after(image, top_k=10)}
        assert found == pytest.approx({label: score / total for label, score in expected.items()}, abs=1e-5)

    def test_report_and_card_speak_of_the_folded_checkpoint(self, scaled):
        report = json.loads((scaled / "report.json").read_text())
        card = ModelCard.load(scaled / "README.md")
        assert report["folded"] is True and "is folded into the last layer" in card.text
        ece = next(result.metric_value for result in card.data.eval_results if result.metric_type == "ece")
        assert ece == report["test"]["temperature_scaled"]["ece"]

    def test_the_fit_is_in_the_data_order_whatever_that_of_the_head(self, run, tmp_path):
        order = np.random.default_rng(1).permutation(10)
        other = relabelled(run[0], tmp_path / "other", order.tolist())
        here = scale_checkpoint(task(run[0]), tmp_path / "here", method="vector", seed=3)
        there = scale_checkpoint(task(other), tmp_path / "there", method="vector", seed=3)
        np.testing.assert_allclose(np.asarray(here.scale)[order], there.scale, rtol=1e-3)
        reports = [evaluate_checkpoint(task(tmp_path / name), seed=3).to_dict()["test"] for name in ("here", "there")]
        assert "temperature" not in reports[0]
        for name in ("raw", "temperature_scaled"):
            assert reports[0][name] == pytest.approx(reports[1][name], rel=1e-2)
        assert reports[0]["raw"] == pytest.approx(run[1]["test"]["raw"], rel=1e-3)

    def test_a_folded_checkpoint_is_not_folded_again(self, scaled, tmp_path, capsys):
        assert cli.main(["scale", "vision", str(scaled), "--output", str(tmp_path / "twice")]) == 2
        assert "has a scaling folded in already" in capsys.readouterr().err
        assert not (tmp_path / "twice").exists()

    def test_an_unknown_method_is_an_error(self, run, tmp_path):
        with pytest.raises(ValueError, match="method must be one of temperature, platt, vector; found 'isotonic'"):
            scale_checkpoint(task(run[0]), tmp_path, method="isotonic")


class TestPredictions:
    @pytest.mark.parametrize("suffix", ["parquet", "npz"])
    def test_the_gate_reads_them_and_finds_the_ece_of_the_report(self, run, tmp_path, suffix, capsys):
        path = tmp_path / f"predictions.{suffix}"
        report = evaluate_checkpoint(task(run[0]), seed=3, predictions=path)
        assert cli.main(["gate", str(path), "--max-ece", "1"]) == 0
        assert f"ECE {report.test.raw['ece']:.4g}"[:9] in capsys.readouterr().out

    def test_they_are_probabilities_and_labels_in_the_order_of_the_test_split(self, run, tmp_path):
        evaluate_checkpoint(task(run[0]), seed=3, predictions=tmp_path / "p.npz")
        saved = np.load(tmp_path / "p.npz")
        assert saved["label"].tolist() == load_splits(seed=3).test["label"][:]
        found = calibration_report(saved["probabilities"], saved["label"])
        assert found == pytest.approx(run[1]["test"]["raw"], rel=1e-4)

    def test_another_kind_of_file_is_refused_before_anything_is_read(self, tmp_path):
        with pytest.raises(ValueError, match=r"go to a .parquet or .npz file, found .*p.txt"):
            evaluate_checkpoint(task("no/such/checkpoint"), predictions=tmp_path / "p.txt")


class TestUnfitCheckpoints:
    def test_one_without_a_classifier_head_is_refused(self, run, tmp_path):
        from safetensors.torch import load_file, save_file

        shutil.copytree(run[0], tmp_path / "headless")
        weights = tmp_path / "headless" / "model.safetensors"
        kept = {name: tensor for name, tensor in load_file(weights).items() if "head" not in name}
        save_file(kept, weights, {"format": "pt"})
        with pytest.raises(ValueError, match=r"no weights for \['timm_model.head.bias', .*they would be random"):
            evaluate_checkpoint(task(tmp_path / "headless"), seed=3)

    def test_one_that_is_no_classifier_is_refused(self, tmp_path):
        tiny.bert().bert.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="Expected the checkpoint of a classifier.*BertModel"):
            evaluate_checkpoint(task(tmp_path))

    @pytest.mark.parametrize("measure", [evaluate_checkpoint, lambda task: scale_checkpoint(task, "nowhere")])
    def test_an_adapter_without_its_base_is_refused_with_the_way_to_merge_it(self, tmp_path, measure):
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(ValueError, match="holds the adapter of a PEFT model.*Merge it into its base first"):
            measure(task(tmp_path))
