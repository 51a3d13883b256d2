"""Entity-level metrics: spans by hand, counts against a slow search, calibration of entities."""

import numpy as np
import pytest

from hf_adafocal.metrics.entities import Entity, entities_of, entity_report

NAMES = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def slow_entities(tags):
    """Every stretch of tags that is an entity and cannot be longer."""
    found = set()
    for start in range(len(tags)):
        for end in range(start + 1, len(tags) + 1):
            kinds = {tag[2:] for tag in tags[start:end]}
            inside = (
                len(kinds) == 1 and "O" not in tags[start:end] and all(tag[0] == "I" for tag in tags[start + 1 : end])
            )
            kind = tags[start][2:]
            begins = tags[start][0] == "B" or start == 0 or tags[start - 1][2:] != kind
            ends = end == len(tags) or tags[end] != f"I-{kind}"
            if inside and begins and ends and tags[start] != "O":
                found.add(Entity(kind, start, end))
    return found


def batch(seed, size=6, length=12):
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.full(5, 0.3), (size, length))
    labels = np.where(
        random.random((size, length)) < 0.6, probabilities.argmax(-1), random.integers(0, 5, (size, length))
    )
    labels[random.random(labels.shape) < 0.2] = -100
    return probabilities, labels


class TestEntitiesOf:
    @pytest.mark.parametrize(
        ("tags", "expected"),
        [
            (["B-PER", "I-PER", "O", "B-LOC"], [("PER", 0, 2), ("LOC", 3, 4)]),
            (["B-PER", "B-PER", "I-PER"], [("PER", 0, 1), ("PER", 1, 3)]),
            (["I-PER", "I-LOC", "I-LOC"], [("PER", 0, 1), ("LOC", 1, 3)]),
            (["O", "O"], []),
            ([], []),
        ],
    )
    def test_by_hand(self, tags, expected):
        assert entities_of(tags) == expected

    def test_they_are_those_of_a_search_over_all_stretches(self):
        random = np.random.default_rng(0)
        for _ in range(300):
            tags = [NAMES[k] for k in random.integers(0, 5, random.integers(0, 9))]
            assert set(entities_of(tags)) == slow_entities(tags)

    @pytest.mark.parametrize("tag", ["NOUN", "S-PER", "B-", ""])
    def test_other_tags_are_an_error(self, tag):
        with pytest.raises(ValueError, match="B-TYPE, I-TYPE and O, found"):
            entities_of(["O", tag])


class TestEntityReport:
    def test_counts_are_those_of_sets_of_spans(self):
        probabilities, labels = batch(0)
        true, guessed = set(), set()
        for index, (row, of_row) in enumerate(zip(probabilities, labels, strict=True)):
            kept = of_row != -100
            true |= {(index, *entity) for entity in slow_entities([NAMES[k] for k in of_row[kept]])}
            guessed |= {(index, *entity) for entity in slow_entities([NAMES[k] for k in row[kept].argmax(-1)])}
        found = entity_report(probabilities, labels, NAMES)
        assert found["precision"] == len(true & guessed) / len(guessed)
        assert found["recall"] == len(true & guessed) / len(true)
        of_kind = [{entity for entity in part if entity[1] == "PER"} for part in (true, guessed)]
        assert found["f1_PER"] == pytest.approx(2 * len(of_kind[0] & of_kind[1]) / sum(map(len, of_kind)))

    def test_the_calibration_error_is_that_of_entities_by_hand(self):
        p = np.zeros((1, 4, 5))
        p[0, 0, [3, 0]] = 0.9, 0.1  # B-PER
        p[0, 1, [4, 0]] = 0.5, 0.5  # O, which comes first: half a right entity
        p[0, 2, [1, 0]] = 0.8, 0.2  # B-LOC
        p[0, 3, [2, 0]] = 0.75, 0.25  # I-LOC
        found = entity_report(p, [[3, 4, 1, 2]], NAMES)
        assert found["num_predicted"] == found["num_entities"] == 2 and found["f1"] == 0.5
        assert found["ece"] == pytest.approx((0.9 + 0.4) / 2)  # PER is wrong at 0.9, LOC right at 0.8 * 0.75

    def test_a_type_that_is_only_there_or_only_predicted_has_an_f1_of_0(self):
        p = np.eye(5)[[[1, 0, 0]]]  # LOC, O, O
        for labels, kinds in (([[0, 3, 0]], ["LOC", "PER"]), ([[1, 3, 0]], ["LOC", "PER"]), ([[0, 0, 3]], None)):
            found = entity_report(p, labels, NAMES)
            assert found["f1_PER"] == 0 and found["f1_LOC"] == (labels[0][0] == 1)
            assert kinds is None or [name for name in found if name.startswith("f1_")] == [f"f1_{k}" for k in kinds]
            assert {type(number) for number in found.values()} == {float}

    def test_tags_that_rounding_puts_above_1_make_no_entity_surer_than_1(self):
        p = np.zeros((1, 3, 5))
        p[0, [0, 1, 2], [3, 4, 4]] = 1.004  # together 1.012
        assert entity_report(p, [[3, 4, 4]], NAMES)["ece"] == 0

    def test_what_is_ignored_changes_nothing(self):
        probabilities, labels = batch(1)
        changed = probabilities.copy()
        changed[labels == -100] = [0, 1, 0, 0, 0]
        assert entity_report(changed, labels, NAMES) == entity_report(probabilities, labels, NAMES)

    def test_without_entities_scores_are_zero_and_there_is_no_calibration_error(self):
        p = np.zeros((1, 2, 5))
        p[..., 0] = 1
        found = entity_report(p, [[0, 0]], NAMES)
        assert found == {"num_entities": 0, "num_predicted": 0, "precision": 0, "recall": 0, "f1": 0}

    def test_shapes_that_do_not_fit_are_an_error(self):
        with pytest.raises(ValueError, match=r"probabilities \(N, L, 5\)"):
            entity_report(np.zeros((2, 3, 4)), np.zeros((2, 3), dtype=int), NAMES)

    @pytest.mark.parametrize("label", [-1, 5])
    def test_a_label_out_of_range_is_an_error(self, label):
        with pytest.raises(ValueError, match=rf"must lie in \[0, 5\) or be -100, found \[ *{label}"):
            entity_report(np.eye(5)[[[0, 1]]], [[label, -100]], NAMES)

    def test_logits_of_counted_tokens_are_an_error_and_those_of_ignored_ones_are_not_looked_at(self):
        logits = np.array([[[1.0, 0, 0, 0, 0], [7.0, -3, 1, 0, 0]]])
        assert entity_report(logits, [[0, -100]], NAMES)["num_entities"] == 0
        assert entity_report(logits, [[-100, -100]], NAMES)["num_predicted"] == 0
        with pytest.raises(ValueError, match="look like logits"):
            entity_report(logits, [[-100, 1]], NAMES)
