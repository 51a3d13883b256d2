"""`AdaFocalSFTTrainer`: supervised fine-tuning of language models through TRL, with AdaFocal over tokens.

It needs the extra `sft` (`trl>=1.16`). TRL's fused head gives the log-probability of each label without the logits of
all tokens, and AdaFocal needs nothing else: `(1 - sign(gamma) p)^|gamma| ce` with `ce = -log p`.
"""

from typing import Any

import torch
from torch import Tensor

from hf_adafocal.losses.adafocal import AdaFocalLoss
from hf_adafocal.losses.base import FocalFamilyLoss
from hf_adafocal.losses.functional import modulate
from hf_adafocal.metrics.binning import BinStats
from hf_adafocal.training.callbacks import AdaFocalCallback, SaveAfterEvaluation
from hf_adafocal.training.model_conventions import DEFAULT_IGNORE_INDEX, ModelConventions, base_model
from hf_adafocal.training.recorder import EvaluationRecorder
from hf_adafocal.training.recording_trainer import RecordingTrainer
from hf_adafocal.training.token_rows import token_rows

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError("AdaFocalSFTTrainer needs TRL: install the extra `sft` (trl>=1.16).") from error

AGREEMENT = 0.02  # share of the NLL by which the fused head and the evaluation may differ, in bfloat16


