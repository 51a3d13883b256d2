import hashlib
import json
import logging
import random
import tracemalloc

import numpy as np
import pytest
import tiny
import torch
from datasets import Array3D, Dataset, Features, Image, IterableDataset, Sequence, Value, load_dataset
from PIL import Image as PILImage
from torch.utils.data import Subset
from transformers import DefaultDataCollator

from hf_adafocal.data.encoding import encode_texts
from hf_adafocal.data.fingerprint import fingerprint
from hf_adafocal.data.loading import Splits, load_splits
from hf_adafocal.data.overlap import check_splits, drop_overlap, without_overlap
from hf_adafocal.models import train_word_level_tokenizer
from hf_adafocal.runs.finetune import finetune
from hf_adafocal.runs.tasks import Prepared, TextTask

pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.fixture
def warnings(caplog):
    """What transformers and this package log from warnings up, as text."""
    logging.getLogger("transformers").propagate = True
    caplog.set_level("WARNING")
    return caplog


def texts(*rows: str, **columns) -> Dataset:
    return Dataset.from_dict({"text": list(rows), "label": [0] * len(rows), **columns})


class Rows(torch.utils.data.Dataset):
    """Made as they are read."""

    def __init__(self, make, size):
        self.make, self.size = make, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.make(index)


def random_text(index) -> dict:
    return {"text": f"{random.random()} {np.random.random()} {torch.rand(())}", "label": 0}


