"""Public names of the package, each with the module that defines it: read by type checkers and by `_lazy.py`."""

from hf_adafocal.losses.adafocal import AdaDualFocalLoss as AdaDualFocalLoss
from hf_adafocal.losses.adafocal import AdaFocalLoss as AdaFocalLoss
from hf_adafocal.losses.adafocal import ClasswiseAdaFocalLoss as ClasswiseAdaFocalLoss
from hf_adafocal.losses.batch_loss import CombinedLoss as CombinedLoss
from hf_adafocal.losses.brier import BrierLoss as BrierLoss
from hf_adafocal.losses.class_weights import balanced_class_weights as balanced_class_weights
from hf_adafocal.losses.confidence_penalty import ConfidencePenaltyLoss as ConfidencePenaltyLoss
from hf_adafocal.losses.focal import CrossEntropyLoss as CrossEntropyLoss
from hf_adafocal.losses.focal import DualFocalLoss as DualFocalLoss
from hf_adafocal.losses.focal import FLSD53Loss as FLSD53Loss
from hf_adafocal.losses.focal import FocalLoss as FocalLoss
from hf_adafocal.losses.focal import InverseFocalLoss as InverseFocalLoss
from hf_adafocal.losses.label_smoothing import AdaptiveLabelSmoothingLoss as AdaptiveLabelSmoothingLoss
from hf_adafocal.losses.label_smoothing import LabelSmoothingLoss as LabelSmoothingLoss
from hf_adafocal.losses.registry import LOSSES as LOSSES
from hf_adafocal.losses.registry import build_loss as build_loss
from hf_adafocal.losses.torch_losses import as_classification_loss as as_classification_loss
