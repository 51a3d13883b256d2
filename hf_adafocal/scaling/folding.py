"""Scaling folded into a classifier's last layer, so that the checkpoint is an ordinary one and its scores calibrated.

`scale * (W h + b) + bias` is `(scale W) h + (scale b + bias)`: the same layer with other numbers. Whatever loads the
checkpoint (`from_pretrained`, `pipeline`, an ONNX export, a server) needs to know nothing of it.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

import hf_adafocal.models  # noqa: F401 (so that the Auto classes know its networks)
from hf_adafocal.checkpoint_files import is_training_state, is_weights
from hf_adafocal.preserved_state import random_state_kept
from hf_adafocal.scaling.fit import Scaling
from hf_adafocal.scaling.head import find_head, is_adapter

RECORD = "adafocal_calibration"  # where the model's config keeps what was folded


def fold_scaling(model: Any, scaling: Scaling, inputs: dict[str, Tensor] | None = None) -> None:
    """Fold a scaling into the weight and bias of the classification layer, in place.

    The layer is found by `head.find_head`. The new numbers are computed on the CPU in float64 and cast back, so every
    process gets the same bits and probabilities agree with those of the scaled logits to about 1e-6 in float32; in
    bfloat16 each weight is rounded to 3 digits anew, which moves a probability by up to about 1e-2: fold a float32
    checkpoint where you can.

    The scaling is recorded as `model.config.adafocal_calibration`, as `Scaling.to_dict` writes it; with an adapter
    also under `auto_mapping` of the adapter's config, which is what PEFT saves.

    Args:
        model: A single-label classifier of texts, tokens, images or pixels, not quantized, also with a single output
            for two classes; a PEFT model with its head in `modules_to_save`, or merged (`merge_and_unload`).
        scaling: What `fit_temperature_scaling`, `fit_vector_scaling` or, of two classes, `fit_platt_scaling` found on
            this model's logits.
        inputs: A batch that the model takes; needed only where neither token ids nor pixels of the size that the
            config tells will do.

    Raises:
        TypeError: If `model` is neither a `PreTrainedModel` nor a `PeftModel`.
        ValueError: If a scaling was folded before, the model has no single linear head, the head is quantized, tied,
            not saved with the adapter, or cannot hold the scaling. The model is then as it was.

    >>> from hf_adafocal import GlobalPoolingCNNConfig, GlobalPoolingCNNForSequenceClassification
    >>> config = GlobalPoolingCNNConfig(vocab_size=9, embedding_size=4, num_filters=4, hidden_size=4, num_labels=2)
    >>> model = GlobalPoolingCNNForSequenceClassification(config).eval()
    >>> tokens = torch.ones(1, 30, dtype=torch.long)
    >>> before = model(tokens).logits
    >>> fold_scaling(model, Scaling(scale=0.5))
    >>> torch.allclose(model(tokens).logits, before / 2)
    True
    """
    _check_model(model)
    recorded = recorded_scaling(model)
    if recorded is not None:
        raise ValueError(
            f"A scaling is folded into this model already: {recorded.to_dict()}. Undo it with unfold_scaling(model); "
            "if the model was trained further since, call forget_scaling(model) instead."
        )
    _check_task(model.config)
    head = find_head(model, inputs)
    scale, bias = _numbers_for(head, scaling)
    _rescale(head, scale, bias)
    setattr(model.config, RECORD, scaling.to_dict())
    adapter = _adapter_config(model)
    if adapter is not None:
        adapter.auto_mapping = {**(adapter.auto_mapping or {}), RECORD: scaling.to_dict()}


def check_foldable(model: Any, inputs: dict[str, Tensor] | None = None) -> bool:
    """Check that `fold_scaling` would accept a temperature, without changing the model; call it before training.

    A scaling that is recorded already is no objection here: training moves on from it and forgets the record.

    Args:
        model: As in `fold_scaling`.
        inputs: As in `fold_scaling`.

    Returns:
        Whether the head has a bias, as Platt and vector scaling need it.

    Raises:
        TypeError: As `fold_scaling`.
        ValueError: As `fold_scaling`.
    """
    _check_model(model)
    _check_task(model.config)
    with random_state_kept():
        return find_head(model, inputs).bias is not None


def unfold_scaling(model: Any, inputs: dict[str, Tensor] | None = None) -> None:
    """Undo `fold_scaling` in place, also on a reloaded checkpoint; exact up to rounding in the head's dtype.

    Args:
        model: A model whose config has the record of a scaling.
        inputs: As in `fold_scaling`.

    Raises:
        TypeError: If `model` is neither a `PreTrainedModel` nor a `PeftModel`.
        ValueError: If no scaling is recorded, or as `fold_scaling`. The model is then as it was.
    """
    _check_model(model)
    scaling = recorded_scaling(model)
    if scaling is None:
        raise ValueError(f"model.config.{RECORD} holds no scaling, so there is none to undo.")
    head = find_head(model, inputs)
    scale, bias = (torch.tensor(value, dtype=torch.float64) for value in _numbers_for(head, scaling))
    _rescale(head, 1 / scale, -bias / scale)
    forget_scaling(model)


def recorded_scaling(model: Any) -> Scaling | None:
    """Return the scaling that was folded into a model; None if there is none.

    Args:
        model: A model, under PEFT or not, or its config (which knows nothing of an adapter loaded from disk).
    """
    adapter = _adapter_config(model)
    record = None if adapter is None else (adapter.auto_mapping or {}).get(RECORD)
    if record is None:
        record = getattr(getattr(model, "config", model), RECORD, None)
    return None if record is None else Scaling.from_dict(record)


def forget_scaling(model: Any) -> None:
    """Remove the record of a folded scaling but keep the weights, as before further training."""
    adapter = _adapter_config(model)
    if adapter is not None and adapter.auto_mapping:
        rest = {name: value for name, value in adapter.auto_mapping.items() if name != RECORD}
        adapter.auto_mapping = rest or None
    if hasattr(model.config, RECORD):
        delattr(model.config, RECORD)


def fold_checkpoint(folder: str | Path, scaling: Scaling, output: str | Path | None = None) -> Path:
    """Apply `fold_scaling` to a checkpoint on disk, keeping the dtype it was saved in.

    Files beside the weights (tokenizer, processor, card) are copied to `output`; optimizer, scheduler and the rest of
    a run's state, and folders, are not.

    Args:
        folder: A folder with `config.json` and all weights.
        scaling: What was fitted on this checkpoint's logits.
        output: Where the calibrated checkpoint goes; `folder` itself if left out. Weights that are there already go,
            in whatever format (shards, `pytorch_model.bin`, `model.onnx`): they would not be calibrated.

    Returns:
        Where the calibrated checkpoint is.

    Raises:
        ValueError: If the checkpoint is no classifier, lacks weights, or as `fold_scaling`. No file is then changed.
    """
    folder, output = Path(folder), Path(output or folder)
    model = load_classifier(folder)
    fold_scaling(model, scaling)

    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".folding-") as staging:  # the old weights may be mapped
        model.save_pretrained(staging)
        if output.resolve() != folder.resolve():
            _copy_beside_weights(folder, output)
        written = {path.replace(output / path.name) for path in Path(staging).iterdir()}
    for stale in {path for path in output.iterdir() if path.is_file() and is_weights(path.name)} - written:
        stale.unlink()
    return output


def _check_model(model: Any) -> None:
    if not isinstance(model, PreTrainedModel) and not (_is_peft(model) and hasattr(model, "config")):
        raise TypeError(f"Expected a transformers or PEFT model, found {type(model).__name__}. Unwrap it.")
    adapters = [] if _is_peft(model) else [name for name, module in model.named_modules() if is_adapter(module)]
    if adapters:
        raise ValueError(
            f"{len(adapters)} modules are adapters ({adapters[0]}, ...), which this model saves without its head. "
            "Give the PeftModel itself, or merge them first: model = model.merge_and_unload()."
        )


def _is_peft(model: Any) -> bool:
    return is_adapter(model) and hasattr(model, "get_base_model")


def _adapter_config(model: Any) -> Any:
    """Return the config of the active adapter of a PEFT model, which is saved with it; None of another model."""
    return model.peft_config[model.active_adapter] if _is_peft(model) else None


def _check_task(config: transformers.PretrainedConfig) -> None:
    single = config.num_labels == 1 and config.problem_type == "multi_label_classification"  # of one label
    known = config.problem_type in (None, "single_label_classification") or single
    if not known or (config.num_labels or 0) < 1:
        raise ValueError(
            "Scaling is fitted to the softmax over two or more classes, found num_labels "
            f"{config.num_labels} and problem_type {config.problem_type}; a single output counts as two classes."
        )


def _numbers_for(head: nn.Linear | nn.Conv2d | nn.Conv3d, scaling: Scaling) -> tuple[Any, Any]:
    """Return factor and bias of the outputs of a head, each a number or one per output, if it can hold them."""
    outputs = head.weight.shape[0]
    numbers = (scaling.scale, scaling.bias_of(outputs))
    for name, value in zip(("scale", "bias"), numbers, strict=True):
        if isinstance(value, tuple) and len(value) != outputs:
            raise ValueError(f"The head has {outputs} outputs, but {name} has {len(value)} numbers.")
    if np.any(scaling.bias) and head.bias is None:
        raise ValueError(
            "The head has no bias, and from_pretrained would not load one that is added: fold a temperature instead "
            "(fit_temperature_scaling)."
        )
    return numbers


def _rescale(head: nn.Linear | nn.Conv2d | nn.Conv3d, scale: Any, bias: Any) -> None:
    """Make the head's output `scale * output + bias`, rounding once; on the CPU, as some devices lack float64."""
    outputs = head.weight.shape[0]
    scale, bias = (torch.as_tensor(value, dtype=torch.float64).expand(outputs) for value in (scale, bias))
    with torch.no_grad():
        factors = scale.reshape(-1, *[1] * (head.weight.ndim - 1))
        head.weight.copy_((head.weight.cpu().double() * factors).to(head.weight.dtype))
        if head.bias is not None:
            head.bias.copy_((head.bias.cpu().double() * scale + bias).to(head.bias.dtype))