class TestFingerprint:
    def test_it_is_blake2b_of_names_and_contents_the_same_in_every_process(self):
        def digest(text):
            return hashlib.blake2b(b"str4:textstr%d:%s" % (len(text), text), digest_size=8).digest()

        found = fingerprint(texts("ab", "c"))
        assert [int(value).to_bytes(8, "little") for value in found.digests] == [digest(b"ab"), digest(b"c")]
        values = sorted(int.from_bytes(digest(text), "little") for text in (b"ab", b"c"))
        content = b"".join(value.to_bytes(8, "little") for value in values)
        assert found.hash == hashlib.blake2b(content, digest_size=16).hexdigest()

    def test_the_order_of_rows_is_no_content_and_their_number_is(self):
        assert fingerprint(texts("a", "b", "c")).hash == fingerprint(texts("c", "a", "b")).hash
        assert fingerprint(texts("a", "b", "b")).hash != fingerprint(texts("a", "a", "b")).hash

    def test_labels_and_masks_are_no_content(self):
        rows = {"input_ids": [[1, 2]], "labels": [0], "attention_mask": [[1, 1]]}
        other = {"input_ids": [[1, 2]], "labels": [1], "attention_mask": [[1, 0]], "label_text": ["x"]}
        assert fingerprint(Dataset.from_dict(rows)).hash == fingerprint(Dataset.from_dict(other)).hash

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ({"a": [[1, 2], [3, 4]]}, {"a": [[1, 2, 3, 4]]}),
            ({"a": [[1], [2, 3]]}, {"a": [[1, 2], [3]]}),
            ({"a": ["ab", "c"]}, {"a": ["a", "bc"]}),
            ({"a": "x", "b": "yz"}, {"a": "xy", "b": "z"}),
            ({"a": "x", "b": "y"}, {"a": "y", "b": "x"}),
            ({"a": "1"}, {"a": 1}),
            ({"a": b"1"}, {"a": "1"}),
            ({"a": None}, {"a": ""}),
        ],
    )
    def test_different_rows_have_different_digests_stored_or_given(self, one, other):
        given = [fingerprint([row]).hash for row in (one, other)]
        stored = [fingerprint(Dataset.from_list([row])).hash for row in (one, other)]
        assert given[0] != given[1] and stored == given

    @pytest.mark.parametrize("lengths", [(4, 4), (4, 2)])
    def test_equal_tokens_are_equal_in_every_container(self, lengths):
        rows = [list(range(length)) for length in lengths]
        expected = fingerprint([{"input_ids": row} for row in rows]).hash
        for change in (np.array, torch.tensor, lambda row: np.array(row, np.int32)):
            assert fingerprint([{"input_ids": change(row)} for row in rows]).hash == expected
        for kind in ("int64", "int32", "uint8"):
            features = Features({"input_ids": Sequence(Value(kind))})
            assert fingerprint(Dataset.from_dict({"input_ids": rows}, features=features)).hash == expected

    def test_equal_images_are_equal_as_nested_lists_arrays_and_tensors(self):
        pixels = np.random.default_rng(0).integers(0, 256, (300, 3, 4, 5), dtype=np.uint8)  # more than a batch
        expected = fingerprint([{"pixel_values": image} for image in pixels])
        assert len(set(expected.digests.tolist())) == 300
        kinds = [Array3D((3, 4, 5), "uint8"), Sequence(Sequence(Sequence(Value("uint8"))))]
        for kind in kinds:
            stored = Dataset.from_dict({"pixel_values": pixels.tolist()}, features=Features({"pixel_values": kind}))
            np.testing.assert_array_equal(fingerprint(stored).digests, expected.digests)
        given = fingerprint([{"pixel_values": torch.tensor(image)} for image in pixels])
        np.testing.assert_array_equal(given.digests, expected.digests)

    def test_an_image_is_its_file_whether_stored_or_beside(self, tmp_path):
        images = [PILImage.fromarray(np.full((4, 4), 50 * index, np.uint8)) for index in range(3)]
        for index, image in enumerate(images):
            image.save(tmp_path / f"{index}.png")
        paths = [str(tmp_path / f"{index}.png") for index in range(3)]
        features = Features({"image": Image()})
        beside = Dataset.from_dict({"image": paths}, features=features)
        stored = Dataset.from_dict({"image": images}, features=features)
        assert len(set(fingerprint(stored).digests.tolist())) == 3
        np.testing.assert_array_equal(fingerprint(beside).digests, fingerprint(stored).digests)

    @pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Subset(Subset(data, [3, 2, 1]), [0, 1, 2])])
    def test_a_transform_is_not_applied(self, wrap):
        data = texts("a", "b", "c", "d")
        changed = data.with_transform(lambda batch: pytest.fail("the transform was called"))
        rows = wrap(range(4)) if isinstance(wrap(data), Dataset) else [3, 2, 1]
        assert fingerprint(wrap(changed)).hash == fingerprint(data.select(rows)).hash

    def test_a_format_is_no_content(self):
        data = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": [0, 1]})
        assert fingerprint(data.with_format("torch")).hash == fingerprint(data).hash

    def test_selected_and_shuffled_rows_are_read_in_their_order(self):
        data = texts(*map(str, range(600)))
        order = np.random.default_rng(0).permutation(600)[:400]
        expected = fingerprint(data).digests[order]
        np.testing.assert_array_equal(fingerprint(data.select(order)).digests, expected)

    def test_the_random_state_is_left_as_it_was(self):
        def draw():
            return random.random(), np.random.random(), torch.rand(()).item()

        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        expected = draw()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        fingerprint(Rows(random_text, 20))
        assert draw() == expected
        with pytest.raises(TypeError):
            fingerprint(Rows(lambda index: random_text(index)["text"], 2))

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (IterableDataset.from_generator(lambda: iter([{"a": 1}])), "a IterableDataset is streamed"),
            ([(1, 0)], "a row is a tuple, not a dict"),
            ([{"labels": 1}], r"no model input is among \['labels'\]"),
            ([{"a": object()}], "a row holds a object"),
            (Dataset.from_dict({"label": [1]}), r"no model input is among \['label'\]"),
        ],
    )
    def test_what_cannot_be_read_is_a_type_error(self, data, message):
        with pytest.raises(TypeError, match=message):
            fingerprint(data)

    @pytest.mark.parametrize("stored", [True, False])
    def test_memory_does_not_grow_with_the_rows_but_for_nine_bytes_each(self, tmp_path, stored):
        def row(index):
            return {"pixel_values": np.full((3, 32, 32), index, np.int32), "labels": 0}

        def peak(size):
            data = (
                Dataset.from_generator(lambda: map(row, range(size)), cache_dir=str(tmp_path))
                if stored
                else Rows(row, size)
            )
            fingerprint(data)  # whatever is cached
            tracemalloc.start()
            fingerprint(data)
            found = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return found

        small, large = peak(400), peak(3000)
        assert large - small < 9 * 2600 + 100_000  # the rows themselves hold 32 MB


