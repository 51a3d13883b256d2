"""Only what a checkpoint folder holds may be uploaded, whatever lies there under whatever name."""

import gzip
import io
import json
import lzma
import os
import pickle
import shutil

import hypothesis.strategies as st
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

import hf_adafocal.models  # noqa: F401 (the Auto classes learn the CNN)
from hf_adafocal.upload_selection import custom_code, select_files

CHECKPOINT = {"config.json", "model.safetensors"}
# Made of parts, so that no scanner of repositories takes this file for a leak.
OTHERS = {
    "hub": "hf" + "_" + "aB3" * 12,
    "github": "ghp" + "_" + "aB3" * 13,
    "aws": "AKIA" + "ABCDEFGH12345678",
    "openai": "sk" + "-proj-" + "aB3" * 12,
    "slack": "xoxb" + "-1234567890-abcdef",
    "key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----\nabc",
}


def picture(format="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, format)
    return file.getvalue()


def array(content):
    file = io.BytesIO()
    np.save(file, content, allow_pickle=True)
    return file.getvalue()


def archive(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


HARM = {"a": [1, "b"]}
HOSTILE = {
    "weights.PKL": pickle.dumps(HARM),
    "labels.txt": pickle.dumps(HARM, 0),
    "notes.md": pickle.dumps(HARM, 4),
    "teacher.safetensors": pickle.dumps(HARM),
    "extra.json": archive(HARM),
    "objects.npy": array(np.array([HARM], dtype=object)),
    "samples.npy": array(np.arange(3.0)),
    "labels.txt.gz": gzip.compress(pickle.dumps(HARM)),
    "labels.xz": lzma.compress(pickle.dumps(HARM)),
    "vectorizer.joblib": b"anything",
    "model.ckpt": b"anything",
    "pytorch_model.bin": archive(HARM),
    "pytorch_model.bin.index.json": b"{}",
    "training_args.bin": archive(HARM),
    "events.out.tfevents.1.host": b"events",
    "env": b"SECRET=1",
    ".env": b"SECRET=1",
    ".netrc": b"machine huggingface.co password x",
    ".git/config": b"[remote]",
    ".git-credentials": b"https://me:secret@huggingface.co",
    ".cache/huggingface/token": OTHERS["hub"].encode(),
    "id_rsa": OTHERS["key"].encode(),
    "server.pem": OTHERS["key"].encode(),
    "credentials.json": json.dumps({"key": OTHERS["aws"]}).encode(),
    "token": OTHERS["hub"].encode(),
    "service_account.json": b'{"private_key_id": "1"}',
    "wandb/settings": OTHERS["openai"].encode(),
    "train.csv": b"text,label\nprivate,1\n",
    "predictions.parquet": b"PAR1",
    "run.sh": f"HF_TOKEN={OTHERS['hub']} python train.py".encode(),
    "helpers.py": b"import os\n",
    "nohup.out": b"/home/me/project",
    "checkpoint-3/id_rsa": OTHERS["key"].encode(),
    "config.json.bak": b"{}",
    "model.safetensors.tmp": b"\0" * 8,
    "sub/config.json": b"{}",
    "odd\nname": b"",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny.bert().save_pretrained(folder)
    return folder


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def write(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


class TestHostileFiles:
    def test_none_of_them_is_chosen_and_each_is_named_with_a_reason(self, run):
        write(run, HOSTILE)
        files, left_out = select_files(run)
        assert len(HOSTILE) > 30
        assert set(files) == CHECKPOINT
        assert set(left_out) == {path.replace("\n", "\\n") for path in HOSTILE}
        pickles = "weights.PKL labels.txt notes.md teacher.safetensors extra.json objects.npy labels.txt.gz labels.xz"
        assert {left_out[path] for path in pickles.split()} == {"pickle"}
        reasons = {path: left_out[path] for path in ("pytorch_model.bin", ".env", "id_rsa", "checkpoint-3/id_rsa")}
        assert reasons == {
            "pytorch_model.bin": "pickled weights",
            ".env": "hidden",
            "id_rsa": "not part of a checkpoint",
            "checkpoint-3/id_rsa": "training state",
        }

    def test_asking_for_training_state_lets_none_of_them_through_but_the_state(self, run):
        write(run, HOSTILE)
        files, _ = select_files(run, training_state=True)
        assert set(files) == CHECKPOINT | {"training_args.bin", "events.out.tfevents.1.host"}

    @pytest.mark.parametrize("name", ["config.json", "vocab.txt", "README.md", "reliability.png", "tokenizer.model"])
    @pytest.mark.parametrize("content", HOSTILE)
    def test_under_a_name_of_the_allow_list_it_is_refused_or_harmless(self, name, content, run):
        write(run, {name: HOSTILE[content]})
        harmless = {"README.md": str.isascii, "vocab.txt": str.isascii, "config.json": lambda text: text[:1] == "{"}
        try:
            files, _ = select_files(run)
        except ValueError as error:
            assert str(run / name) in str(error)
        else:
            text = files[name].read_bytes().decode()
            assert harmless[name](text) and not any(secret in text for secret in OTHERS.values())
            with pytest.raises(Exception):  # noqa: B017 (anything but success)
                pickle.loads(text.encode())

    @pytest.mark.parametrize("secret", OTHERS)
    @pytest.mark.parametrize("name", ["README.md", "config.json", "tokenizer.json", "vocab.txt", "report.json"])
    def test_a_token_of_anybody_in_an_allowed_file_is_refused_and_not_repeated(self, secret, name, run):
        text = f"see {OTHERS[secret]} here"
        write(run, {name: json.dumps({"note": text}).encode() if name.endswith("json") else text.encode()})
        with pytest.raises(
            ValueError, match=f"{name} holds what looks like an access token or a private key"
        ) as caught:
            select_files(run)
        assert OTHERS[secret] not in str(caught.value)

    def test_a_token_in_the_metadata_of_the_weights_is_refused(self, run):
        save_file({"a": torch.zeros(2)}, run / "model.safetensors", metadata={"by": OTHERS["hub"]})
        with pytest.raises(ValueError, match="model.safetensors holds what looks like an access token"):
            select_files(run)

    def test_a_pickle_in_place_of_the_weights_is_refused(self, run):
        write(run, {"model.safetensors": pickle.dumps(HARM)})
        with pytest.raises(ValueError, match="model.safetensors cannot be read"):
            select_files(run)


class TestLinks:
    @pytest.mark.parametrize("name", ["README.md", "LICENSE", "vocab.txt", "anything"])
    def test_a_link_that_leads_outside_is_never_followed(self, name, run, tmp_path):
        (tmp_path / name).write_text("private")
        (run / name).symlink_to(tmp_path / name)
        for include in ((), ["*"]):
            files, left_out = select_files(run, include=include)
            assert set(files) == CHECKPOINT and left_out == {name: "a link that leads out of the folder"}

    def test_a_folder_outside_is_not_entered(self, run, tmp_path):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "adapter_config.json").write_text("{}")
        (run / "adapter").symlink_to(tmp_path / "other")
        assert select_files(run) == ({path: run / path for path in CHECKPOINT}, {
            "adapter": "a link that leads out of the folder"
        })  # fmt: skip

    def test_a_chain_of_links_and_a_parent_are_outside_too(self, run, tmp_path):
        (tmp_path / "LICENSE").write_text("private")
        (tmp_path / "second").symlink_to(tmp_path / "LICENSE")
        (run / "LICENSE").symlink_to("../second")
        (run / "NOTICE").symlink_to("../run-2/NOTICE")
        (tmp_path / "run-2").mkdir()
        (tmp_path / "run-2" / "NOTICE").write_text("of another run")
        assert set(select_files(run).left_out.values()) == {"a link that leads out of the folder"}

    def test_a_link_within_the_folder_counts_as_the_file_of_its_name(self, run):
        (run / "checkpoint-3").mkdir()
        (run / "model.safetensors").rename(run / "checkpoint-3" / "model.safetensors")
        (run / "model.safetensors").symlink_to("checkpoint-3/model.safetensors")
        assert set(select_files(run).files) == CHECKPOINT

    def test_a_link_within_the_folder_gives_no_other_name_to_a_file(self, run):
        write(run, {".env": b"SECRET=1"})
        (run / "LICENSE").symlink_to(".env")
        (run / "NOTICE").symlink_to("nothing")
        left_out = select_files(run).left_out
        assert left_out["LICENSE"] == "a link to a file of another name"
        assert left_out["NOTICE"] == "a link to a folder, or to nothing"

    def test_a_folder_that_is_a_link_itself_is_taken_as_where_it_leads(self, run, tmp_path):
        (tmp_path / "latest").symlink_to(run)
        assert set(select_files(tmp_path / "latest").files) == CHECKPOINT

    def test_a_pipe_is_not_waited_for(self, run):
        os.mkfifo(run / "README.md")
        assert select_files(run).left_out == {"README.md": "not a regular file"}


class TestAllowed:
    def test_what_presents_a_checkpoint_is_allowed(self, run):
        shown = {
            "README.md": b"# Card\n![a](reliability.png)\n![b](pictures/curve.jpeg)\n<img src='./wide.webp'>\n",
            "LICENSE": b"text",
            "NOTICE.txt": b"text",
            "report.json": b'{"test": 1}',
            "reliability.png": picture(),
            "gamma.png": picture(),
            "pictures/curve.jpeg": picture("JPEG"),
            "wide.webp": picture("WEBP"),
            ".eval_results/newsgroups.yaml": b"- dataset: {id: a/b}\n  value: 0.5\n",
        }
        write(run, shown)
        write(run, {"unseen.png": picture()})
        files, left_out = select_files(run)
        assert set(files) == CHECKPOINT | set(shown) and left_out == {"unseen.png": "not part of a checkpoint"}

    def test_tokenizer_files_are_allowed(self, run):
        pieces = b"\x0a\x03\x0a\x01a" * 3
        write(run, {"vocab.txt": b"[PAD]\nthe\n", "merges.txt": b"a b\n", "chat_template.jinja": b"{{ x }}"})
        write(run, {"spiece.model": pieces, "sentencepiece.bpe.model": pieces, "vocab.json": b'{"a": 1}'})
        assert len(select_files(run).files) == 8

    @pytest.mark.parametrize("name", ["README.md", "reliability.png", ".eval_results/a.yaml", "spiece.model"])
    @pytest.mark.parametrize("content", [b"\xff\xfe\0", b"\0\0\0\0", b"\x0a\xff\xff\xff\xff\xff", b"\x80\x04."])
    def test_with_another_content_it_is_an_error_that_names_the_file(self, name, content, run):
        write(run, {name: content})
        with pytest.raises(ValueError, match="cannot be read: .*Save the run again before it is pushed"):
            select_files(run)

    @given(content=st.binary(max_size=40))
    def test_no_content_of_a_tokenizer_model_breaks_the_check(self, content, saved, tmp_path_factory):
        folder = tmp_path_factory.mktemp("run")
        write(folder, {"config.json": b"{}", "spiece.model": content})
        try:
            assert set(select_files(folder).files) == {"config.json", "spiece.model"}
        except ValueError as error:
            assert "spiece.model cannot be read" in str(error)

    def test_custom_code_that_auto_map_names_is_allowed_with_what_it_imports(self, tmp_path):
        config = AutoConfig.for_model("global_pooling_cnn")
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
        modules = custom_code(tmp_path)
        assert modules and set(modules) <= set(select_files(tmp_path).files)
        write(
            tmp_path,
            {"models.py": b"from .layers import A\nfrom . import pool\n", "layers.py": b"from .deep import B"},
        )
        write(tmp_path, {"pool.py": b"", "deep.py": b"from .models import C\n", "other.py": b""})
        assert custom_code(tmp_path) == ["deep.py", "layers.py", "models.py", "pool.py"]
        assert select_files(tmp_path).left_out == {"other.py": "not part of a checkpoint"}

    @pytest.mark.parametrize("auto_map", ["text", {"A": 3}, {"A": ["x.Y", None]}, {"A": "me/repo--module.A"}, None])
    def test_an_odd_auto_map_names_no_code(self, auto_map, run):
        write(run, {"config.json": json.dumps({"auto_map": auto_map}).encode(), "module.py": b""})
        assert custom_code(run) == []

    def test_further_adapters_of_peft_are_allowed(self, run):
        write(run, {"second/adapter_config.json": b"{}"})
        save_file({"a": torch.zeros(1)}, run / "second" / "adapter_model.safetensors")
        assert set(select_files(run).files) == CHECKPOINT | {
            "second/adapter_config.json",
            "second/adapter_model.safetensors",
        }

    def test_a_missing_folder_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="found no folder at"):
            select_files(tmp_path / "nowhere")


class TestInclude:
    def test_a_pattern_names_a_file_a_suffix_or_a_folder(self, run):
        write(run, {"onnx/model.onnx": b"onnx", "onnx/a.txt": b"a", "train.csv": b"a,b", "other.csv": b"a", "x": b""})
        chosen = set(select_files(run, include=["onnx/*", "train.csv"]).files) - CHECKPOINT
        assert chosen == {"onnx/model.onnx", "onnx/a.txt", "train.csv"}
        assert set(select_files(run, include=["*.csv"]).files) - CHECKPOINT == {"train.csv", "other.csv"}

    def test_a_star_does_not_name_hidden_files_but_their_own_pattern_does(self, run):
        write(run, {".env": b"", "a/.hidden": b"", ".github/labels.txt": b"", "plain": b""})
        assert set(select_files(run, include=["*"]).files) - CHECKPOINT == {"plain"}
        assert ".github/labels.txt" in select_files(run, include=[".github/*"]).files

    def test_a_pickle_is_included_under_a_name_that_says_so_alone(self, run):
        write(run, {"labels.txt": pickle.dumps(HARM), "vectorizer.pkl": pickle.dumps(HARM)})
        files, left_out = select_files(run, include=["labels.txt", "*.pkl"])
        assert "vectorizer.pkl" in files and left_out == {"labels.txt": "pickle"}

    def test_an_included_file_must_not_hold_a_token(self, run):
        write(run, {"run.sh": HOSTILE["run.sh"]})
        with pytest.raises(ValueError, match="run.sh holds what looks like an access token"):
            select_files(run, include=["*.sh"])

    def test_a_pattern_that_matches_nothing_is_an_error(self, run):
        with pytest.raises(ValueError, match="matches '..onx'. Check the patterns"):
            select_files(run, include=["*.onx"])


def test_training_state_of_every_launcher_is_state(run):
    state = "checkpoint-9/optimizer.pt checkpoint-9/rng_state_0.pth checkpoint-9/trainer_state.json trainer_state.json"
    sharded = "checkpoint-9/global_step9/mp_rank_00_model_states.pt checkpoint-9/pytorch_model_fsdp_0/__0_0.distcp"
    paths = {
        *state.split(),
        *sharded.split(),
        "checkpoint-9/pytorch_model_fsdp_0/.metadata",
        "runs/a/events.out.tfevents",
    }
    write(run, dict.fromkeys(paths, b"state"))
    write(run, {"checkpoint-9/config.json": b"{}", "checkpoint-9/notes": b""})
    assert set(select_files(run, training_state=True).files) == CHECKPOINT | paths | {"checkpoint-9/config.json"}
    assert set(select_files(run).files) == CHECKPOINT
