"""The hash that ties a report to the weights it describes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import bert

from hf_adafocal.report.weights import weights_hash


@pytest.fixture
def folder(tmp_path):
    bert().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class TestWeightsHash:
    def test_the_hash_of_a_folder_is_that_of_the_state_dict_saved_there(self, folder):
        assert weights_hash(folder) == weights_hash(bert().state_dict()) == weights_hash(str(folder))

    def test_neither_shards_nor_other_files_count(self, folder, tmp_path):
        bert().save_pretrained(tmp_path / "shards", max_shard_size="3KB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
        (folder / "README.md").write_text("words")
        assert weights_hash(folder) == weights_hash(tmp_path / "shards")

    @pytest.mark.parametrize("change", ["value", "name", "dtype", "shape"])
    def test_any_change_of_a_tensor_changes_it(self, folder, change):
        before = weights_hash(folder)
        tensors = load_file(folder / "model.safetensors")
        tensor = tensors.pop("classifier.weight")
        name = "other.weight" if change == "name" else "classifier.weight"
        changed = {"value": tensor.clone(), "dtype": tensor.half(), "shape": tensor.reshape(-1)}.get(change, tensor)
        if change == "value":
            changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(9.0))
        save_file({**tensors, name: changed}, folder / "model.safetensors")
        assert weights_hash(folder) != before

    def test_half_precision_and_empty_tensors_are_hashed_alike_in_both_forms(self, tmp_path):
        tensors = {"a": torch.randn(3).bfloat16(), "b": torch.zeros(0, 2), "c": torch.tensor(True)}
        save_file(tensors, tmp_path / "model.safetensors")
        assert weights_hash(tmp_path) == weights_hash(tensors)

    def test_an_adapter_counts_beside_the_model(self, folder):
        before = weights_hash(folder)
        shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
        assert weights_hash(folder) not in (before, None)

    def test_a_folder_without_weights_has_none(self, tmp_path):
        assert weights_hash(tmp_path) is None

    def test_pickled_weights_are_hashed_as_files(self, tmp_path):
        torch.save(bert().state_dict(), tmp_path / "pytorch_model.bin")
        assert len(weights_hash(tmp_path)) == 32

    @pytest.mark.parametrize("damage", ["empty", "cut", "header", "offsets"])
    def test_a_damaged_file_is_an_error_that_names_it(self, folder, damage):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        header = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
        path.write_bytes(
            {
                "empty": b"",
                "cut": content[:100],
                "header": content[:8] + b"x" * 50 + content[58:],
                "offsets": len(header).to_bytes(8, "little") + header,
            }[damage]
        )
        with pytest.raises(ValueError, match="model.safetensors cannot be read"):
            weights_hash(folder)