class TestCheckSplits:
    def sets(self):
        return {
            "train": texts("a", "b", "b", "c"),
            "calibration": texts("b", "x", "a", "a"),
            "test": texts("x", "y", "c"),
        }

    def test_rows_of_the_later_set_that_stand_in_the_earlier_one_are_counted(self, warnings):
        found = check_splits(self.sets(), "warn")
        rows = {name: list(part["text"]) for name, part in self.sets().items()}
        pairs = (("calibration", "train"), ("test", "train"), ("test", "calibration"))
        assert found.overlap == {f"{b} in {a}": sum(row in rows[a] for row in rows[b]) for b, a in pairs}
        assert found.overlap["calibration in train"] == 3
        assert "3 of 4 calibration rows have the same inputs as a train row" in warnings.text

    def test_shared_rows_are_an_error_that_says_how_many_which_and_what_to_do(self):
        message = (
            r"3 of 4 calibration rows .* a train row \(rows 0, 2, 3 of calibration\).*1 of 3 test rows .* a train row "
            r"\(rows 2 of test\).*1 of 3 test rows .* a calibration row.*without_overlap.*split_overlap='warn'"
        )
        with pytest.raises(ValueError, match=message):
            check_splits(self.sets())

    def test_disjoint_sets_say_nothing(self, warnings):
        found = check_splits({"train": texts("a", "a"), "calibration": texts("b")})
        assert found.overlap == {"calibration in train": 0} and not warnings.text
        assert found.fingerprints["train"].size == 2

    def test_skip_reads_nothing(self):
        unread = Rows(lambda index: pytest.fail("a row was read"), 3)
        found = check_splits({"train": unread, "calibration": unread}, "skip")
        assert found.fingerprints == {"train": None, "calibration": None} and found.overlap == {}

    def test_blank_rows_are_nobodys_copy(self):
        blank = [texts("", " \n", "a"), texts("", "b")]
        assert check_splits(dict(zip(("train", "test"), blank, strict=True))).overlap == {"test in train": 0}
        tokens = [[{"input_ids": [2]}, {"input_ids": [2, 7]}], [{"input_ids": [2]}, {"input_ids": []}]]
        named = dict(zip(("train", "test"), tokens, strict=True))
        assert check_splits(named, blank_tokens=[0, 1, 2]).overlap == {"test in train": 0}
        with pytest.raises(ValueError, match="1 of 2 test rows"):
            check_splits(named)

    def test_an_image_beside_an_empty_text_is_no_blank_row(self):
        row = {"pixel_values": np.ones((1, 2, 2)), "text": ""}
        with pytest.raises(ValueError, match="1 of 1 test rows"):
            check_splits({"train": [row], "test": [row]})

    def test_a_streamed_set_gives_one_warning_and_the_others_are_compared(self, warnings):
        streamed = IterableDataset.from_generator(lambda: iter([{"text": "a"}]))
        with pytest.raises(ValueError, match="1 of 1 test rows .* a calibration row"):
            check_splits({"train": streamed, "calibration": texts("a"), "test": texts("a")})
        assert warnings.text.count("cannot be checked for train: a IterableDataset is streamed") == 1


