"""What each file of a checkpoint folder is, by its name and by its content."""

import bz2
import gzip
import lzma
import pickle
import zlib

import hypothesis.strategies as st
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from safetensors.torch import save_file

from hf_adafocal.checkpoint_files import check_header, is_log, is_pickle, is_training_state, is_weights

COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zlib": zlib.compress}


class Imports:
    """Unpickled by a call, as the pickles are that run code."""

    def __reduce__(self):
        return print, ("run",)


class TestNames:
    def test_weights_are_what_the_libraries_write_and_look_up(self, tmp_path):
        tiny.bert().save_pretrained(tmp_path / "one")
        tiny.bert().save_pretrained(tmp_path / "shards", max_shard_size="5KB")
        tiny.bert().save_pretrained(tmp_path / "variant", max_shard_size="5KB", variant="fp16")
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert len(written) > 10
        assert {path.name for path in written if not is_weights(path)} == {"config.json"}

    @pytest.mark.parametrize(
        "name", ["pytorch_model.bin", "adapter_model.safetensors", "tf_model.h5", "flax_model.msgpack", "model.onnx"]
    )
    def test_weights_of_other_libraries_are_weights(self, name):
        assert is_weights(name) and is_weights(f"folder/{name}")

    @pytest.mark.parametrize("name", ["teacher.safetensors", "model.py", "my_model.safetensors", "model.json"])
    def test_files_that_no_library_looks_up_are_no_weights(self, name):
        assert not is_weights(name)

    def test_all_that_a_trainer_saves_beside_model_and_config_is_training_state_or_a_log(self, tmp_path):
        pytest.importorskip("tensorboard")
        patch = pytest.MonkeyPatch()
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
        run = tiny.trainer(tmp_path, save_strategy="epoch", report_to="tensorboard")
        run.train()
        patch.undo()
        run.save_model()
        run.save_state()
        paths = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
        unknown = {str(path) for path in paths if not is_training_state(path) and not is_log(path)}
        assert unknown == {"model.safetensors", "config.json"}
        for checkpoint in ("checkpoint-6", "checkpoint-12"):
            inside = [path.relative_to(tmp_path / checkpoint) for path in (tmp_path / checkpoint).iterdir()]
        assert {str(path) for path in inside if not is_training_state(path)} == {"model.safetensors", "config.json"}


class TestCheckHeader:
    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "state.pt"])
    def test_a_file_passes_whole_and_fails_cut_anywhere(self, name, tmp_path):
        tiny.bert().save_pretrained(tmp_path)
        torch.save({"a": torch.zeros(9)}, tmp_path / "state.pt")
        check_header(tmp_path / name)
        content = (tmp_path / name).read_bytes().rstrip()
        for size in (0, 1, len(content) // 2, len(content) - 1):
            (tmp_path / name).write_bytes(content[:size])
            with pytest.raises(ValueError, match=f"{name} cannot be read"):
                check_header(tmp_path / name)

    @pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "absent"}}'])
    def test_an_index_must_name_shards_that_are_there(self, index, tmp_path):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match="index.json cannot be read: it (holds no|names .'absent'., which)"):
            check_header(tmp_path / "model.safetensors.index.json")

    def test_other_files_pass(self, tmp_path):
        (tmp_path / "notes.txt").write_text("anything")
        check_header(tmp_path / "notes.txt")


class TestIsPickle:
    @staticmethod
    def judge(tmp_path, content, name="labels.txt"):
        path = tmp_path / name
        path.write_bytes(content)
        return is_pickle(path)

    @pytest.mark.parametrize("protocol", range(6))
    @pytest.mark.parametrize("value", [["a", "b"], {"a": 1}, 3.5, "text", Imports()], ids=lambda value: str(value)[:9])
    def test_a_pickle_of_any_protocol_is_one(self, value, protocol, tmp_path):
        content = pickle.dumps(value, protocol)
        assert self.judge(tmp_path, content)
        assert self.judge(tmp_path, content, "model.safetensors")
        for compress in COMPRESSORS.values():
            assert self.judge(tmp_path, compress(content))

    @pytest.mark.parametrize("protocol", range(6))
    def test_a_pickle_that_imports_is_one_with_anything_after_it(self, protocol, tmp_path):
        assert self.judge(tmp_path, pickle.dumps(Imports(), protocol) + b"\n\n# notes\n")

    @pytest.mark.parametrize("name", ["a.pkl", "a.PKL", "a.Pickle", "a.pt", "a.bin", "a.joblib"])
    def test_the_suffix_alone_is_enough_in_any_case(self, name, tmp_path):
        assert self.judge(tmp_path, b"anything", name)

    def test_archives_of_torch_and_arrays_of_objects_are_pickles(self, tmp_path):
        torch.save({"a": 1}, tmp_path / "extra.json")
        torch.save({"a": 1}, tmp_path / "old.json", _use_new_zipfile_serialization=False)
        np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
        np.save(tmp_path / "records.npy", np.array([(1, {})], dtype=[("a", int), ("b", object)]), allow_pickle=True)
        np.savez(tmp_path / "objects.npz", a=np.zeros(2), b=np.array([{}], dtype=object))
        np.savez_compressed(tmp_path / "packed.npz", b=np.array([{}], dtype=object))
        files = list(tmp_path.iterdir())
        assert len(files) == 6 and [path.name for path in files if not is_pickle(path)] == []

    def test_numbers_tensors_and_archives_of_text_are_none(self, tmp_path):
        np.save(tmp_path / "numbers.npy", np.zeros((2, 3)))
        np.savez(tmp_path / "numbers.npz", a=np.zeros(2), b=np.ones(1))
        save_file({"a": torch.zeros(1)}, tmp_path / "extra.safetensors", metadata={"filler": ""})
        size = (tmp_path / "extra.safetensors").read_bytes()[0]
        save_file({"a": torch.zeros(1)}, tmp_path / "extra.safetensors", metadata={"filler": "x" * (0x280 - size)})
        assert (tmp_path / "extra.safetensors").read_bytes()[:2] == b"\x80\x02"
        (tmp_path / "notes.txt.gz").write_bytes(gzip.compress(b"notes"))
        (tmp_path / "broken.gz").write_bytes(gzip.compress(b"notes")[:12])
        assert [path.name for path in tmp_path.iterdir() if is_pickle(path)] == []

    @pytest.mark.parametrize("text", ["N.B. notes", "PK", "# Card\n", "[PAD]\n[UNK]\nthe\n", "a: 1\n", "I am.\n"])
    def test_text_is_none(self, text, tmp_path):
        assert not self.judge(tmp_path, text.encode())

    @given(st.text(max_size=60).map(lambda text: "{" + text))
    def test_json_is_none_whatever_is_in_it(self, tmp_path_factory, text):
        assert not self.judge(tmp_path_factory.getbasetemp(), text.encode())
