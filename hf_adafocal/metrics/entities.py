"""Entity-level metrics of token classification: precision, recall, F1 and calibration of whole entities."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_adafocal.metrics.scores import calibration_error
from hf_adafocal.metrics.validation import as_array, checked_chunks

OUTSIDE = "O"


class Entity(NamedTuple):
    """An entity of a sequence of tags.

    Attributes:
        kind: Its type.
        start: Position of its first tag.
        end: Position after its last tag.
    """

    kind: str
    start: int
    end: int


def entities_of(tags: Sequence[str]) -> list[Entity]:
    """Find the entities of a sequence of tags `B-TYPE`, `I-TYPE` and `O`.

    An entity starts at a `B`, and at an `I` that follows `O` or another type, as CoNLL's own script has it.

    Raises:
        ValueError: If a tag is none of the three.

    >>> entities_of(["B-PER", "I-PER", "B-PER", "O", "I-LOC"])
    [Entity(kind='PER', start=0, end=2), Entity(kind='PER', start=2, end=3), Entity(kind='LOC', start=4, end=5)]
    """
    found: list[Entity] = []
    for place, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if tag != OUTSIDE and (prefix not in ("B", "I") or not kind):
            raise ValueError(f"Tags of entities are B-TYPE, I-TYPE and O, found {tag!r}.")
        if tag == OUTSIDE:
            continue
        goes_on = prefix == "I" and found and found[-1].end == place and found[-1].kind == kind
        if goes_on:
            found[-1] = found[-1]._replace(end=place + 1)
        else:
            found.append(Entity(kind, place, place + 1))
    return found


def entity_report(
    probabilities: Any, labels: Any, names: Sequence[str], num_bins: int = 15, *, ignore_index: int = -100
) -> dict[str, float]:
    """Compute metrics of whole entities: a predicted entity is right if its type and both of its ends are.

    The confidence of a predicted entity is the product of the probabilities of its tags: the probability that all of
    them are right, were they independent.

    Args:
        probabilities: Of the tags of each token, shape `(N, L, C)`.
        labels: Tags, shape `(N, L)`; `ignore_index` for tokens that do not count (padding, word pieces after the
            first), which are left out before entities are found.
        names: Name of each tag, in the order of the classes.
        num_bins: Bins of the calibration error.
        ignore_index: Label of tokens that do not count.

    Returns:
        `num_entities` and `num_predicted`; `precision`, `recall` and `f1`, 0 where there is nothing to divide by;
        `ece` of the predicted entities, absent if there is none; and `f1_TYPE` of each type.

    Raises:
        ValueError: If the shapes do not fit, a label is out of range, a name is not a tag of entities, or the rows of
            tokens that count are not probabilities.

    Source: Tjong Kim Sang and De Meulder 2003, Introduction to the CoNLL-2003 shared task (precision, recall, F1).

    >>> p = np.array([[[0.1, 0.9, 0.0], [0.2, 0.0, 0.8], [1.0, 0.0, 0.0]]])
    >>> report = entity_report(p, [[1, 2, 0]], ["O", "B-PER", "I-PER"])
    >>> report["f1"], round(report["ece"], 2)  # 1 - 0.9 * 0.8
    (1.0, 0.28)
    """
    probabilities, labels = as_array(probabilities).astype(np.float64), as_array(labels)
    if probabilities.ndim != 3 or labels.shape != probabilities.shape[:2] or probabilities.shape[2] != len(names):
        raise ValueError(
            f"Expected probabilities (N, L, {len(names)}) and labels (N, L), found {probabilities.shape} and "
            f"{labels.shape}."
        )
    counted = labels != ignore_index
    if not np.isin(labels[counted], np.arange(len(names))).all():
        raise ValueError(
            f"Labels must lie in [0, {len(names)}) or be {ignore_index}, found {np.unique(labels[counted])}."
        )
    if counted.any():
        for _ in checked_chunks(probabilities[counted]):
            pass
    true: dict[str, int] = {}
    right: dict[str, int] = {}
    guessed: dict[str, int] = {}
    confidence, correct = [], []
    for row, of_row, used in zip(probabilities, labels, counted, strict=True):
        kept = row[used]
        truth = set(entities_of([names[int(label)] for label in of_row[used]]))
        for entity in truth:
            true[entity.kind] = true.get(entity.kind, 0) + 1
        for entity in entities_of([names[label] for label in kept.argmax(-1)]):
            guessed[entity.kind] = guessed.get(entity.kind, 0) + 1
            hit = entity in truth
            right[entity.kind] = right.get(entity.kind, 0) + hit
            places = slice(entity.start, entity.end)
            confidence.append(float(kept[places].max(-1).prod()))
            correct.append(hit)
    found = {"num_entities": float(sum(true.values())), "num_predicted": float(len(correct))}
    found |= _scores(sum(right.values()), len(correct), sum(true.values()))
    if correct:
        found["ece"] = calibration_error(np.minimum(confidence, 1.0), np.array(correct), num_bins)
    for kind in sorted(true.keys() | guessed.keys()):
        found[f"f1_{kind}"] = _scores(right.get(kind, 0), guessed.get(kind, 0), true.get(kind, 0))["f1"]
    return found


def _scores(right: int, guessed: int, true: int) -> dict[str, float]:
    return {
        "precision": right / guessed if guessed else 0.0,
        "recall": right / true if true else 0.0,
        "f1": 2 * right / (guessed + true) if guessed + true else 0.0,
    }