class TestWithoutOverlap:
    @pytest.mark.parametrize("stored", [True, False])
    def test_copies_go_and_the_rest_keeps_its_order_and_repetitions(self, stored):
        rows = [{"text": text, "label": 0} for text in ("d", "a", "", "b", "c", "c")]
        left = without_overlap(
            Dataset.from_list(rows) if stored else rows, texts("a", "x", ""), [{"text": "b", "label": 1}]
        )
        assert [row["text"] for row in left] == ["d", "", "c", "c"]

    def test_a_set_without_copies_is_returned_as_it_is(self):
        data = texts("a")
        assert without_overlap(data, texts("b")) is data

    def test_dropping_all_rows_is_an_error(self):
        with pytest.raises(ValueError, match="All 2 rows stand in the held-out sets too"):
            without_overlap(texts("a", "b"), texts("b", "a"))

    def test_the_remedy_that_the_guard_advises_satisfies_the_guard(self):
        train = [{"input_ids": [index], "text": f"Text {index}", "label": 0} for index in range(6)]
        calibration = [{"input_ids": [index], "text": f"text {index}", "label": 0} for index in range(4, 9)]
        columns = ["input_ids", "attention_mask", "labels", "label"]  # the model's; `text` differs and does not count
        with pytest.raises(ValueError, match=r"without_overlap\(train, calibration, columns=\['input_ids'\]\)"):
            check_splits({"train": train, "calibration": calibration}, columns=columns)
        left = without_overlap(train, calibration, columns=["input_ids"])
        assert len(left) == 4
        assert check_splits({"train": left, "calibration": calibration}, columns=columns).overlap == {
            "calibration in train": 0
        }

    def test_columns_that_one_of_the_sets_lacks_hide_nothing(self):
        one, other = [{"input_ids": [1], "row": 0}, {"input_ids": [2], "row": 1}], [{"input_ids": [1]}]
        assert [row["row"] for row in without_overlap(one, other)] == [1]
        with pytest.raises(ValueError, match="1 of 1 test rows"):
            check_splits({"train": one, "test": other})

    def test_an_empty_set_shares_nothing(self, warnings):
        empty = texts("a").select([]).remove_columns("text")
        assert check_splits({"train": texts("a"), "test": empty}).overlap == {"test in train": 0}
        assert not warnings.text and drop_overlap(empty, {"test": texts("a")})[0] is empty

    def test_sets_without_a_common_input_cannot_be_compared(self, warnings):
        check_splits({"train": texts("a"), "test": [{"input_ids": [1]}]})
        assert "cannot be checked for train: no model input is among ['label', 'text']" in warnings.text


class TestMultipleChoice:
    """Rows of nested token lists, one list per option, of different lengths."""

    rows = [{"input_ids": [[2, 5 + index], [2, 5, 6 + index]], "label": 0} for index in range(4)]

    @pytest.mark.parametrize("kind", [list, Dataset.from_list])
    def test_ragged_rows_are_hashed_and_compared_like_any_row(self, kind):
        with pytest.raises(ValueError, match="2 of 3 calibration rows"):
            check_splits({"train": kind(self.rows), "calibration": kind([*self.rows[:2], {"input_ids": [[2], [9]]}])})
        left = without_overlap(kind(self.rows), kind(self.rows[:3]), blank_tokens=[2])
        assert [row["input_ids"] for row in left] == [self.rows[3]["input_ids"]]

    def test_tensors_and_lists_hash_the_same(self):
        tensors = [{"input_ids": [torch.tensor(option) for option in row["input_ids"]]} for row in self.rows]
        assert fingerprint(tensors).hash == fingerprint(self.rows).hash

    def test_options_without_a_real_token_are_blank(self):
        found = fingerprint([{"input_ids": [[2], [2, 2], []]}, {"input_ids": [[2], [2, 7]]}], blank_tokens=[2])
        assert found.blank.tolist() == [True, False]


