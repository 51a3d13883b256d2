"""Conventions of a model's labels (shifts, decoder inputs, ignored index) and further terms of its own loss."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from hf_adafocal.losses.layout import classes_second
from hf_adafocal.preserved_state import evaluating, random_state_kept

logger = logging.get_logger(__name__)

# Nats that two ways of computing one cross-entropy can differ by, in float32 and in narrower types.
ROUNDING, COARSE_ROUNDING = 1e-5, 3e-2
DEFAULT_IGNORE_INDEX = -100


@dataclass(frozen=True)
class ModelConventions:
    """How the logits and labels of a model belong together.

    Attributes:
        shifts_labels: Logits at position i predict the label at i + 1, as in causal language models.
        decoder_inputs: Makes decoder inputs from labels, as encoder-decoders do inside their forward pass; or None.
        ignore_index: Label that the model's own loss ignores.
        single_output: The one logit is that of the positive one of two classes; labels may be the floats 0.0 and 1.0.
    """

    shifts_labels: bool = False
    decoder_inputs: Any = None
    ignore_index: int = DEFAULT_IGNORE_INDEX
    single_output: bool = False

    @classmethod
    def of(cls, model: Any) -> "ModelConventions":
        """Read the conventions of a model, beneath a PEFT wrapper too; a plain module follows none."""
        model = base_model(model)
        config = getattr(model, "config", None)
        causal = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss  # type: ignore[arg-type]
        causal = causal or type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        ignore_index = getattr(config, "semantic_loss_ignore_index", DEFAULT_IGNORE_INDEX)
        # By the class: the config of an image classifier may have the number too.
        segments = any("SemanticSegmentation" in kind.__name__ for kind in type(model).__mro__)
        return cls(
            shifts_labels=causal and not encoder_decoder,
            decoder_inputs=getattr(model, "prepare_decoder_input_ids_from_labels", None) if encoder_decoder else None,
            ignore_index=ignore_index if segments else DEFAULT_IGNORE_INDEX,
            single_output=has_single_output(model),
        )

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs of the forward pass: the batch without labels, so that the model computes no loss."""
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}
        if self.decoder_inputs is not None and not {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
            inputs["decoder_input_ids"] = self.decoder_inputs(labels=batch["labels"])
        return inputs

    def targets(self, batch: Mapping[str, Any], ignore_index: int) -> Tensor:
        """Return labels aligned with the logits that predict them, in the labels' shape."""
        if "shift_labels" in batch:  # of a collator that packs sequences
            return batch["shift_labels"]
        if self.single_output and isinstance(batch["labels"], Tensor) and batch["labels"].is_floating_point():
            return batch["labels"].long()  # `label_checks` has seen that they are 0.0 and 1.0
        if not self.shifts_labels:
            return batch["labels"]
        return F.pad(batch["labels"], (0, 1), value=ignore_index)[..., 1:]


def has_single_output(model: Any) -> bool:
    """Return whether a classifier has a single output, `num_labels=1`, as rerankers have."""
    model = base_model(model)
    one = getattr(getattr(model, "config", None), "num_labels", None) == 1
    return one and any(task in type(model).__name__ for task in ("Classification", "SemanticSegmentation"))


def base_model(model: Any) -> Any:
    """Return the model beneath a PEFT wrapper; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def logits_of(outputs: Any, model_name: str) -> Tensor:
    """Return the logits in a model's output: a dict with `logits`, a tuple that begins with them, or a tensor.

    Raises:
        ValueError: If a dict holds none.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        if "logits" not in outputs:
            raise ValueError(
                f"The output of {model_name} must hold `logits`, found {sorted(outputs)}. Use a model with a "
                "classification head, or name its scores `logits`."
            )
        return outputs["logits"]
    return outputs[0] if isinstance(outputs, tuple | list) else outputs.logits


class FurtherTerms:
    """Keep the terms that a model adds to its cross-entropy, such as those of auxiliary heads and routers.

    Args:
        ignore_index: Label that does not count.

    Attributes:
        looked: A batch has been looked at.
        found: The model's own loss has further terms.
    """

    def __init__(self, ignore_index: int) -> None:
        self.ignore_index = ignore_index
        self.looked = self.found = False

    def check(
        self, model: torch.nn.Module, batch: Mapping[str, Any], targets: Tensor, *, mixed_precision: bool = False
    ) -> None:
        """Compare a model's own loss with the cross-entropy of its logits on a batch; warn if they differ.

        Args:
            model: In any mode; it is put back, and so is the random state.
            batch: With labels.
            targets: Labels in the places of the logits that predict them.
            mixed_precision: The model computes in a narrower type than it returns. On CUDA its cross-entropy then
                takes the logarithm of the softmax in that type.
        """
        self.looked = True
        inner = base_model(model)
        if "labels" not in inspect.signature(inner.forward).parameters or has_single_output(model):
            return  # the own loss of a single output would be one of regression
        with torch.no_grad(), evaluating(model), random_state_kept():  # without dropout the two can be compared
            outputs = model(**batch)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if loss is None or "logits" not in outputs:
            return
        excess = float(self.of(loss, outputs["logits"], targets))
        narrow = mixed_precision or any(torch.finfo(part.dtype).bits < 32 for part in (outputs["logits"], loss))
        self.found = abs(excess) > (COARSE_ROUNDING if narrow else ROUNDING * max(1.0, abs(float(loss))))
        if self.found:
            logger.warning(
                f"The own loss of {type(model).__name__} has terms beside the cross-entropy of its logits "
                f"({excess:+.3f} on the first batch; an auxiliary head or router?); they are added to the loss."
            )

    def of(self, loss: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the terms in a model's own loss, as a mean over the batch: the loss minus the mean cross-entropy."""
        logits, targets = classes_second(logits, targets)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return loss.mean() - F.cross_entropy(logits, targets.long(), ignore_index=self.ignore_index)
