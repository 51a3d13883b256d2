"""Choose which files of a run folder may be uploaded: an allow-list, by name and by content.

What a checkpoint, its tokenizer or processor, its model card and its report consist of is uploaded if the content is
what the name promises. Everything else stays, unless a pattern names it.
"""

import ast
import os
import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from hf_adafocal.checkpoint_files import (
    LOG_FILES,
    PICKLE_SUFFIXES,
    STATE_FILES,
    STATE_FOLDERS,
    check_header,
    is_log,
    is_pickle,
    is_training_state,
    is_weights,
    read_json,
)

REPORT = "report.json"
PICTURES = ("reliability.png", "gamma.png", "smoothing.png", "overlay.png")
EXAMPLE = "example.png"  # an input that the card shows
ABOUT_WEIGHTS = (REPORT, *PICTURES, EXAMPLE)
# Pattern of a path, a `*` within one folder, and what the file must hold.
_ALLOWED = (
    *((name, "json") for name in ("config.json", "generation_config.json", "adapter_config.json", REPORT)),
    *((f"{name}_config.json", "json") for name in ("preprocessor", "processor", "video_preprocessor", "tokenizer")),
    *((name, "json") for name in ("tokenizer.json", "vocab.json", "special_tokens_map.json", "added_tokens.json")),
    *((name, "json") for name in ("chat_template.json", "entity_vocab.json", "normalizer.json")),
    *((name, "text") for name in ("vocab.txt", "merges.txt", "bpe.codes", "dict.txt", "chat_template.jinja")),
    *((name, "sentencepiece") for name in ("spiece.model", "tokenizer.model", "spm.model", "sentencepiece*.model")),
    *((name, "text") for name in ("README.md", "LICENSE", "LICENSE.*", "NOTICE", "NOTICE.*", "CITATION.cff")),
    ("additional_chat_templates/*.jinja", "text"),
    *((name, "picture") for name in ABOUT_WEIGHTS[1:]),
    *((f".eval_results/*.{suffix}", "yaml") for suffix in ("yaml", "yml")),
    *(("*/adapter_config.json", "json"), ("*/adapter_model.safetensors", "safetensors")),
)
_SECRET = re.compile(
    rb"\b(?:hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{50,}"
    rb"|glpat-[\w-]{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}|sk-(?:[a-z]+-)?[A-Za-z0-9_-]{32,}"
    rb"|xox[abeprs]-[A-Za-z0-9-]{10,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY"
)
_LARGEST_SEARCHED = 1 << 26  # bytes; larger files are tensors
_PICTURE_FORMATS = ("PNG", "JPEG", "GIF", "WEBP")


class Selection(NamedTuple):
    """The files of a folder, by their path in it (with `/`).

    Attributes:
        files: Those to upload, each with its place on disk.
        left_out: The others, each with the reason.
    """

    files: dict[str, Path]
    left_out: dict[str, str]


