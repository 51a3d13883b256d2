"""Reports of checkpoints that are there already, scalings folded into them, and the commands that do it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForImageClassification, pipeline

from hf_adafocal import cli
from hf_adafocal.data.loading import load_splits
from hf_adafocal.runs.evaluate import class_order, evaluate_checkpoint, scale_checkpoint
from hf_adafocal.runs.finetune import finetune, parse_arguments
from hf_adafocal.runs.tasks import ImageTask
from hf_adafocal.scaling.folding import recorded_scaling

pytest.importorskip("timm", reason="timm is the extra `vision`")
pytest.importorskip("matplotlib", reason="matplotlib is the extra `plots`")

QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--num_train_epochs", "5", "--learning_rate", "3e-3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on digits: its folder and report."""
    folder = tmp_path_factory.mktemp("run")
    return folder, finetune(
        *parse_arguments(ImageTask, [*QUICK, "--output_dir", str(folder), "--seed", "3"])
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
        found = evaluate_checkpoint(task(folder), seed=3).to_dict()
        for name in ("raw", "temperature_scaled"):
            assert found["test"][name] == pytest.approx(report["test"][name], rel=1e-4)
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
        assert "may hold rows the checkpoint was trained on" in caplog.text

    def test_of_a_folded_checkpoint_it_tells_before_from_now(self, run, scaled):
        found = evaluate_checkpoint(task(scaled), seed=3).to_dict()
        assert found["folded"] is True
        for name in ("raw", "temperature_scaled"):
            assert found["test"][name] == pytest.approx(run[1]["test"][name], rel=1e-3)


class Config:
    def __init__(self, names):
        self.id2label, self.num_labels = dict(enumerate(names)), len(names)


class TestClassOrder:
    train = load_splits().train

    def test_classes_are_found_by_name(self):
        names = [str(k) for k in (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)]
        assert [names[k] for k in class_order(Config(names), self.train)] == [str(k) for k in range(10)]

    def test_classes_without_names_are_taken_as_they_come(self):
        assert class_order(Config([f"LABEL_{k}" for k in range(10)]), self.train).tolist() == list(range(10))

    @pytest.mark.parametrize(
        "names", [["cat", "dog"], [f"LABEL_{k}" for k in range(9)], [f"no {k}" for k in range(10)]]
    )
    def test_other_classes_are_an_error_that_shows_both(self, names):
        with pytest.raises(ValueError, match=rf"has {len(names)} classes \({names[0]}.*the data 10 \(0, 1"):
            class_order(Config(names), self.train)


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
        assert report["folded"] is True and "folded into the classifier head" in card.text
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
        with pytest.raises(ValueError, match="method must be one of temperature, vector; found 'isotonic'"):
            scale_checkpoint(task(run[0]), tmp_path, method="isotonic")


class TestCommands:
    def test_evaluate_prints_the_table_and_writes_into_the_run(self, run, capsys):
        folder, report = run
        (folder / "report.json").write_text(json.dumps(report))
        (folder / "README.md").unlink()
        assert cli.main(["evaluate", "vision", str(folder)]) == 0
        assert f"| {100 * report['test']['raw']['accuracy']:.2f}" in capsys.readouterr().out
        assert (folder / "README.md").exists()

    def test_card_keeps_what_the_user_wrote(self, run, capsys):
        folder, _ = run
        readme = folder / "README.md"
        readme.write_text(readme.read_text() + "\n## Ours\n")
        assert cli.main(["card", str(folder), "--repo-id", "me/digits", "--license", "mit"]) == 0
        assert readme.read_text().endswith("## Ours\n") and 'model="me/digits"' in readme.read_text()
        assert ModelCard.load(readme).data.license == "mit"

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (["evaluate", "vision", "no/such/checkpoint/here"], "say where the report goes with --output"),
            (["card", "."], "holds no report.json"),
            (["push", "nowhere", "me/x"], "nowhere"),
            (["publish-metric", "no_such_metric", "me"], "no_such_metric"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_what_cannot_be_done_is_one_line_and_exit_code_2(self, line, message, capsys):
        assert cli.main(line) == 2
        found = capsys.readouterr().err.strip().splitlines()[-1]
        assert found.startswith(f"hf-adafocal {line[0]}: ") and message in found

    @pytest.mark.parametrize("verb", ["compare", "evaluate", "scale", "card", "push", "publish-metric", "gate"])
    def test_the_help_of_each_verb_has_an_example(self, verb, capsys):
        with pytest.raises(SystemExit) as exit_:
            cli.main([verb, "--help"])
        assert exit_.value.code == 0 and f"example: hf-adafocal {verb} " in " ".join(capsys.readouterr().out.split())

    def test_push_says_what_it_left_out_and_that_a_second_one_has_nothing_new(self, scaled, local_hub, capsys):
        (scaled / "training_args.bin").write_bytes(b"\x80\x04.")
        for answer in ("pushed to", "nothing new for"):
            assert cli.main(["push", str(scaled), "me/digits"]) == 0
            out = capsys.readouterr().out
            assert answer in out and "left out training_args.bin" in out

    @pytest.mark.slow
    def test_from_training_to_calibrated_scores_in_a_fresh_process(self, scaled, local_hub, tmp_path):
        assert cli.main(["push", str(scaled), "me/digits"]) == 0
        load_splits(seed=3).test[0]["image"].convert("RGB").save(tmp_path / "digit.png")
        code = (
            "import json, sys; from transformers import pipeline; "
            "print(json.dumps(pipeline('image-classification', model='me/digits')(sys.argv[1], top_k=10)))"
        )
        environment = {"PATH": "/usr/bin:/bin", **local_hub.environment(tmp_path / "home", "hf_writer")}
        result = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "digit.png")], capture_output=True, text=True, env=environment
        )
        assert result.returncode == 0, result.stderr[-2000:]
        here = pipeline("image-classification", model=str(scaled))(str(tmp_path / "digit.png"), top_k=10)
        there = json.loads(result.stdout.splitlines()[-1])
        assert [entry["label"] for entry in there] == [entry["label"] for entry in here]
        np.testing.assert_allclose([e["score"] for e in there], [e["score"] for e in here], atol=1e-6)
        assert recorded_scaling(AutoModelForImageClassification.from_pretrained(scaled).config) is not None
