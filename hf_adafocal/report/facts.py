"""Publishable facts about a model and its data: names without local paths, versions of libraries."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("hf-adafocal", "torch", "transformers", "datasets", "accelerate", "numpy")
TASKS = {  # last part of a model's class name -> the Hub's name of its task
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForTokenClassification": "token-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForUniversalSegmentation": "image-segmentation",
    "ForAudioClassification": "audio-classification",
    "ForVideoClassification": "video-classification",
}


@dataclass(frozen=True)
class DataSource:
    """Publishable name of a data set.

    Attributes:
        name: Hub id, or the name of the folder alone.
        hub_id: The id if the data set is on the Hub, else None.
    """

    name: str
    hub_id: str | None = None

    @classmethod
    def of(cls, dataset: str) -> "DataSource":
        """Identify the source behind a user's name for a data set: a Hub id, a built-in name or a local path.

        >>> DataSource.of("../private/imgs"), DataSource.of("me/news").hub_id
        (DataSource(name='imgs', hub_id=None), 'me/news')
        """
        on_hub = re.fullmatch(r"[\w.-]*\w[\w.-]*/[\w.-]*\w[\w.-]*", dataset) and dataset[0] != "."
        if on_hub and not Path(dataset).exists():
            return cls(dataset, dataset)
        parts = [part for part in re.split(r"[/\\]+", dataset) if part not in ("", ".", "..", "~")]
        return cls(parts[-1] if parts else "local data")


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model that its card states besides calibration.

    Attributes:
        architecture: Name of its class.
        task: The Hub's name of the task; None if it is none of `TASKS`.
        labels: Class names in the order of the logits; empty if unknown; one, that of the positive class, of a head
            with a single output for two classes.
        base_model: Hub id of the checkpoint that was fine-tuned; None if unknown, local or trained from scratch.
        custom_code: Whether loading it needs `trust_remote_code=True`.
        adapter: Whether the checkpoint is a PEFT adapter.
    """

    architecture: str
    task: str | None = None
    labels: tuple[str, ...] = ()
    base_model: str | None = None
    custom_code: bool = False
    adapter: bool = False

    @property
    def single_output(self) -> bool:
        """Whether the head has one logit, that of the positive one of two classes."""
        return len(self.labels) == 1


def describe_model(model: Any) -> ModelFacts:
    """Collect what a card says of a model: its class, task, labels, origin.

    Args:
        model: A transformers model, also under PEFT or a wrapper with `module`.

    >>> class BertForSequenceClassification: pass
    >>> describe_model(BertForSequenceClassification()).task
    'text-classification'
    """
    while not hasattr(model, "config") and hasattr(model, "module"):  # DistributedDataParallel
        model = model.module
    adapter = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    if adapter:
        model = model.get_base_model()
    architecture, config = type(model).__name__, getattr(model, "config", None)
    names = getattr(config, "id2label", None) or {}
    labels = tuple(str(names[index]) for index in sorted(names)) if isinstance(names, Mapping) else ()
    origin = str(getattr(config, "_name_or_path", "") or getattr(model, "name_or_path", "") or "")
    base = None if not origin else _hub_model(origin)
    return ModelFacts(
        architecture,
        next((task for part, task in TASKS.items() if architecture.endswith(part)), None),
        labels,
        base,
        bool(getattr(config, "auto_map", None)),
        adapter,
    )


def versions() -> dict[str, str]:
    """Return the version of each library that a result depends on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _hub_model(origin: str) -> str | None:
    if Path(origin).exists() or not re.fullmatch(r"[\w.-]*\w(/[\w.-]*\w)?", origin):
        return None
    return origin
