"""What a Trainer uploads to the Hub: the files of an allow-list, and no report of other weights."""

import json
import pickle
import shutil

import pytest
import tiny
import torch
from huggingface_hub import ModelCard

from hf_adafocal.report.card import START
from hf_adafocal.report.weights import weights_hash
from hf_adafocal.training import hub_uploads

pytestmark = pytest.mark.usefixtures("blank_pictures")

TEST = tiny.token_dataset(30, seed=4)
MODEL = {"config.json", "model.safetensors"}
REPORTED = {"README.md", "report.json", "reliability.png", "gamma.png"}
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def hub_trainer(folder, model=None, **settings):
    known = {"push_to_hub": True, "hub_model_id": "me/news", "hub_always_push": True, "save_strategy": "epoch"}
    return tiny.trainer(folder, model, **{**known, **settings})


def spoil(folder, outside):
    """Put into a run folder what may not leave it."""
    (folder / "runs").mkdir()
    (folder / "runs" / "events.out.tfevents.1").write_bytes(b"events")
    (folder / "labels.txt").write_bytes(pickle.dumps({"a": [1]}))
    (folder / "env").write_text("SECRET=1")
    outside.write_text("private")
    (folder / "LICENSE").symlink_to(outside)
    return {"runs/events.out.tfevents.1", "labels.txt", "env", "LICENSE", "training_args.bin"}


def commits(hub, repo_id="me/news"):
    """Files of every commit of a repository, the first one (the Hub's own) left out."""
    repository = hub.model(repo_id)
    found = [repository.commits[oid] for oid in reversed(repository.history())][1:]
    return [
        (commit.message, {path: file.content for path, file in commit.files.items() if path != ".gitattributes"})
        for commit in found
    ]


