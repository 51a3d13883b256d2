"""Names of the files in a checkpoint folder (weights, training state, logs), and checks that read headers alone.

Everybody who copies, uploads, deletes or verifies files of a checkpoint asks here.
"""

import bz2
import gzip
import io
import json
import lzma
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import IO, Any

from safetensors import SafetensorError, safe_open

STATE_FILE = "trainer_state.json"  # the Trainer writes it last, so a checkpoint that holds it is complete

# Patterns of names: folders at any depth, files in any folder.
STATE_FOLDERS = ("checkpoint-*", "last-checkpoint", "global_step*", "pytorch_model_fsdp_*", "optimizer_*")
STATE_FILES = (
    *(STATE_FILE, "training_args.bin", "optimizer*", "scheduler*", "scaler*.pt", "rng_state*.pth"),
    *("random_states*.pkl", "latest", "zero_to_fp32.py", "*_states.pt", "*.distcp", ".metadata"),
)
LOG_FOLDERS = ("runs", "wandb", "mlruns", "trackio")
LOG_FILES = ("events.out.tfevents*",)
PICKLE_SUFFIXES = (".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth")

# What a checkpoint needs to be resumed from: of each part at least one match. Shards count by their index, which is
# written after them; the last patterns are folders of FSDP and DeepSpeed.
RESUMABLE_PARTS = {
    "weights": (
        *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
        *("adapter_model.*", "*/adapter_model.*", "pytorch_model_fsdp*", "global_step*"),
    ),
    "optimizer": ("*optimizer*", "global_step*"),
    "scheduler": ("scheduler.pt", "global_step*"),
    "random state": ("rng_state*.pth",),
}

# model.safetensors, model.fp16-00001-of-00002.safetensors, model.safetensors.index.fp16.json, pytorch_model.bin, ...
_WEIGHTS = re.compile(
    r"(model|pytorch_model|adapter_model|tf_model|flax_model)([._][\w.]+?)?(-\d+-of-\d+)?"
    r"\.(safetensors|bin|h5|msgpack|onnx)([._]data|\.index(\.\w+)?\.json)?"
)


def is_weights(path: str | PurePath) -> bool:
    """Whether a file holds weights, or the index of their shards, under a name that loaders look up.

    Covers safetensors, PyTorch, TensorFlow, Flax and ONNX, variants such as `fp16`, shards, and PEFT adapters.

    Example:
        >>> [is_weights(name) for name in ("model-00001-of-00002.safetensors", "model.onnx", "teacher.safetensors")]
        [True, True, False]
    """
    return _WEIGHTS.fullmatch(PurePath(path).name) is not None


def is_training_state(path: str | PurePath) -> bool:
    """Whether a file, by its path in the run folder, is state of the optimizer, scheduler, Trainer or random numbers.

    Example:
        >>> [is_training_state(name) for name in ("optimizer.pt", "checkpoint-9/config.json", "config.json")]
        [True, True, False]
    """
    return _matches(PurePath(path), STATE_FOLDERS, STATE_FILES)


def is_log(path: str | PurePath) -> bool:
    """Whether a file, by its path in the run folder, is the log of an experiment tracker.

    Example:
        >>> is_log("runs/Nov25/events.out.tfevents.1"), is_log("report.json")
        (True, False)
    """
    return _matches(PurePath(path), LOG_FOLDERS, LOG_FILES)


def _matches(path: PurePath, folders: tuple[str, ...], files: tuple[str, ...]) -> bool:
    named = any(fnmatch(part, pattern) for part in path.parts[:-1] for pattern in folders)
    return named or any(fnmatch(path.name, pattern) for pattern in files)


# Headers ---------------------------------------------------------------------------------------------------------


