"""Push a run folder to the Hugging Face Hub as a model: an allow-list of files, in one repeatable commit."""

import mmap
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.utils import logging

from hf_adafocal.checkpoint_files import is_weights
from hf_adafocal.hub.client import PushResult, checked_token, push_files
from hf_adafocal.hub.data_sets import look_up_data_set
from hf_adafocal.report.atomic import write_atomically
from hf_adafocal.report.card import CARD, PICTURES, START, names_license, with_license, write_card
from hf_adafocal.report.eval_results import results_of_other_weights
from hf_adafocal.report.files import FILE, read_report
from hf_adafocal.report.hub_card import card_without_report
from hf_adafocal.report.schema import Report
from hf_adafocal.report.tables import escape
from hf_adafocal.report.weights import weights_hash
from hf_adafocal.upload_selection import EXAMPLE, Selection, describes_weights, select_files

logger = logging.get_logger(__name__)


def push_run(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    include: Sequence[str] = (),
    include_training_state: bool = False,
    license: str | None = None,
    benchmark_task: str | None = None,
    message: str = "Push a run with hf-adafocal",
) -> PushResult:
    """Push the folder of a run as a model: weights, configuration, tokenizer or processor, card, report, pictures.

    Everything goes into one commit, so the repository is never half new. A push that failed can be repeated; one that
    changes nothing makes no commit. Call it in one process of a distributed run.

    A card with a calibration report is pushed as `report.json` and the repository's id make it; the folder's own card
    stays as it is. A report of other weights than those in the folder is refused.

    Only files of an allow-list are pushed, and only if they hold what their names say
    (`upload_selection.select_files`); the result names each other file with the reason. The Trainer's state
    (`trainer_state.json`, `training_args.bin`, optimizer, scheduler and random states, `checkpoint-*` folders, event
    files) is pushed with `include_training_state` alone. It holds pickles, which run code when they are loaded: share
    them with people who trust you.

    Args:
        folder: What `save_model` wrote, with the files beside it.
        repo_id: `<namespace>/<name>`, or `<name>` in the user's own namespace.
        private: Create the repository as a private one. The visibility of one that is there does not change.
        revision: Branch to push to, created from `main` if there is none of that name; `main` if left out.
        include: Patterns of further files to push, such as `*.onnx`.
        include_training_state: Push what is needed to go on training, too.
        license: Licence of the checkpoint, as the Hub spells it; written into the folder's own card too. If the card
            names none a warning asks for one.
        benchmark_task: Task of the benchmark under which the accuracy is entered in `.eval_results/`; if left out,
            that of a registered benchmark whose whole split was measured (`data_sets.look_up_data_set`).
        message: First line of the commit message.

    Returns:
        What was pushed, what was left out and why, and whether there is a new commit.

    Raises:
        ValueError: If the folder holds no complete checkpoint in safetensors, a file is not what its name says or
            holds an access token, or the report or card is not known to describe these weights.
        PushError: If the Hub cannot be reached or refuses, or `private` is asked of a public repository.
    """
    folder = Path(folder)
    if license is not None:
        _write_license(folder, license)
    selection = select_files(folder, include=include, training_state=include_training_state)
    _check_checkpoint(folder, selection)
    if CARD not in selection.files:
        logger.warning(f"{folder} holds no README.md, so the repository {repo_id} gets no model card from this push.")
    elif not names_license(selection.files[CARD].read_text(encoding="utf-8")):
        logger.warning("The model card names no licence. Choose one, as in `hf-adafocal push --license apache-2.0`.")
    _check_for_token(selection.files)
    report = _checked_report(folder, selection.files)
    _check_local_paths(folder, selection.files)
    if benchmark_task is not None and report is None:
        raise ValueError(
            f"{folder} holds no card with a report whose accuracy could be entered as {benchmark_task!r}."
        )

    def files(full_id: str) -> dict[str, Path | bytes]:
        if CARD not in selection.files:
            return {**selection.files, **card_without_report(HfApi(token=True), repo_id=full_id, revision=revision)}
        if report is None:
            return {**selection.files}
        known = look_up_data_set(report, full_id, benchmark_task)
        card = _card_of_repository(folder, report, full_id, known.language)
        return {**selection.files, CARD: card, **known.entries}

    result = push_files(
        files,
        repo_id,
        private=private,
        revision=revision,
        message=message,
        replaces=describes_weights,
    )
    if selection.left_out:
        reasons = ", ".join(f"{path} ({reason})" for path, reason in selection.left_out.items())
        logger.info(f"Not pushed: {reasons}.")
    return replace(result, left_out=selection.left_out)


