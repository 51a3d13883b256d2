import gzip
import io
import json
import zipfile

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import train_test_split

from hf_adafocal import cli
from hf_adafocal.cli import main
from hf_adafocal.metrics.prediction_files import read_groups, read_predictions
from hf_adafocal.metrics.scores import expected_calibration_error, top_label

SUFFIXES = ("parquet", "csv", "npz")
every_suffix = pytest.mark.parametrize("suffix", SUFFIXES)
every_nested_suffix = pytest.mark.parametrize("suffix", ["parquet", "npz"])


def predictions(size=2000, gap=0.0):
    """Probabilities of three classes whose top one is right at a rate of its probability minus the gap."""
    generator = np.random.default_rng(0)
    confidence = 0.5 + 0.5 * generator.random(size)
    predicted = generator.integers(3, size=size)
    labels = np.where(generator.random(size) < confidence - gap, predicted, (predicted + 1) % 3)
    probabilities = np.repeat((1 - confidence[:, None]) / 2, 3, axis=1)
    probabilities[np.arange(size), predicted] = confidence
    return probabilities, labels


def pairs(size=2000, gap=0.0):
    return top_label(*predictions(size, gap))


def save(path, **columns):
    """Write arrays, or lists of a row each, to a file of the kind its suffix says."""
    if path.suffix == ".npz":
        np.savez(path, **columns)
        return path
    table = pyarrow.table({name: list(values) for name, values in columns.items()})
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pyarrow.parquet.write_table(table, path)
    return path


