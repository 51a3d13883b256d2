"""Find the classification layer of a model by experiment, and check that it can be rescaled."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_adafocal.preserved_state import evaluating

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
VOLUME_SIDE = 16  # voxels of the made-up volume
NESTED = ("vision_config", "text_config", "backbone_config", "audio_config")


def find_head(model: Any, inputs: dict[str, Tensor] | None = None) -> nn.Linear | nn.Conv2d | nn.Conv3d:
    """Find the linear or convolutional layer that computes the logits, whatever its name.

    In a forward pass each layer with one output per label gets its output scaled, and the logits must follow exactly.

    Args:
        model: A classifier; under PEFT with its head in `modules_to_save`.
        inputs: A batch that the model takes; by default one made up from the sizes in its config.

    Raises:
        ValueError: If there is none, more than one, or one whose numbers cannot be changed alone.
    """
    num_labels = model.config.num_labels
    candidates = {name: module for name, module in model.named_modules() if _outputs(module) == num_labels}
    with evaluating(model), torch.no_grad():
        batch = example(model) if inputs is None else inputs
        try:
            found = [name for name, module in candidates.items() if _logits_follow(model, module, batch)]
        except (RuntimeError, TypeError, IndexError, KeyError) as error:
            raise ValueError(
                f"{type(model).__name__} does not take the batch that its head was to be found with: {error} Give a "
                "batch that it takes as `inputs`."
            ) from error
    if len(found) != 1:
        raise ValueError(
            f"Expected one linear layer whose output the logits of {type(model).__name__} follow, found "
            f"{found or 'none'} among {sorted(candidates)} (those with {num_labels} outputs). Without one, scale the "
            "logits where they are used: Scaling.apply."
        )
    _check_head(model, found[0], candidates[found[0]])
    return candidates[found[0]]


def example(model: Any) -> dict[str, Tensor]:
    """Make dummy inputs: one short text, one grey image of the size in the model's config, or one small volume.

    Args:
        model: Of texts (`input_ids`) or images (`pixel_values`).

    Raises:
        ValueError: If the model takes something else.
    """
    config, kind = model.config, model.main_input_name
    if kind == "input_ids":
        size = _setting(config, "vocab_size", 30_000)
        ids = [token % size for token in range(3, 10)]
        end = _setting(config, "eos_token_id", None)
        ids += [end] if isinstance(end, int) and end < size else []  # BART classifies at this token
        return {kind: torch.tensor([ids], device=model.device)}
    if kind == "pixel_values":
        shape = _image_shape(config)
        first = next((module for module in model.modules() if isinstance(module, CONVOLUTIONS)), None)
        if isinstance(first, nn.Conv3d):
            shape = (first.in_channels, *[VOLUME_SIDE] * 3)
        pixels = torch.linspace(-1, 1, math.prod(shape), device=model.device, dtype=model.dtype)
        return {kind: pixels.reshape(1, *shape)}
    raise ValueError(f"{type(model).__name__} takes {kind}; give a batch of them as `inputs` to find its head with.")


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is a PEFT adapter."""
    return type(module).__module__.split(".")[0] == "peft"


def _outputs(module: Any) -> int | None:
    """Return the number of outputs of a linear or convolutional layer; None of a PEFT module, which wraps another."""
    if is_adapter(module):
        return None
    found = getattr(module, "out_features", None)
    return module.out_channels if found is None and isinstance(module, CONVOLUTIONS) else found


def _image_shape(config: Any) -> tuple[int, ...]:
    timm = getattr(config, "pretrained_cfg", None) or {}
    if timm.get("input_size"):
        return tuple(timm["input_size"])
    size = _setting(config, "image_size", None) or _setting(config, "input_size", None) or 224
    if isinstance(size, Mapping):
        size = (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else (size[-2], size[-1])
    return _setting(config, "num_channels", None) or _setting(config, "in_chans", 3), height, width


def _setting(config: Any, name: str, default: Any) -> Any:
    """Look up a setting in a config or in the config of a part of the model."""
    for part in (config, *(getattr(config, nested, None) for nested in NESTED)):
        value = part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)
        if value is not None:
            return value
    return default


def _along_classes(values: Tensor, ndim: int) -> Tensor:
    """Reshape per-class numbers to broadcast over classes last, or second in images and volumes."""
    return values.reshape(-1, *[1] * (ndim - 2)) if ndim > 3 else values


def _logits_follow(model: Any, module: nn.Module, batch: dict[str, Tensor]) -> bool:
    """Whether the logits scale exactly with this module's output, with no nonlinearity after it."""
    plain = model(**batch).logits.float()
    classes = plain.shape[1] if plain.ndim > 3 else plain.shape[-1]
    scale = torch.linspace(0.5, 2.0, classes, device=plain.device)
    bias = torch.linspace(1.0, -1.0, classes, device=plain.device)

    def rescaled(values: Tensor) -> Tensor:
        factor, shift = (_along_classes(part, values.ndim) for part in (scale, bias))
        return (values.float() * factor + shift).to(values.dtype)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        fits = isinstance(output, Tensor) and classes == (output.shape[1] if output.ndim > 3 else output.shape[-1])
        return rescaled(output) if fits else output

    handle = module.register_forward_hook(hook)
    try:
        scaled = model(**batch).logits.float()
    finally:
        handle.remove()
    expected = rescaled(plain)
    tolerance = max(1e-4, 4 * torch.finfo(model.dtype).eps)
    return bool((scaled - expected).abs().max() <= tolerance * expected.abs().max())


def _check_head(model: nn.Module, name: str, head: Any) -> None:
    """Raise unless the head is a plain layer that is saved and whose parameters nothing else uses."""
    weight = getattr(head, "weight", None)
    plain = isinstance(head, nn.Linear | nn.Conv2d | nn.Conv3d) and type(weight) is nn.Parameter
    whole = isinstance(weight, Tensor) and weight.dtype in DTYPES and not weight.is_meta and weight.numel() > 0
    if not plain or not whole:
        found = f"{type(weight).__name__} of {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(
            f"The head {name} is a {type(head).__module__}.{type(head).__name__} with a weight that is a {found}, not "
            "floating point numbers that can be rescaled: load the model without quantization, parametrization, "
            "sharding or offloading."
        )
    _check_adapters(model, name)
    own = {f"{name}.weight": weight, f"{name}.bias": head.bias}
    for own_name, parameter in own.items():
        for other_name, other in model.named_parameters(remove_duplicate=False):
            if parameter is not None and other_name not in own and other.data_ptr() == parameter.data_ptr():
                raise ValueError(
                    f"{own_name} is tied to {other_name}, which would be rescaled with it. Untie them: "
                    "config.tie_word_embeddings = False, and a copy of the weight in the head."
                )


def _check_adapters(model: nn.Module, name: str) -> None:
    """Raise unless the head is saved with the adapters, where there are some, and is not one of them."""
    modules = dict(model.named_modules())
    if not any(is_adapter(module) for module in modules.values()):
        return
    parts = name.split(".")
    above = [modules[".".join(parts[:length])] for length in range(1, len(parts))]
    wrappers = {type(module).__name__ for module in above if is_adapter(module)}
    if "ModulesToSaveWrapper" not in wrappers:
        raise ValueError(
            f"The head {name} is not saved with the adapter: put it into the adapter's `modules_to_save`, or merge "
            "the adapter first (model = model.merge_and_unload())."
        )
