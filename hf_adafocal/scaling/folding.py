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

import hf_adafocal.models  # noqa: F401 (so that the Auto classes know the global-pooling CNN)
from hf_adafocal.preserved_state import evaluating, random_state_kept
from hf_adafocal.scaling.fit import Scaling

RECORD = "adafocal_calibration"  # where the model's config keeps what was folded
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "tf_model*.h5", "flax_model*.msgpack", "model*.onnx*")
# A folded checkpoint is a result; these are the state of a run that would go on from the head as it was.
TRAINING_STATE = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", "training_args.bin")


def fold_scaling(model: PreTrainedModel, scaling: Scaling, inputs: dict[str, Tensor] | None = None) -> None:
    """Put a scaling into the weight and bias of the layer that makes the logits, in place.

    The layer is found by experiment: in a forward pass each linear layer with one output per label gets its output
    scaled, and the logits must follow exactly. Computed in float64 and cast back, so probabilities agree with those of
    the scaled logits to about 1e-6 in float32; in bfloat16 each weight is rounded to 3 digits anew, which moves a
    probability by up to about 1e-2: fold a float32 checkpoint where you can.

    The scaling is recorded as `model.config.adafocal_calibration`, as `Scaling.to_dict` writes it.

    Args:
        model: A single-label classifier; LoRA merged (`merge_and_unload`), not quantized.
        scaling: What `fit_temperature_scaling` or `fit_vector_scaling` found on this model's logits.
        inputs: A batch that the model takes; needed only where neither token ids nor pixels of the size that the
            config tells will do.

    Raises:
        TypeError: If `model` is no `PreTrainedModel`.
        ValueError: If a scaling was folded before, the model has no single linear head, the head is quantized, tied or
            inside an adapter, or cannot hold the scaling. The model is then as it was.
    """
    _check_model(model)
    if recorded_scaling(model.config) is not None:
        raise ValueError(
            f"A scaling is folded into this model already: {getattr(model.config, RECORD)}. Undo it with "
            f"unfold_scaling(model); if the model was trained further since, set model.config.{RECORD} = None instead."
        )
    _check_task(model.config)
    head = find_head(model, inputs)
    _check_fit(head, scaling)
    _rescale(head, scaling.scale, scaling.bias)
    setattr(model.config, RECORD, scaling.to_dict())


def check_foldable(model: PreTrainedModel, inputs: dict[str, Tensor] | None = None) -> None:
    """Raise what `fold_scaling` would raise for a temperature; change nothing. Call it before training.

    A scaling that is recorded already is no objection here: training moves on from it and forgets the record.

    Args:
        model: As in `fold_scaling`.
        inputs: As in `fold_scaling`.

    Raises:
        TypeError: As `fold_scaling`.
        ValueError: As `fold_scaling`.
    """
    _check_model(model)
    _check_task(model.config)
    with random_state_kept():
        find_head(model, inputs)


def unfold_scaling(model: PreTrainedModel, inputs: dict[str, Tensor] | None = None) -> None:
    """Undo `fold_scaling` in place, also on a checkpoint loaded since; exact but for rounding in the head's dtype.

    Args:
        model: A model whose config has the record of a scaling.
        inputs: As in `fold_scaling`.

    Raises:
        TypeError: If `model` is no `PreTrainedModel`.
        ValueError: If no scaling is recorded, or as `fold_scaling`. The model is then as it was.
    """
    _check_model(model)
    scaling = recorded_scaling(model.config)
    if scaling is None:
        raise ValueError(f"model.config.{RECORD} holds no scaling, so there is none to undo.")
    head = find_head(model, inputs)
    _check_fit(head, scaling)
    scale, bias = (torch.tensor(value, dtype=torch.float64) for value in (scaling.scale, scaling.bias))
    _rescale(head, 1 / scale, -bias / scale)
    delattr(model.config, RECORD)


def recorded_scaling(config: transformers.PretrainedConfig) -> Scaling | None:
    """The scaling that was folded into a model, by its config; None if there is none."""
    record = getattr(config, RECORD, None)
    return None if record is None else Scaling.from_dict(record)


def fold_checkpoint(folder: str | Path, scaling: Scaling, output: str | Path | None = None) -> Path:
    """`fold_scaling` for a checkpoint on disk, which stays in the dtype it was saved in.

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
    model = _load_classifier(folder)
    fold_scaling(model, scaling)

    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".folding-") as staging:  # the old weights may be mapped
        model.save_pretrained(staging)
        if output.resolve() != folder.resolve():
            _copy_beside_weights(folder, output)
        written = {path.replace(output / path.name) for path in Path(staging).iterdir()}
    for stale in {path for pattern in WEIGHTS for path in output.glob(pattern)} - written:
        stale.unlink()
    return output


def find_head(model: PreTrainedModel, inputs: dict[str, Tensor] | None = None) -> nn.Linear:
    """The linear layer whose output the logits follow, whatever its name.

    Args:
        model: A classifier.
        inputs: As in `fold_scaling`.

    Raises:
        ValueError: If there is none, more than one, or one whose numbers cannot be changed alone.
    """
    num_labels = model.config.num_labels
    candidates = {
        name: module for name, module in model.named_modules() if getattr(module, "out_features", None) == num_labels
    }
    with evaluating(model), torch.no_grad():
        batch = _example(model) if inputs is None else inputs
        found = [name for name, module in candidates.items() if _logits_follow(model, module, batch)]
    if len(found) != 1:
        raise ValueError(
            f"Expected one linear layer whose output the logits of {type(model).__name__} follow, found "
            f"{found or 'none'} among {sorted(candidates)} (those with {num_labels} outputs). Without one, scale the "
            "logits where they are used: Scaling.apply."
        )
    _check_head(model, found[0], candidates[found[0]])
    return candidates[found[0]]


def _logits_follow(model: PreTrainedModel, module: nn.Module, batch: dict[str, Tensor]) -> bool:
    """Whether scaling this module's output scales the logits, and nothing comes after that would bend them."""
    plain = model(**batch).logits.float()
    scale = torch.linspace(0.5, 2.0, plain.shape[-1], device=plain.device)
    bias = torch.linspace(1.0, -1.0, plain.shape[-1], device=plain.device)
    handle = module.register_forward_hook(lambda module, args, out: (out.float() * scale + bias).to(out.dtype))
    try:
        scaled = model(**batch).logits.float()
    finally:
        handle.remove()
    expected = plain * scale + bias
    tolerance = max(1e-4, 4 * torch.finfo(model.dtype).eps)
    return bool((scaled - expected).abs().max() <= tolerance * expected.abs().max())


