import io
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from transformers import ViTImageProcessor

from hf_adafocal.data.encoding import encode_images, encode_texts
from hf_adafocal.data.loading import Splits, load_splits
from hf_adafocal.models import train_word_level_tokenizer


def save(folder: Path, **splits: Dataset) -> str:
    """A local data set of parquet files, one a split."""
    folder.mkdir(exist_ok=True)
    for name, dataset in splits.items():
        dataset.to_parquet(str(folder / f"{name}.parquet"))
    return str(folder)


def texts(size: int, start: int = 0, label: str = "label", **columns) -> Dataset:
    rows = {"text": [f"text number {start + index}" for index in range(size)], label: [i % 4 for i in range(size)]}
    return Dataset.from_dict({**rows, **columns})


def contents(part: Dataset) -> set:
    return set(part["text"])


class TestDigits:
    def test_the_default_is_the_embedded_digits_in_three_disjoint_parts(self):
        splits = load_splits()
        assert [len(part) for part in splits[:3]] == [400, 400, 997] and splits.ood is None
        assert splits.label_names == [str(digit) for digit in range(10)]
        pixels = [np.stack([np.asarray(image) for image in part["image"]]) for part in splits[:3]]
        original = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
        together = np.concatenate(pixels).reshape(1797, -1)
        assert sorted(map(bytes, together)) == sorted(map(bytes, original.reshape(1797, -1)))

    def test_each_part_has_the_classes_in_the_same_shares(self):
        splits = load_splits()
        whole = np.bincount(load_digits().target) / 1797
        for part in splits[:3]:
            np.testing.assert_allclose(np.bincount(part["label"][:]) / len(part), whole, atol=0.01)

    def test_one_seed_gives_one_split_and_another_seed_another(self):
        first, again, other = (load_splits(seed=seed).test["label"][:] for seed in (3, 3, 4))
        assert first == again != other


