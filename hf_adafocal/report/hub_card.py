"""Fetch and clean the model card that a Hub repository already has."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError

from hf_adafocal.report.card import CARD, START, without_report


def card_without_report(api: HfApi, **target: Any) -> dict[str, bytes]:
    """Return a repository's card without its calibration report, to be uploaded with other weights.

    Args:
        api: Client of the Hub.
        **target: `repo_id`, and `revision` and `token` if need be.

    Returns:
        The new card by its path; empty if there is none, or none that shows a report.

    Raises:
        HfHubHTTPError: If the Hub cannot be asked.
        ValueError: If the metadata of the card cannot be read.
    """
    try:
        text = Path(api.hf_hub_download(filename=CARD, **target)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        return {}
    return {CARD: without_report(text).encode()} if START in text else {}