def load_classifier(folder: str | Path) -> PreTrainedModel:
    """Load the checkpoint of a classifier in the dtype it was saved in.

    Args:
        folder: A local folder or a Hub id.

    Raises:
        ValueError: If it is no classifier, an adapter without its base, or lacks weights (of its head, say), which
            would be random.
    """
    if (Path(folder) / "adapter_config.json").is_file() and not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"{folder} holds the adapter of a PEFT model, not a checkpoint. Merge it into its base first, in Python: "
            "AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=...).merge_and_unload()"
            ".save_pretrained(other_folder), and save the tokenizer there too."
        )
    architecture = (AutoConfig.from_pretrained(folder).architectures or ["none"])[0]
    task = architecture[architecture.rfind("For") :]  # ForSequenceClassification, ForImageClassification, ...
    auto = getattr(transformers, f"AutoModel{task}", None)
    if auto is None or not task.endswith(("Classification", "Segmentation")):
        raise ValueError(f"Expected the checkpoint of a classifier in {folder}, its config.json names {architecture}.")
    model, info = auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted(info["missing_keys"]) or info["mismatched_keys"]
        raise ValueError(
            f"The checkpoint in {folder} has no weights for {missing}: they would be random, and so would the scores. "
            "Fine-tune it first."
        )
    return model


def _copy_beside_weights(folder: Path, output: Path) -> None:
    for path in folder.iterdir():
        if path.is_file() and not is_weights(path.name) and not is_training_state(path.name):
            shutil.copy2(path, output / path.name)