class TestDropOverlap:
    def sets(self):
        return texts("a", "b", "b", "c", "d"), {"calibration": texts("b", "x"), "test": texts("c", "y")}

    def test_training_rows_of_any_held_out_set_go_with_one_line_that_counts_them(self, warnings):
        train, held_out = self.sets()
        kept, found = drop_overlap(train, held_out)
        assert list(kept["text"]) == ["a", "d"] and len(train) == 5
        assert warnings.text.count("Dropped 3 of 5 training rows whose inputs stand in a held-out set") == 1
        assert found.dropped == 3 and set(found.overlap.values()) == {0}
        assert found.fingerprints["train"].hash == fingerprint(kept).hash

    def test_rows_that_calibration_and_test_share_stay_an_error(self):
        train, held_out = self.sets()
        with pytest.raises(
            ValueError, match=r"1 of 2 test rows .* a calibration row.*without_overlap\(calibration, test"
        ):
            drop_overlap(train, {**held_out, "test": texts("x", "y")})

    def test_further_evaluation_sets_may_repeat_the_calibration_set(self):
        train, held_out = self.sets()
        kept, _ = drop_overlap(train, {**held_out, "validation": texts("b", "x", "d")})
        assert list(kept["text"]) == ["a"]

    def test_a_set_without_copies_is_returned_as_it_is_and_nothing_is_said(self, warnings):
        train, _ = self.sets()
        kept, found = drop_overlap(train, {"calibration": texts("x")})
        assert kept is train and found.dropped == 0 and not warnings.text

    def test_the_other_policies_keep_the_rows(self, warnings):
        train, held_out = self.sets()
        with pytest.raises(ValueError, match="1 of 2 calibration rows .* a train row"):
            drop_overlap(train, held_out, "error")
        kept, found = drop_overlap(train, held_out, "warn")
        assert (
            kept is train
            and found.overlap["calibration in train"] == 1
            and "which split_overlap='warn'" in warnings.text
        )
        unread = Rows(lambda index: pytest.fail("a row was read"), 3)
        assert drop_overlap(unread, {"calibration": unread}, "skip")[0] is unread

    def test_a_streamed_training_set_gives_one_warning_and_stays(self, warnings):
        streamed = IterableDataset.from_generator(lambda: iter([{"text": "a"}]))
        kept, found = drop_overlap(streamed, {"calibration": texts("a"), "test": texts("b")})
        assert kept is streamed and found.overlap == {"test in calibration": 0}
        assert warnings.text.count("cannot be checked for train") == 1

    def test_an_unknown_policy_is_an_error(self):
        with pytest.raises(ValueError, match="one of drop, error, warn, skip; found 'remove'"):
            drop_overlap(*self.sets(), "remove")


class TestLoadSplits:
    def save(self, folder, **splits) -> str:
        folder.mkdir()
        for name, rows in splits.items():
            rows.to_parquet(str(folder / f"{name}.parquet"))
        return str(folder)

    def test_copies_across_the_splits_are_dropped_from_the_earlier_one_and_counted(self, tmp_path, warnings):
        train = texts(*(f"t{i}" for i in range(80)), *["shared"] * 2, "", "both")
        calibration = texts("c0", "shared", "both", "in test", "")
        test = texts("e0", "both", "in test", "")
        splits = load_splits(self.save(tmp_path / "d", train=train, validation=calibration, test=test))
        assert list(splits.test["text"]) == ["e0", "both", "in test", ""]
        assert list(splits.calibration["text"]) == ["c0", "shared", ""]
        assert list(splits.train["text"]) == [*(f"t{i}" for i in range(80)), ""]
        assert "Dropped 3 of 84 training rows" in warnings.text
        assert "Dropped 2 of 5 calibration rows whose inputs stand in test too" in warnings.text

    def test_parts_carved_from_repeated_rows_share_none(self, tmp_path):
        rows = [f"text {index % 30}" for index in range(200)]
        splits = load_splits(self.save(tmp_path / "d", train=texts(*rows)), calibration_fraction=0.03, test_fraction=5)
        train, calibration, test = (set(part["text"]) for part in splits[:3])
        assert train and calibration and not train & calibration and not train & test and not calibration & test

    def test_texts_that_become_equal_when_cut_are_dropped_too(self):
        words = [f"w{index}" for index in range(9)]
        tokenizer = train_word_level_tokenizer([" ".join(words)], 100, max_length=4)
        parts = [texts("w1 w2 w3 w4", "w5 w6", ""), texts("w1 w2 w3 w7", "w8", ""), texts("w7", "")]
        encoded = encode_texts(Splits(*parts), tokenizer)
        assert [len(part) for part in encoded[:3]] == [2, 3, 2]  # empty texts are kept
        assert encoded.train[0]["input_ids"] == tokenizer("w5 w6")["input_ids"]

    def test_the_digits_share_no_image(self):
        assert set(check_splits(dict(zip(("a", "b", "c"), load_splits()[:3], strict=True))).overlap.values()) == {0}

    def test_20_newsgroups_shares_no_text_though_its_source_does(self, real_data):
        source = load_dataset(str(real_data / "20_newsgroups"))
        texts = {role: {text for text in part["text"] if text.strip()} for role, part in source.items()}
        assert len(texts["train"] & texts["test"]) == 5
        splits = load_splits(str(real_data / "20_newsgroups"))
        train, calibration, test = ({text for text in part["text"] if text.strip()} for part in splits[:3])
        assert not train & calibration and not train & test and not calibration & test


