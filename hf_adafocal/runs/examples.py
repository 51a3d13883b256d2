"""Make the example of a model card: an input and the pipeline's output for it."""

from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedModel, pipeline

from hf_adafocal.data.images import to_rgb
from hf_adafocal.data.loading import BUILT_IN, HUB_IDS
from hf_adafocal.report.facts import DataSource
from hf_adafocal.runs.tasks import ImageTask, Prepared, SegmentationTask, Task
from hf_adafocal.upload_selection import EXAMPLE

_HTTPError = cast("type[Exception]", HfHubHTTPError.__bases__[0])  # of httpx
NEUTRAL = "This is an example."  # for data that may not be shown


def make_examples(
    task: Task, prepared: Prepared, model: PreTrainedModel, folder: str | Path
) -> tuple[dict[str, Any], ...]:
    """Run a checkpoint's pipeline on one input, as the example of its model card.

    The input is one of the test split if the data are public. Rows of other data are never shown: a text is then a
    neutral sentence, and there is no image.

    Args:
        task: The task.
        prepared: Its data and processor.
        model: The checkpoint, as `from_pretrained` loads it.
        folder: Of the card; an image is written there as `example.png`.

    Returns:
        `{"input": text or "example.png", "scores": {label: score}}`, or nothing.
    """
    if isinstance(task, SegmentationTask):  # its pipeline gives masks, not scores
        return ()
    given = prepared.example if is_public(task.dataset) else None
    if isinstance(task, ImageTask):
        if given is None:
            return ()
        given = to_rgb(given)
        Path(folder).mkdir(parents=True, exist_ok=True)
        given.save(Path(folder) / EXAMPLE)
        classify: Any = pipeline("image-classification", model=model, image_processor=prepared.processing_class)
        name = EXAMPLE
    elif prepared.processing_class is None:  # tokens that came ready-made
        return ()
    else:
        given = name = given or NEUTRAL
        classify = pipeline("text-classification", model=model, tokenizer=prepared.processing_class)
    return ({"input": name, "scores": {found["label"]: found["score"] for found in classify(given)}},)


def is_public(dataset: str) -> bool:
    """Return whether anybody may read a data set: a built-in one, or an open one of the Hub."""
    if dataset in BUILT_IN or dataset in HUB_IDS:
        return True
    hub_id = DataSource.of(dataset).hub_id
    if hub_id is None:
        return False
    try:
        found = HfApi().dataset_info(hub_id, token=False, timeout=10)
    except (_HTTPError, OSError):  # without an answer it is not known to be
        return False
    return not found.private and not found.gated