class TestReadPredictions:
    @every_suffix
    @pytest.mark.parametrize("dtype", [bool, int, float])
    def test_it_reads_pairs_from_every_kind_of_file(self, tmp_path, suffix, dtype):
        confidence, correct = pairs(50)
        path = save(tmp_path / f"p.{suffix}", id=np.arange(50), confidence=confidence, correct=correct.astype(dtype))
        found = read_predictions(path)
        assert (found[0] == confidence).all() and (found[1] == correct).all()

    @every_nested_suffix
    def test_it_takes_the_top_label_of_probabilities(self, tmp_path, suffix):
        probabilities, labels = predictions(50)
        found = read_predictions(save(tmp_path / f"p.{suffix}", probabilities=probabilities, label=labels))
        expected = top_label(probabilities, labels)
        assert (found[0] == expected[0]).all() and (found[1] == expected[1]).all()

    @pytest.mark.parametrize("kind", [pyarrow.list_, pyarrow.large_list, lambda v: pyarrow.list_(v, 3)])
    def test_every_list_type_of_parquet_is_read(self, tmp_path, kind):
        probabilities, labels = predictions(50)
        column = pyarrow.array(list(probabilities.astype(np.float32)), kind(pyarrow.float32()))
        pyarrow.parquet.write_table(
            pyarrow.table({"probabilities": column, "label": labels}), tmp_path / "p.parquet", row_group_size=7
        )
        assert (read_predictions(tmp_path / "p.parquet")[1] == top_label(probabilities, labels)[1]).all()

    @every_suffix
    def test_columns_can_have_other_names(self, tmp_path, suffix):
        path = save(tmp_path / f"p.{suffix}", score=[0.25, 0.5], hit=[1, 0])
        confidence, correct = read_predictions(path, pair_columns=("score", "hit"))
        assert confidence.tolist() == [0.25, 0.5] and correct.tolist() == [1, 0]

    @every_nested_suffix
    def test_probability_columns_can_have_other_names_and_win_over_the_default_pair(self, tmp_path, suffix):
        columns = {"probs": [[0.25, 0.75], [0.5, 0.5]], "y": [1, 1], "confidence": [0.1, 0.1], "correct": [0, 0]}
        path = save(tmp_path / f"p.{suffix}", **columns)
        confidence, correct = read_predictions(path, probability_columns=("probs", "y"))
        assert confidence.tolist() == [0.75, 0.5] and correct.tolist() == [True, False]

    @every_nested_suffix
    def test_a_file_with_both_kinds_of_columns_needs_a_choice(self, tmp_path, suffix):
        columns = {"probabilities": [[0.25, 0.75]], "label": [1], "confidence": [0.5], "correct": [0]}
        path = save(tmp_path / f"p.{suffix}", **columns)
        with pytest.raises(ValueError, match="found more than one of them. Name the two to read"):
            read_predictions(path)
        assert read_predictions(path, pair_columns=("confidence", "correct"))[0].tolist() == [0.5]

    def test_both_kinds_of_names_are_an_error(self, tmp_path):
        path = save(tmp_path / "p.npz", confidence=[0.5], correct=[0])
        with pytest.raises(ValueError, match="not both"):
            read_predictions(path, pair_columns=("a", "b"), probability_columns=("c", "d"))

    @every_suffix
    def test_missing_columns_are_an_error_that_names_file_and_columns(self, tmp_path, suffix):
        path = save(tmp_path / f"p.{suffix}", confidence=[0.5], label=[0])
        with pytest.raises(ValueError, match=rf"p.{suffix}: expected columns.*found \['confidence', 'label'\]"):
            read_predictions(path)
        with pytest.raises(ValueError, match=rf"p.{suffix}: no column 'hit', found \['confidence', 'label'\]"):
            read_predictions(path, pair_columns=("confidence", "hit"))

    @every_suffix
    @pytest.mark.parametrize(
        ("confidence", "correct", "match"),
        [
            ([0.5, 1.5], [0, 1], r"columns 'confidence' and 'correct': Probabilities must lie in \[0, 1\]"),
            ([0.5, 0.5], [0, 2], "columns 'confidence' and 'correct': Outcomes must be 0 or 1"),
            (["high", "low"], [0, 1], "column 'confidence': expected numbers, found"),
            ([0.5, 0.5], ["yes", "no"], "column 'correct': expected numbers, found"),
        ],
        ids=["confidence above 1", "outcome 2", "words as confidence", "words as outcome"],
    )
    def test_unusable_values_are_an_error_that_names_file_and_column(
        self, tmp_path, suffix, confidence, correct, match
    ):
        path = save(tmp_path / f"p.{suffix}", confidence=confidence, correct=correct)
        with pytest.raises(ValueError, match=rf"p\.{suffix}, {match}"):
            read_predictions(path)

    @pytest.mark.parametrize("suffix", ["parquet", "csv"])
    def test_nulls_are_an_error_that_counts_them(self, tmp_path, suffix):
        path = save(tmp_path / f"p.{suffix}", confidence=[0.5, None, None], correct=[0, 1, 1])
        with pytest.raises(ValueError, match="column 'confidence': expected a value in each row, found 2 nulls"):
            read_predictions(path)

    @pytest.mark.parametrize(
        ("probabilities", "match"),
        [
            ([[0.5, 0.5], [1.0]], "column 'probabilities': expected lists of one length, found 1 to 2"),
            ([[0.5, 0.5], [None, 0.5]], "column 'probabilities': expected a value in each row, found 1 nulls"),
            ([[2.0, -1.0], [0.1, 3.0]], "columns 'probabilities' and 'label': .*look like logits"),
            ([0.5, 0.5], "column 'probabilities': expected a list.*name the two columns as pair columns"),
            (["0.5 0.5", "0.1 0.9"], "column 'probabilities': expected numbers, found text"),
        ],
        ids=["uneven", "null inside", "logits", "one number", "text"],
    )
    def test_lists_that_are_no_probabilities_are_an_error(self, tmp_path, probabilities, match):
        path = save(tmp_path / "p.parquet", probabilities=probabilities, label=[0, 1])
        with pytest.raises(ValueError, match=f"p.parquet, {match}"):
            read_predictions(path)

    @pytest.mark.parametrize("rows", [[], [[], []]], ids=["no rows", "empty lists"])
    def test_no_probabilities_at_all_are_an_error(self, tmp_path, rows):
        column = pyarrow.array(rows, pyarrow.list_(pyarrow.float64()))
        label = pyarrow.array([0] * len(rows), pyarrow.int64())
        pyarrow.parquet.write_table(pyarrow.table({"probabilities": column, "label": label}), tmp_path / "p.parquet")
        with pytest.raises(ValueError, match=rf"p.parquet, columns.*found shapes \({len(rows)}, 0\)"):
            read_predictions(tmp_path / "p.parquet")

    def test_columns_that_are_not_read_may_hold_anything(self, tmp_path):
        path = save(tmp_path / "p.npz", confidence=[0.5], correct=[1], text=np.array(["a", None]))
        assert read_predictions(path)[0].tolist() == [0.5]

    def test_a_matrix_as_confidence_is_an_error(self, tmp_path):
        path = save(tmp_path / "p.npz", confidence=[[0.5, 0.5]], correct=[1])
        with pytest.raises(ValueError, match=r"'confidence' and 'correct': .*found shapes \(1, 2\) and \(1,\)"):
            read_predictions(path)

    @every_suffix
    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 this is no archive"], ids=["empty", "damaged"])
    def test_a_file_that_is_not_what_it_is_called_is_an_error_that_names_it(self, tmp_path, suffix, content):
        path = tmp_path / f"p.{suffix}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"p\.{suffix}: "):
            read_predictions(path)

    @every_suffix
    def test_a_missing_file_or_a_folder_is_an_error_that_names_it(self, tmp_path, suffix):
        (tmp_path / f"folder.{suffix}").mkdir()
        for name in ("missing", "folder"):
            with pytest.raises(ValueError, match=rf"{name}\.{suffix}: cannot be read as {suffix}"):
                read_predictions(tmp_path / f"{name}.{suffix}")

    def test_python_objects_in_an_archive_are_not_loaded(self, tmp_path):
        path = save(tmp_path / "p.npz", confidence=np.array([0.5, None]), correct=[0, 1])
        with pytest.raises(ValueError, match="p.npz.*allow_pickle"):
            read_predictions(path)

    def test_a_single_array_is_an_error(self, tmp_path):
        np.save(tmp_path / "p.npy", np.zeros(3))
        (tmp_path / "p.npy").rename(tmp_path / "p.npz")
        with pytest.raises(ValueError, match="p.npz: cannot be read as npz"):
            read_predictions(tmp_path / "p.npz")

    def test_another_kind_of_file_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match=r"p.json: expected a .parquet, .csv, .tsv, .jsonl, .npz or .npy file"):
            read_predictions(tmp_path / "p.json")


