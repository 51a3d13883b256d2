"""Where the classes of a model's logits are."""

import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_outputs import SemanticSegmenterOutput, TokenClassifierOutput

from hf_adafocal.losses import LOSSES, CombinedLoss, CrossEntropyLoss
from hf_adafocal.losses.layout import classes_last, classes_second, is_single, resized


class TestClasses:
    """Where the classes are follows from the number of dimensions."""

    def test_rows_and_tokens_have_them_last_and_dense_logits_second(self):
        for shape in ((4, 3), (4, 5, 3)):
            logits = torch.randn(shape)
            assert classes_last(logits, torch.zeros(shape[:-1])) is logits
        dense = torch.randn(2, 3, 4, 5)
        assert torch.equal(classes_last(dense, torch.zeros(2, 4, 5)), dense.permute(0, 2, 3, 1))

    @pytest.mark.parametrize("classes", [3, 5])
    def test_a_loss_gets_tokens_as_rows_also_where_there_are_as_many_tokens_as_classes(self, classes):
        logits, labels = torch.randn(2, 3, classes), torch.tensor([[0, 1, 2], [2, -100, 1]])
        found, targets = classes_second(logits, labels)
        assert torch.equal(found, logits.reshape(6, classes)) and torch.equal(targets, labels.reshape(6))

    @pytest.mark.parametrize("labels", [(2, 4, 5), (2, 5), (2,)], ids=str)
    def test_dense_logits_that_fit_or_cannot_fit_are_left_alone(self, labels):
        logits = torch.randn(2, 3, 4, 5)
        assert resized(logits, torch.zeros(labels)) is logits
        assert resized(logits[..., None, None], torch.zeros(2, 8, 8, 1, 1)).shape == (2, 3, 4, 5, 1, 1)

    def test_small_dense_logits_are_interpolated_to_the_labels(self):
        logits, labels = torch.randn(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.long)
        expected = F.interpolate(logits, size=(8, 8), mode="bilinear", align_corners=False)
        assert torch.equal(classes_second(logits, labels)[0], expected)
        assert torch.equal(classes_last(logits, labels), expected.movedim(1, -1))

    def test_volumes_are_interpolated_too(self):
        logits, labels = torch.randn(1, 2, 3, 3, 3), torch.zeros(1, 6, 6, 6, dtype=torch.long)
        expected = F.interpolate(logits, size=(6, 6, 6), mode="trilinear", align_corners=False)
        assert torch.equal(classes_last(logits, labels), expected.movedim(1, -1))


class TestSingleLogits:
    """A single logit is that of the positive one of two classes."""

    @pytest.mark.parametrize("shape", [(6, 1), (2, 5, 1), (2, 1, 4, 5), (2, 1, 3, 4, 2), (1, 1, 1, 1)], ids=str)
    def test_losses_are_those_of_the_sigmoid(self, shape):
        logits = torch.randn(shape)
        labels = torch.randint(2, shape[:-1] if len(shape) < 4 else (shape[0], *shape[2:]))
        expected = F.binary_cross_entropy_with_logits(logits.reshape(labels.shape), labels.float())
        torch.testing.assert_close(F.cross_entropy(*classes_second(logits, labels)), expected)
        last = classes_last(logits, labels)
        assert last.shape == (*labels.shape, 2) and is_single(logits)
        torch.testing.assert_close(F.cross_entropy(last.reshape(-1, 2), labels.reshape(-1)), expected)

    @pytest.mark.parametrize(
        "shape", [(6, 2), (1, 2), (2, 1, 5), (2, 3, 4, 1), (2, 2, 1, 1), (1, 2, 1, 1, 1)], ids=str
    )
    def test_a_single_sample_token_or_pixel_is_none(self, shape):
        logits = torch.randn(shape)
        labels = torch.zeros(shape[:-1] if len(shape) < 4 else (shape[0], *shape[2:]), dtype=torch.long)
        assert not is_single(logits)
        assert classes_second(logits, labels)[0].numel() == classes_last(logits, labels).numel() == logits.numel()


class TestOutputsOfModels:
    """A loss that a stock Trainer calls gets the model's output."""

    def test_tokens_have_their_classes_last_also_where_there_are_as_many_tokens_as_classes(self):
        logits, labels = torch.randn(2, 4, 4), torch.tensor([[0, 1, 2, 3], [3, -100, -100, 1]])
        expected = F.cross_entropy(logits.reshape(8, 4), labels.reshape(8))
        for loss in (CrossEntropyLoss(), CombinedLoss("mmce", auxiliary_weight=0.0)):
            torch.testing.assert_close(loss(TokenClassifierOutput(logits=logits), labels), expected)

    def test_small_dense_logits_are_resized_to_the_labels(self):
        logits, labels = torch.randn(2, 3, 2, 2), torch.randint(0, 3, (2, 8, 8))
        resized = F.interpolate(logits, size=(8, 8), mode="bilinear", align_corners=False)
        found = CrossEntropyLoss()(SemanticSegmenterOutput(logits=logits), labels)
        torch.testing.assert_close(found, F.cross_entropy(resized, labels))

    def test_a_tensor_has_them_second_as_for_pytorchs_losses(self):
        logits, labels = torch.randn(2, 3, 5), torch.randint(0, 3, (2, 5))
        expected = F.cross_entropy(logits, labels)
        torch.testing.assert_close(LOSSES["cross_entropy"]()(logits, labels), expected)
