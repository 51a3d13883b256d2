"""Means and sums over an optimizer step, class weights, and which labels count."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_names import ANY_SHAPE
from sklearn.utils.class_weight import compute_class_weight

from hf_adafocal.losses import CombinedLoss, CrossEntropyLoss, FocalLoss, balanced_class_weights
from hf_adafocal.losses.batch_samples import MOST_PAIRED
from hf_adafocal.losses.registry import LOSSES, PER_SAMPLE_LOSSES

WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.7])
PARTS = [slice(0, 3), slice(3, 4), slice(4, 12)]


def batch():
    logits, labels = 2 * torch.randn(12, 4, dtype=torch.float64), torch.randint(4, (12,))
    labels[[1, 7]] = -100
    return logits.requires_grad_(), labels


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("name", PER_SAMPLE_LOSSES)
class TestClassWeights:
    def test_micro_batches_add_up_to_the_mean_over_the_weights_of_the_step(self, name):
        (logits, labels), loss_fn = batch(), PER_SAMPLE_LOSSES[name](weight=WEIGHTS)
        total = sum(loss_fn.count(labels[part]) for part in PARTS)
        parts = sum(loss_fn(logits[part], labels[part], total) for part in PARTS)
        torch.testing.assert_close(parts, loss_fn(logits, labels))
        torch.testing.assert_close(gradient(parts, logits), gradient(loss_fn(logits, labels), logits))

    def test_the_count_is_the_sum_of_the_weights_of_the_counted_labels(self, name):
        labels = torch.tensor([[0, 2], [-100, 1]])
        weighted, plain = PER_SAMPLE_LOSSES[name](weight=WEIGHTS), PER_SAMPLE_LOSSES[name]()
        assert weighted.takes_weights
        assert weighted.count(labels).item() == pytest.approx(0.2 + 3.0 + 1.0) and plain.count(labels) == 3
        assert weighted.count(torch.full((3,), -100)) == 0


class TestCombinedLoss:
    def test_the_base_with_weights_is_its_mean_and_the_term_keeps_its_share(self):
        (logits, labels), base = batch(), CrossEntropyLoss(weight=WEIGHTS)
        loss_fn = CombinedLoss("mmce", base, auxiliary_weight=0.5)
        total = sum(loss_fn.count(labels[part]) for part in PARTS)
        parts = sum(loss_fn(logits[part], labels[part], total) for part in PARTS)
        terms = sum(loss_fn.function(logits[part], labels[part]) * base.count(labels[part]) / total for part in PARTS)
        torch.testing.assert_close(parts, base(logits, labels) + 0.5 * terms)

    def test_it_takes_no_weights_itself_and_says_so(self):
        loss_fn = CombinedLoss("mmce")
        assert not loss_fn.takes_weights and not LOSSES["mmce"].func.takes_weights
        with pytest.raises(ValueError, match="Give them to the base"):
            CombinedLoss("mmce", weight=WEIGHTS)

    def test_its_ignore_index_is_that_of_its_base_before_and_after_it_is_set(self):
        logits, labels = batch()
        loss_fn, expected = CombinedLoss("dca"), CombinedLoss("dca", ignore_index=2)
        loss_fn.ignore_index = 2
        assert loss_fn.base.ignore_index == loss_fn.ignore_index == 2
        labels = labels.where(labels >= 0, 2)
        assert loss_fn(logits, labels) == expected(logits, labels) and loss_fn.count(labels) == (labels != 2).sum()


@pytest.mark.parametrize("name", PER_SAMPLE_LOSSES)
def test_an_ignore_index_can_be_set_later(name):
    logits, labels = batch()
    labels = labels.where(labels >= 0, 255)
    loss_fn = PER_SAMPLE_LOSSES[name]()
    loss_fn.ignore_index = 255
    assert loss_fn(logits, labels) == PER_SAMPLE_LOSSES[name](ignore_index=255)(logits, labels)
    assert loss_fn.count(labels) == 10


class TestSum:
    @pytest.mark.parametrize("name", ANY_SHAPE)
    def test_in_a_step_the_sums_of_micro_batches_add_up_whatever_number_of_items_is_passed(self, name):
        (logits, labels), loss_fn = batch(), LOSSES[name](reduction="sum")
        for items in (10, torch.tensor(3), None):
            parts = sum(loss_fn(logits[part], labels[part], items) for part in PARTS)
            expected = sum(loss_fn(logits[part], labels[part]) for part in PARTS)
            torch.testing.assert_close(parts, expected, rtol=0, atol=0)
        if name in PER_SAMPLE_LOSSES:
            torch.testing.assert_close(parts, loss_fn(logits, labels))

    @pytest.mark.parametrize("name", ANY_SHAPE)
    def test_a_mean_divided_by_one_item_is_the_sum(self, name):
        logits, labels = batch()
        torch.testing.assert_close(LOSSES[name]()(logits, labels, 1), LOSSES[name](reduction="sum")(logits, labels))

    def test_it_is_the_sum_that_pytorch_takes(self):
        logits, labels = batch()
        found = CrossEntropyLoss(reduction="sum")(logits, labels, 10)
        torch.testing.assert_close(found, F.cross_entropy(logits, labels, reduction="sum"))

    def test_no_reduction_has_no_mean_over_a_step(self):
        with pytest.raises(ValueError, match="reduction 'none' has no mean over an optimizer step"):
            FocalLoss(reduction="none")(*batch(), 10)

    def test_an_unknown_reduction_is_an_error_when_the_loss_is_made(self):
        with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', found 'avg'"):
            FocalLoss(reduction="avg")


class TestBalancedClassWeights:
    def test_they_are_those_of_scikit_learn(self):
        labels = torch.randint(5, (200,)).clamp_min(1)
        found = balanced_class_weights(labels, 5)
        expected = compute_class_weight("balanced", classes=np.arange(1, 5), y=labels.numpy())
        torch.testing.assert_close(found[1:], torch.tensor(expected, dtype=torch.float32))
        assert found[0] == 1  # a class without labels

    def test_the_mean_weight_of_the_labels_is_one(self):
        labels = torch.tensor([[0, 0, 0], [1, 2, -100]])
        assert balanced_class_weights(labels, 4)[labels[labels >= 0]].mean().item() == pytest.approx(1)

    @pytest.mark.parametrize(
        "labels",
        [[0, 0, 2, 255], [[0, 0], [2, 255]], [[0], [0, 2, 255]], torch.tensor([[0, 255], [2, 0]], dtype=torch.uint8)],
        ids=str,
    )
    def test_labels_may_be_of_rows_tokens_or_pixels(self, labels):
        assert balanced_class_weights(labels, 3, ignore_index=255).tolist() == [0.75, 1, 1.5]

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([0, 3], r"labels must lie in \[0, 3\).*found 0 to 3"),
            ([-1, 0], "found -1 to 0"),
            ([0, 7], "found 0 to 7"),
            ([0.5, 1.0], "must be integer class indices"),
            (torch.tensor([True]), "must be integer class indices"),
            ([], "found none that counts"),
            ([-100], "found none that counts"),
        ],
        ids=str,
    )
    def test_labels_that_make_no_sense_are_an_error(self, labels, message):
        with pytest.raises(ValueError, match=message):
            balanced_class_weights(labels, 3)


@pytest.mark.parametrize("weight", [[1.0, -1.0], [1.0, float("nan")], torch.tensor([float("inf")])], ids=str)
def test_class_weights_that_make_no_sense_are_an_error(weight):
    with pytest.raises(ValueError, match="Class weights must be finite numbers from 0"):
        CrossEntropyLoss(weight=weight)


def test_class_weights_may_be_a_list():
    logits, labels = batch()
    expected = F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(CrossEntropyLoss(weight=[1, 2, 3, 4])(logits, labels), expected)


class TestPairs:
    @pytest.mark.parametrize("term", ["mmce", "mmce_w", "aurc_regularised"])
    def test_terms_that_compare_all_pairs_refuse_more_samples_than_a_named_limit(self, term):
        logits, labels = torch.zeros(2, 2, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)
        with pytest.raises(ValueError, match=f"all pairs of samples.*at most {MOST_PAIRED} .*found 8192.*dca"):
            CombinedLoss(term)(logits, labels)

    @pytest.mark.parametrize(
        "term", ["dca", "mdca", "soft_ece", "soft_ece_label_binned", "dece", "aurc", "selective_au"]
    )
    def test_the_others_take_them(self, term):
        logits, labels = torch.randn(2, 2, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)
        assert CombinedLoss(term)(logits, labels).isfinite()