NAMES = ["cat", "dog", "eel"]


class TestGroups:
    @every_suffix
    def test_the_gate_takes_the_images_of_pixels_from_the_column_group_or_the_one_that_is_named(
        self, tmp_path, suffix, capsys
    ):
        confidence, correct = pairs(400)
        for column, more in (("group", []), ("image", ["--group-column", "image"])):
            groups = np.arange(400) % 20
            path = save(
                tmp_path / f"p.{suffix}", confidence=confidence, correct=correct.astype(int), **{column: groups}
            )
            main(["gate", "--max-ece", "0.5", *more, str(path)])
            assert "400 samples in 20 groups" in capsys.readouterr().out
            np.testing.assert_array_equal(read_groups(path, "image" if more else None), groups)
        assert read_groups(path) is None

    def test_a_column_that_is_not_there_is_an_error(self, tmp_path, capsys):
        confidence, correct = pairs(40)
        path = save(tmp_path / "p.csv", confidence=confidence, correct=correct.astype(int))
        assert main(["gate", "--max-ece", "0.5", "--group-column", "image", str(path)]) == 2
        assert "no column 'image'" in capsys.readouterr().err


def write_text(path, separator, names=NAMES, label=NAMES.__getitem__, size=40):
    """One column per class and a label, in text, as spreadsheets and `DataFrame.to_csv` write it."""
    probabilities, labels = predictions(size)
    header = separator.join([*(f"prob_{name}" for name in names), "label"])
    lines = [
        separator.join([*map(repr, row), str(label(k))]) for row, k in zip(probabilities.tolist(), labels, strict=True)
    ]
    text = "\n".join([header, *lines, ""])
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w")
    with opened as file:
        file.write(text)
    return top_label(probabilities, labels)


def assert_read(path, expected):
    found = read_predictions(path)
    assert (found[0] == expected[0]).all() and (found[1] == expected[1]).all()


