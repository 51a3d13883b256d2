"""Labels that are no classes of the model are an error before the first step, which names label and set."""

import logging

import numpy as np
import pytest
import tiny
import torch
from datasets import Array2D, ClassLabel, Dataset, Features, IterableDataset, Sequence, Value
from torch.utils.data import StackDataset
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from hf_adafocal import AdaFocalTrainer
from hf_adafocal.training.label_checks import check_labels


def rows(labels, seed=0, feature=None) -> Dataset:
    """24 rows that repeat the labels; rows of two seeds differ."""
    tokens = np.random.default_rng(seed).integers(1, tiny.VOCABULARY, (24, 9))
    features = Features({"input_ids": Sequence(Value("int64")), "labels": feature or Value("int64")})
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": (labels * 24)[:24]}, features=features)


TRAIN = rows([0, 1, 2])

CONTAINERS = {
    "arrow": lambda data: data,
    "torch": lambda data: data.with_format("torch"),
    "shuffled": lambda data: data.shuffle(seed=1),
    "list": list,
    "tensors": lambda data: StackDataset(**{name: torch.tensor(data[name][:]) for name in data.column_names}),
}


class OwnRows(torch.utils.data.Dataset):
    """Rows that only an index gives."""

    def __init__(self, data):
        self.data = list(data)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


@pytest.fixture
def warnings(caplog):
    logging.getLogger("transformers").propagate = True
    caplog.set_level("WARNING")
    return caplog


class TestRange:
    @pytest.mark.parametrize("container", CONTAINERS)
    @pytest.mark.parametrize("loss", ["adafocal", "cross_entropy"])
    def test_a_label_beyond_the_models_classes_is_an_error_that_names_label_and_set(self, tmp_path, container, loss):
        held_out = CONTAINERS[container](rows([0, 1, 2, 3], seed=1))
        message = r"The evaluation set has labels that are no classes of the model \(0 to 2\): 3 \(6 rows\)"
        with pytest.raises(ValueError, match=message):
            tiny.trainer(tmp_path, train_dataset=TRAIN, eval_dataset=held_out, loss=loss)

    def test_each_set_is_called_by_its_name(self, tmp_path):
        good, bad = rows([0, 1, 2], seed=1), rows([0, 5], seed=2)
        with pytest.raises(ValueError, match=r"The training set has labels .*: 5 \(12 rows\)"):
            tiny.trainer(tmp_path, train_dataset=bad, eval_dataset=good)
        with pytest.raises(ValueError, match=r"The calibration set has labels"):
            tiny.trainer(tmp_path, train_dataset=TRAIN, eval_dataset=good, calibration_dataset=bad)
        with pytest.raises(ValueError, match=r"The last set has labels"):
            tiny.trainer(tmp_path, train_dataset=TRAIN, eval_dataset={"calibration": good, "last": bad})

    @pytest.mark.parametrize("part", ["train_dataset", "eval_dataset"])
    def test_minus_one_is_no_label(self, tmp_path, part):
        sets = {"train_dataset": TRAIN, "eval_dataset": rows([0, 1, 2], seed=1), part: rows([0, 1, 2, -1], seed=2)}
        with pytest.raises(ValueError, match=r"-1 \(6 rows\)\. Drop what has no label, or label it -100"):
            tiny.trainer(tmp_path, **sets)

    def test_a_missing_label_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match=r"6 labels in the column 'labels' are missing \(None\)"):
            tiny.trainer(tmp_path, train_dataset=TRAIN, eval_dataset=rows([0, 1, 2, None], seed=1))

    def test_the_ignored_label_is_none_of_them(self, tmp_path):
        tiny.trainer(tmp_path, train_dataset=TRAIN, eval_dataset=rows([0, 1, 2, -100], seed=1)).train()

    def test_labels_of_tokens_are_looked_at_one_by_one(self, tmp_path):
        model = type("TaggerForTokenClassification", (torch.nn.Module,), {})()
        model.config = tiny.bert().config
        good = rows([[0, 1, -100], [2]], feature=Sequence(Value("int64")))
        bad = rows([[0, 1, -100], [7]], seed=1, feature=Sequence(Value("int64")))
        check_labels({"training": good}, model)
        with pytest.raises(ValueError, match=r"The evaluation set has labels .* \(0 to 2\): 7\."):
            check_labels({"training": good, "evaluation": bad}, model)
        pixels = Features({"labels": Array2D((2, 2), "int64")})
        masks = Dataset.from_dict({"labels": [[[0, 3], [1, 2]]]}, features=pixels)
        with pytest.raises(ValueError, match=r"The training set has labels .* \(0 to 2\): 3\."):
            check_labels({"training": masks}, model)

    @pytest.mark.parametrize("loss", ["adafocal", "cross_entropy"])
    @pytest.mark.parametrize("part", ["train_dataset", "eval_dataset"])
    def test_rows_of_ones_own_are_checked_batch_by_batch(self, tmp_path, loss, part):
        sets = {"train_dataset": TRAIN, "eval_dataset": rows([0, 1, 2], seed=1), part: OwnRows(rows([0, 4], seed=2))}
        run = tiny.trainer(tmp_path, loss=loss, **sets, class_weights="1,2,3")
        with pytest.raises(ValueError, match=r"The batch has labels that are no classes of the model \(0 to 2\): 4"):
            run.train()

    def test_a_trainer_that_only_predicts_takes_hidden_labels(self, tmp_path):
        run = tiny.trainer(tmp_path, train_dataset=None, eval_dataset=rows([-1], seed=1))
        hidden = rows([-1], seed=1).remove_columns("labels")
        assert run.predict(hidden).predictions.shape == (24, 3)

    def test_streams_and_transformed_sets_are_left_to_their_batches(self, tmp_path):
        stream = IterableDataset.from_generator(lambda: iter(rows([0, 9], seed=1)))
        check_labels({"training": TRAIN, "evaluation": stream}, tiny.bert())
        moved = rows([1, 2, 3], seed=1).with_transform(lambda batch: batch)
        check_labels({"training": moved}, tiny.bert())