def check_consistent(files, folder):
    """A report, a picture or a card with numbers is of the weights beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(files["model.safetensors"])
    shown = START in files.get("README.md", b"").decode()
    if "report.json" in files:
        assert shown and json.loads(files["report.json"])["weights"] == weights_hash(folder)
    else:
        assert not shown and not [path for path in files if path.endswith(".png")]
        if "README.md" in files:
            assert not ModelCard(files["README.md"].decode()).data.eval_results


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder with checkpoint, report, pictures and card of an earlier run."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    run = tiny.trainer(folder)
    run.train()
    run.save_model()
    run.write_report(TEST, num_resamples=10)
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


class TestPushToHub:
    def test_it_pushes_the_checkpoint_and_its_report_in_one_commit(self, local_hub, tmp_path):
        run = hub_trainer(tmp_path / "run", save_strategy="no")
        forbidden = spoil(tmp_path / "run", tmp_path / "outside")
        run.train()
        run.write_report(TEST, num_resamples=10)
        done = run.push_to_hub(license="mit")
        ((message, files),) = commits(local_hub)
        assert set(files) == MODEL | REPORTED and message == "End of training"
        assert done.oid == local_hub.model("me/news").branches["main"]
        assert forbidden - {"training_args.bin"} <= {
            path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*")
        }
        check_consistent(files, tmp_path / "check")
        card = ModelCard(files["README.md"].decode())
        assert card.data.license == "mit" and "30 test samples" in card.text and 'model="me/news"' in card.text

    def test_trained_again_the_card_is_of_the_new_weights(self, local_hub, folder, tmp_path):
        first = hub_trainer(folder, tiny.bert(seed=3), save_strategy="no")
        first.push_to_hub()
        again = hub_trainer(folder, tiny.bert(seed=4), save_strategy="no")
        again.train()
        again.push_to_hub()
        (_, one), (_, two) = commits(local_hub)
        for files in (one, two):
            check_consistent(files, tmp_path / "check")
        assert one["report.json"] != two["report.json"]
        found = {r.metric_type: r.metric_value for r in ModelCard(two["README.md"].decode()).data.eval_results}
        assert found["nll"] == pytest.approx(again.evaluate()["eval_nll"], rel=1e-5)

    def test_without_a_set_to_measure_no_report_of_earlier_weights_is_pushed(self, local_hub, folder, tmp_path):
        before = hub_trainer(folder, tiny.bert(seed=3), save_strategy="no")
        before.push_to_hub()
        hub_trainer(
            folder, tiny.bert(seed=5), save_strategy="no", loss="focal", eval_dataset=None, eval_strategy="no"
        ).push_to_hub()
        assert set(commits(local_hub)[0][1]) == MODEL | REPORTED - {"gamma.png"}
        files = commits(local_hub)[1][1]
        assert set(files) == MODEL | {"README.md"}
        check_consistent(files, tmp_path / "check")

    def test_in_the_background_it_uploads_what_was_there_when_it_was_called(self, local_hub, folder, tmp_path):
        run = hub_trainer(folder, tiny.bert(seed=3), save_strategy="no")
        with local_hub.lock:  # so that the upload is not over before the weights change
            job = run.push_to_hub(blocking=False)
            tiny.bert(seed=6).save_pretrained(folder)
        job.result()
        check_consistent(commits(local_hub)[0][1], tmp_path / "check")
        assert not list(folder.glob(".upload-*"))

    def test_a_file_with_an_access_token_is_refused(self, local_hub, folder):
        (folder / "vocab.txt").write_text("hf" + "_" + "aB3" * 12)
        with pytest.raises(ValueError, match="vocab.txt holds what looks like an access token"):
            hub_trainer(folder, save_strategy="no").push_to_hub()
        assert commits(local_hub) == []

    def test_saving_by_hand_pushes_once_and_consistently(self, local_hub, folder, tmp_path):
        run = hub_trainer(folder, tiny.bert(seed=3), save_strategy="no")
        run.save_model()
        ((message, files),) = commits(local_hub)
        assert message == "Model save" and set(files) == MODEL | REPORTED - {"gamma.png"}
        check_consistent(files, tmp_path / "check")

    def test_it_asks_for_a_licence(self, local_hub, folder, caplog):
        run = hub_trainer(folder, save_strategy="no")
        run.push_to_hub()
        assert "names no licence. Choose one, as in push_to_hub(license='apache-2.0')" in caplog.text


class TestSaves:
    @pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
    def test_every_commit_is_consistent_and_holds_nothing_forbidden(self, strategy, local_hub, folder, tmp_path):
        hub_trainer(folder, tiny.bert(seed=3), save_strategy="no").push_to_hub(license="mit")
        (folder / "README.md").write_text((folder / "README.md").read_text() + "\n## Ours\n\nWords.\n")
        spoil(folder, tmp_path / "outside")
        run = hub_trainer(folder, tiny.bert(seed=4), hub_strategy=strategy, hub_token="hf_writer")
        run.train()
        during = commits(local_hub)[1:]
        run.push_to_hub()
        (_, first), *_, (message, last) = commits(local_hub)
        expected = {
            "every_save": [MODEL, MODEL],
            "checkpoint": [MODEL | {f"last-checkpoint/{name}" for name in MODEL | STATE}] * 2,
            "all_checkpoints": [
                MODEL | {f"checkpoint-{step}/{name}" for step in steps for name in MODEL | STATE}
                for steps in ([6], [6, 12])
            ],
            "end": [],
        }[strategy]
        assert [set(files) for _, files in during] == [paths | {"README.md"} for paths in expected]
        for _, files in during:
            card = ModelCard(files["README.md"].decode())
            assert card.data.license == "mit" and card.text.rstrip().endswith("## Ours\n\nWords.")
            assert files["model.safetensors"] != first["model.safetensors"]
        assert message == "End of training" and REPORTED <= set(last)
        for _, files in commits(local_hub):
            check_consistent(files, tmp_path / "check")
        assert not list(folder.glob(".upload-*"))

    def test_the_state_of_the_last_checkpoint_is_the_one_to_go_on_from(self, local_hub, tmp_path):
        run = hub_trainer(tmp_path / "run", hub_strategy="checkpoint")
        run.train()
        run._finish_current_push()
        files = commits(local_hub)[-1][1]
        there = tmp_path / "downloaded"
        for path, content in files.items():
            (there / path).parent.mkdir(parents=True, exist_ok=True)
            (there / path).write_bytes(content)
        longer = tiny.trainer(tmp_path / "longer", num_train_epochs=3)
        longer.train(resume_from_checkpoint=str(there / "last-checkpoint"))
        straight = tiny.trainer(tmp_path / "straight", num_train_epochs=3)
        straight.train()
        assert weights_hash(longer.model) == weights_hash(straight.model)

    def test_a_save_that_cannot_be_uploaded_is_said_and_the_run_goes_on(self, local_hub, folder, caplog):
        run = hub_trainer(folder)
        local_hub.fail("/commit/", 403, times=1)
        (folder / "README.md").write_text("---\na: [\n---\n# Mine\n")
        run.train()
        run._finish_current_push()
        assert run.state.global_step == 12 and commits(local_hub) == []
        assert "The checkpoint of epoch 1 is not uploaded: The metadata of README.md cannot be read" in caplog.text
        (folder / "README.md").write_text("# Mine\n")
        run.train()
        run._finish_current_push()
        assert "The upload of epoch 1 failed: " in caplog.text and len(commits(local_hub)) == 1

    def test_a_card_that_is_in_the_repository_alone_loses_its_report(self, local_hub, folder, tmp_path):
        hub_trainer(folder, tiny.bert(seed=3), save_strategy="no").push_to_hub(license="mit")
        run = hub_trainer(tmp_path / "elsewhere", tiny.bert(seed=4))
        run.train()
        run._finish_current_push()
        for _, files in commits(local_hub)[1:]:
            check_consistent(files, tmp_path / "check")
            assert ModelCard(files["README.md"].decode()).data.license == "mit"


def test_every_process_measures_before_the_main_one_uploads(tmp_path, local_hub, monkeypatch):
    calls = []
    run = hub_trainer(tmp_path / "run", save_strategy="no")
    monkeypatch.setattr(run, "is_world_process_zero", lambda: False)
    monkeypatch.setattr(run, "create_model_card", lambda **_: calls.append("card"))
    assert run.push_to_hub() is None and calls == ["card"] and commits(local_hub) == []


def test_no_argument_of_a_run_is_uploaded_with_its_token(tmp_path, local_hub):
    run = hub_trainer(tmp_path / "run", hub_strategy="checkpoint", hub_token="hf_writer")
    run.train()
    run._finish_current_push()
    saved = tmp_path / "run" / "checkpoint-12" / "training_args.bin"
    assert torch.load(saved, weights_only=False).hub_token == "hf_writer"
    assert not [path for _, files in commits(local_hub) for path in files if path.endswith(".bin")]
    assert hub_uploads.NEVER == ("training_args.bin",)
