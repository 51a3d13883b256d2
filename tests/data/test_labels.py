"""Label columns of files as people have them: missing, hidden, unknown, numbered from 1, as text, as floats."""

import itertools
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adafocal.data.labels import ClassEncoding, check_classes, encode_labels, has_labels
from hf_adafocal.data.loading import load_splits

NUMBERS = itertools.count()


def folder(tmp_path, form: str = "csv", **splits: list):
    """A local data set with a file per split; each split is a list of labels."""
    path = tmp_path / f"data{next(NUMBERS)}"
    path.mkdir(parents=True)
    for name, labels in splits.items():
        rows = pd.DataFrame({"text": [f"{name} {index}" for index in range(len(labels))], "label": labels})
        if form == "csv":
            rows.to_csv(path / f"{name}.csv", index=False)
        else:
            rows.to_parquet(path / f"{name}.parquet", index=False)
    return str(path)


def label_of(splits) -> dict[str, str]:
    """Name of the label of each text, over all splits."""
    parts = [part for part in splits[:3]]
    return {row["text"]: splits.label_names[row["label"]] for part in parts for row in part}


class TestMissing:
    def test_a_few_hidden_labels_are_dropped_and_the_official_splits_stay(self, tmp_path, caplog, log_propagates):
        train = [0, 1, 2] * 40 + [-1] * 3
        path = folder(tmp_path, "parquet", train=train, validation=[0, 1, 2, -1] * 5, test=[2, 1, -1, 0])
        splits = load_splits(path)
        assert [len(part) for part in splits[:3]] == [120, 15, 3] and splits.label_names == ["0", "1", "2"]
        assert splits.test["text"][:] == ["test 0", "test 1", "test 3"] and splits.test["label"][:] == [2, 1, 0]
        assert "Dropped 3 of 123 rows of train without a label" in caplog.text
        assert "Dropped 5 of 20 rows of validation without a label" in caplog.text
        assert "Dropped 1 of 4 rows of test without a label" in caplog.text

    def test_the_same_holds_for_class_labels(self, tmp_path):
        features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
        for name, labels in {"train": [0, 1] * 20, "test": [1, -1, 0]}.items():
            rows = {"text": [f"{name} {i}" for i in range(len(labels))], "label": labels}
            Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"{name}.parquet"))
        splits = load_splits(str(tmp_path))
        assert splits.test["text"][:] == ["test 0", "test 2"] and splits.label_names == ["no", "yes"]

    @pytest.mark.parametrize("form", ["csv", "parquet"])
    @pytest.mark.parametrize("labels", [[0, 1, None], ["a", "b", None], [True, False, None], ["a", "b", ""]])
    def test_missing_labels_are_no_class(self, tmp_path, form, labels):
        splits = load_splits(folder(tmp_path, form, train=labels * 20))
        assert splits.label_names == sorted(str(label) for label in labels[:2])
        assert sum(map(len, splits[:3])) == 40
        assert all(int(text.split()[1]) % 3 < 2 for text in label_of(splits))

    def test_a_split_counts_as_unlabelled_only_if_all_its_labels_are_missing(self, tmp_path):
        train, hidden = [0, 1] * 50, [-1] * 10
        splits = load_splits(folder(tmp_path, train=train, validation=[0, 1] * 4, test=hidden))
        assert all(text.startswith("validation") for text in splits.test["text"])

    def test_a_test_split_without_a_label_column_counts_as_unlabelled(self, tmp_path):
        path = folder(tmp_path, "parquet", train=[0, 1] * 50)
        (tmp_path / "other").mkdir()
        unlabelled = Dataset.from_dict({"text": ["a"]})
        assert not has_labels(unlabelled, "label") and has_labels(Dataset.from_dict({"label": [0]}), "label")
        assert len(load_splits(path).test) == 20

    def test_all_labels_missing_is_an_error(self):
        with pytest.raises(ValueError, match="All 3 labels in the column 'label' of train are missing"):
            ClassEncoding.of(Dataset.from_dict({"label": [-1, -1, -1]}), "label")

    def test_many_labels_of_minus_one_may_be_a_class_so_they_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="20 of 60 rows of train have the label -1.*If it is a class, number"):
            load_splits(folder(tmp_path, train=[-1, 0, 1] * 20))

    def test_minus_one_beside_other_negative_labels_is_a_class(self, tmp_path):
        splits = load_splits(folder(tmp_path, train=[-2, -1, 0, 1, 2] * 10, test=[-1, 2]))
        assert splits.label_names == ["-2", "-1", "0", "1", "2"] and splits.test["label"][:] == [1, 4]