class TestWhatPeopleHave:
    @pytest.mark.parametrize(
        ("name", "separator"),
        [
            ("p.csv", ","),
            ("p.csv", ";"),
            ("p.tsv", "\t"),
            ("run.1.csv.gz", ","),
            ("p.tsv.gz", "\t"),
            ("run.1.CSV", ";"),
        ],
    )
    def test_a_column_for_each_class_and_the_name_of_the_label(self, tmp_path, name, separator):
        assert_read(tmp_path / name, write_text(tmp_path / name, separator))

    @pytest.mark.parametrize("names", [["0", "1", "2"], NAMES], ids=["numbers as names", "other names"])
    def test_a_label_that_is_a_number_is_the_name_of_a_class_or_the_index_of_its_column(self, tmp_path, names):
        assert_read(tmp_path / "p.csv", write_text(tmp_path / "p.csv", ",", names, label=int))

    def test_numbers_as_names_win_over_the_order_of_the_columns(self, tmp_path):
        (tmp_path / "p.csv").write_text("prob_1,prob_0,label\n0.75,0.25,1\n0.75,0.25,0\n")
        assert read_predictions(tmp_path / "p.csv")[1].tolist() == [True, False]

    @pytest.mark.parametrize("suffix", ["parquet", "npz"])
    def test_columns_of_classes_are_read_from_binary_files_too(self, tmp_path, suffix):
        probabilities, labels = predictions(40)
        columns = {f"prob_{name}": column for name, column in zip(NAMES, probabilities.T, strict=True)}
        names = np.array(NAMES)[labels]
        assert_read(save(tmp_path / f"p.{suffix}", **columns, label=names), top_label(probabilities, labels))

    def test_a_label_dictionary_of_parquet_is_read(self, tmp_path):
        column = pyarrow.array(["b", "a"]).dictionary_encode()
        table = pyarrow.table({"prob_a": [0.25, 0.75], "prob_b": [0.75, 0.25], "label": column})
        pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
        assert read_predictions(tmp_path / "p.parquet")[1].tolist() == [True, True]

    def test_boolean_labels_name_the_classes_true_and_false(self, tmp_path):
        (tmp_path / "p.csv").write_text("prob_False,prob_True,label\n0.25,0.75,True\n0.25,0.75,False\n")
        assert read_predictions(tmp_path / "p.csv")[1].tolist() == [True, False]

    @pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".tsv"])
    def test_lists_in_text_are_json(self, tmp_path, suffix):
        probabilities, labels = predictions(40)
        separator = "\t" if suffix == ".tsv" else ","
        quoted = [f'"{json.dumps(row)}"{separator}{k}' for row, k in zip(probabilities.tolist(), labels, strict=True)]
        text = "\n".join([f"probabilities{separator}label", *quoted, ""])
        path = tmp_path / f"p{suffix}"
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
        assert_read(path, top_label(probabilities, labels))

    @pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
    @pytest.mark.parametrize("form", ["pairs", "lists", "columns"])
    def test_lines_of_json(self, tmp_path, suffix, form):
        probabilities, labels = predictions(40)
        confidence, correct = top_label(probabilities, labels)
        samples = list(zip(probabilities.tolist(), labels.tolist(), strict=True))
        rows = {
            "pairs": [{"confidence": float(c), "correct": bool(r)} for c, r in zip(confidence, correct, strict=True)],
            "lists": [
                {"probabilities": p.tolist(), "label": int(k)} for p, k in zip(probabilities, labels, strict=True)
            ],
            "columns": [
                {"label": NAMES[k], **{f"prob_{name}": v for name, v in zip(NAMES, p, strict=True)}}
                for p, k in samples
            ],
        }[form]
        text = "\n".join(map(json.dumps, rows)).encode()
        path = tmp_path / f"p{suffix}"
        path.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
        assert_read(path, (confidence, correct))

    def test_an_array_of_two_columns_and_a_structured_array(self, tmp_path):
        confidence, correct = pairs(40)
        np.save(tmp_path / "p.npy", np.stack([confidence, correct], axis=1))
        assert_read(tmp_path / "p.npy", (confidence, correct))
        structured = np.zeros(40, dtype=[("correct", bool), ("confidence", "f8")])
        structured["confidence"], structured["correct"] = confidence, correct
        np.save(tmp_path / "p.npy", structured)
        assert_read(tmp_path / "p.npy", (confidence, correct))

    def test_decimals_and_half_precision_of_parquet_are_numbers(self, tmp_path):
        columns = {
            "confidence": pyarrow.array([0.25, 0.5], pyarrow.float32()).cast(pyarrow.decimal128(5, 3)),
            "correct": pyarrow.array([1, 0], pyarrow.uint8()),
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
        assert read_predictions(tmp_path / "p.parquet")[0].tolist() == [0.25, 0.5]

    def test_a_byte_order_mark_and_windows_line_ends_are_no_obstacle(self, tmp_path):
        (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbfconfidence;correct\r\n0.25;1\r\n0.5;0\r\n")
        assert read_predictions(tmp_path / "p.csv")[0].tolist() == [0.25, 0.5]

    def test_a_column_of_notes_may_hold_line_ends_and_the_other_separator(self, tmp_path):
        rows = [f'{k % 2},{k % 2},"{k};;;\n{"x" * 60}"' for k in range(20_000)]  # more than one block of the parser
        (tmp_path / "p.csv").write_text("\n".join(["confidence,correct,note", *rows, ""]))
        assert read_predictions(tmp_path / "p.csv")[0].tolist() == [0, 1] * 10_000

    def test_a_column_of_lists_may_have_a_name_like_those_of_classes(self, tmp_path):
        path = save(tmp_path / "p.parquet", prob_all=[[0.25, 0.75], [0.5, 0.5]], label=[1, 1])
        assert read_predictions(path, probability_columns=("prob_all", "label"))[0].tolist() == [0.75, 0.5]

    def test_a_random_forest_on_iris_has_the_ece_of_its_probabilities(self, tmp_path, capsys):
        features, target = load_iris(return_X_y=True)
        names = load_iris().target_names
        parts = train_test_split(features, target, test_size=0.5, random_state=0, stratify=target)
        forest = RandomForestClassifier(random_state=0).fit(parts[0], parts[2])
        probabilities = forest.predict_proba(parts[1])
        header = ",".join([*(f"prob_{name}" for name in names), "label"])
        lines = [
            ",".join([*map(repr, row), names[k]]) for row, k in zip(probabilities.tolist(), parts[3], strict=True)
        ]
        (tmp_path / "iris.csv").write_text("\n".join([header, *lines, ""]))
        confidence, correct = read_predictions(tmp_path / "iris.csv")
        expected = top_label(probabilities, parts[3])
        assert (confidence == expected[0]).all() and (correct == expected[1]).all()
        assert expected_calibration_error(probabilities, parts[3]) == pytest.approx(0.03213, abs=5e-6)
        assert main(["gate", "--max-ece", "0.5", str(tmp_path / "iris.csv")]) == 0
        assert "0.0321" in capsys.readouterr().out


def encrypted_zip():
    """An .npz whose one member says that it is encrypted."""
    content = bytearray(archive())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + offset] |= 1
    return bytes(content)


def archive():
    file = io.BytesIO()
    np.savez_compressed(file, confidence=np.full(50, 0.5), correct=np.ones(50))
    return file.getvalue()


def damaged_zlib():
    content = bytearray(archive())
    start = content.index(b"confidence.npy") + len("confidence.npy") + 30
    content[start : start + 20] = bytes(20)
    return bytes(content)


def parquet_of(**columns):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def twice():
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_arrays([pyarrow.array([0.5]), pyarrow.array([0.5])], ["confidence", "confidence"])
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def npy_of(shape):
    file = io.BytesIO()
    np.save(file, np.zeros(shape))
    return file.getvalue()


UNREADABLE = {
    "a column twice in csv": ("p.csv", b"confidence,correct,confidence\n0.5,1,0.5\n", "occurs 2 times"),
    "a column twice in parquet": ("p.parquet", twice(), "occurs 2 times"),
    "bad zlib": ("p.npz", damaged_zlib(), "column 'confidence': "),
    "an encrypted zip": ("p.npz", encrypted_zip(), "encrypted"),
    "a date": ("p.parquet", parquet_of(confidence=pyarrow.array([0], pyarrow.date32()), correct=[1]), "found date32"),
    "a struct": ("p.parquet", parquet_of(confidence=[{"a": 1}], correct=[1]), "found struct"),
    "a map": (
        "p.parquet",
        parquet_of(
            confidence=pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int8())), correct=[1]
        ),
        "found map",
    ),
    "nulls alone": ("p.parquet", parquet_of(confidence=pyarrow.nulls(1), correct=[1]), "found 1 nulls"),
    "text": ("p.csv", b"confidence,correct\nhigh,1\n", "expected numbers, found text"),
    "rows of two lengths": ("p.csv", b"confidence,correct\n0.5,1\n0.5\n", "cannot be read as csv"),
    "latin-1": ("p.csv", b"confidence,correct,\xe4\n0.5,1,\xe4\n", "cannot be read as csv"),
    "no gzip": ("p.csv.gz", b"confidence,correct\n0.5,1\n", "cannot be read as csv"),
    "cut gzip": ("p.csv.gz", gzip.compress(b"confidence,correct\n" + b"0.5,1\n" * 999)[:-9], "cannot be read as csv"),
    "json cut off": ("p.jsonl", b'{"confidence": 0.5, "corr', "cannot be read as jsonl"),
    "json without objects": ("p.jsonl", b"[0.5, 1]\n", "one object per line"),
    "json with nulls": ("p.jsonl", b'{"confidence": null, "correct": 1}\n', "found 1 nulls"),
    "json lists of two lengths": (
        "p.jsonl",
        b'{"probabilities": [0.5, 0.5], "label": 0}\n{"probabilities": [1.0], "label": 0}\n',
        "found 1 to 2",
    ),
    "json lists that are none": ("p.csv", b'probabilities,label\n"[0.5, 0.5",1\n', "expected JSON lists"),
    "a label without a column": ("p.csv", b"prob_a,prob_b,label\n0.5,0.5,c\n", "no column for the label 'c'"),
    "a label index too large": ("p.csv", b"prob_a,prob_b,label\n0.5,0.5,2\n", r"labels must lie in \[0, 2\)"),
    "no array": ("p.npy", b"", "cannot be read as npy"),
    "an array of three columns": ("p.npy", npy_of((2, 3)), r"shape \(N, 2\).*found \(2, 3\)"),
    "an array of three dimensions": ("p.npy", npy_of((2, 2, 2)), r"shape \(N, 2\).*found \(2, 2, 2\)"),
    "one column of a class": ("p.csv", b"prob_a,label\n1,a\n", "expected columns"),
    "json with a line without object": (
        "p.jsonl",
        b'{"confidence": 0.5, "correct": 1}\n3\n',
        "one object per line",
    ),
    "nothing": ("p.jsonl", b"", "one object per line"),
    "a folder's suffix": ("p", b"", "expected a .parquet"),
    "packed parquet": ("p.parquet.gz", b"", "expected a .parquet"),
}


