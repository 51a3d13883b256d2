"""Hash of a model's weights, which ties a report to the checkpoint it describes."""

import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_CHECKPOINTS = ("model*.safetensors", "adapter_model*.safetensors")
_OTHERS = ("pytorch_model*.bin", "adapter_model*.bin")  # hashed as files: reading a pickle would run code


def weights_hash(weights: Any) -> str | None:
    """Compute a hash of the types, shapes and values of all tensors of a checkpoint.

    Names, shards, tensors that occur twice and the files beside the weights do not count, so that a model has the hash
    of the folder it is saved in, also where `save_pretrained` renames tensors or leaves out tied ones.

    Args:
        weights: A folder with `*.safetensors` (of a model, an adapter or both); a model (of a PEFT model the adapter
            counts, as it alone is saved); or a state dict.

    Returns:
        32 hexadecimal digits (BLAKE2b); None for a folder without weights. `.bin` files are hashed as they are.

    Raises:
        ValueError: If a safetensors file cannot be read.

    >>> import torch
    >>> weights_hash({"head.weight": torch.eye(2)}) == weights_hash({"head.weight": torch.eye(2)})
    True
    """
    if not isinstance(weights, str | Path):
        return _combined({_tensor_digest(tensor) for tensor in _state(weights).values()})
    digests: set[bytes] = set()
    for pattern in _CHECKPOINTS:
        for path in Path(weights).glob(pattern):
            digests.update(_file_digests(path))
    if not digests:
        for pattern in _OTHERS:
            for path in Path(weights).glob(pattern):
                with path.open("rb") as file:
                    digests.add(hashlib.file_digest(file, hashlib.blake2b).digest())
    return _combined(digests) if digests else None


def _state(weights: Any) -> Mapping[str, Any]:
    if isinstance(weights, Mapping):
        return weights
    if hasattr(weights, "peft_config"):
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(weights)
    return weights.state_dict()


def _combined(digests: set[bytes]) -> str:
    return hashlib.blake2b(b"".join(sorted(digests)), digest_size=16).hexdigest()


def _file_digests(path: Path) -> Iterator[bytes]:
    """Compute the digest of each tensor of a safetensors file, read through a memory map."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            with memoryview(content) as view:
                yield from _digests(view)
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:  # an empty file too
        raise ValueError(f"{path} cannot be read: {error}.") from error


def _tensor_digest(tensor: Any) -> bytes:
    from safetensors.torch import save

    (digest,) = _digests(memoryview(save({"": tensor.detach().cpu().contiguous()})))
    return digest


def _digests(content: memoryview) -> Iterator[bytes]:
    """Compute the digest of type, shape and bytes of each tensor, from the content of a safetensors file."""
    start = 8 + int.from_bytes(content[:8], "little")
    if not 10 <= start <= len(content):
        raise ValueError("it is no complete safetensors file")
    for name, entry in json.loads(bytes(content[8:start])).items():
        if name == "__metadata__":
            continue
        begin, end = (start + offset for offset in entry["data_offsets"])
        if not start <= begin <= end <= len(content):
            raise ValueError(f"the tensor {name} lies outside it")
        hasher = hashlib.blake2b(f"{entry['dtype']}{entry['shape']}".encode())
        with content[begin:end] as data:
            hasher.update(data)
        yield hasher.digest()