def _example(model: PreTrainedModel) -> dict[str, Tensor]:
    """One short text or one grey image for the model, by its config."""
    config, kind = model.config, model.main_input_name
    if kind == "input_ids":
        ids = [token % config.vocab_size for token in range(3, 10)]
        end = getattr(config, "eos_token_id", None)
        ids += [end] if isinstance(end, int) and end < config.vocab_size else []  # BART classifies at this token
        return {kind: torch.tensor([ids], device=model.device)}
    if kind == "pixel_values":
        timm = getattr(config, "pretrained_cfg", None) or {}
        channels, *size = timm.get("input_size") or [getattr(config, "num_channels", 3), *[_image_size(config)] * 2]
        pixels = torch.linspace(-1, 1, channels * size[0] * size[1], device=model.device, dtype=model.dtype)
        return {kind: pixels.reshape(1, channels, *size)}
    raise ValueError(f"{type(model).__name__} takes {kind}; give a batch of them as `inputs` to find its head with.")


def _image_size(config: transformers.PretrainedConfig) -> int:
    size = getattr(config, "image_size", None) or 224
    return size if isinstance(size, int) else size[-1]


def _check_model(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"Expected a transformers model, found {type(model).__name__}. Unwrap it; merge an adapter first: "
            "model = model.merge_and_unload()."
        )
    adapters = [name for name, module in model.named_modules() if type(module).__module__.split(".")[0] == "peft"]
    if adapters:
        raise ValueError(
            f"{len(adapters)} modules are adapters ({adapters[0]}, ...). Merge them first: "
            "model = model.merge_and_unload()."
        )


def _check_task(config: transformers.PretrainedConfig) -> None:
    if config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
        raise ValueError(
            "Scaling is fitted to the softmax over two or more classes, found num_labels "
            f"{config.num_labels} and problem_type {config.problem_type}."
        )


def _check_head(model: nn.Module, name: str, head: nn.Module) -> None:
    """Raise unless the head is a plain linear layer whose parameters nothing else uses."""
    weight = getattr(head, "weight", None)
    plain = isinstance(head, nn.Linear) and type(weight) is nn.Parameter
    if not plain or weight.dtype not in DTYPES or weight.is_meta:
        found = f"{type(weight).__name__} of {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(
            f"The head {name} is a {type(head).__module__}.{type(head).__name__} with a weight that is a {found}, not "
            "floating point numbers that can be rescaled: load the model without quantization, parametrization or "
            "offloading."
        )
    own = {f"{name}.weight": weight, f"{name}.bias": head.bias}
    for own_name, parameter in own.items():
        for other_name, other in model.named_parameters(remove_duplicate=False):
            if parameter is not None and other_name not in own and other.data_ptr() == parameter.data_ptr():
                raise ValueError(
                    f"{own_name} is tied to {other_name}, which would be rescaled with it. Untie them: "
                    "config.tie_word_embeddings = False, and a copy of the weight in the head."
                )


def _check_fit(head: nn.Linear, scaling: Scaling) -> None:
    for name in ("scale", "bias"):
        value = getattr(scaling, name)
        if isinstance(value, tuple) and len(value) != head.out_features:
            raise ValueError(f"The head has {head.out_features} outputs, but {name} has {len(value)} numbers.")
    if np.any(scaling.bias) and head.bias is None:
        raise ValueError(
            "The head has no bias, and from_pretrained would not load one that is added: fold a temperature instead "
            "(fit_temperature_scaling)."
        )


def _rescale(head: nn.Linear, scale: Any, bias: Any) -> None:
    """Make the head's output `scale * output + bias`, rounding once."""
    scale, bias = (torch.as_tensor(value, dtype=torch.float64, device=head.weight.device) for value in (scale, bias))
    with torch.no_grad():
        head.weight.copy_(head.weight.double() * scale.expand(head.out_features)[:, None])
        if head.bias is not None:
            head.bias.copy_(head.bias.double() * scale + bias)


def _load_classifier(folder: Path) -> PreTrainedModel:
    architecture = (AutoConfig.from_pretrained(folder).architectures or ["none"])[0]
    task = architecture[architecture.rfind("For") :]  # ForSequenceClassification, ForImageClassification, ...
    auto = getattr(transformers, f"AutoModel{task}", None)
    if auto is None or "Classification" not in task:
        raise ValueError(f"Expected the checkpoint of a classifier in {folder}, its config.json names {architecture}.")
    model, info = auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted(info["missing_keys"]) or info["mismatched_keys"]
        raise ValueError(
            f"The checkpoint in {folder} has no weights for {missing}: there is nothing calibrated in it."
        )
    return model


def _copy_beside_weights(folder: Path, output: Path) -> None:
    for path in folder.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in (*WEIGHTS, *TRAINING_STATE)):
            shutil.copy2(path, output / path.name)