def _check_checkpoint(folder: Path, selection: Selection) -> None:
    top = {path for path in selection.files if "/" not in path}
    if not any(path.endswith(".safetensors") and is_weights(path) for path in top):
        found = {path: reason for path, reason in selection.left_out.items() if "/" not in path and is_weights(path)}
        pickled = [path for path, reason in found.items() if reason == "pickled weights"]
        if pickled:
            raise ValueError(
                f"The weights in {folder} are pickles ({', '.join(pickled)}), and these are not pushed. Convert them: "
                "load the folder with the model's `from_pretrained` and `save_pretrained` it there, which writes "
                "model.safetensors."
            )
        reasons = "".join(f" {path} is left out: {reason}." for path, reason in found.items())
        raise ValueError(
            f"{folder} holds no weights (model.safetensors).{reasons} Save the run with `trainer.save_model()` first."
        )
    if not {"config.json", "adapter_config.json"} & top:
        raise ValueError(f"{folder} holds no config.json. Save the run with `trainer.save_model()` first.")


def _check_for_token(files: Mapping[str, Path]) -> None:
    token = checked_token().encode()
    for source in files.values():
        if source.suffix != ".safetensors" and _contains(source, token):
            raise ValueError(f"{source} holds your Hugging Face token. Remove it from there, or leave the file out.")


def _contains(source: Path, secret: bytes) -> bool:
    if source.stat().st_size == 0:  # which cannot be mapped
        return False
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(secret) >= 0


# Card and report ---------------------------------------------------------------------------------------------------


def _checked_report(folder: Path, files: Mapping[str, Path]) -> Report | None:
    """Return the report that the card shows; None if the card shows none.

    Raises:
        ValueError: If there is a report of other weights, or a card that shows one that is missing.
    """
    report = read_report(folder) if FILE in files else None
    shown = CARD in files and START in files[CARD].read_text(encoding="utf-8")
    advice = "Measure these weights with `hf-adafocal evaluate`, or delete the report"
    if report is not None and report.weights != weights_hash(folder):
        found = (
            "does not say which weights it describes"
            if report.weights is None
            else ("describes other weights than those beside it")
        )
        raise ValueError(f"{folder / FILE} {found}. {advice} and its card.")
    if shown and report is None:
        raise ValueError(f"{folder / CARD} shows a calibration report, but {FILE} is missing. {advice} in it.")
    outdated = results_of_other_weights(files, weights_hash(folder))
    if outdated:
        raise ValueError(f"{folder / outdated[0]} is a result of other weights than those in {folder}. Delete it.")
    return report if shown else None


def _card_of_repository(folder: Path, report: Report, repo_id: str, language: Any) -> bytes:
    """Rewrite the folder's card from its report, for the repository it is pushed to."""
    with tempfile.TemporaryDirectory() as parent:
        copy = Path(parent) / folder.resolve().name
        copy.mkdir()
        for path in folder.iterdir():
            if path.name in (CARD, "config.json", *PICTURES, EXAMPLE) or path.suffix == ".py":
                shutil.copyfile(path, copy / path.name)
        write_card(copy, report, repo_id=repo_id, language=language)
        return (copy / CARD).read_bytes()


def _write_license(folder: Path, license: str) -> None:
    path = folder / CARD
    existing = path.read_text(encoding="utf-8") if path.is_file() else f"# {escape(folder.resolve().name)}\n"
    write_atomically(path, with_license(existing, license))


def _check_local_paths(folder: Path, files: Mapping[str, Path]) -> None:
    """Reject local paths in the report, and warn of local paths in other small text files."""
    places = {f"{place}/".encode() for place in (Path.home(), Path.cwd(), folder.resolve()) if place != Path("/")}
    for path, source in files.items():
        if source.suffix not in (".json", ".md", ".jinja", ".yaml", ".yml") or source.stat().st_size > 1 << 20:
            continue
        content = source.read_bytes()
        found = [place.decode() for place in places if place in content]
        if found and path == FILE:
            raise ValueError(f"{source} names places on this machine ({found[0]}...). Repeat the evaluation.")
        if found:
            logger.warning(f"{path} names places on this machine ({found[0]}...), which everybody will read.")
