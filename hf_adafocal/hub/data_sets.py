"""Look up the Hub's metadata of the data set behind a report: its language and its tasks as a benchmark."""

import datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

import huggingface_hub
import yaml
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from transformers.utils import logging

from hf_adafocal.report.eval_results import eval_results_entry
from hf_adafocal.report.schema import Report

logger = logging.get_logger(__name__)
_HTTPError = cast("type[Exception]", HfHubHTTPError.__bases__[0])  # of httpx


class DataSetFacts(NamedTuple):
    """Metadata of a data set's repository.

    Attributes:
        language: Languages of the data, as the Hub codes them; None if it does not say.
        entries: Result of the report on the benchmark that the data set is, path in the checkpoint's folder and text.
    """

    language: str | list[str] | None = None
    entries: dict[str, bytes] = {}


def look_up_data_set(report: Report | None, repo_id: str, task_id: str | None = None) -> DataSetFacts:
    """Fetch the Hub's metadata of the data set that a report was measured on.

    A data set is a benchmark if it has an `eval.yaml`, which names tasks, each with a split. Without `task_id` a
    result is entered only where it is known to be that of the benchmark: the only task of the measured split, and as
    many samples as that split has.

    Args:
        report: None if there is none.
        repo_id: Repository of the checkpoint, the source of the result.
        task_id: Task under which the result is to be entered.

    Raises:
        ValueError: If `task_id` is given and the data set is no benchmark with such a task.
    """
    source = None if report is None else report.evaluated_on
    if report is None or source is None or source.hub_id is None:
        if task_id is not None:
            raise ValueError("Only results on a data set of the Hub can be entered as a benchmark's.")
        return DataSetFacts()
    api = HfApi(token=True)
    try:
        found = api.dataset_info(source.hub_id, timeout=10)
        tasks = _tasks(api, source.hub_id, found.sha)
    except (_HTTPError, OSError) as error:
        if task_id is not None:
            raise ValueError(f"The data set {source.hub_id} cannot be looked up: {_in_one_line(error)}") from error
        logger.warning(f"The data set {source.hub_id} cannot be looked up: {_in_one_line(error)}")
        return DataSetFacts()
    card = found.card_data.to_dict() if found.card_data is not None else {}
    spoken = (report.model.task or "").startswith(("text", "token"))
    language = card.get("language") if spoken else None
    chosen = _chosen_task(report, source.hub_id, tasks, card, task_id)
    if chosen is None or not hasattr(huggingface_hub, "EvalResultEntry"):
        return DataSetFacts(language)
    path, text = eval_results_entry(
        report,
        chosen,
        dataset_revision=found.sha if _is_older(found.last_modified, report.date) else None,
        source_url=f"{constants.ENDPOINT}/{repo_id}/blob/main/report.json",
        source_name="report of hf-adafocal",
    )
    return DataSetFacts(language, {path: text.encode()})


def _tasks(api: HfApi, hub_id: str, revision: str | None) -> list[dict[str, Any]]:
    """Return the tasks of a benchmark; none if the data set is no benchmark."""
    try:
        path = api.hf_hub_download(hub_id, "eval.yaml", repo_type="dataset", revision=revision)
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except EntryNotFoundError:
        return []
    except (yaml.YAMLError, UnicodeDecodeError):
        logger.warning(f"The eval.yaml of the data set {hub_id} cannot be read.")
        return []
    tasks = content.get("tasks") if isinstance(content, dict) else None
    return [task for task in tasks or () if isinstance(task, dict) and task.get("id")]


def _chosen_task(
    report: Report, hub_id: str, tasks: list[dict[str, Any]], card: dict[str, Any], task_id: str | None
) -> str | None:
    ids = [str(task["id"]) for task in tasks]
    if task_id is not None:
        if task_id not in ids:
            known = f"its tasks are {', '.join(ids)}" if ids else "it is no benchmark: it has no eval.yaml with tasks"
            raise ValueError(f"The data set {hub_id} has no task {task_id!r}; {known}.")
        return task_id
    fitting = [str(task["id"]) for task in tasks if task.get("split", "test") == report.test.split]
    size = report.splits.get(report.test.split, {}).get("size")
    if len(fitting) == 1 and size is not None and size == _rows(card, report.test.split):
        return fitting[0]
    if ids:
        logger.warning(
            f"The data set {hub_id} is a benchmark ({', '.join(ids)}), but it is not known that its whole "
            f"{report.test.split} split was measured. If it was, push with `--benchmark-task`."
        )
    return None


def _rows(card: dict[str, Any], split: str) -> int | None:
    """Return the number of rows of a split, from the metadata of a data set with one configuration."""
    infos = card.get("dataset_info")
    infos = [infos] if isinstance(infos, dict) else infos
    if not isinstance(infos, list) or len(infos) != 1:
        return None
    return next((part.get("num_examples") for part in infos[0].get("splits", ()) if part.get("name") == split), None)


def _is_older(changed: datetime.datetime | None, day: str | None) -> bool:
    """Whether a data set was last changed before a measurement, so that its current revision is the measured one."""
    return changed is not None and day is not None and changed.date() < datetime.date.fromisoformat(day)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