def select_files(
    folder: str | Path, *, include: Sequence[str] = (), exclude: Sequence[str] = (), training_state: bool = False
) -> Selection:
    """Choose the files of a run folder that may be uploaded, and say of each other one why it may not.

    Allowed are weights in safetensors, configurations, tokenizer and processor, the Python modules that `auto_map`
    names, licence and card with the pictures it shows, `report.json`, and `.eval_results/`. A symbolic link counts as
    the file it leads to if that lies in the folder under the same name.

    Args:
        folder: A run folder.
        include: Patterns of further files, matched with the path in the folder and with the name, as the shell does:
            `*.onnx`, `onnx/*`. Pickles under a name that does not say so, and links that lead outside, stay.
        exclude: Patterns of files to leave out unread, matched likewise.
        training_state: Allow the Trainer's state too: optimizer, scheduler and random states, `checkpoint-*` folders,
            event files. These hold pickles.

    Raises:
        ValueError: If there is no folder, a pattern matches nothing, or a file that would be uploaded does not hold
            what its name says, or holds an access token or a private key.

    Example:
        >>> import json, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text("{}"), (folder / "id_rsa").write_text("-----BEGIN")
        >>> files, left_out = select_files(folder)
        >>> list(files), left_out
        (['config.json'], {'id_rsa': 'not part of a checkpoint'})
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"Expected the folder of a run, found no folder at {folder}.")
    named = {path: "python" for path in custom_code(folder)} | {path: "picture" for path in _shown_pictures(folder)}
    selection = Selection({}, {})
    matched: set[str] = set()
    for path, source in _entries(folder):
        patterns = [pattern for pattern in include if _is_named_by(path, pattern)]
        matched.update(patterns)
        reason = "not asked for" if any(_is_named_by(path, pattern) for pattern in exclude) else None
        reason = reason or _obstacle(folder, source)
        if reason is None:
            kind: str | None = named.get(path) or _kind(path, training_state)
            if kind is None and patterns and (source.suffix.lower() in PICKLE_SUFFIXES or not is_pickle(source)):
                kind = "any"
            if kind is not None:
                _check(source, kind)
            else:
                reason = _reason(path, source)
        if reason is None:
            selection.files[path] = source
        else:
            selection.left_out[_printable(path)] = reason
    unmatched = [pattern for pattern in include if pattern not in matched]
    if unmatched:
        raise ValueError(
            f"No file of {folder} matches {', '.join(map(repr, unmatched))}. Check the patterns to include."
        )
    return selection


def describes_weights(path: str) -> bool:
    """Whether a file of a repository is part of its weights or about them.

    One that an earlier upload left there must go with the next: loaders would find it by its name in place of the new
    weights, or it would show results of weights that are gone.

    Example:
        >>> [describes_weights(path) for path in ("model.safetensors", "report.json", "teacher.safetensors")]
        [True, True, False]
    """
    entry = fnmatchcase(path, ".eval_results/*__*.yaml")  # as `report.eval_results` names its entries
    return entry or ("/" not in path and (is_weights(path) or path in ("adapter_config.json", *ABOUT_WEIGHTS)))


def custom_code(folder: str | Path) -> list[str]:
    """Find the Python modules that a checkpoint's configurations name in `auto_map`, with those that they import.

    Args:
        folder: Of the checkpoint.

    Returns:
        Names of files in the folder.
    """
    folder = Path(folder)
    references: list[str] = []
    for path in sorted(folder.glob("*config.json")):
        try:
            content = read_json(path)
        except (OSError, ValueError):
            continue  # whoever reads the file as a configuration will say so
        mapped = content.get("auto_map") if isinstance(content, dict) else None
        for value in mapped.values() if isinstance(mapped, dict) else ():
            references += [name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)]
    waiting = [reference.rpartition(".")[0] for reference in references if "--" not in reference]
    found: list[str] = []
    while waiting:
        name = f"{waiting.pop()}.py"
        if name not in found and (folder / name).is_file():
            found.append(name)
            waiting += _relative_imports(folder / name)
    return sorted(found)


def _relative_imports(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return []
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return [name for node in nodes for name in ([node.module] if node.module else [a.name for a in node.names])]


def _shown_pictures(folder: Path) -> list[str]:
    """Return the pictures in the folder that the card shows."""
    card = folder / "README.md"
    if not card.is_file():
        return []
    text = card.read_text(encoding="utf-8", errors="replace")
    links = [*re.findall(r"!\[[^\]]*\]\(([^)\s]+)", text), *re.findall(r"<img\b[^>]*\bsrc=[\"']([^\"']+)", text)]
    names = [os.path.normpath(link) for link in links]
    return [name for name in names if name.lower().endswith((".png", ".jpg", ".jpeg", ".gif", ".webp"))]


# The entries of a folder -----------------------------------------------------------------------------------------


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Return path and location of every file and link; links are not followed."""
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders.sort()
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in sorted([*links, *files]):
            source = Path(parent) / name
            yield source.relative_to(folder).as_posix(), source


def _raise(error: OSError) -> None:
    raise error


