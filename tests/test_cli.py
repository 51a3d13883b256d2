"""The command `hf-adafocal`: exit codes, help, and what it takes from a run."""

import json
import subprocess
import sys

import numpy as np
import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageClassification, pipeline

import hf_adafocal
from hf_adafocal import cli
from hf_adafocal.data.loading import load_splits
from hf_adafocal.runs.arguments import parse_arguments
from hf_adafocal.runs.finetune import finetune
from hf_adafocal.runs.tasks import ImageTask
from hf_adafocal.scaling.folding import recorded_scaling

pytestmark = pytest.mark.usefixtures("blank_pictures", "few_digits")

pytest.importorskip("timm", reason="timm is the extra `vision`")
pytest.importorskip("matplotlib", reason="matplotlib is the extra `plots`")

QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--num_train_epochs", "5", "--learning_rate", "3e-3"]
QUICK += ["--calibrate_at_end", "false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on digits: its folder and report."""
    folder = tmp_path_factory.mktemp("run")
    line = [*QUICK, "--output_dir", str(folder), "--seed", "3"]
    return folder, finetune(*parse_arguments(ImageTask, line)).to_dict()


@pytest.fixture(scope="module")
def scaled(run, tmp_path_factory):
    """The run with a temperature folded in, by the command line."""
    folder = tmp_path_factory.mktemp("scaled") / "digits"
    assert cli.main(["scale", "vision", str(run[0]), "--output", str(folder)]) == 0
    return folder


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
        line = ["card", str(folder), "--repo-id", "me/digits", "--license", "mit", "--title", "Digits, small"]
        assert cli.main(line) == 0
        assert readme.read_text().split("\n---\n")[1].lstrip().startswith("# Digits, small\n\n<!-- calibration report")
        assert readme.read_text().endswith("## Ours\n") and 'model="me/digits"' in readme.read_text()
        assert ModelCard.load(readme).data.license == "mit"

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (["evaluate", "vision", "no/such/checkpoint/here"], "no/such/checkpoint/here"),
            (["scale", "vision", "no/such/checkpoint/here", "--output", "x"], "no/such/checkpoint/here"),
            (["compare", "vision", "--losses", "focal", "focal"], "Each loss counts once, found focal more than once"),
            (["compare", "vision", "--seeds", "0", "0"], "Each seed counts once, found 0 more than once"),
            (["compare", "vision", "--losses", "hinge"], "losses must be among"),
            (["compare", "vision", "--push_to_hub", "true"], "A comparison pushes none of its runs"),
            (["train", "vision", "--no_such_thing", "1"], "--no_such_thing"),
            (["gate", "nowhere.parquet", "--max-ece", "0.1"], "nowhere.parquet"),
            (["card", "."], "holds no report.json"),
            (["push", "nowhere", "me/x"], "nowhere"),
            (["publish-metric", "no_such_metric", "me"], "no_such_metric"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_what_cannot_be_done_is_one_line_and_exit_code_2(self, line, message, capsys):
        assert cli.main(line) == 2
        found = capsys.readouterr().err.strip().splitlines()[-1]
        assert "Traceback" not in found
        assert found.startswith(f"hf-adafocal {line[0]}: ") and message in found

    @pytest.mark.parametrize(
        "verb", ["train", "compare", "evaluate", "scale", "card", "push", "publish-metric", "gate"]
    )
    def test_the_help_of_each_verb_has_an_example(self, verb, capsys):
        with pytest.raises(SystemExit) as exit_:
            cli.main([verb, "--help"])
        assert exit_.value.code == 0 and f"example: hf-adafocal {verb} " in " ".join(capsys.readouterr().out.split())

    @pytest.mark.parametrize("verb", ["train", "compare", "evaluate", "scale"])
    def test_the_help_of_a_command_shows_the_arguments_that_it_passes_on(self, verb, capsys):
        with pytest.raises(SystemExit):
            cli.main([verb, "--help"])
        out = capsys.readouterr().out
        assert all(f"  --{name} " in out for name in ("dataset", "max_length", "input_column"))
        trains = verb in ("train", "compare")
        assert all((f"--{name} " in out) is trains for name in ("architecture", "vocab_size", "horizontal_flip"))
        assert ("--gamma_lambda" in out) is trains and ("TrainingArguments" in out) is trains

    def test_the_version_is_that_of_the_package(self, capsys):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["--version"])
        assert exit_.value.code == 0 and capsys.readouterr().out == f"hf-adafocal {hf_adafocal.__version__}\n"

    def test_without_a_verb_the_command_says_how_to_use_it(self, capsys):
        with pytest.raises(SystemExit) as exit_:
            cli.main([])
        assert exit_.value.code == 2 and "compare" in capsys.readouterr().err

    def test_a_fault_of_the_package_is_never_a_gate_not_passed(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("hf_adafocal.metrics.gate.calibration_gate", lambda *_, **__: 1 / 0)
        np.savez(tmp_path / "p.npz", confidence=np.ones(3), correct=np.ones(3))
        assert cli.main(["gate", str(tmp_path / "p.npz"), "--max-ece", "0.1"]) == 2
        assert "ZeroDivisionError" in capsys.readouterr().err

    def test_train_needs_nothing_but_the_package(self, tmp_path, capsys):
        line = [*QUICK, "--num_train_epochs", "1", "--max_train_samples", "64", "--output_dir", str(tmp_path / "run")]
        line += ["--baseline", "none"]
        assert cli.main(["train", "vision", *line]) == 0
        table = capsys.readouterr().out.splitlines()
        assert (
            any(line.startswith("| adafocal, as trained") for line in table)
            and (tmp_path / "run" / "report.json").exists()
        )

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


class TestWhatARunSays:
    """`evaluate` and `scale` take data set, columns, length and seed from the run."""

    @pytest.fixture(scope="class")
    def text_run(self, tmp_path_factory):
        folder, data = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("data")
        words = ["space", "motor", "faith"]
        texts = [" ".join([words[i % 3], f"a{i % 5}", f"b{i % 8}", f"c{i // 40}", *["cut"] * 9]) for i in range(120)]
        from datasets import Dataset

        rows = Dataset.from_dict({"body": texts, "other": ["x"] * 120, "topic": [i % 3 for i in range(120)]})
        rows.to_parquet(str(data / "train.parquet"))
        line = ["--dataset", str(data), "--input_column", "body", "--label_column", "topic", "--max_length", "5"]
        line += ["--seed", "7", "--output_dir", str(folder), *QUICK, "--num_train_epochs", "1"]
        assert cli.main(["train", "text", *line]) == 0
        return folder, data

    def test_nothing_need_be_repeated(self, text_run, tmp_path, caplog):
        import transformers

        folder, _ = text_run
        before = json.loads((folder / "report.json").read_text())
        transformers.utils.logging.enable_propagation()
        try:
            assert cli.main(["evaluate", "text", str(folder)]) == 0
            assert cli.main(["scale", "text", str(folder), "--output", str(tmp_path / "scaled")]) == 0
        finally:
            transformers.utils.logging.disable_propagation()
        after = json.loads((folder / "report.json").read_text())
        assert after["splits"] == before["splits"] and after["seed"] == 7
        assert after["test"]["raw"] == pytest.approx(before["test"]["raw"], rel=1e-4)
        assert json.loads((tmp_path / "scaled" / "report.json").read_text())["splits"] == before["splits"]
        assert "may hold rows" not in caplog.text

    def test_the_command_line_goes_first(self, text_run, tmp_path, capsys):
        folder, _ = text_run
        line = ["evaluate", "text", str(folder), "--output", str(tmp_path / "report"), "--label_column", "other"]
        assert cli.main(line) == 2 and "has 3 classes (0, 1, 2), the data 1 (x)" in capsys.readouterr().err

    def test_without_the_record_the_report_says_all_but_where_a_local_data_set_is(self, text_run, tmp_path, capsys):
        import shutil

        folder, data = text_run
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        (copy / "run_arguments.json").unlink()
        assert cli.main(["evaluate", "text", str(copy)]) == 2
        assert "does not say where its data set is, since it was a local folder" in capsys.readouterr().err
        assert cli.main(["evaluate", "text", str(copy), "--dataset", str(data)]) == 0

    def test_a_run_of_another_kind_is_refused(self, text_run, capsys):
        assert cli.main(["evaluate", "vision", str(text_run[0])]) == 2
        assert "is of the kind text, not vision" in capsys.readouterr().err

    @pytest.mark.parametrize("verb", ["evaluate", "scale"])
    def test_a_foreign_checkpoint_is_not_measured_on_data_that_nobody_named(self, verb, run, tmp_path, capsys):
        AutoModelForImageClassification.from_pretrained(run[0]).save_pretrained(tmp_path / "foreign")
        assert cli.main([verb, "vision", str(tmp_path / "foreign"), "--output", str(tmp_path / "report")]) == 2
        assert "holds no record of a run of hf-adafocal: name the data set with --dataset" in capsys.readouterr().err
        assert not (tmp_path / "report").exists()

    def test_the_report_of_a_foreign_checkpoint_goes_into_a_folder_of_its_own(self, run, tmp_path, monkeypatch):
        AutoModelForImageClassification.from_pretrained(run[0]).save_pretrained(tmp_path / "foreign")
        monkeypatch.chdir(tmp_path)
        before = sorted(path.name for path in (tmp_path / "foreign").iterdir())
        assert cli.main(["evaluate", "vision", "foreign", "--dataset", "digits"]) == 0
        assert sorted(path.name for path in (tmp_path / "foreign").iterdir()) == before
        assert (tmp_path / "runs" / "evaluate" / "foreign" / "report.json").exists()


class TestDamagedFiles:
    @settings(max_examples=40)
    @given(st.binary(max_size=200), st.sampled_from([".parquet", ".npz", ".csv"]))
    def test_whatever_a_file_holds_the_gate_answers_in_one_line(self, tmp_path_factory, content, suffix):
        path = tmp_path_factory.mktemp("fuzz") / f"predictions{suffix}"
        path.write_bytes(content)
        assert answer(["gate", str(path), "--max-ece", "0.1"]) == 1

    @settings(max_examples=30)
    @given(st.data())
    def test_a_report_cut_or_changed_anywhere_is_one_line(self, run, tmp_path_factory, data):
        folder = tmp_path_factory.mktemp("report")
        whole = json.dumps(run[1])
        if data.draw(st.booleans()):
            text = whole[: data.draw(st.integers(0, len(whole) - 1))]
        else:
            report = json.loads(whole)
            node = report
            for _ in range(data.draw(st.integers(0, 3))):
                inner = [key for key, value in node.items() if isinstance(value, dict) and value]
                node = node[data.draw(st.sampled_from(inner))] if inner else node
            key = data.draw(st.sampled_from(sorted(node)))
            node[key] = data.draw(st.sampled_from([None, -1, "x", [1, "a"], {"a": 1}, 10**400]))
            text = json.dumps(report)
        (folder / "report.json").write_text(text)
        assert answer(["card", str(folder)]) in (0, 1)  # some changes leave a report


def answer(line: list[str]) -> int:
    """Run a command that fails or not: the number of lines on stderr; it never shows a traceback or exits with 1."""
    import contextlib
    import io

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(line)
    assert "Traceback" not in errors.getvalue(), errors.getvalue()
    assert code in (0, 2), errors.getvalue()
    return len(errors.getvalue().splitlines())
