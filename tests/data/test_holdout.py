import random

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Subset

from hf_adafocal.data.columns import LABEL_COLUMNS
from hf_adafocal.data.holdout import hold_out, row_labels

KINDS = {
    "list": lambda rows: rows,
    "dataset": Dataset.from_list,
    "subset": lambda rows: Subset(rows, range(len(rows))),
}


def numbered(labels, name: str = "label") -> list[dict]:
    return [{"row": index, name: label} for index, label in enumerate(labels)]


def rows_of(part) -> list[int]:
    return [part[index]["row"] for index in range(len(part))]


class TestStratified:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", LABEL_COLUMNS)
    def test_each_class_gives_its_share_whatever_the_container_and_the_name_of_the_labels(self, kind, name):
        labels = [0] * 60 + [1] * 30 + [2] * 10
        rest, held = hold_out(KINDS[kind](numbered(labels, name)), 0.2, seed=0)
        assert np.bincount([labels[row] for row in rows_of(held)]).tolist() == [12, 6, 2]
        assert np.bincount([labels[row] for row in rows_of(rest)]).tolist() == [48, 24, 8]

    @given(st.lists(st.integers(0, 5), min_size=2, max_size=80), st.data())
    def test_the_parts_are_a_partition_in_order_with_every_class_in_the_rest_and_shares_within_one_row(
        self, labels, data
    ):
        sizes = np.bincount(labels)
        most = len(labels) - np.count_nonzero(sizes)
        if most < 1:
            with pytest.raises(ValueError, match="keep a row of each of the"):
                hold_out(numbered(labels), 1, seed=0)
            return
        held_size = data.draw(st.integers(1, most))
        rest, held = (rows_of(part) for part in hold_out(numbered(labels), held_size, data.draw(st.integers(0, 9))))
        assert rest == sorted(rest) and held == sorted(held) and len(held) == held_size
        assert sorted(rest + held) == list(range(len(labels)))
        assert {labels[row] for row in rest} == set(labels)
        taken = np.bincount([labels[row] for row in held], minlength=len(sizes))
        shares = sizes * held_size / len(labels)
        if (sizes[sizes > 0] - shares[sizes > 0] >= 1).all():  # no class is so small that a row of it must stay
            assert (np.abs(taken - shares) < 1 + 1e-9).all()

    def test_every_row_of_a_class_is_as_likely_to_be_held_out(self):
        labels = [0] * 30 + [1] * 10
        counts = np.zeros(40)
        for seed in range(2000):
            counts[rows_of(hold_out(numbered(labels), 0.25, seed)[1])] += 1
        # 2,000 draws of a share of 0.25: a standard deviation of 19
        assert np.abs(counts - 500).max() < 5 * 19.4

    def test_a_class_with_a_single_row_stays_in_the_rest(self):
        for seed in range(20):
            rest, held = hold_out(numbered([0] * 18 + [1, 2]), 0.2, seed)
            assert {18, 19} <= set(rows_of(rest)) and len(held) == 4

    def test_one_seed_gives_one_split_whatever_the_global_random_state_and_leaves_it(self):
        data = numbered([index % 3 for index in range(60)])
        first = rows_of(hold_out(data, 0.2, seed=1)[1])
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        assert rows_of(hold_out(data, 0.2, seed=1)[1]) == first != rows_of(hold_out(data, 0.2, seed=2)[1])
        assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
        assert torch.equal(states[2], torch.get_rng_state())

    @pytest.mark.parametrize("make", [torch.tensor, np.int64, str])
    def test_labels_may_be_tensors_numbers_or_strings(self, make):
        labels = [0] * 20 + [1] * 20
        _, held = hold_out(numbered([make(label) for label in labels]), 0.1, seed=0)
        assert [labels[row] for row in rows_of(held)] == [0, 0, 1, 1]

    def test_stored_labels_are_read_without_the_transform(self):
        data = Dataset.from_list(numbered([0, 1] * 20)).with_transform(lambda batch: pytest.fail("it was called"))
        rest, held = hold_out(data, 0.25, seed=0)
        assert (len(rest), len(held)) == (30, 10) and held.format == data.format

    def test_class_labels_and_missing_labels_are_classes(self):
        features = Features({"row": Value("int64"), "label": ClassLabel(names=["a", "b"])})
        data = Dataset.from_list(numbered([0, 1, None, None] * 10), features=features)
        _, held = hold_out(data, 0.2, seed=0)
        assert sorted(map(str, held["label"][:])) == sorted(["0", "0", "1", "1"] + ["None"] * 4)


class TestAtRandom:
    @pytest.mark.parametrize("kind", ["list", "dataset"])
    def test_labels_per_token_or_pixel_are_split_by_row(self, kind):
        tokens = [{"row": index, "labels": [index % 2] * (1 + index % 3)} for index in range(50)]
        pixels = [{"row": index, "labels": [[0, 1], [1, 255]]} for index in range(50)]
        for rows in (tokens, pixels):
            rest, held = hold_out(KINDS[kind](rows), 0.1, seed=0)
            assert row_labels(KINDS[kind](rows)) is None
            assert sorted(rows_of(rest) + rows_of(held)) == list(range(50)) and len(held) == 5

    def test_dense_labels_may_be_tensors(self):
        rows = [{"row": index, "labels": torch.zeros(4, 4, dtype=torch.int64)} for index in range(10)]
        assert len(hold_out(rows, 0.2, seed=0)[1]) == 2

    def test_without_labels_rows_are_drawn_at_random(self):
        draws = {tuple(rows_of(hold_out([{"row": index} for index in range(20)], 0.25, seed)[1])) for seed in range(9)}
        assert len(draws) == 9 and all(len(draw) == 5 for draw in draws)


class TestErrors:
    @pytest.mark.parametrize("fraction", [0.0, 1.0, 0, 10, 11, -0.5])
    def test_an_empty_part_is_an_error(self, fraction):
        with pytest.raises(ValueError, match=f"Cannot hold out {fraction} of 10 rows: one of the two parts"):
            hold_out(numbered([0] * 10), fraction, seed=0)

    def test_a_stream_is_an_error_that_says_what_to_pass(self):
        data = IterableDataset.from_generator(lambda: iter([{"label": 0}]))
        with pytest.raises(
            ValueError, match="needs a length and an index, found a IterableDataset.*calibration_dataset"
        ):
            hold_out(data, 0.1, seed=0)