class TestUnknown:
    def test_a_label_that_train_lacks_is_an_error_that_names_label_and_split(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"'test' has labels that train does not have: 3 \(2 rows\). Train has 0, 1"
        ):
            load_splits(folder(tmp_path, train=[0, 1, 2] * 20, test=[0, 1, 2, 3, 3]))
        with pytest.raises(ValueError, match="'validation' has labels that train does not have: 'new'"):
            load_splits(folder(tmp_path, train=["a", "b"] * 20, validation=["a", "new"]))

    def test_a_declared_class_without_a_training_row_is_an_error_if_a_held_out_split_has_it(self):
        feature = ClassLabel(names=["a", "b", "c"])
        columns = {"train": [0, 1], "test": [2, 0]}
        features = Features({"label": feature})
        parts = {name: Dataset.from_dict({"label": labels}, features=features) for name, labels in columns.items()}
        encoding = ClassEncoding.of(parts["train"], "label")
        with pytest.raises(ValueError, match=r"'test' has labels of which train has no row: 'c' \(1 rows\)"):
            check_classes(parts, encoding)

    def test_a_declared_class_without_any_row_gives_a_warning(self, caplog, log_propagates):
        data = Dataset.from_dict({"label": [0, 1]}, features=Features({"label": ClassLabel(names=["a", "b", "c"])}))
        check_classes({"train": data}, ClassEncoding.of(data, "label"))
        assert "No row has the label 'c' (1 of 3 declared classes)" in caplog.text

    def test_class_labels_in_another_order_are_matched_by_name(self):
        def part(names, labels):
            return Dataset.from_dict({"label": labels}, features=Features({"label": ClassLabel(names=names)}))

        encoding = ClassEncoding.of(part(["a", "b"], [0, 1]), "label")
        assert encode_labels(part(["b", "a"], [0, 1, 1]), "label", encoding, "test")["label"][:] == [1, 0, 0]


class TestNumbering:
    def test_labels_from_1_are_numbered_from_0_and_keep_their_names(self, tmp_path):
        splits = load_splits(folder(tmp_path, train=[1, 2, 3] * 20, test=[3, 1, 2]))
        assert splits.label_names == ["1", "2", "3"] and splits.test["label"][:] == [2, 0, 1]

    def test_gaps_leave_no_empty_class(self, tmp_path):
        splits = load_splits(folder(tmp_path, train=[0, 5, 70] * 20, test=[70]))
        assert splits.label_names == ["0", "5", "70"] and splits.test["label"][:] == [2]

    def test_floats_that_are_integers_are_integers(self):
        data = Dataset.from_dict({"label": [1.0, 2.0, float("nan"), None]})
        encoding = ClassEncoding.of(data, "label")
        assert encoding.names == ("1", "2")
        assert encode_labels(data.add_column("text", list("abcd")), "label", encoding, "train")["text"][:] == [
            "a",
            "b",
        ]

    @pytest.mark.parametrize(
        ("column", "message"),
        [
            ([0.5, 1.0], r"must hold classes, found 0.5 \(regression\?\)"),
            ([[0, 1], [1, 0]], "must hold one class per row, found List"),
        ],
    )
    def test_what_is_no_class_is_an_error(self, column, message):
        with pytest.raises(ValueError, match=message):
            ClassEncoding.of(Dataset.from_dict({"label": column}), "label")

    def test_token_labels_are_an_error(self):
        features = Features({"label": Sequence(ClassLabel(names=["a"]))})
        with pytest.raises(ValueError, match="must hold one class per row"):
            ClassEncoding.of(Dataset.from_dict({"label": [[0]]}, features=features), "label")


def kinds_of_labels():
    return st.sampled_from([(0, 1, 2), (1, 2, 3), (-7, 4, 90), ("b", "a", "C"), ("1", "2", "10"), (True, False)])


@settings(max_examples=25)
@given(kinds_of_labels(), st.sampled_from(["csv", "parquet"]), st.data())
def test_every_labelled_row_of_a_file_keeps_its_label_and_no_other_row_is_left(tmp_path_factory, kinds, form, data):
    base = [kind for kind in kinds for _ in range(12)]
    extra = data.draw(st.lists(st.sampled_from([*kinds, None]), max_size=10))
    test = data.draw(st.lists(st.sampled_from([*kinds, None]), max_size=6))
    labels = data.draw(st.permutations([*base, *extra]))
    path = folder(tmp_path_factory.mktemp("fuzz"), form, train=labels, **({"test": test} if any(test) else {}))
    splits = load_splits(path)
    expected = {f"train {index}": str(label) for index, label in enumerate(labels) if label is not None}
    if any(test):
        expected |= {f"test {index}": str(label) for index, label in enumerate(test) if label is not None}
    assert label_of(splits) == expected
    assert Counter(splits.label_names) == Counter(map(str, kinds))
    assert set(np.unique(splits.train["label"][:])) == set(range(len(kinds)))


class TestMissingInputs:
    def test_a_missing_text_is_an_error_that_names_the_rows(self, tmp_path):
        rows = pd.DataFrame({"text": ["a", None, "c", None] * 10, "label": [0, 1] * 20})
        rows.to_parquet(tmp_path / "train.parquet")
        with pytest.raises(
            ValueError, match=r"20 of 40 rows of the split 'train' have no text: rows 1, 3, 5, 7, 9, \.\."
        ):
            load_splits(str(tmp_path))
