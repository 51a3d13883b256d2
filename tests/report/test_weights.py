"""The hash that ties a report to the weights it describes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import bert
from transformers import BertForMaskedLM

from hf_adafocal.report.weights import weights_hash


@pytest.fixture
def folder(tmp_path):
    bert().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class TestWeightsHash:
    def test_the_hash_of_a_folder_is_that_of_the_state_dict_saved_there(self, folder):
        assert weights_hash(folder) == weights_hash(bert().state_dict()) == weights_hash(str(folder))
        assert weights_hash(folder) == weights_hash(bert())

    def test_neither_shards_nor_other_files_count(self, folder, tmp_path):
        bert().save_pretrained(tmp_path / "shards", max_shard_size="3KB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
        (folder / "README.md").write_text("words")
        assert weights_hash(folder) == weights_hash(tmp_path / "shards")

    @pytest.mark.parametrize("change", ["value", "dtype", "shape"])
    def test_any_change_of_a_tensor_changes_it(self, folder, change):
        before = weights_hash(folder)
        tensors = load_file(folder / "model.safetensors")
        tensor = tensors.pop("classifier.weight")
        changed = {"value": tensor.clone(), "dtype": tensor.half(), "shape": tensor.reshape(-1)}[change]
        if change == "value":
            changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(9.0))
        save_file({**tensors, "classifier.weight": changed}, folder / "model.safetensors")
        assert weights_hash(folder) != before

    def test_half_precision_and_empty_tensors_are_hashed_alike_in_both_forms(self, tmp_path):
        tensors = {"a": torch.randn(3).bfloat16(), "b": torch.zeros(0, 2), "c": torch.tensor(True)}
        save_file(tensors, tmp_path / "model.safetensors")
        assert weights_hash(tmp_path) == weights_hash(tensors)

    def test_a_model_with_tied_weights_has_the_hash_of_its_folder(self, tmp_path):
        model = BertForMaskedLM(bert().config)
        model.save_pretrained(tmp_path)
        assert "cls.predictions.decoder.weight" not in load_file(tmp_path / "model.safetensors")
        assert weights_hash(model) == weights_hash(tmp_path)

    def test_of_a_peft_model_the_adapter_counts(self, tmp_path):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
        model.save_pretrained(tmp_path)
        assert weights_hash(model) == weights_hash(tmp_path)

    def test_an_adapter_counts_beside_the_model(self, folder):
        before = weights_hash(folder)
        save_file({"lora": torch.ones(2)}, folder / "adapter_model.safetensors")
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