class TestTrainer:
    def test_a_calibration_set_with_rows_of_train_is_an_error_whatever_the_label(self, tmp_path):
        train = tiny.token_dataset(48, seed=0)
        copies = train.select(range(7)).map(lambda row: {"labels": (row["labels"] + 1) % 3})
        mixed = Dataset.from_list([*tiny.token_dataset(53, seed=1), *copies], features=train.features)
        with pytest.raises(
            ValueError, match=r"7 of 60 calibration rows .* a train row \(rows 53, 54, 55, 56, 57, \.\."
        ):
            tiny.trainer(tmp_path, train_dataset=train, eval_dataset=mixed, split_overlap="error")
        kept = tiny.trainer(tmp_path, train_dataset=train, eval_dataset=mixed).train_dataset
        assert kept["input_ids"][:] == train["input_ids"][7:]  # by default training rows give way

    def test_the_training_set_cannot_be_the_calibration_set(self, tmp_path):
        data = tiny.token_dataset(60)
        with pytest.raises(ValueError, match="All 60 rows stand in the held-out sets too"):
            tiny.trainer(tmp_path, train_dataset=data, eval_dataset=data)

    def test_a_column_the_model_does_not_read_hides_nothing(self, tmp_path):
        data = tiny.token_dataset(60)
        numbered = [data.add_column("row", list(range(start, start + 60))) for start in (0, 60)]
        with pytest.raises(ValueError, match="All 60 rows stand in the held-out sets too"):
            tiny.trainer(tmp_path, train_dataset=numbered[0], eval_dataset=numbered[1])

    @pytest.mark.parametrize(("policy", "says"), [("warn", True), ("skip", False)])
    def test_it_can_be_allowed(self, tmp_path, warnings, policy, says):
        data = tiny.token_dataset(60)
        run = tiny.trainer(tmp_path, train_dataset=data, eval_dataset=data, split_overlap=policy, num_train_epochs=1)
        run.train()
        assert run.loss.gammas.ne(1).any()
        assert ("60 of 60 calibration rows" in warnings.text) is says

    def test_an_unknown_policy_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match="split_overlap must be one of drop, error, warn, skip; found 'no'"):
            tiny.arguments(tmp_path, split_overlap="no")

    def test_losses_without_gamma_are_not_held_up(self, tmp_path):
        data = tiny.token_dataset(60)
        tiny.trainer(tmp_path, train_dataset=data, eval_dataset=data, loss="cross_entropy")

    def test_a_carved_part_shares_nothing_because_train_loses_its_copies(self, tmp_path, warnings):
        data = tiny.token_dataset(30)
        data = Dataset.from_list([*data, *data], features=data.features)
        run = tiny.trainer(tmp_path, train_dataset=data, eval_dataset=None, calibration_fraction=0.2)
        train, held_out = (set(map(tuple, part["input_ids"])) for part in (run.train_dataset, run.calibration_dataset))
        assert len(run.calibration_dataset) == 12 and not train & held_out
        assert f"Dropped {48 - len(run.train_dataset)} of 48 training rows" in warnings.text

    def test_a_carved_part_is_left_alone_if_nothing_is_to_be_read(self, tmp_path):
        data = tiny.token_dataset(30)
        data = Dataset.from_list([*data, *data], features=data.features)
        run = tiny.trainer(
            tmp_path, train_dataset=data, eval_dataset=None, calibration_fraction=0.2, split_overlap="skip"
        )
        assert len(run.train_dataset) == 48

    def test_the_test_entry_of_a_dict_cannot_be_the_calibration_set(self, tmp_path):
        data = tiny.token_dataset(60, seed=1)
        with pytest.raises(ValueError, match="60 of 60 test rows .* a calibration row"):
            tiny.trainer(tmp_path, eval_dataset={"calibration": data, "test": data})

    def test_the_evaluation_set_may_be_the_calibration_set(self, tmp_path):
        data = tiny.token_dataset(60, seed=1)
        tiny.trainer(tmp_path, eval_dataset={"calibration": data, "validation": data})

    def test_a_streamed_training_set_gives_one_warning_and_trains(self, tmp_path, warnings):
        data = tiny.token_dataset(48)
        streamed = IterableDataset.from_generator(lambda: iter(data))
        run = tiny.trainer(tmp_path, train_dataset=streamed, max_steps=2, eval_strategy="steps", eval_steps=2)
        run.train()
        assert warnings.text.count("cannot be checked for train: a IterableDataset is streamed") == 1
        assert run.loss.gammas.ne(1).any()

    def test_the_check_does_not_change_the_run(self, tmp_path):
        def noisy(index):
            ids = torch.randint(1, tiny.VOCABULARY, (4,))
            return {"input_ids": ids, "labels": index % 3}

        tables = []
        for policy in ("error", "skip"):
            run = tiny.trainer(
                tmp_path, train_dataset=Rows(noisy, 48), eval_dataset=tiny.token_dataset(60), split_overlap=policy
            )
            run.train()
            tables.append(run.loss.gammas.tolist())
        assert tables[0] == tables[1]


