import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Subset

from hf_adafocal.data.columns import LABEL_COLUMNS, column_names, label_column


@pytest.mark.parametrize("name", LABEL_COLUMNS)
@pytest.mark.parametrize(
    "kind",
    [
        list,
        Dataset.from_list,
        lambda rows: Subset(rows, [1]),
        lambda rows: Subset(Dataset.from_list(rows), [1]),
    ],
)
def test_the_label_column_is_found_in_every_kind_of_data_set(name, kind):
    data = kind([{"input_ids": [1, 2], name: index} for index in range(3)])
    assert label_column(data) == name and column_names(data) == ["input_ids", name]


def test_labels_goes_before_label():
    assert label_column([{"label": 0, "labels": 1}]) == "labels"


@pytest.mark.parametrize(
    "data",
    [[], [(1, 0)], IterableDataset.from_generator(lambda: iter([{"label": 1}])), iter([{"label": 1}]), {"text": 1}],
)
def test_without_known_columns_there_is_none(data):
    assert label_column(data) is None


def test_reading_the_first_row_leaves_the_random_state_as_it_was():
    class Random(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"pixel_values": torch.rand(2), "label": index}

    state = torch.get_rng_state()
    assert label_column(Random()) == "label" and torch.equal(torch.get_rng_state(), state)