class TestLocalFolder:
    def test_its_own_test_split_is_kept_and_calibration_comes_from_train(self, tmp_path):
        path = save(tmp_path / "d", train=texts(80), test=texts(20, start=1000))
        splits = load_splits(path, calibration_fraction=0.25)
        assert contents(splits.test) == contents(texts(20, start=1000))
        assert not contents(splits.train) & contents(splits.calibration)
        assert contents(splits.train) | contents(splits.calibration) == contents(texts(80))
        assert np.bincount(splits.calibration["label"][:]).tolist() == [5, 5, 5, 5]

    def test_a_free_validation_split_is_the_calibration_split(self, tmp_path):
        path = save(tmp_path / "d", train=texts(80), validation=texts(12, start=500), test=texts(20, start=1000))
        splits = load_splits(path)
        assert contents(splits.calibration) == contents(texts(12, start=500)) and len(splits.train) == 80

    def test_a_test_split_with_hidden_labels_is_replaced_by_validation(self, tmp_path):
        hidden = texts(20, start=1000).remove_columns("label").add_column("label", [-1] * 20)
        path = save(tmp_path / "d", train=texts(80), validation=texts(12, start=500), test=hidden)
        splits = load_splits(path)
        assert contents(splits.test) == contents(texts(12, start=500))
        assert len(splits.train) + len(splits.calibration) == 80

    def test_integer_labels_get_the_names_that_stand_beside_them(self, tmp_path):
        names = ["north", "east", "south", "west"]
        path = save(tmp_path / "d", train=texts(40, label_text=[names[i % 4] for i in range(40)]))
        assert load_splits(path).label_names == names

    def test_string_labels_become_classes_in_alphabetical_order(self, tmp_path):
        data = texts(40).remove_columns("label").add_column("label", ["b", "a"] * 20)
        splits = load_splits(save(tmp_path / "d", train=data))
        assert splits.label_names == ["a", "b"]
        by_text = dict(zip(data["text"], data["label"], strict=True))
        for row in splits.test:
            assert splits.label_names[row["label"]] == by_text[row["text"]]

    def test_columns_can_be_named(self, tmp_path):
        notes = [f"note {index}" for index in range(40)]
        data = texts(40, label="topic", note=notes)
        with pytest.raises(ValueError, match="Cannot tell the label among the columns.*pass label_column"):
            load_splits(save(tmp_path / "d", train=data))
        splits = load_splits(save(tmp_path / "d", train=data), label_column="topic", input_column="note")
        assert set(splits.train.column_names) == {"text", "label"} and set(splits.train["text"]) < set(notes)

    def test_an_unknown_column_is_an_error_that_lists_the_columns(self, tmp_path):
        with pytest.raises(ValueError, match=r"no column 'body'; the data set has \['label', 'text'\]"):
            load_splits(save(tmp_path / "d", train=texts(40)), input_column="body")

    def test_several_texts_without_a_known_name_must_be_chosen(self, tmp_path):
        data = Dataset.from_dict({"title": ["a"] * 8, "body": ["b"] * 8, "label": [0, 1] * 4})
        with pytest.raises(ValueError, match="Cannot tell the input.*pass input_column"):
            load_splits(save(tmp_path / "d", train=data))

    def test_fewer_training_samples_than_classes_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match="max_train_samples=3 is fewer than the 4 classes of train"):
            load_splits(save(tmp_path / "d", train=texts(80)), max_train_samples=3)

    def test_without_a_train_split_it_says_which_splits_there_are(self, tmp_path):
        with pytest.raises(ValueError, match=r"needs a split 'train', found \['test'\]"):
            load_splits(save(tmp_path / "d", test=texts(8)))

    def test_the_only_sample_of_a_class_stays_in_train(self, tmp_path):
        data = Dataset.from_dict({"text": [f"text {index}" for index in range(20)], "label": [0] * 19 + [1]})
        path = save(tmp_path / "d", train=data)
        assert all(1 in load_splits(path, seed=seed).train["label"][:] for seed in range(5))

    def test_fewer_training_samples_leave_calibration_and_test_whole(self, tmp_path):
        path = save(tmp_path / "d", train=texts(400))
        whole, small = load_splits(path), load_splits(path, max_train_samples=40)
        assert (len(whole.train), len(small.train)) == (288, 40)
        assert contents(whole.calibration) == contents(small.calibration)
        assert contents(whole.test) == contents(small.test)
        assert np.bincount(small.train["label"][:]).tolist() == [10, 10, 10, 10]

    def test_images_under_another_name_are_found_by_their_type(self, tmp_path):
        images = [PILImage.fromarray(np.full((4, 4, 3), index, np.uint8)) for index in range(40)]
        features = Features({"img": Image(), "label": ClassLabel(names=["x", "y"])})
        data = Dataset.from_dict({"img": images, "label": [0, 1] * 20}, features=features)
        splits = load_splits(save(tmp_path / "d", train=data))
        assert splits.train.column_names == ["image", "label"] and splits.label_names == ["x", "y"]

    def test_out_of_distribution_inputs_come_without_labels(self, tmp_path):
        path, other = save(tmp_path / "d", train=texts(40)), save(tmp_path / "o", test=texts(5, start=900))
        splits = load_splits(path, ood=other)
        assert splits.ood.column_names == ["text"] and contents(splits.ood) == contents(texts(5, start=900))
        with pytest.raises(ValueError, match="must be of the kind 'image', found 'text'"):
            load_splits("digits", ood=other)

    def test_noise_is_the_test_images_under_gaussian_noise_that_a_seed_repeats(self):
        splits, again, other = (load_splits("digits", ood="noise", seed=seed) for seed in (0, 0, 1))
        assert splits.ood.column_names == ["image"] and len(splits.ood) == len(splits.test)
        pairs = [
            (np.asarray(a["image"], float), np.asarray(b["image"], float)) for a, b in zip(*splits[2:], strict=True)
        ]
        grey = np.concatenate([(noisy - clean)[(clean > 100) & (clean < 150)] for clean, noisy in pairs])
        assert grey.std() == pytest.approx(25.5, rel=0.05) and abs(grey.mean()) < 1  # clipped nowhere near
        first = [np.asarray(part.ood[0]["image"]) for part in (splits, again, other)]
        assert (first[0] == first[1]).all() and (first[0] != first[2]).any()
        assert len({(noisy - clean).tobytes() for clean, noisy in pairs}) == len(pairs)  # drawn anew for each

    def test_noise_is_not_for_texts(self, tmp_path):
        with pytest.raises(ValueError, match="ood='noise' is for images; of texts name a data set"):
            load_splits(save(tmp_path / "d", train=texts(40)), ood="noise")

    def test_without_a_network_one_line_says_what_to_do(self, monkeypatch):
        def offline(path):
            raise ConnectionError("Couldn't reach the Hub.")

        monkeypatch.setattr("hf_adafocal.data.loading.load_dataset", offline)
        with pytest.raises(OSError, match="'SetFit/20_newsgroups' cannot be loaded: Couldn't reach.*--dataset FOLDER"):
            load_splits("20_newsgroups")

    def test_a_file_is_told_from_the_folder_that_is_wanted(self, tmp_path):
        (tmp_path / "rows.csv").write_text("text,label\na,0\n")
        with pytest.raises(ValueError, match="rows.csv' is a file: name the folder"):
            load_splits(str(tmp_path / "rows.csv"))

    def test_files_that_cannot_be_read_are_a_value_error(self, tmp_path):
        (tmp_path / "train.parquet").write_bytes(b"no parquet")
        with pytest.raises(ValueError, match="cannot be read"):
            load_splits(str(tmp_path))

    def test_a_hub_id_goes_to_the_hub(self, monkeypatch):
        asked = []
        answer = DatasetDict(train=texts(40))
        monkeypatch.setattr("hf_adafocal.data.loading.load_dataset", lambda path: asked.append(path) or answer)
        load_splits("20_newsgroups")
        load_splits("someone/something")
        assert asked == ["SetFit/20_newsgroups", "someone/something"]