class TinyTask(TextTask):
    """Three sets handed in as they are."""

    splits: Splits

    def prepare(self, seed):
        return Prepared(self.splits, tiny.bert, None, DefaultDataCollator())


def task(train, calibration, test) -> TinyTask:
    tiny_task = TinyTask()
    tiny_task.splits = Splits(train, calibration, test)
    return tiny_task


class TestFinetune:
    @pytest.mark.parametrize("loss", ["adafocal", "cross_entropy"])
    def test_a_test_split_with_calibration_rows_is_an_error_before_training(self, tmp_path, loss):
        calibration = tiny.token_dataset(60, seed=1)
        with pytest.raises(ValueError, match="12 of 12 test rows .* a calibration row"):
            finetune(
                task(tiny.token_dataset(48), calibration, calibration.select(range(12))),
                tiny.arguments(tmp_path, loss=loss),
            )
        assert not list(tmp_path.iterdir())

    def test_the_report_names_each_split_by_its_content_and_what_they_share(self, tmp_path):
        train, calibration = tiny.token_dataset(48), tiny.token_dataset(60, seed=1)
        test = tiny.token_dataset(12, seed=2)
        report = finetune(task(train, calibration, test), tiny.arguments(tmp_path, num_train_epochs=1)).to_dict()
        assert json.loads((tmp_path / "report.json").read_text()) == report
        assert report["overlap"] == {
            "policy": "drop",
            "rows": {"calibration in train": 0, "test in train": 0, "test in calibration": 0},
            "dropped": 0,
        }
        assert {role: split["size"] for role, split in report["splits"].items()} == {
            "train": 48, "calibration": 60, "test": 12,
        }  # fmt: skip
        assert report["splits"]["test"]["hash"] == fingerprint(test.shuffle(seed=3)).hash

    def test_an_allowed_overlap_stands_in_the_report(self, tmp_path):
        train, calibration = tiny.token_dataset(48), tiny.token_dataset(60, seed=1)
        args = tiny.arguments(tmp_path, num_train_epochs=1, split_overlap="warn")
        report = finetune(task(train, calibration, calibration.select(range(12))), args).to_dict()
        assert report["overlap"]["policy"] == "warn" and report["overlap"]["rows"]["test in calibration"] == 12

    def test_sets_that_were_not_compared_are_reported_so(self, tmp_path):
        train, calibration = tiny.token_dataset(48), tiny.token_dataset(60, seed=1)
        args = tiny.arguments(tmp_path, num_train_epochs=1, split_overlap="skip")
        report = finetune(task(train, calibration, calibration), args).to_dict()
        assert report["overlap"] == {"policy": "skip", "rows": {}, "dropped": 0}
        assert report["splits"]["test"] == {"size": 60}