class TestUnreadableFiles:
    @pytest.mark.parametrize("case", UNREADABLE, ids=str)
    def test_they_are_an_error_of_one_line_and_exit_with_2(self, tmp_path, capsys, case):
        name, content, match = UNREADABLE[case]
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=match) as error:
            read_predictions(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        assert cli.main(["gate", "--max-ece", "0.1", str(path)]) == 2
        found = capsys.readouterr()
        assert not found.out and found.err.count("\n") == 1

    def test_the_cases_of_archives_are_what_they_are_called(self, tmp_path):
        (tmp_path / "p.npz").write_bytes(encrypted_zip())
        assert zipfile.ZipFile(tmp_path / "p.npz").infolist()[0].flag_bits & 1

    VALID = {
        "p.csv": b"confidence,correct\n0.25,1\n0.5,0\n",
        "p.tsv": b"prob_a\tprob_b\tlabel\n0.25\t0.75\ta\n",
        "p.csv.gz": gzip.compress(b"confidence,correct\n0.25,1\n0.5,0\n"),
        "p.jsonl": b'{"probabilities": [0.25, 0.75], "label": 1}\n{"probabilities": [0.5, 0.5], "label": 0}\n',
        "p.parquet": parquet_of(confidence=[0.25, 0.5], correct=[1, 0]),
        "p.npz": archive(),
    }

    @pytest.mark.parametrize("name", VALID)
    @given(data=st.data())
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_damaged_bytes_are_read_or_refused_with_a_value_error_of_one_line(self, tmp_path, name, data):
        content = bytearray(self.VALID[name])
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, max(len(content) - 1, 0)))
            kind = data.draw(st.sampled_from(["byte", "cut", "insert", "repeat"]))
            if kind == "byte" and content:
                content[at] = data.draw(st.integers(0, 255))
            elif kind == "cut":
                del content[at:]
            elif kind == "insert":
                content[at:at] = data.draw(st.binary(max_size=8))
            else:
                content[at:at] = content[at : at + 12]
        path = tmp_path / name
        path.write_bytes(bytes(content))
        try:
            confidence, correct = read_predictions(path)
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert ((confidence >= 0) & (confidence <= 1)).all() and np.isin(correct, (0, 1)).all()
