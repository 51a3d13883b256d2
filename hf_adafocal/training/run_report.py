"""Report a run: measure its checkpoint on a test set and describe how it was trained."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from transformers import Trainer
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.utils import logging

from hf_adafocal.data.fingerprint import Fingerprint
from hf_adafocal.data.overlap import SplitCheck
from hf_adafocal.losses.registry import name_of
from hf_adafocal.report.card import is_stale
from hf_adafocal.report.files import pictures, read_report, save_report
from hf_adafocal.report.measurement import Collected
from hf_adafocal.report.schema import Report, build_report
from hf_adafocal.report.weights import weights_hash
from hf_adafocal.scaling.folding import recorded_scaling
from hf_adafocal.training.arguments import AdaFocalTrainingArguments
from hf_adafocal.training.plan import is_stream

if TYPE_CHECKING:
    from hf_adafocal.training.trainer import AdaFocalTrainer

logger = logging.get_logger(__name__)


def report_of(
    trainer: "AdaFocalTrainer", test_dataset: Any = None, *, ood: tuple[str, Any] | None = None, **facts: Any
) -> Report:
    """Measure a trainer's current model and build its report.

    Args:
        trainer: Trained or not.
        test_dataset: Data that trained and chose nothing. Left out, the entry "test" of the evaluation sets, else the
            first evaluation set, and the report says what that set was used for.
        ood: Name and data set of out-of-distribution inputs.
        **facts: Further arguments of `report.schema.build_report`, which replace what the trainer knows.

    Raises:
        ValueError: If there is no set to measure.
    """
    split, dataset = _measured_set(trainer, test_dataset)
    _, logits = trainer.measure(dataset, split)
    calibration = trainer.calibration_dataset
    folded = recorded_scaling(trainer.network)
    fitted = None
    if calibration is not None and folded is None and logits is not None:
        fitted = logits if calibration is dataset else trainer.measure(calibration, "calibration")[1]
    if ood is not None:
        facts["ood"] = (ood[0], trainer.predict(ood[1], metric_key_prefix="ood").predictions)
    known = _facts(trainer, split, dataset)
    known = {**known, **facts, "training": {**known["training"], **facts.get("training", {})}}
    return build_report(collected_results(trainer, split) if logits is None else logits, fitted, **known)


def collected_results(trainer: "AdaFocalTrainer", prefix: str) -> Collected:
    """Return the metrics of the last evaluation under a prefix, for a report of logits that were too many to keep."""
    collected, num_bins = trainer.recorder.samples[prefix], trainer.plan.num_bins
    return Collected(collected.metrics(num_bins), len(collected), num_bins, collected.diagram(num_bins))


def pictures_of(trainer: "AdaFocalTrainer", prefix: str) -> dict[str, Any]:
    """Draw the reliability diagram of the last evaluation under a prefix.

    Returns:
        Matplotlib figures by name; none without matplotlib, or if nothing was evaluated under that prefix.
    """
    plots, samples = pictures(), trainer.recorder.samples.get(prefix)
    if plots is None or samples is None:
        return {}
    return {"reliability": plots.reliability_diagram(samples.diagram(trainer.plan.num_bins))}


def adaptation_pictures_of(trainer: "AdaFocalTrainer") -> dict[str, Any]:
    """Draw how the loss adapted over training; matplotlib figures by name, none if it did not."""
    plots, callback = pictures(), trainer.adaptive_callback
    return {} if plots is None or callback is None else plots.adaptation_diagrams(callback.history)


def save_with_weights(trainer: "AdaFocalTrainer", report: Report) -> None:
    """Write a report into the trainer's folder, and save the model first if the weights there are others."""
    stale = trainer.is_world_process_zero() and is_stale(trainer.folder, report)
    (stale,) = broadcast_object_list([stale])
    if stale:
        trainer.save_model(_internal_call=True)  # without the upload that a user's call makes
    if trainer.is_world_process_zero():
        save_report(trainer.folder, report)


def current_report(trainer: "AdaFocalTrainer") -> tuple[Report | None, bool]:
    """Read the report in the trainer's folder on the main process, and whether it describes the current model."""
    report = None
    if trainer.is_world_process_zero():
        try:
            report = read_report(trainer.folder)
        except ValueError as error:
            logger.warning(f"{error} It is replaced.")
    current = report is not None and report.weights == weights_hash(trainer.network)
    (current,) = broadcast_object_list([current])
    return report, current


def card_options(trainer: "AdaFocalTrainer", *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Convert arguments of `Trainer.create_model_card` to options of `report.card.write_card`."""
    given = inspect.signature(Trainer.create_model_card).bind(trainer, *args, **kwargs).arguments
    names = {"model_name": "name", "finetuned_from": "base_model", "dataset_tags": "datasets"}
    names |= {name: name for name in ("language", "license", "tags")}
    options = {ours: given[theirs] for theirs, ours in names.items() if given.get(theirs)}
    return {"repo_id": trainer.hub_model_id, **options}


def tensorboard_writer_of(trainer: "AdaFocalTrainer") -> Any:
    """Return the TensorBoard writer of a run; None if it has none."""
    callbacks = trainer.callback_handler.callbacks
    return next((found.tb_writer for found in callbacks if isinstance(found, TensorBoardCallback)), None)


def _measured_set(trainer: "AdaFocalTrainer", test_dataset: Any) -> tuple[str, Any]:
    if test_dataset is not None:
        return "test", test_dataset
    sets = trainer.eval_dataset
    if isinstance(sets, Mapping):
        name = "test" if "test" in sets else next(iter(sets))
        return ("test" if name == "test" else "evaluation"), sets[name]
    if sets is None:
        raise ValueError("There is no set to report on: pass test_dataset, or build the trainer with an eval_dataset.")
    return "evaluation", sets


def _facts(trainer: "AdaFocalTrainer", split: str, dataset: Any) -> dict[str, Any]:
    args, plan = trainer.args, trainer.plan
    callback = trainer.adaptive_callback
    calibration = plan.calibration_dataset
    # The role whose data moved the loss, and so on; the evaluation set may be the calibration set.
    role = split if calibration is dataset else "calibration"
    held_out = {} if plan.adaptive is None else {"adaptation": role}
    if calibration is not None:
        held_out["scaling"] = role
    if args.load_best_model_at_end:
        held_out["selection"] = "evaluation"
    sets = {"train": trainer.train_dataset, "calibration": calibration, split: dataset}
    check = plan.split_check or SplitCheck({}, {})
    prints = check.fingerprints
    return {
        "model": trainer.model,
        "split": split,
        "num_bins": plan.num_bins,
        "folded": recorded_scaling(trainer.network),
        "loss": {
            "name": name_of(trainer.loss),
            **(args.loss_settings if isinstance(args, AdaFocalTrainingArguments) and plan.from_arguments else {}),
            **({"reduction": "sum"} if plan.reduction == "sum" else {}),
        },
        "adaptation": () if callback is None else callback.history,
        "splits": {
            name: _described(part, prints.get(name))
            for name, part in sets.items()
            if part is not None and not is_stream(part)
        },
        "held_out": held_out,
        "overlap": {"policy": plan.split_overlap, "rows": check.overlap, "dropped": check.dropped},
        "seed": args.seed,
        "training": {
            "epochs": trainer.state.epoch or args.num_train_epochs,
            "batch_size": args.train_batch_size * args.gradient_accumulation_steps * trainer.processes.count,
            "learning_rate": args.learning_rate,
        },
    }


def _described(part: Any, fingerprint: Fingerprint | None) -> dict[str, Any]:
    return {"size": len(part), "hash": None if fingerprint is None else fingerprint.hash}
