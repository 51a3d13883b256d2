"""Hash of a model's weights, which ties a report to the checkpoint it describes."""

import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_CHECKPOINTS = ("model*.safetensors", "adapter_model*.safetensors")
_OTHERS = ("pytorch_model*.bin", "adapter_model*.bin")  # hashed as files: reading a pickle would run code


def weights_hash(weights: str | Path | Mapping[str, Any]) -> str | None:
    """Hash of names, types, shapes and values of all tensors of a checkpoint.

    Neither the number of shards nor the files beside the weights count. The hash of a folder is that of the state
    dict that was saved there, unless `save_pretrained` left out or renamed tensors (tied weights, old names): compare
    folders with folders.

    Args:
        weights: A folder with `*.safetensors` (of a model, an adapter or both), or a state dict of tensors.

    Returns:
        32 hexadecimal digits (BLAKE2b); None for a folder without weights. `.bin` files are hashed as they are.

    Raises:
        ValueError: If a safetensors file cannot be read.

    >>> import torch
    >>> weights_hash({"head.weight": torch.eye(2)}) == weights_hash({"head.weight": torch.eye(2)})
    True
    """
    if isinstance(weights, Mapping):
        return _combined({name: _tensor_digest(tensor) for name, tensor in weights.items()})
    folder = Path(weights)
    digests: dict[str, bytes] = {}
    for kind, pattern in zip(("", "adapter:"), _CHECKPOINTS, strict=True):
        for path in sorted(folder.glob(pattern)):
            digests.update((kind + name, digest) for name, digest in _file_digests(path))
    if not digests:
        for pattern in _OTHERS:
            for path in sorted(folder.glob(pattern)):
                with path.open("rb") as file:
                    digests[path.name] = hashlib.file_digest(file, hashlib.blake2b).digest()
    return _combined(digests) if digests else None


def _combined(digests: Mapping[str, bytes]) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for name in sorted(digests):
        hasher.update(name.encode() + b"\0" + digests[name])
    return hasher.hexdigest()


def _file_digests(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and digest of each tensor of a safetensors file, read through a memory map."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            with memoryview(content) as view:
                yield from _digests(view)
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:  # an empty file too
        raise ValueError(f"{path} cannot be read: {error}.") from error


def _tensor_digest(tensor: Any) -> bytes:
    from safetensors.torch import save

    ((_, digest),) = _digests(memoryview(save({"": tensor.detach().cpu().contiguous()})))
    return digest


def _digests(content: memoryview) -> Iterator[tuple[str, bytes]]:
    """Name and digest of type, shape and bytes of each tensor, from the content of a safetensors file."""
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
        yield name, hasher.digest()
