import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from accelerate import debug_launcher
from datasets import Dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, BertTokenizerFast, pipeline

from hf_adafocal.data.loading import load_splits
from hf_adafocal.metrics.scores import calibration_report
from hf_adafocal.runs.arguments import parse_arguments
from hf_adafocal.runs.examples import NEUTRAL, is_public
from hf_adafocal.runs.finetune import finetune, train
from hf_adafocal.runs.run_record import RunRecord, read_record
from hf_adafocal.runs.tasks import ImageTask, TextTask

pytestmark = pytest.mark.usefixtures("blank_pictures", "few_digits")

pytest.importorskip("timm", reason="timm is the extra `vision`")
pytest.importorskip("matplotlib", reason="matplotlib is the extra `plots`")

SCRIPTS = Path(__file__).parents[2] / "scripts"
PAPER: list[str] = []
QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--num_train_epochs", "2", "--max_train_samples", "200"]


def newsgroups(folder: Path) -> str:
    """Texts of three topics that share most words, 30 a topic, with one empty text."""
    generator = np.random.default_rng(0)
    common, topics = [f"word{i}" for i in range(30)], ["space", "motor", "faith"]
    rows = []
    for index in range(90):
        words = [*generator.choice(common, 25), *generator.choice(topics, 2, p=np.eye(3)[index % 3] * 0.85 + 0.05)]
        rows.append(" ".join(generator.permutation(words)))
    rows[0] = ""
    folder.mkdir()
    data = Dataset.from_dict({"text": rows, "label": [index % 3 for index in range(90)]})
    data.to_parquet(str(folder / "train.parquet"))
    return str(folder)


def sizes(report: dict) -> dict:
    return {role: split["size"] for role, split in report["splits"].items()}


class TestParseArguments:
    def test_a_task_brings_training_arguments_of_its_own(self, tmp_path):
        task, args = parse_arguments(ImageTask, ["--output_dir", str(tmp_path)])
        assert (task.dataset, args.loss, args.num_train_epochs) == ("digits", "adafocal", 100)
        assert args.calibrate_at_end is True and args.eval_strategy == "epoch"
        assert args.remove_unused_columns is False

    def test_a_pretrained_model_gets_the_settings_of_a_fine_tune(self, tmp_path):
        _, args = parse_arguments(TextTask, ["--model_name_or_path", "x", "--output_dir", str(tmp_path)])
        assert (args.num_train_epochs, args.learning_rate) == (3, 5e-5)
        assert args.loss == "adafocal" and args.calibrate_at_end is True

    def test_the_user_goes_first(self, tmp_path):
        task, args = parse_arguments(
            TextTask, ["--learning_rate", "0.1", "--max_length", "9", "--output_dir", str(tmp_path), "--loss", "focal"]
        )
        assert (args.learning_rate, task.max_length, args.loss) == (0.1, 9, "focal")

    def test_an_unknown_argument_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match="--no_such_thing"):
            parse_arguments(TextTask, ["--no_such_thing", "1", "--output_dir", str(tmp_path)])


@pytest.fixture(scope="module")
def vision_run(tmp_path_factory):
    """A short run on digits: its folder and report."""
    folder = tmp_path_factory.mktemp("vision")
    report = finetune(*parse_arguments(ImageTask, [*QUICK, "--output_dir", str(folder), "--seed", "3"])).to_dict()
    return folder, report


class TestExample:
    def test_of_public_data_an_input_of_the_test_split_is_shown_with_what_the_checkpoint_says(self, vision_run):
        folder, report = vision_run
        (example,) = report["examples"]
        found = pipeline("image-classification", model=str(folder))(str(folder / "example.png"))
        assert {entry["label"]: pytest.approx(entry["score"], abs=1e-5) for entry in found} == example["scores"]
        assert list(example["scores"])[0] == found[0]["label"] and len(found) == 5
        card = (folder / "README.md").read_text()
        assert '<img src="example.png"' in card and f"# {found[0]['label']}: {found[0]['score']:.3f}\n" in card

    def test_of_local_texts_none_is_shown(self, tmp_path):
        rows = newsgroups(tmp_path / "data")
        arguments = [*QUICK, "--dataset", rows, "--output_dir", str(tmp_path / "run"), "--num_train_epochs", "1"]
        report = finetune(*parse_arguments(TextTask, arguments))
        (example,) = report.examples
        found = pipeline("text-classification", model=str(tmp_path / "run"))(NEUTRAL)
        assert example["input"] == NEUTRAL
        assert example["scores"] == {found[0]["label"]: pytest.approx(found[0]["score"], abs=1e-5)}

    def test_a_data_set_of_the_hub_is_public_only_where_the_hub_says_so(self, local_hub):
        local_hub.add_dataset("me/open", {})
        local_hub.add_dataset("me/hidden", {}, private=True)
        assert is_public("digits") and is_public("cifar10") and is_public("me/open")
        assert not is_public("../imgs") and not is_public("me/hidden") and not is_public("me/nothing")
        assert {token for *_, token in local_hub.asked("/api/datasets/")} == {None}
        local_hub.fail("/api/datasets/", 503, times=9)
        assert not is_public("me/open")