def _printable(path: str) -> str:
    """Make a path printable on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)


def _obstacle(folder: Path, source: Path) -> str | None:
    """Return why a file cannot be uploaded, whatever it holds; None if it can."""
    if source.is_symlink():
        target = source.resolve()
        if not target.is_relative_to(folder.resolve()):
            return "a link that leads out of the folder"
        if not target.is_file():
            return "a link to a folder, or to nothing"
        if target.name != source.name:
            return "a link to a file of another name"
    if not source.is_file():
        return "not a regular file"
    return None if os.access(source, os.R_OK) else "not readable"


def _is_named_by(path: str, pattern: str) -> bool:
    """Whether a pattern matches, as in a shell: hidden files only if it begins with a dot too."""
    hidden = any(part.startswith(".") for part in path.split("/"))
    if hidden and not (pattern.startswith(".") or "/." in pattern):
        return False
    return fnmatchcase(path, pattern) or fnmatchcase(PurePosixPath(path).name, pattern)


def _kind(path: str, training_state: bool) -> str | None:
    """Return which content a file of the allow-list must have; None for one that is not on the list."""
    whole = PurePosixPath(path)
    if training_state and (is_training_state(whole) or is_log(whole)):
        if any(fnmatchcase(whole.name, pattern) for pattern in (*STATE_FILES, *LOG_FILES)):
            return "any"
        inside = [part for part in whole.parts if not any(fnmatchcase(part, pattern) for pattern in STATE_FOLDERS)]
        whole = PurePosixPath(*inside)
    elif is_training_state(whole) or is_log(whole):
        return None
    if len(whole.parts) == 1 and is_weights(whole) and whole.suffix in (".safetensors", ".json"):
        return None if ".bin." in whole.name else whole.suffix[1:]
    for pattern, kind in _ALLOWED:
        parts = pattern.split("/")
        if len(parts) == len(whole.parts) and all(map(fnmatchcase, whole.parts, parts)):
            return kind
    return None


def _reason(path: str, source: Path) -> str:
    """Return why a file that is not on the allow-list is left out."""
    whole = PurePosixPath(path)
    if (is_weights(whole) and ".bin" in whole.suffixes) or whole.suffix == ".ckpt":
        return "pickled weights"
    if is_training_state(whole):
        return "training state"
    if is_log(whole):
        return "log of a tracker"
    if any(part.startswith(".") for part in whole.parts):
        return "hidden"
    return "pickle" if is_pickle(source) else "not part of a checkpoint"


# Contents --------------------------------------------------------------------------------------------------------


def _check(source: Path, kind: str) -> None:
    """Raise unless the file holds what its name says, and no secret."""
    try:
        _CONTENTS[kind](source)
    except ValueError as error:
        text = str(error)
        known = text if text.startswith(f"{source} ") else f"{source} cannot be read: {text.rstrip('.')}."
        raise ValueError(f"{known} Save the run again before it is pushed.") from error
    found = _SECRET.search(_readable_part(source))
    if found:
        start = found[0][:4].decode()
        raise ValueError(f"{source} holds what looks like an access token or a private key ({start}...). Remove it.")


def _readable_part(source: Path) -> bytes:
    """Return the bytes of a file without its tensors."""
    with source.open("rb") as file:
        if source.suffix == ".safetensors":
            return file.read(int.from_bytes(file.read(8), "little"))
        return file.read() if source.stat().st_size <= _LARGEST_SEARCHED else b""


def _check_json(source: Path) -> None:
    check_header(source)
    if not isinstance(read_json(source), dict | list):
        raise ValueError("it must hold a JSON object or list")


def _check_text(source: Path) -> None:
    if is_pickle(source):
        raise ValueError("it is a pickle")
    if "\0" in source.read_text(encoding="utf-8"):
        raise ValueError("it must be text, found a zero byte")


def _check_python(source: Path) -> None:
    try:
        ast.parse(source.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ValueError(f"it must be a Python module ({error})") from error


def _check_yaml(source: Path) -> None:
    import yaml

    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"it must be YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict | list):
        raise ValueError("it must hold a YAML mapping or list")


def _check_picture(source: Path) -> None:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(source, formats=_PICTURE_FORMATS) as picture:
            picture.verify()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"it must be a picture ({', '.join(_PICTURE_FORMATS)})") from error


def _check_sentencepiece(source: Path) -> None:
    """A protocol buffer of the five messages that a SentencePiece model consists of, to the end of the file."""
    content, position = source.read_bytes(), 0
    while position < len(content):
        tag, length, shift = content[position], 0, 0
        while True:
            position += 1
            if position >= len(content) or shift > 28:
                raise ValueError("it must be a SentencePiece model")
            length |= (content[position] & 0x7F) << shift
            shift += 7
            if content[position] < 0x80:
                break
        position += 1 + length
        if tag not in (0x0A, 0x12, 0x1A, 0x22, 0x2A) or position > len(content):
            raise ValueError("it must be a SentencePiece model")
    if not content:
        raise ValueError("it is empty")


_CONTENTS: dict[str, Callable[[Path], None]] = {
    "any": lambda source: None,
    "json": _check_json,
    "picture": _check_picture,
    "python": _check_python,
    "safetensors": check_header,
    "sentencepiece": _check_sentencepiece,
    "text": _check_text,
    "yaml": _check_yaml,
}
