import hashlib
import io
import json
import logging
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace

import huggingface_hub
import pytest
import tiny
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from hf_adafocal.hub.client import PushError, push_files
from hf_adafocal.hub.push import push_run
from hf_adafocal.report.card import START, write_card
from hf_adafocal.report.eval_results import write_eval_results
from hf_adafocal.report.facts import DataSource
from hf_adafocal.report.files import read_report, save_report

pytestmark = pytest.mark.usefixtures("blank_pictures")

CARD = """---
pipeline_tag: text-classification
model-index:
- name: model
  results:
  - task: {type: text-classification}
    dataset: {type: synthetic, name: Synthetic}
    metrics: [{type: ece, value: 0.0125, name: ECE}]
---

# A calibrated model

![Reliability](reliability.png) ![Gamma](pictures/gamma.png)
"""
CHECKPOINT = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
PRESENTED = {"README.md", "report.json", "reliability.png", "pictures/gamma.png"}
TEXTS = ["word3 word30 word12", "word1 word1", "word2"]


def picture(color):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """What the Trainer leaves behind, with the files that are written beside it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    words = {"[UNK]": 0} | {f"word{k}": k for k in range(1, tiny.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = tiny.trainer(folder, num_train_epochs=1, save_strategy="steps", save_steps=3)
    trainer.processing_class = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]", model_input_names=["input_ids"]
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    trainer.write_report()
    (folder / "gamma.png").unlink(missing_ok=True)
    (folder / "README.md").write_text(CARD)
    (folder / "reliability.png").write_bytes(picture("white"))
    (folder / "pictures").mkdir()
    (folder / "pictures" / "gamma.png").write_bytes(picture("black"))
    (folder / "runs" / "now").mkdir(parents=True)
    (folder / "runs" / "now" / "events.out.tfevents.1").write_bytes(b"events")
    (folder / "wandb").mkdir()
    (folder / "wandb" / "settings.json").write_text("{}")
    return folder


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def on_disk(folder, paths):
    return {path: (folder / path).read_bytes() for path in paths}


class TestPushRun:
    def test_pushes_the_checkpoint_and_what_presents_it_byte_by_byte(self, local_hub, run):
        result = push_run(run, "me/model")
        assert set(result.files) == CHECKPOINT | PRESENTED
        repository = local_hub.model("me/model")
        assert repository.files() == on_disk(run, CHECKPOINT | PRESENTED)
        assert (result.repo_id, result.revision, result.url) == ("me/model", "main", f"{local_hub.endpoint}/me/model")
        assert result.commit == repository.branches["main"]
        assert result.new_commit and not repository.private

    def test_pushes_no_pickle_no_training_state_and_no_logs(self, local_hub, run):
        (run / "pytorch_model.bin").write_bytes(b"weights")
        (run / "vectorizer.pkl").write_bytes(b"anything")
        (run / ".env").write_text("SECRET=1")
        result = push_run(run, "me/model")
        assert set(local_hub.model("me/model").files()) == CHECKPOINT | PRESENTED
        everything = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
        assert set(result.left_out) == everything - CHECKPOINT - PRESENTED
        logs = {"runs/now/events.out.tfevents.1", "wandb/settings.json"}
        assert {result.left_out[path] for path in logs} == {"log of a tracker"}

    def test_pushes_further_files_by_their_pattern_alone(self, local_hub, run):
        (run / "model.onnx").write_bytes(b"onnx")
        assert "model.onnx" in push_run(run, "me/model").left_out
        assert "model.onnx" in push_run(run, "me/model", include=["*.onnx"]).files
        assert local_hub.model("me/model").files()["model.onnx"] == b"onnx"

    def test_pushes_no_file_that_a_link_fetches_from_outside(self, local_hub, run, tmp_path):
        (tmp_path / "LICENSE").write_text("private")
        (run / "LICENSE").symlink_to(tmp_path / "LICENSE")
        result = push_run(run, "me/model")
        assert result.left_out["LICENSE"] == "a link that leads out of the folder"
        assert "LICENSE" not in local_hub.model("me/model").files()

    def test_pushes_entries_of_evaluation_results(self, local_hub, run):
        (run / ".eval_results").mkdir()
        (run / ".eval_results" / "news.yaml").write_text("- dataset: {id: a/b}\n  value: 0.5\n")
        push_run(run, "me/model")
        assert b"a/b" in local_hub.model("me/model").files()[".eval_results/news.yaml"]

    def test_pushes_training_state_when_asked_but_no_pickled_weights(self, local_hub, run):
        (run / "checkpoint-3" / "pytorch_model.bin").write_bytes(b"weights")
        result = push_run(run, "me/model", include_training_state=True)
        state = {"training_args.bin", "trainer_state.json", "checkpoint-3/optimizer.pt", "checkpoint-3/scheduler.pt"}
        state |= {"checkpoint-3/model.safetensors", "checkpoint-3/rng_state.pth", "runs/now/events.out.tfevents.1"}
        assert state <= set(local_hub.model("me/model").files())
        assert result.left_out == {
            "checkpoint-3/pytorch_model.bin": "pickled weights",
            "wandb/settings.json": "log of a tracker",
        }

    def test_a_second_push_makes_no_commit(self, local_hub, run):
        first, second = push_run(run, "me/model"), push_run(run, "me/model")
        assert (first.new_commit, second.new_commit) == (True, False)
        assert first.commit == second.commit
        assert first.files == second.files
        assert len(local_hub.model("me/model").history()) == 2  # the Hub's own first commit, and this one
        assert len(local_hub.asked("/commit/")) == 1

    def test_a_changed_card_is_committed_without_sending_the_weights_again(self, local_hub, run):
        push_run(run, "me/model")
        sent = len(local_hub.asked("/_storage/", "PUT"))
        (run / "README.md").write_text(CARD + "More.\n")
        result = push_run(run, "me/model")
        assert result.new_commit
        assert local_hub.model("me/model").files() == on_disk(run, CHECKPOINT | PRESENTED)
        assert len(local_hub.asked("/_storage/", "PUT")) == sent

    def test_a_private_repository_is_not_found_without_the_token(self, local_hub, run):
        push_run(run, "me/model", private=True)
        assert local_hub.model("me/model").private
        api = huggingface_hub.HfApi(endpoint=local_hub.endpoint)
        with pytest.raises(huggingface_hub.errors.HfHubHTTPError):
            api.repo_info("me/model", token=False)
        assert api.repo_info("me/model").private

    def test_private_is_not_promised_for_a_public_repository(self, local_hub, run):
        push_run(run, "me/model")
        (run / "LICENSE").write_text("not for everyone")
        with pytest.raises(PushError, match="me/model is there already and public, but private=True"):
            push_run(run, "me/model", private=True)
        assert "LICENSE" not in local_hub.model("me/model").files()

    def test_a_revision_becomes_a_branch_and_leaves_main_as_it_was(self, local_hub, run):
        push_run(run, "me/model")
        before = (run / "report.json").read_bytes()
        (run / "report.json").write_bytes(before.replace(b'"seed": 42', b'"seed": 7'))
        results = [push_run(run, "me/model", revision="trial/1") for _ in range(2)]
        repository = local_hub.model("me/model")
        assert repository.files("trial/1") == on_disk(run, CHECKPOINT | PRESENTED)
        assert repository.files("main")["report.json"] == before
        assert [result.new_commit for result in results] == [True, False]
        assert results[0].revision == "trial/1"
        assert results[0].commit == repository.branches["trial/1"]
        assert results[0].url == f"{local_hub.endpoint}/me/model/tree/trial/1"

    def test_a_name_alone_is_a_repository_of_the_user(self, local_hub, run):
        assert push_run(run, "model").repo_id == "me/model"
        assert push_run(run, "team/model").repo_id == "team/model"
        assert set(local_hub.repositories) == {("model", "me/model"), ("model", "team/model")}

    def test_weights_of_an_earlier_push_that_would_be_loaded_instead_are_deleted(self, local_hub, run):
        push_run(run, "me/model")
        (run / "report.json").unlink()
        model = tiny.bert(seed=1)
        (run / "model.safetensors").unlink()
        model.save_pretrained(run, max_shard_size="5KB")
        assert (run / "model.safetensors.index.json").exists()
        result = push_run(run, "me/model")
        assert result.removed == ("model.safetensors", "report.json")  # which described these weights
        assert not {"model.safetensors", "report.json"} & set(local_hub.model("me/model").files())
        for shard in run.glob("model*"):
            shard.unlink()
        model.save_pretrained(run)
        result = push_run(run, "me/model")
        assert "model.safetensors.index.json" in result.removed
        assert [path for path in local_hub.model("me/model").files() if path.startswith("model")] == [
            "model.safetensors"
        ]

    def test_other_files_of_the_repository_stay(self, local_hub, run):
        push_run(run, "me/model")
        push_files({"notes.txt": b"kept", "teacher.safetensors": b"kept"}, "me/model", message="more")
        assert push_run(run, "me/model").removed == ()
        assert {"notes.txt", "teacher.safetensors"} <= set(local_hub.model("me/model").files())

    def test_asks_for_a_licence_and_writes_it_into_the_card(self, local_hub, run, caplog):
        push_run(run, "me/model")
        assert "names no licence. Choose one, as in `hf-adafocal push --license" in caplog.text
        caplog.clear()
        push_run(run, "me/model", license="apache-2.0")
        pushed = local_hub.model("me/model").files()["README.md"].decode()
        assert huggingface_hub.ModelCard(pushed).data.license == "apache-2.0" and "# A calibrated model" in pushed
        assert not push_run(run, "me/model").new_commit and "licence" not in caplog.text
        (run / "README.md").unlink()
        assert push_run(run, "me/other", license="mit").new_commit
        assert b"license: mit" in local_hub.model("me/other").files()["README.md"]

    def test_warns_of_a_missing_card(self, local_hub, run, caplog):
        push_run(run, "me/model")
        assert "README.md" not in caplog.text
        (run / "README.md").unlink()
        push_run(run, "me/other")
        assert "no README.md, so the repository me/other gets no model card" in caplog.text


class TestCard:
    """The card and the report that are pushed are of these weights and of this repository."""

    @pytest.fixture
    def reported(self, run):
        report = read_report(run)
        write_card(run, report, repo_id="someone/first")
        return run

    def test_it_names_the_repository_it_is_pushed_to(self, local_hub, reported):
        before = (reported / "README.md").read_bytes()
        assert b'"someone/first"' in before
        for repo_id, full_id in (("me/other", "me/other"), ("third", "me/third")):
            push_run(reported, repo_id)
            card = local_hub.model(full_id).files()["README.md"].decode()
            assert f'"{full_id}"' in card and "someone/first" not in card
        assert (reported / "README.md").read_bytes() == before

    def test_a_second_push_makes_no_commit(self, local_hub, reported):
        assert [push_run(reported, "me/model").new_commit for _ in range(2)] == [True, False]

    def test_what_a_person_wrote_around_the_report_is_pushed(self, local_hub, reported):
        card = (reported / "README.md").read_text()
        (reported / "README.md").write_text(card + "\n## Intended use\n\nOurs alone.\n")
        push_run(reported, "me/model")
        assert "## Intended use\n\nOurs alone." in local_hub.model("me/model").files()["README.md"].decode()

    def test_a_report_of_other_weights_is_refused(self, local_hub, run):
        tiny.bert(seed=1).save_pretrained(run)
        with pytest.raises(ValueError, match="report.json describes other weights than those beside it"):
            push_run(run, "me/model")
        assert local_hub.requests == []

    def test_a_report_that_does_not_say_of_which_weights_it_is_is_refused(self, local_hub, run):
        document = json.loads((run / "report.json").read_text())
        del document["weights"]
        (run / "report.json").write_text(json.dumps(document))
        with pytest.raises(ValueError, match="does not say which weights it describes. Measure these weights with"):
            push_run(run, "me/model")
        assert local_hub.requests == []

    def test_no_report_of_earlier_weights_stays_in_the_repository(self, local_hub, reported):
        (reported / "README.md").write_text((reported / "README.md").read_text() + "\n## Ours\n\nWords.\n")
        push_run(reported, "me/model", license="mit")
        tiny.bert(seed=1).save_pretrained(reported)
        for name in ("report.json", "README.md", "reliability.png"):
            (reported / name).unlink()
        assert {"report.json", "reliability.png"} <= set(push_run(reported, "me/model").removed)
        files = local_hub.model("me/model").files()
        card = huggingface_hub.ModelCard(files["README.md"].decode())
        assert not {"report.json", "reliability.png"} & set(files)
        assert START not in card.text
        assert [result.dataset_name for result in card.data.eval_results] == ["Synthetic"]  # which are the person's
        assert card.data.license == "mit" and card.text.rstrip().endswith("## Ours\n\nWords.")

    def test_a_card_whose_report_is_missing_is_refused(self, local_hub, reported):
        (reported / "report.json").unlink()
        with pytest.raises(ValueError, match="README.md shows a calibration report, but report.json is missing"):
            push_run(reported, "me/model")
        assert local_hub.requests == []

    def test_places_on_this_machine_are_refused_in_the_report_and_warned_of_elsewhere(self, local_hub, run, caplog):
        (run / "README.md").write_text(f"{CARD}\nTrained in {run}/data.\n")
        push_run(run, "me/model")
        assert "README.md names places on this machine" in caplog.text
        report = (run / "report.json").read_text()
        (run / "report.json").write_text(report.replace('"training": {', f'"training": {{"images": "{run}/images", '))
        with pytest.raises(ValueError, match="report.json names places on this machine"):
            push_run(run, "me/model")


BENCHMARK = {
    "README.md": "---\nlanguage: [de]\ndataset_info:\n  splits: [{name: evaluation, num_examples: 60}]\n---\n",
    "eval.yaml": "name: News\ntasks:\n- {id: topics, split: evaluation}\n- {id: other, split: train}\n",
}


class TestDataSet:
    """What the Hub says of the data set behind a report."""

    @pytest.fixture
    def reported(self, run):
        save_report(run, replace(read_report(run), evaluated_on=DataSource.of("me/news")))
        return run

    @staticmethod
    def entries(hub, repo_id="me/model"):
        files = hub.model(repo_id).files()
        return {path: yaml.safe_load(content) for path, content in files.items() if path.startswith(".eval_results")}

    @pytest.fixture(autouse=True)
    def hub_2(self):
        if not hasattr(huggingface_hub, "EvalResultEntry"):
            pytest.skip("huggingface_hub knows no entries of .eval_results before 2.0")

    def test_a_result_on_a_benchmark_is_entered_with_revision_date_and_source(self, local_hub, reported):
        revision = local_hub.add_dataset("me/news", BENCHMARK)
        assert push_run(reported, "me/model").new_commit and not push_run(reported, "me/model").new_commit
        ((path, (entry,)),) = self.entries(local_hub).items()
        report = read_report(reported)
        assert path == ".eval_results/me__news.yaml"
        assert entry["dataset"] == {"id": "me/news", "task_id": "topics", "revision": revision}
        assert entry["value"] == pytest.approx(100 * report.metrics["accuracy"], abs=1e-3)
        assert str(entry["date"]) == report.date
        assert entry["source"]["url"] == f"{local_hub.endpoint}/me/model/blob/main/report.json"
        assert not list(reported.glob(".eval_results/*"))
        card = huggingface_hub.ModelCard(local_hub.model("me/model").files()["README.md"].decode())
        assert card.data.language == ["de"] and card.data.datasets == ["me/news"]

    def test_the_entry_of_weights_that_are_gone_goes_too(self, local_hub, reported):
        local_hub.add_dataset("me/news", BENCHMARK)
        push_run(reported, "me/model")
        del local_hub.repositories["dataset", "me/news"]
        assert push_run(reported, "me/model").removed == (".eval_results/me__news.yaml",)
        assert self.entries(local_hub) == {}

    @pytest.mark.parametrize(
        "changes",
        [
            {"README.md": "# News\n"},  # as many samples as the split has?
            {"README.md": BENCHMARK["README.md"].replace("60", "61")},
            {"eval.yaml": BENCHMARK["eval.yaml"].replace("train", "evaluation")},  # which of the two tasks?
        ],
    )
    def test_where_it_is_not_known_to_be_the_benchmarks_it_is_entered_on_request_alone(
        self, changes, local_hub, reported, caplog
    ):
        local_hub.add_dataset("me/news", BENCHMARK | changes)
        push_run(reported, "me/model")
        assert self.entries(local_hub) == {} and "push with `--benchmark-task`" in caplog.text
        push_run(reported, "me/model", benchmark_task="topics")
        assert len(self.entries(local_hub)) == 1
        with pytest.raises(PushError, match="me/news has no task 'topic'; its tasks are topics, other"):
            push_run(reported, "me/model", benchmark_task="topic")

    def test_a_data_set_that_is_no_benchmark_or_cannot_be_asked_gets_none(self, local_hub, reported, caplog):
        push_run(reported, "me/model")
        assert "The data set me/news cannot be looked up" in caplog.text
        local_hub.add_dataset("me/news", {"README.md": "# News\n"})
        push_run(reported, "me/model")
        assert self.entries(local_hub) == {}
        with pytest.raises(PushError, match="has no task 'topics'; it is no benchmark: it has no eval.yaml"):
            push_run(reported, "me/model", benchmark_task="topics")
        local_hub.fail("/api/datasets/", 503, times=9)
        with pytest.raises(PushError, match="me/news cannot be looked up"):
            push_run(reported, "me/model", benchmark_task="topics")

    def test_an_entry_in_the_folder_of_other_weights_is_refused(self, local_hub, reported):
        write_eval_results(reported, replace(read_report(reported), weights="0" * 32), "topics")
        with pytest.raises(ValueError, match="me__news.yaml is a result of other weights than those in"):
            push_run(reported, "me/model")
        write_eval_results(reported, read_report(reported), "topics")
        push_run(reported, "me/model")
        assert len(self.entries(local_hub)) == 1


class TestFolder:
    """What is said of a folder before anything is asked of the Hub."""

    @pytest.fixture(autouse=True)
    def no_request(self, local_hub):
        yield
        assert local_hub.requests == []

    def test_pickled_weights_alone_are_refused_with_the_way_to_convert_them(self, run):
        (run / "model.safetensors").rename(run / "pytorch_model.bin")
        with pytest.raises(ValueError, match="are pickles .pytorch_model.bin., .*Convert them.*save_pretrained"):
            push_run(run, "me/model")

    def test_a_run_that_was_not_saved_is_refused(self, run):
        for path in run.glob("*.safetensors"):
            path.unlink()
        with pytest.raises(ValueError, match="holds no weights .*trainer.save_model"):
            push_run(run, "me/model")

    def test_weights_without_a_configuration_are_refused(self, run):
        (run / "config.json").unlink()
        with pytest.raises(ValueError, match="holds no config.json"):
            push_run(run, "me/model")

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
    def test_a_file_that_was_cut_short_is_refused(self, name, run):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=f"{name} cannot be read: .*Save the run again"):
            push_run(run, "me/model")

    def test_an_index_without_its_shards_is_refused(self, run):
        (run / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
        with pytest.raises(ValueError, match="model-00002-of-00002.safetensors.*missing"):
            push_run(run, "me/model")

    def test_a_missing_folder_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="found no folder at"):
            push_run(tmp_path / "nowhere", "me/model")

    def test_a_file_that_holds_the_token_is_refused(self, run):
        (run / "report.json").write_text('{"hub_token": "hf_writer"}')
        with pytest.raises(ValueError, match="report.json holds your Hugging Face token") as caught:
            push_run(run, "me/model")
        assert "hf_writer" not in str(caught.value)

    def test_training_arguments_that_hold_the_token_are_refused(self, run):
        torch.save({"hub_token": "hf_writer"}, run / "training_args.bin")
        with pytest.raises(ValueError, match="training_args.bin holds your Hugging Face token"):
            push_run(run, "me/model", include_training_state=True)


ENDPOINTS = {
    "/api/repos/create": "POST",
    "/api/models/me/model": "GET",
    "/api/validate-yaml": "POST",
    "/preupload/": "POST",
    "/info/lfs/": "POST",
    "/_storage/": "PUT",
    "/_verify/": "POST",
    "/commit/": "POST",
}
every_endpoint = pytest.mark.parametrize(("endpoint", "method"), ENDPOINTS.items())


def check_one_line(error, *parts):
    text = str(error)
    assert "\n" not in text and text
    assert "hf_writer" not in text
    for part in parts:
        assert part in text


class TestTroubleThatPasses:
    @staticmethod
    def check_pushed_once(hub, run, result):
        repository = hub.model("me/model")
        assert repository.files() == on_disk(run, CHECKPOINT | PRESENTED)
        assert result.new_commit
        assert repository.history()[0] == result.commit
        assert len(repository.history()) == 2

    @every_endpoint
    @pytest.mark.parametrize("trouble", ["500", "502 with a page", "429", "cut", "answer lost"])
    def test_one_failure_of_any_request_does_not_show(self, endpoint, method, trouble, local_hub, run):
        if trouble == "500":
            local_hub.fail(endpoint, 500, method=method)
        elif trouble == "502 with a page":
            local_hub.fail(endpoint, 502, method=method, body=b"<html>Bad gateway</html>")
        elif trouble == "429":
            local_hub.fail(endpoint, 429, method=method, headers={"Retry-After": "7"})
        elif trouble == "cut":
            local_hub.cut(endpoint, after_bytes=100, method=method)
        else:
            local_hub.lose_answer(endpoint, method=method)
        result = push_run(run, "me/model")
        assert local_hub.faults[0].times == 0  # it did happen
        self.check_pushed_once(local_hub, run, result)
        assert local_hub.waits and (trouble != "429" or max(local_hub.waits) >= 7)

    def test_a_branch_that_was_made_although_the_answer_was_lost_is_used(self, local_hub, run):
        local_hub.lose_answer("/branch/")
        assert push_run(run, "me/model", revision="trial").new_commit
        assert local_hub.model("me/model").files("trial") == on_disk(run, CHECKPOINT | PRESENTED)

    def test_the_wait_of_the_rate_limit_header_is_kept(self, local_hub, run):
        headers = {"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
        local_hub.fail("/api/repos/create", 429, headers=headers)
        self.check_pushed_once(local_hub, run, push_run(run, "me/model"))
        assert local_hub.waits == [55]

    @every_endpoint
    def test_a_push_that_died_half_way_is_repeated_to_the_same_state(self, endpoint, method, local_hub, run):
        local_hub.cut(endpoint, after_bytes=50, method=method, times=100)
        with pytest.raises(PushError) as caught:
            push_run(run, "me/model")
        check_one_line(caught.value, "Push again: what has arrived is not sent twice.")
        assert len(local_hub.asked(endpoint, method)) <= 6 * 3  # three files go to the storage
        local_hub.faults.clear()
        self.check_pushed_once(local_hub, run, push_run(run, "me/model"))

    def test_weights_that_arrived_before_the_push_died_are_not_sent_again(self, local_hub, run):
        local_hub.fail("/commit/", 503, times=100)
        with pytest.raises(PushError, match="The Hub fails at the moment"):
            push_run(run, "me/model")
        local_hub.faults.clear()
        sent = [path for _, path, status, _ in local_hub.asked("/_storage/") if status == 200]
        self.check_pushed_once(local_hub, run, push_run(run, "me/model"))
        assert len(sent) == len(set(sent)) == 3
        assert len(local_hub.asked("/_storage/")) == 3

    def test_a_push_that_died_leaves_the_earlier_state(self, local_hub, run):
        push_run(run, "me/model")
        before = local_hub.model("me/model").files()
        (run / "report.json").unlink()
        model = tiny.bert(seed=1)
        model.save_pretrained(run)
        local_hub.cut("/commit/", after_bytes=10, times=100)
        with pytest.raises(PushError):
            push_run(run, "me/model")
        assert local_hub.model("me/model").files() == before

    def test_a_wait_of_an_hour_is_left_to_the_user(self, local_hub, run):
        local_hub.fail("/api/repos/create", 429, headers={"Retry-After": "3600"}, times=100)
        with pytest.raises(PushError) as caught:
            push_run(run, "me/model")
        check_one_line(caught.value, "The Hub asks to wait 3600 s")
        assert local_hub.waits == []


class TestTroubleThatStays:
    def test_no_token(self, local_hub, run, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(PushError) as caught:
            push_run(run, "me/model")
        check_one_line(caught.value, "No Hugging Face token", "hf auth login", "HF_TOKEN")
        assert local_hub.requests == []

    def test_a_token_that_would_be_quoted_in_an_error_is_not_sent(self, local_hub, run, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_writer\x01")
        with pytest.raises(PushError) as caught:
            push_run(run, "me/model")
        check_one_line(caught.value, "characters that no token has")
        assert caught.value.__cause__ is None and local_hub.requests == []

    def test_an_unknown_token(self, local_hub, run, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_expired")
        with pytest.raises(PushError) as caught:
            push_run(run, "me/model")
        check_one_line(caught.value, "does not accept the token (401", "hf auth login")
        assert "hf_expired" not in str(caught.value)
        assert isinstance(caught.value.__cause__, huggingface_hub.errors.HfHubHTTPError)

    @pytest.mark.parametrize("repo_id", ["someone-else/model", "me/model"])
    def test_a_token_without_the_right(self, repo_id, local_hub, run, monkeypatch):
        if repo_id == "me/model":
            push_files({"notes.txt": b"there already"}, repo_id, message="before")
            monkeypatch.setenv("HF_TOKEN", "hf_reader")
        with pytest.raises(PushError) as caught:
            push_run(run, repo_id)
        check_one_line(caught.value, f"may not write to {repo_id} (403", "write access")
        assert isinstance(caught.value.__cause__, huggingface_hub.errors.HfHubHTTPError)

    @pytest.mark.parametrize(
        "repo_id", ["a/b/c", "me/", "me/my model", "me--model", "", "https://huggingface.co/me/m"]
    )
    def test_a_malformed_repository_id(self, repo_id, local_hub, run):
        with pytest.raises(PushError) as caught:
            push_run(run, repo_id)
        check_one_line(caught.value, f"{repo_id!r} is not the id of a repository; expected <namespace>/<name>")
        assert isinstance(caught.value.__cause__, ValueError)
        assert local_hub.requests == []

    def test_a_revision_that_no_branch_can_have(self, local_hub, run):
        with pytest.raises(PushError) as caught:
            push_run(run, "me/model", revision="refs/pr/7")
        check_one_line(caught.value, "Invalid reference for a branch: refs/pr/7")

    def test_a_revision_that_is_a_commit(self, local_hub, run):
        commit = push_run(run, "me/model").commit
        (run / "README.md").write_text(CARD + "More.\n")
        with pytest.raises(PushError) as caught:
            push_run(run, "me/model", revision=commit)
        check_one_line(caught.value, "is a commit, not a branch")

    def test_no_network(self, local_hub, run):
        local_hub.close()
        with pytest.raises(PushError) as caught:
            push_run(run, "me/model")
        check_one_line(caught.value, f"The connection to {local_hub.endpoint} failed", "Check the network")
        assert local_hub.waits == []

    def test_offline_mode(self, local_hub, run, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(PushError) as caught:
            push_run(run, "me/model")
        check_one_line(caught.value, "HF_HUB_OFFLINE is set")

    def test_a_card_that_the_hub_refuses(self, local_hub, run):
        (run / "README.md").write_text("---\nmodel-index: [{results: 3}]\n---\n")
        with pytest.raises(PushError) as caught:
            push_run(run, "me/model")
        check_one_line(caught.value, "Invalid metadata in README.md", '"model-index" needs a name and results')
        assert local_hub.asked("/_storage/") == []  # found before the weights were sent

    def test_a_page_of_a_proxy_in_place_of_the_hub(self, local_hub, run):
        local_hub.fail("/api/", 200, body=b"<html>Please log in</html>", times=100)
        with pytest.raises(PushError) as caught:
            push_run(run, "me/model")
        check_one_line(caught.value, "did not answer as the Hub does", "HF_ENDPOINT")

    def test_a_hub_that_repeats_the_token_does_not_get_it_into_the_error(self, local_hub, run):
        local_hub.fail("/commit/", 418, body=b'{"error": "Bearer hf_writer\\nis odd"}')
        with pytest.raises(PushError) as caught:
            push_run(run, "me/model")
        check_one_line(caught.value, "418: Bearer [token] is odd")

    def test_the_token_is_sent_to_the_hub_alone_and_never_logged(self, local_hub, run, caplog, monkeypatch, capfd):
        caplog.set_level(logging.DEBUG)
        monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
        monkeypatch.setattr(logging.getLogger("huggingface_hub"), "level", logging.DEBUG)
        local_hub.fail("/commit/", 500, times=2)
        local_hub.fail("/preupload/", 500)
        push_run(run, "me/model")
        assert "attempt 2 follows" in caplog.text and "Request " in caplog.text
        assert "hf_writer" not in caplog.text + "".join(capfd.readouterr())
        assert {token for *_, token in local_hub.asked("/api/")} == {"hf_writer"}
        assert {token for *_, token in local_hub.asked("/_storage/")} == {None}

    def test_nothing_takes_a_token_as_an_argument(self):
        import inspect

        for function in (push_run, push_files):
            assert not [name for name in inspect.signature(function).parameters if "token" in name]


@pytest.mark.slow
def test_a_fresh_process_loads_the_pushed_model_with_the_same_scores_and_its_card(local_hub, run, tmp_path):
    push_run(run, "me/model", private=True)
    script = """if True:
        import json, sys
        from huggingface_hub import ModelCard
        from transformers import pipeline
        classify = pipeline("text-classification", model=sys.argv[1], top_k=None, device=-1)
        card = ModelCard.load(sys.argv[1])
        metrics = [(entry.metric_type, entry.metric_value) for entry in card.data.eval_results]
        print(json.dumps([classify(sys.argv[2:]), metrics, card.text.strip()]))
    """
    command = [sys.executable, "-c", script, "me/model", *TEXTS]
    environment = local_hub.environment(tmp_path / "home", token="hf_writer")
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    scores, metrics, text = json.loads(done.stdout)
    here = pipeline("text-classification", model=str(run), top_k=None, device=-1)
    assert scores == here(TEXTS)
    assert len({scored[0]["score"] for scored in scores}) == len(TEXTS)  # the texts matter
    assert metrics == [["ece", 0.0125]] and text.startswith("# A calibrated model")
    assert {
        path.rsplit("/", 1)[-1] for _, path, status, _ in local_hub.asked("/resolve/", "GET") if status == 200
    } >= {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "README.md",
    }
    assert not push_run(run, "me/model").new_commit


class TestLocalHub:
    """The server refuses what the Hub refuses, so that the tests above mean something."""

    CONTENT = b"\0 weights"
    OID = hashlib.sha256(CONTENT).hexdigest()

    @staticmethod
    def ask(hub, method, path, content, token="hf_writer"):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        url = path if path.startswith("http") else hub.endpoint + path
        request = urllib.request.Request(
            url, body, {"Authorization": f"Bearer {token}"} if token else {}, method=method
        )
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, json.loads(response.read() or b"{}")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def batch(self, hub, token="hf_writer"):
        objects = [{"oid": self.OID, "size": len(self.CONTENT)}]
        wanted = {"operation": "upload", "hash_algo": "sha256", "objects": objects}
        return self.ask(hub, "POST", "/me/model.git/info/lfs/objects/batch", wanted, token)

    def commit(self, hub, oid, size, token="hf_writer"):
        pointer = {"path": "model.safetensors", "oid": oid, "size": size, "algo": "sha256"}
        lines = [{"key": "header", "value": {"summary": "s"}}, {"key": "lfsFile", "value": pointer}]
        content = b"\n".join(json.dumps(line).encode() for line in lines)
        return self.ask(hub, "POST", "/api/models/me/model/commit/main", content, token)[0]

    @pytest.fixture
    def hub(self, local_hub):
        assert self.ask(local_hub, "POST", "/api/repos/create", {"name": "model"})[0] == 200
        return local_hub

    def test_an_upload_must_have_the_hash_and_the_size_that_were_declared(self, hub):
        href = self.batch(hub)[1]["objects"][0]["actions"]["upload"]["href"]
        assert self.ask(hub, "PUT", href, b"\1 weights", None)[0] == 400
        assert self.ask(hub, "PUT", href, self.CONTENT + b"!", None)[0] == 400
        assert self.ask(hub, "PUT", href.split("?")[0] + "?signature=0", self.CONTENT, None)[0] == 403
        assert self.commit(hub, self.OID, len(self.CONTENT)) == 422
        assert self.ask(hub, "PUT", href, self.CONTENT, None)[0] == 200
        assert "actions" not in self.batch(hub)[1]["objects"][0]
        assert self.commit(hub, self.OID, len(self.CONTENT)) == 200

    def test_verify_knows_what_arrived_and_its_size(self, hub):
        actions = self.batch(hub)[1]["objects"][0]["actions"]
        claim = {"oid": self.OID, "size": len(self.CONTENT)}
        assert self.ask(hub, "POST", actions["verify"]["href"], claim)[0] == 404
        self.ask(hub, "PUT", actions["upload"]["href"], self.CONTENT, None)
        assert self.ask(hub, "POST", actions["verify"]["href"], claim | {"size": 1})[0] == 422
        assert self.ask(hub, "POST", actions["verify"]["href"], claim)[0] == 200

    @pytest.mark.parametrize(
        ("token", "status"), [(None, 401), ("hf_unknown", 401), ("hf_reader", 403), ("hf_other", 403)]
    )
    def test_writing_takes_a_token_with_the_right(self, token, status, hub):
        assert self.batch(hub, token)[0] == status
        assert self.commit(hub, self.OID, len(self.CONTENT), token) == status

    def test_weights_are_not_taken_as_a_regular_file(self, hub):
        value = {"path": "model.safetensors", "content": "AAAA", "encoding": "base64"}
        lines = [{"key": "header", "value": {"summary": "s"}}, {"key": "file", "value": value}]
        content = b"\n".join(json.dumps(line).encode() for line in lines)
        assert self.ask(hub, "POST", "/api/models/me/model/commit/main", content)[0] == 400