class TestPush:
    def test_a_run_is_pushed_once_at_its_end_with_card_report_and_pictures(self, local_hub, tmp_path):
        folder = tmp_path / "run"
        arguments = [*QUICK, "--output_dir", str(folder), "--push_to_hub", "true", "--hub_model_id", "me/digits"]
        report = finetune(*parse_arguments(ImageTask, [*arguments, "--num_train_epochs", "1"]))
        repository = local_hub.model("me/digits")
        files = repository.files()
        assert len(repository.history()) == 2  # the Hub's own first commit, and this one
        shown = {"README.md", "report.json", "reliability.png", "gamma.png", "example.png"}
        assert set(files) == shown | {"config.json", "model.safetensors"}
        assert json.loads(files["report.json"]) == report.to_dict()
        card = files["README.md"].decode()
        assert f"{local_hub.endpoint}/me/digits/resolve/main/example.png" in card
        assert f"On {report.metrics['num_samples']} test images it is right in" in card and "Trained on digits" in card


class TestFinetune:
    def test_the_folder_holds_checkpoint_report_and_pictures(self, vision_run):
        folder, report = vision_run
        assert json.loads((folder / "report.json").read_text()) == report
        expected = {"model.safetensors", "config.json", "trainer_state.json", "run_arguments.json", "README.md"}
        assert expected <= {path.name for path in folder.iterdir()}
        for name in ("reliability.png", "gamma.png"):
            assert (folder / name).read_bytes()[:4] == b"\x89PNG"

    def test_the_report_is_what_the_saved_checkpoint_does_on_the_test_split(self, vision_run, few_digits):
        folder, report = vision_run
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        processor = AutoImageProcessor.from_pretrained(folder)
        test = load_splits(seed=3).test
        with torch.no_grad():
            pixels = processor([image.convert("RGB") for image in test["image"]], return_tensors="pt")
            p = model(**pixels).logits.double().softmax(-1).numpy()
        expected = calibration_report(p, np.asarray(test["label"][:]))
        assert report["folded"] is True and report["test"]["temperature_scaled"] == pytest.approx(expected, rel=1e-4)
        assert sizes(report) == {"train": 200, **few_digits}

    def test_folding_a_temperature_changes_neither_row_of_the_report(self, vision_run, tmp_path):
        line = [*QUICK, "--output_dir", str(tmp_path), "--seed", "3", "--calibrate_at_end", "false"]
        report = finetune(*parse_arguments(ImageTask, line)).to_dict()
        assert vision_run[1]["folded"] is True and report["folded"] is False
        for name in ("raw", "temperature_scaled"):
            assert report["test"][name] == pytest.approx(vision_run[1]["test"][name], rel=1e-3)
        assert report["test"]["temperature"] == pytest.approx(vision_run[1]["test"]["temperature"], rel=1e-3)

    def test_the_record_of_the_run_says_all_its_arguments_and_the_report_no_path(self, vision_run):
        folder, report = vision_run
        task, args = parse_arguments(ImageTask, [*QUICK, "--output_dir", str(folder), "--seed", "3"])
        assert read_record(folder).differences(RunRecord.of(task, args)) == []
        assert read_record(folder).seed == 3 and read_record(folder).task["max_train_samples"] == 200
        assert report["training"]["task"]["kind"] == "vision" and "runtime_seconds" in report["training"]
        assert str(folder) not in json.dumps(report)

    def test_the_checkpoint_works_in_a_pipeline(self, vision_run):
        folder, _ = vision_run
        classify = pipeline("image-classification", model=str(folder))
        assert len(classify(load_splits().test[0]["image"].convert("RGB"), top_k=10)) == 10

    def test_gamma_of_every_update_is_in_the_report(self, vision_run):
        _, report = vision_run
        assert [entry["step"] for entry in report["adaptation"]] == [0, 7, 14]
        assert all(len(entry["gammas"]) == 15 for entry in report["adaptation"])
        assert report["loss"]["name"] == "adafocal" and report["loss"]["gamma_max"] == 20
        saved = json.loads((vision_run[0] / "trainer_state.json").read_text())["stateful_callbacks"]["adafocal"]
        assert report["adaptation"][-1]["gammas"] == saved["gammas"]

    def test_epsilon_of_every_update_is_in_the_report_and_on_the_card(self, tmp_path):
        line = [
            *QUICK,
            "--output_dir",
            str(tmp_path),
            "--loss",
            "adaptive_label_smoothing",
            "--calibration_steps",
            "4",
        ]
        report = finetune(*parse_arguments(ImageTask, line)).to_dict()
        assert [entry["step"] for entry in report["adaptation"]] == [0, 5, 9, 13]
        saved = json.loads((tmp_path / "trainer_state.json").read_text())["stateful_callbacks"]["adafocal"]
        assert (saved["smoothing"], saved["updates"]) == (report["adaptation"][-1]["smoothing"], 3)
        card = (tmp_path / "README.md").read_text()
        assert (
            "The smoothing of the labels moved 3 times, by the temperature of slices of the calibration split" in card
        )

    def test_other_inputs_are_told_apart_by_the_confidence_of_the_checkpoint(self, tmp_path, few_digits):
        line = [*QUICK, "--output_dir", str(tmp_path), "--loss", "cross_entropy", "--ood", "noise", "--seed", "3"]
        line += ["--calibrate_at_end", "false"]
        report = finetune(*parse_arguments(ImageTask, line)).to_dict()
        model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        processor, splits = AutoImageProcessor.from_pretrained(tmp_path), load_splits(seed=3, ood="noise")
        with torch.no_grad():
            test, other = (
                model(**processor([image.convert("RGB") for image in part["image"]], return_tensors="pt")).logits
                for part in (splits.test, splits.ood)
            )
        confidence = [logits.double().softmax(-1).amax(-1).numpy() for logits in (test, other)]
        wins = (confidence[0][:, None] > confidence[1]).mean() + (confidence[0][:, None] == confidence[1]).mean() / 2
        assert report["ood"]["raw"]["max_softmax_auroc"] == pytest.approx(wins, abs=1e-4)
        assert (
            report["ood"]["dataset"] == "noise"
            and report["ood"]["temperature_scaled"]["num_out"] == few_digits["test"]
        )

    def test_one_seed_gives_one_result(self, vision_run, tmp_path):
        _, report = vision_run
        again = finetune(*parse_arguments(ImageTask, [*QUICK, "--output_dir", str(tmp_path), "--seed", "3"])).to_dict()
        assert again["test"] == report["test"] and again["adaptation"] == report["adaptation"]

    def test_a_text_model_is_trained_from_scratch_with_a_tokenizer_of_its_own(self, tmp_path):
        line = ["--dataset", newsgroups(tmp_path / "data"), "--output_dir", str(tmp_path / "run"), *QUICK[:4]]
        report = finetune(
            *parse_arguments(TextTask, [*line, "--num_train_epochs", "15", "--per_device_train_batch_size", "8"])
        ).to_dict()
        assert sizes(report) == {"train": 64, "calibration": 8, "test": 18}
        assert report["test"]["raw"]["accuracy"] > 0.6
        classify = pipeline("text-classification", model=str(tmp_path / "run"))
        assert classify("space space word1")[0]["label"] == "0"

    def test_any_sequence_classifier_can_be_fine_tuned(self, tmp_path):
        data = newsgroups(tmp_path / "data")
        words = sorted({word for text in load_splits(data).train["text"] for word in text.split()})
        (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
        BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
        tiny.bert(num_labels=2).save_pretrained(tmp_path / "model")
        line = ["--dataset", data, "--model_name_or_path", str(tmp_path / "model"), "--loss", "cross_entropy"]
        report = finetune(
            *parse_arguments(TextTask, [*line, "--output_dir", str(tmp_path / "run"), *QUICK[:6]])
        ).to_dict()
        assert report["model"]["architecture"] == "BertForSequenceClassification" and "adaptation" not in report
        assert not (tmp_path / "run" / "gamma.png").exists()

    def test_any_image_classifier_can_be_fine_tuned(self, vision_run, tmp_path):
        folder, _ = vision_run
        line = ["--model_name_or_path", str(folder), "--output_dir", str(tmp_path), *QUICK]
        task, args = parse_arguments(ImageTask, line)
        task.prepare(0).model_init()
        assert finetune(task, args).training["learning_rate"] == 5e-5


def train_and_keep_what_is_printed(folder) -> None:
    torch.set_num_threads(1)
    with open(folder / f"printed-{os.getpid()}", "w") as printed, contextlib.redirect_stdout(printed):
        train(ImageTask, [*QUICK, "--output_dir", str(folder), "--baseline", "none"])


class TestScripts:
    @pytest.mark.slow
    def test_two_processes_write_one_report_and_print_one_table(self, tmp_path, few_digits):
        debug_launcher(train_and_keep_what_is_printed, args=(tmp_path,), num_processes=2)
        printed = [path.read_text().count("adafocal, as trained") for path in tmp_path.glob("printed-*")]
        assert sorted(printed) == [0, 1]
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["training"]["batch_size"] == 2 * 32 and sizes(report)["test"] == few_digits["test"]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "launcher",
        [
            ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
            [
                *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
                *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
            ],
        ],
        ids=["torchrun", "accelerate"],
    )
    def test_the_script_under_a_launcher_writes_one_report_and_prints_one_table(self, tmp_path, launcher):
        script = [str(SCRIPTS / "train_vision.py"), *QUICK, "--baseline", "none", "--output_dir", str(tmp_path)]
        environment = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(SCRIPTS.parent),
            "HF_HOME": str(tmp_path / "home"),
            "PATH": "/usr/bin:/bin",
        }
        result = subprocess.run(
            [sys.executable, "-m", *launcher, *script], capture_output=True, text=True, env=environment, timeout=300
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.count("adafocal, as trained") == 1
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["training"]["batch_size"] == 2 * 32 and sizes(report)["test"] == 997

    @pytest.mark.slow
    def test_the_main_job_prints_a_run_beside_its_baseline_and_what_their_intervals_allow(self, tmp_path):
        folder = tmp_path / "run"
        command = [sys.executable, str(SCRIPTS / "train_vision.py"), "--output_dir", str(folder)]
        result = subprocess.run(command, check=True, timeout=900, capture_output=True, text=True)
        report = json.loads((folder / "report.json").read_text())
        assert sizes(report) == {"train": 400, "calibration": 400, "test": 997}
        assert report["test"]["raw"]["accuracy"] >= 0.88 and len(report["adaptation"]) == 101
        *table, _, words = result.stdout.strip().splitlines()
        starts = ["cross_entropy, as trained", "cross_entropy, T =", "adafocal, as trained", "adafocal, T ="]
        assert [line[2:].startswith(start) for line, start in zip(table[-4:], starts, strict=True)] == [True] * 4
        assert words.startswith("As trained, adafocal has an accuracy of")
        assert list(report["baselines"]) == ["cross_entropy", "cross_entropy + temperature scaling"]
        assert "Warning" not in result.stderr and "warning" not in result.stderr


class TestBaseline:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory):
        """The folder of a short run with a baseline."""
        folder = tmp_path_factory.mktemp("baseline") / "run"
        line = [*QUICK, "--output_dir", str(folder), "--baseline", "focal", "--focal_gamma", "2", "--gamma_max", "5"]
        train(ImageTask, line)
        return folder

    def test_it_is_trained_with_the_same_arguments_in_a_folder_beside_the_run(self, run):
        ours, theirs = (read_record(folder) for folder in (run, run.with_name("run-focal")))
        differences = [difference.split()[0] for difference in ours.differences(theirs)]
        assert sorted(differences) == ["focal_gamma", "gamma_max", "loss"]

    def test_the_report_and_the_card_hold_its_metrics(self, run):
        ours, theirs = (json.loads((run.with_name(name) / "report.json").read_text()) for name in ("run", "run-focal"))
        assert ours["baselines"]["focal"] == theirs["test"]["raw"]
        assert "baseline: focal" in (run / "README.md").read_text()

    def test_digits_have_cross_entropy_as_baseline_and_nothing_else_has_one(self, monkeypatch, tmp_path):
        trained = []
        monkeypatch.setattr("hf_adafocal.runs.finetune.finetune", lambda task, args, **_: trained.append(args.loss))
        monkeypatch.setattr("hf_adafocal.runs.finetune.results_table", lambda *_: "")
        monkeypatch.setattr("hf_adafocal.runs.finetune.results_in_words", lambda *_: "")
        monkeypatch.setattr("hf_adafocal.runs.finetune.baseline_rows", lambda *_: {})
        out = ["--output_dir", str(tmp_path)]
        train(ImageTask, out)
        train(ImageTask, [*out, "--baseline", "none"])
        train(ImageTask, [*out, "--loss", "cross_entropy"])
        train(TextTask, out)
        train(TextTask, [*out, "--baseline", "brier"])
        assert trained == ["cross_entropy", "adafocal", "adafocal", "cross_entropy", "adafocal", "brier", "adafocal"]

    def test_a_script_ends_with_the_message_alone_where_its_data_cannot_be_had(self, monkeypatch, tmp_path):
        line = ["--dataset", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path)]
        with pytest.raises(OSError, match="--dataset FOLDER"):
            train(TextTask, line)
        monkeypatch.setattr("sys.argv", ["scripts/train_text.py", *line])
        with pytest.raises(
            SystemExit, match=r"^train_text.py: The data set '.*nowhere' cannot be loaded: .*[^.]\. With"
        ):
            train(TextTask)