class TestRealData:
    def test_20_newsgroups_keeps_empty_texts_and_the_split_by_date(self, real_data):
        splits = load_splits(str(real_data / "20_newsgroups"), ood=str(real_data / "reuters_r8"))
        assert [len(part) for part in splits] == [212, 22, 120, 100]  # 4 and 2 stand in a later split too
        assert splits.label_names[0] == "alt.atheism" and splits.label_names[-1] == "talk.religion.misc"
        assert sum(not text.strip() for text in splits.test["text"]) == 8

    def test_cifar10_is_found_by_the_type_of_its_columns(self, real_data):
        splits = load_splits(str(real_data / "cifar10"))
        assert [len(part) for part in splits[:3]] == [180, 20, 100]
        assert np.bincount(splits.calibration["label"][:]).tolist() == [2] * 10
        assert splits.test[0]["image"].size == (32, 32)


class TestEncodeTexts:
    def test_texts_become_truncated_ids_and_labels(self, tmp_path):
        data = Dataset.from_dict({"text": [f"word{i} and more" for i in range(40)], "label": [0, 1] * 20})
        splits = load_splits(save(tmp_path / "d", train=data))
        tokenizer = train_word_level_tokenizer(2 * data["text"][:], 100, max_length=3)
        encoded = encode_texts(splits, tokenizer)
        assert set(encoded.train.column_names) == {"labels", "input_ids", "attention_mask"}
        kept = splits.train[0]["text"].removesuffix(" more")
        assert encoded.train[0]["input_ids"] == tokenizer(kept)["input_ids"] and len(kept.split()) == 2
        assert encoded.test["labels"][:] == splits.test["label"][:]

    def test_out_of_distribution_texts_need_no_labels(self, tmp_path):
        path = save(tmp_path / "d", train=texts(40))
        splits = load_splits(path, ood=path)
        encoded = encode_texts(splits, train_word_level_tokenizer(2 * texts(40)["text"][:], 100))
        assert set(encoded.ood.column_names) == {"input_ids", "attention_mask"}


class TestEncodeImages:
    processor = ViTImageProcessor(size={"height": 8, "width": 8})

    def dot(self) -> Splits:
        """One bright pixel in the middle, in every image."""
        pixels = np.zeros((8, 8), np.uint8)
        pixels[4, 4] = 255
        features = Features({"image": Image(), "label": Value("int64")})
        data = Dataset.from_dict({"image": [PILImage.fromarray(pixels)] * 64, "label": [0] * 64}, features=features)
        return Splits(data, data, data)

    def places(self, part: Dataset) -> set[tuple[int, int]]:
        images = torch.stack(list(part[:]["pixel_values"]))[:, 0]
        return {divmod(int(image.argmax()), 8) for image in images}

    def test_training_images_alone_are_shifted_by_up_to_the_share_asked_for(self):
        torch.manual_seed(0)
        encoded = encode_images(self.dot(), self.processor, random_shift=0.125)
        assert self.places(encoded.train) == {(4 + down, 4 + right) for down in (-1, 0, 1) for right in (-1, 0, 1)}
        assert self.places(encoded.calibration) == self.places(encoded.test) == {(4, 4)}

    def test_training_images_alone_are_mirrored_half_of_the_time(self):
        torch.manual_seed(0)
        encoded = encode_images(self.dot(), self.processor, horizontal_flip=True)
        assert self.places(encoded.train) == {(4, 4), (4, 3)}
        assert self.places(encoded.test) == {(4, 4)}

    def test_grey_images_get_three_channels_and_labels_their_plural(self):
        row = encode_images(self.dot(), self.processor).train[:2]
        assert row["pixel_values"].shape == (2, 3, 8, 8) and row["labels"] == [0, 0]

    def test_encoding_survives_a_pickle_for_worker_processes(self):
        import pickle

        encoded = encode_images(self.dot(), self.processor, random_shift=0.125)
        copy = pickle.loads(pickle.dumps(encoded.test))
        assert torch.equal(copy[0]["pixel_values"], encoded.test[0]["pixel_values"])


def test_images_are_read_from_real_encoded_bytes():
    image = load_splits().train.with_format(None)[0]["image"]
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert image.mode == "L" and image.size == (8, 8) and buffer.tell() > 0
