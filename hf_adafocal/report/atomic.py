"""Write a file so that the earlier one is replaced whole or stays."""

import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it, so that the earlier one is replaced whole or stays.

    Args:
        path: Where the content goes; a symbolic link is replaced, not followed.
        content: Text (UTF-8) or bytes.

    Raises:
        OSError: If it cannot be written; nothing is left behind.
    """
    data = content.encode("utf-8", errors="surrogateescape") if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