class AdaFocalSFTTrainer(RecordingTrainer, SFTTrainer):
    """TRL's `SFTTrainer` with AdaFocal, whose gamma follows the calibration of next-token predictions.

    The evaluation set is the calibration set; of a dict of sets, the entry "calibration". Every evaluation adds exact
    `accuracy`, `nll` (the logarithm of the perplexity), `brier`, `ece` and `ada_ece` of the tokens that the loss
    counts, under its prefix. Where a prompt is masked those are the tokens of the answer; then the same metrics of all
    tokens of the texts follow as `text_nll`, `text_ece`, ... The evaluation loss is the NLL. No matrix of tokens by
    vocabulary is kept, in training or in evaluation.

    Args:
        model: As in `SFTTrainer`.
        args: An `SFTConfig` with `loss_type="nll"`; without `eval_strategy` the set is evaluated after each epoch.
        loss: AdaFocal with the paper's settings if left out; or another loss whose gamma depends on the probability of
            the label alone, such as `CrossEntropyLoss` and `FocalLoss`.
        eval_dataset: Held-out data; required, because it moves gamma.
        **kwargs: Every other argument of `SFTTrainer`.

    Raises:
        ValueError: If there is no held-out data, or an argument asks for another loss.

    Source: Ghosh et al. 2022, arXiv 2211.11838, for classifiers; each token is a sample here.

    ```python
    from trl import SFTConfig
    from hf_adafocal.training.sft import AdaFocalSFTTrainer

    args = SFTConfig("out", eval_strategy="steps", eval_steps=100, completion_only_loss=True)
    trainer = AdaFocalSFTTrainer("Qwen/Qwen3-0.6B", args, train_dataset=train, eval_dataset=held_out)
    trainer.train()
    print(trainer.evaluate()["eval_ece"])
    ```
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *,
        loss: FocalFamilyLoss | None = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        loss = AdaFocalLoss() if loss is None else loss
        _check_loss(loss, args, kwargs)
        if eval_dataset is None or (isinstance(eval_dataset, dict) and "calibration" not in eval_dataset):
            raise ValueError(
                "AdaFocal moves gamma by held-out data: give an `eval_dataset`, split off train, or a dict of them "
                f"with the entry 'calibration', found {'none' if eval_dataset is None else sorted(eval_dataset)}."
            )
        super().__init__(model=model, args=args, eval_dataset=eval_dataset, **kwargs)
        self.conventions = ModelConventions.of(self.model)
        self.loss = loss.to(self.args.device)
        self.num_bins = int(getattr(loss, "num_bins", 15))
        self.begin_recording(self.num_bins, None, DEFAULT_IGNORE_INDEX)
        self.text_recorder = EvaluationRecorder(self.processes, self.num_bins)  # of prompts too
        self._head_checked = False
        self.adaptive_callback: AdaFocalCallback | None = None
        if loss.adaptive is not None:
            self.adaptive_callback = AdaFocalCallback(
                loss.adaptive, self._statistics, self._calibration_prefix, self.log, self._evaluate_calibration
            )
        self.add_callback(self.adaptive_callback or SaveAfterEvaluation())

    @property
    def calibration_dataset(self) -> Any:
        """The held-out set that moves gamma, as TRL has prepared it."""
        return self.eval_dataset["calibration"] if isinstance(self.eval_dataset, dict) else self.eval_dataset

    @property
    def _calibration_prefix(self) -> str:
        return "eval_calibration" if isinstance(self.eval_dataset, dict) else "eval"

    def _evaluate_calibration(self) -> None:
        name = "calibration" if isinstance(self.eval_dataset, dict) else None
        self.evaluate(name, metric_key_prefix=self._calibration_prefix)

    def _statistics(self) -> BinStats | None:
        """For the callback: None after the evaluation of a set that somebody handed to `evaluate`."""
        if self.evaluated_dataset is not self.calibration_dataset or self.recorder.calibration is None:
            return None
        return self.recorder.calibration.statistics(self.num_bins)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss as `SFTTrainer.compute_loss`, with the loss of each token modulated while training."""
        model = _Modulated(model, self.loss) if self.network.training else model
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As `SFTTrainer.prediction_step`; records the batch from the hidden states of the same forward pass."""
        inputs = self._prepare_inputs(inputs)
        hidden: list[Tensor] = []
        backbone = base_model(self.model).base_model
        handle = backbone.register_forward_hook(lambda module, args, outputs: hidden.append(outputs[0].detach()))
        try:
            found = SFTTrainer.prediction_step(self, model, inputs, prediction_loss_only, ignore_keys)
        finally:
            handle.remove()
        if self.recorder.active and "labels" in inputs:
            self._record(hidden[0], inputs, float(found[0]) if not self._head_checked else None)
        return found

    @torch.no_grad()
    def _record(self, hidden: Tensor, inputs: dict[str, Any], loss: float | None) -> None:
        labels = self.conventions.targets(inputs, self.ignore_index)
        if hidden.shape[:-1] != labels.shape:
            raise ValueError(
                f"Expected a hidden state for each label {tuple(labels.shape)}, found {tuple(hidden.shape[:-1])} "
                "(virtual tokens of prompt learning?). Train with LoRA, or with SFTTrainer itself."
            )
        network = base_model(self.model)
        head, config = network.get_output_embeddings(), network.config.get_text_config()
        weight, bias = (
            part.full_tensor() if hasattr(part, "full_tensor") else part for part in (head.weight, head.bias)
        )
        texts = _texts(inputs, labels, self.ignore_index)
        rows = token_rows(
            hidden,
            weight,
            texts,
            bias,
            scale=_scale(config),
            softcap=getattr(config, "final_logit_softcapping", None),
            ignore_index=self.ignore_index,
        )
        counted = labels != self.ignore_index
        if loss is not None and bool(counted.any()) and not self.aux_loss_enabled:
            self._head_checked = True
            nll = float(rows[counted][:, 2].mean())
            if not abs(nll - loss) <= AGREEMENT * max(1.0, abs(loss)):
                raise ValueError(
                    f"The head of {type(network).__name__} does more with its logits than scaling and capping them: "
                    f"an NLL of {nll:.4f} was found where TRL has {loss:.4f}. Use SFTTrainer for it."
                )
        self.text_recorder.observe_rows(rows, texts)
        self.recorder.observe_rows(rows.where(counted[..., None], float(DEFAULT_IGNORE_INDEX)), labels)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """As `RecordingTrainer.evaluation_loop`, with metrics of all tokens where prompts are masked."""
        self.text_recorder.begin(getattr(dataloader, "dataset", None), of_calibration=False)
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            texts = self.text_recorder.end(metric_key_prefix)
        finally:
            self.text_recorder.abort()
        if texts is not None and output.metrics is not None:
            every, counted = (kept.samples[metric_key_prefix] for kept in (self.text_recorder, self.recorder))
            if len(every) > len(counted):
                output.metrics.update({f"{metric_key_prefix}_text_{name}": value for name, value in texts.items()})
        return output


class _Modulated:
    """Model wrapper whose fused head returns the modulated loss per token, negated, instead of the log-probability."""

    def __init__(self, model: Any, loss: FocalFamilyLoss) -> None:
        self.model, self.loss = model, loss

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        if inputs.get("fused_lm_head"):
            outputs.log_probs = -modulate(-outputs.log_probs, self.loss.gamma)  # 0 where the label is ignored
        return outputs


def _check_loss(loss: Any, args: Any, kwargs: dict[str, Any]) -> None:
    plain = isinstance(loss, FocalFamilyLoss) and type(loss).formula is FocalFamilyLoss.formula
    if not plain or loss.weight is not None or loss.reduction != "mean" or loss.ignore_index != DEFAULT_IGNORE_INDEX:
        raise ValueError(
            "The fused head gives the probability of the label alone, so the loss must be one of the focal family "
            "(AdaFocalLoss, FocalLoss, InverseFocalLoss, FLSD53Loss, CrossEntropyLoss) with reduction 'mean', "
            f"ignore_index -100 and no class weights, found {type(loss).__name__}."
        )
    if getattr(args, "loss_type", "nll") != "nll" or getattr(args, "label_smoothing_factor", 0):
        raise ValueError("loss_type and label_smoothing_factor would change the loss twice: leave them as they are.")
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func would be ignored: give a `loss` of the focal family, or use SFTTrainer.")


def _texts(inputs: dict[str, Any], labels: Tensor, ignore_index: int) -> Tensor:
    """Return the next token at each position: the label, or the prompt's token where labels are masked; no padding.

    The first token of a text that follows another in one row (its position is 0) is no continuation of it.
    """
    if "input_ids" not in inputs or "shift_labels" in inputs:
        return labels
    tokens = inputs["input_ids"]
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(tokens, dtype=torch.bool)
    if "position_ids" in inputs and inputs["position_ids"].shape == tokens.shape:
        real = real & (inputs["position_ids"] != 0)
    following = tokens.where(real, ignore_index)
    following = torch.nn.functional.pad(following, (0, 1), value=ignore_index)[..., 1:]
    return labels.where(labels != ignore_index, following)


def _scale(config: Any) -> float:
    """Return the factor that a model applies to the logits after the head, as Cohere and Granite do."""
    factor, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    return float(factor) if factor is not None else 1.0 if divisor is None else 1 / float(divisor)
