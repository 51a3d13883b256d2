import pytest
import torch
from torch import nn

from hf_adafocal.losses import (
    AdaFocalLoss,
    CombinedLoss,
    CrossEntropyLoss,
    LabelSmoothingLoss,
    as_classification_loss,
)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5])])
def test_cross_entropy_of_pytorch_keeps_its_values(weight, smoothing, reduction):
    theirs = nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing, ignore_index=1, reduction=reduction)
    ours = as_classification_loss(theirs)
    logits, labels = torch.randn(8, 3), torch.arange(8) % 3
    assert type(ours) is (LabelSmoothingLoss if smoothing else CrossEntropyLoss) and ours.ignore_index == 1
    torch.testing.assert_close(ours(logits, labels), theirs(logits, labels))


@pytest.mark.parametrize("loss", [AdaFocalLoss(), CombinedLoss("mmce")], ids=["adafocal", "mmce"])
def test_a_loss_of_ours_stays_itself(loss):
    assert as_classification_loss(loss) is loss


class Own(nn.CrossEntropyLoss):
    def forward(self, logits, labels):
        return super().forward(2 * logits, labels)


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (nn.NLLLoss(), "found NLLLoss"),
        (nn.BCEWithLogitsLoss(), "found BCEWithLogitsLoss"),
        (nn.MSELoss(), "found MSELoss"),
        (nn.MultiMarginLoss(), "found MultiMarginLoss"),
        (Own(), "found Own"),
        (nn.CrossEntropyLoss, "found the class CrossEntropyLoss, not an instance"),
        (AdaFocalLoss, "found the class AdaFocalLoss, not an instance"),
        (nn.functional.cross_entropy, "found function"),
        ("adafocal", "found 'adafocal' .a loss by name is built by `build_loss`"),
    ],
    ids=range(9),
)
def test_any_other_is_refused_with_words(loss, found):
    with pytest.raises(TypeError, match=f"torch.nn.CrossEntropyLoss, {found}.*subclass .*PerSampleLoss"):
        as_classification_loss(loss)


def test_a_smoothing_out_of_our_range_is_refused():
    with pytest.raises(ValueError, match="label_smoothing must be at most 0.5, found 0.9"):
        as_classification_loss(nn.CrossEntropyLoss(label_smoothing=0.9))