class TestNumbering:
    def test_labels_from_1_are_refused_with_as_many_classes_and_with_one_more(self, tmp_path):
        sets = {"train_dataset": rows([1, 2, 3]), "eval_dataset": rows([1, 2, 3], seed=1)}
        with pytest.raises(ValueError, match=r"3 \(8 rows\)\. Labels that begin at 1 must be numbered from 0"):
            tiny.trainer(tmp_path, **sets)
        with pytest.raises(ValueError, match="run from 1 to 3, and the 4 classes.*Number the labels from 0"):
            tiny.trainer(tmp_path, tiny.bert(num_labels=4), **sets)

    def test_a_class_0_with_a_name_may_have_no_row(self, tmp_path):
        names = ("other", "a", "b", "c")
        model = tiny.bert(num_labels=4, id2label=dict(enumerate(names)))
        tiny.trainer(tmp_path, model, train_dataset=rows([1, 2, 3]), eval_dataset=rows([1, 2, 3], seed=1))

    def test_a_class_that_train_lacks_is_said_with_label_and_set(self, tmp_path, warnings):
        feature = ClassLabel(num_classes=3)
        tiny.trainer(tmp_path, train_dataset=rows([0, 1], feature=feature), eval_dataset=rows([0, 1, 2], 1, feature))
        assert "The evaluation set has labels of which the training set has no row: 2 (8 rows)" in warnings.text
        warnings.clear()
        tiny.trainer(tmp_path, train_dataset=TRAIN, eval_dataset=rows([0, 1], seed=1))
        assert "has no row" not in warnings.text


class TestPixels:
    def images(self, ignored):
        generator = torch.Generator().manual_seed(ignored % 7)
        labels = torch.randint(0, 3, (6, 32, 32), generator=generator)
        labels[:, 0, :5] = ignored
        pixels = torch.randn(6, 3, 32, 32, generator=generator)
        return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]

    @pytest.mark.parametrize("own", [False, True])
    @pytest.mark.parametrize("part", ["train_dataset", "eval_dataset"])
    def test_another_ignored_label_than_that_of_the_config_is_an_error_that_names_both(self, tmp_path, part, own):
        sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
        model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=3, **sizes))
        sets = {"train_dataset": self.images(255), "eval_dataset": self.images(255)[:3], part: self.images(-100)}
        sets = {name: OwnRows(images) if own else images for name, images in sets.items()}
        with pytest.raises(ValueError, match=r"-100\. The label to ignore is 255 \(semantic_loss_ignore_index of the"):
            AdaFocalTrainer(model, tiny.arguments(tmp_path, split_overlap="skip"), **sets).train()