def check_header(path: Path) -> None:
    """Check that a file is what its suffix says and is not cut short; files of other suffixes pass.

    Reads the header of a `.safetensors` file, the directory of a `.pt`, `.pth` or `.bin` archive, and `.json` files
    whole; the shards that an index names must exist.

    Raises:
        ValueError: If the file cannot be read, with its path and the reason.
    """
    read = _HEADERS.get(path.suffix)
    if read is None:
        return
    try:
        read(path)
    except (OSError, ValueError, RecursionError, SafetensorError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def read_json(path: Path) -> Any:
    """Read a JSON file in UTF-8.

    Raises:
        OSError: If there is no such file.
        ValueError: If it holds something else.
    """
    return json.loads(path.read_text(encoding="utf-8"))


def _read_index(path: Path) -> None:
    content = read_json(path)
    if ".index." in path.name:
        try:
            names = set(content["weight_map"].values())
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("it holds no object `weight_map`") from error
        missing = sorted(name for name in names if not (path.parent / name).is_file())
        if missing:
            raise ValueError(f"it names {missing}, which are missing")


def _read_tensors(path: Path) -> None:
    with safe_open(path, framework="np"):  # compares the header with the file's length
        pass


def _read_directory(path: Path) -> None:
    with zipfile.ZipFile(path):  # torch.save writes the archive's directory at its end
        pass


_HEADERS: dict[str, Callable[[Path], None]] = {
    ".json": _read_index,
    ".safetensors": _read_tensors,
    **dict.fromkeys((".pt", ".pth", ".bin"), _read_directory),
}


# Pickles ---------------------------------------------------------------------------------------------------------


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle or holds one, by its suffix or, whatever its name, by its content.

    Finds pickles of every protocol, archives of `torch.save`, `.npy` and `.npz` arrays of objects, and any of these
    compressed with gzip, bz2, xz or zlib.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return True
    if path.suffix == ".safetensors":  # begins with the length of its header, which may look like anything
        try:
            _read_tensors(path)
        except SafetensorError:
            pass
        else:
            return False
    with path.open("rb") as file:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                return any(_member_is_pickle(archive, name) for name in archive.namelist())
        file.seek(0)
        return _holds_pickle(file)


def _member_is_pickle(archive: zipfile.ZipFile, name: str) -> bool:
    if PurePath(name).suffix.lower() in PICKLE_SUFFIXES:
        return True
    if PurePath(name).suffix != ".npy":
        return False
    with archive.open(name) as member:
        return _holds_pickle(member)


_START = 1 << 16  # bytes of a compressed file that are looked at


def _holds_pickle(file: IO[bytes]) -> bool:
    start = file.read(8)
    file.seek(0)
    if start.startswith(b"\x93NUMPY"):
        return _is_object_array(file)
    if re.match(rb"\x80[\x02-\x05]", start):
        return True
    for magic, decompressed in _COMPRESSED.items():
        if start.startswith(magic):
            try:
                return _holds_pickle(io.BytesIO(decompressed(file)))
            except (OSError, EOFError, lzma.LZMAError, zlib.error):
                return False
    return _is_text_pickle(file)


_COMPRESSED: dict[bytes, Callable[[IO[bytes]], bytes]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file).read(_START),
    b"BZh": lambda file: bz2.BZ2File(file).read(_START),
    b"\xfd7zXZ": lambda file: lzma.LZMAFile(file).read(_START),
    **dict.fromkeys(
        (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda"),
        lambda file: zlib.decompressobj().decompress(file.read(_START), _START),
    ),
}


def _is_object_array(file: IO[bytes]) -> bool:
    from numpy.lib import format as npy

    try:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        return bool(read(file)[2].hasobject)
    except ValueError:  # not an array that numpy would load
        return False


def _is_text_pickle(file: IO[bytes]) -> bool:
    """Whether the file is a pickle of protocol 0 or 1, which have no magic number.

    Text that happens to begin like one ("N.B.") is told apart by what follows: a pickle ends with the file, or
    refers to something to import.
    """
    imports = False
    try:
        for opcode, _, _ in pickletools.genops(file):
            imports = imports or opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL", "REDUCE", "BUILD", "PERSID")
    except (ValueError, pickle.UnpicklingError, EOFError, OverflowError):
        return False
    return imports or not file.read(1)
