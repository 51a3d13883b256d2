"""`AdaFocalTrainer`: the Hugging Face Trainer with a calibration-aware loss, and calibration in its evaluations."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    default_compute_objective,
)
from transformers.utils import logging

from hf_adafocal.losses.adafocal import AdaFocalLoss
from hf_adafocal.losses.batch_loss import CombinedLoss
from hf_adafocal.losses.registry import name_of
from hf_adafocal.metrics.binning import BinStats
from hf_adafocal.preserved_state import evaluating, random_state_kept
from hf_adafocal.report.card import START, write_card
from hf_adafocal.report.files import pictures, read_report, versions
from hf_adafocal.scaling.folding import RECORD
from hf_adafocal.training.arguments import AdaFocalTrainingArguments, refuse_streaming
from hf_adafocal.training.callbacks import (
    AdaFocalCallback,
    EpochBegin,
    SaveAfterEvaluation,
    TableCallback,
    TemperatureCallback,
    saved_table,
)
from hf_adafocal.training.checkpoints import STATE_FILE, last_complete_checkpoint
from hf_adafocal.training.evaluation import IGNORED, HistogramCollector, SampleCollector, classes_last, per_sample
from hf_adafocal.training.plan import (
    SeenClasses,
    calibration_entry,
    carve,
    check_calibration,
    choose_rule,
    evaluated_as,
    keep_apart,
    refuse_ignored_arguments,
    refuse_other_batches,
    refuse_other_labels,
    refuse_other_tasks,
    settle_default,
)
from hf_adafocal.training.smoothing_control import temperature_sums
from hf_adafocal.training.trackers import TRACKERS, PictureCallback

logger = logging.get_logger(__name__)


class AdaFocalTrainer(Trainer):
    """A `Trainer` that trains with AdaFocal, or any loss of `LOSSES`, and reports calibration.

    Arguments that name neither a loss nor an update rule get label smoothing steered by the temperature of the
    calibration set, and a log line says so: of what is in `LOSSES` it came out best in short fine-tunes.

    Every evaluation adds exact `accuracy`, `nll`, `ece` and `ada_ece` under its prefix, to the log, the trackers and
    `metric_for_best_model`; the evaluation loss is the NLL, because gamma moves and could not rank checkpoints.
    By the paper's rule AdaFocal moves its table after each evaluation during training, by the temperature rule some
    ten times a run whether it evaluates or not; `update_rule` of the trainer says which it is.

    Args:
        model: As in `Trainer`; its output has `logits`, shape `(N, C)`; `(N, L, C)` for token classification; or
            `(N, C, H, W)` for segmentation, resized to the labels as transformers' own losses do. Each token or pixel
            counts as a sample unless its label is -100.
        args: `AdaFocalTrainingArguments`, or plain `TrainingArguments` for AdaFocal with the paper's settings.
        calibration_dataset: Held-out data that drives gamma. Left out, it is carved from `train_dataset` if
            `calibration_fraction` says so, else it is `eval_dataset` (of a dict, the entry named "calibration"). If
            it is the evaluation set nothing is computed twice. It must share no row with `train_dataset` by content,
            nor with an evaluation set named "test" (see `splits.fingerprint`; `split_overlap` of the arguments); a
            part carved from train loses nothing, and train loses its copies.
        loss: A loss module to use instead of the one `args` describe.
        **kwargs: Every other argument of `Trainer`.

    Raises:
        ValueError: If AdaFocal has no calibration data or is never to be evaluated, if the calibration set shares rows
            with the training set, if the model or the labels are not those of a single-label classifier, or if an
            argument would be ignored (`label_smoothing_factor`, `compute_loss_func`).
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        calibration_dataset: Any = None,
        loss: torch.nn.Module | None = None,
        **kwargs,
    ) -> None:
        args = AdaFocalTrainingArguments() if args is None else args
        ours = isinstance(args, AdaFocalTrainingArguments)
        refuse_ignored_arguments(args, kwargs)
        if isinstance(loss, str):
            raise TypeError(f"loss must be a module, found {loss!r}: name it in AdaFocalTrainingArguments(loss=...).")
        builds_loss = loss is None and ours
        if loss is None:
            loss = args.build_loss() if ours else AdaFocalLoss()
        carved = calibration_dataset is None and ours and args.calibration_fraction > 0
        if carved:
            train_dataset, calibration_dataset = carve(train_dataset, args)
        if eval_dataset is None:
            eval_dataset = calibration_dataset
        adaptive = getattr(loss, "adaptive", None)
        refuse_streaming(getattr(args, "streaming_calibration", False), type(adaptive))
        if calibration_dataset is None and adaptive is not None:
            calibration_dataset = calibration_entry(eval_dataset)
        if builds_loss and args.loss_by_default and train_dataset is not None:
            settle_default(args, calibration_dataset)
            loss = args.build_loss()
            adaptive = getattr(loss, "adaptive", None)
        self.update_rule = choose_rule(args, adaptive, calibration_dataset)
        if adaptive is not None and train_dataset is not None:
            check_calibration(calibration_dataset, args, self.update_rule, getattr(adaptive, "num_bins", 0))

        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        if not self.label_names:
            raise ValueError(
                f"{type(self.model).__name__}.forward has no `labels` argument, so evaluation would find no labels. "
                "Set label_names=['labels'] and remove_unused_columns=False in the training arguments."
            )
        refuse_other_tasks(self.model)
        named = eval_dataset if isinstance(eval_dataset, dict) else {"evaluation": eval_dataset}
        for name, dataset in {**named, "calibration": calibration_dataset, "training": train_dataset}.items():
            refuse_other_labels(name, dataset)
        if adaptive is not None and train_dataset is not None:
            content = {"blank_tokens": getattr(self.processing_class, "all_special_ids", ())}
            if self.args.remove_unused_columns:
                self._set_signature_columns_if_needed()
                content["columns"] = self._signature_columns
            self.train_dataset = keep_apart(
                self.train_dataset, calibration_dataset, eval_dataset, getattr(args, "split_overlap", "error"), carved,
                **content,
            )  # fmt: skip
        # compute_loss divides by the number of labels itself, so the Trainer must always count them.
        self.model_accepts_loss_kwargs = True
        self.loss = loss.to(self.args.device)
        self._builds_loss = builds_loss  # from the arguments
        self.calibration_dataset = calibration_dataset
        self._collector: SampleCollector | HistogramCollector | None = None  # of the evaluation under way
        self._added_metrics: set[str] = set()  # names that no compute_metrics gave
        self._evaluating: Any = None  # the data set that `evaluate` reads
        self._calibration_samples: SampleCollector | HistogramCollector | None = None  # of its last evaluation
        self._num_classes: int | None = None  # of the logits evaluated last
        self._classes = SeenClasses()  # of the calibration set
        self.add_callback(EpochBegin(self._begin_epoch))
        self.add_callback(SaveAfterEvaluation() if adaptive is None else self._table_callback(adaptive))
        self._samples: dict[str, SampleCollector | HistogramCollector] = {}  # of the last evaluation, by prefix
        if set(TRACKERS) & set(self.args.report_to):
            self.add_callback(PictureCallback(self._pictures, self._tensorboard_writer))

    def _table_callback(self, adaptive: Any) -> TableCallback:
        if self.update_rule == "paper":
            first = f"_{next(iter(self.eval_dataset))}" if isinstance(self.eval_dataset, dict) else ""
            trigger = self._calibration_prefix or f"eval{first}"
            return AdaFocalCallback(adaptive, self._awaited_statistics, trigger, self.log)
        size = 0 if self.calibration_dataset is None else len(self.calibration_dataset)
        return TemperatureCallback(adaptive, self._temperature_sums, size, log=self.log, **self._steering)

    @property
    def _steering(self) -> dict[str, Any]:
        named = {"gain": "steering_gain", "every": "calibration_steps", "samples": "calibration_samples"}
        return {name: getattr(self.args, argument, None) for name, argument in named.items()}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As `Trainer.train`; True resumes from the last complete checkpoint, and a damaged one changes nothing.

        A resumed run is the uninterrupted one to the bit, but for two things: the first `loss` it logs is the mean
        since the checkpoint, and data that a transform draws at random are drawn anew if the checkpoint is from
        within an epoch (choose `save_strategy="epoch"` for such data).

        Raises:
            ValueError: If no checkpoint is complete, or the state of the one to resume from is not what a run writes.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"{self.args.output_dir} holds no complete checkpoint to resume from; train without "
                    "resume_from_checkpoint to start from the beginning."
                )
        if resume_from_checkpoint:
            self._check_table(resume_from_checkpoint)
        if getattr(getattr(self.model, "config", None), RECORD, None) is not None:
            logger.warning("The model has a scaling folded into its head; training moves on from there, unrecorded.")
            setattr(self.model.config, RECORD, None)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_table(self, checkpoint: str) -> None:
        saved = saved_table(checkpoint)
        for callback in self.callback_handler.callbacks:
            if saved is not None and isinstance(callback, TableCallback):
                callback.check_table(saved, str(Path(checkpoint) / STATE_FILE))

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            # The checkpoint is of a run that ended within an epoch: the Trainer would take one more step.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def hyperparameter_search(self, hp_space=None, compute_objective=None, *args, **kwargs):
        """As `Trainer.hyperparameter_search`; each trial starts from the loss that its own arguments describe.

        Without `compute_objective` the objective is what the stock Trainer's would be: the evaluation loss (the NLL),
        or the sum of what your `compute_metrics` returns. The metrics that this class adds are not added to it.

        Raises:
            ValueError: If a trial changes `loss` from or to "adafocal", or the update rule: take a trainer for each.
        """
        return super().hyperparameter_search(hp_space, compute_objective or self._objective, *args, **kwargs)

    def _objective(self, metrics: dict[str, float]) -> float:
        return default_compute_objective(
            {name: value for name, value in metrics.items() if name not in self._added_metrics}
        )

    def _hp_search_setup(self, trial):
        super()._hp_search_setup(trial)
        if trial is None or not self._builds_loss:
            return
        loss = self.args.build_loss()
        if (getattr(loss, "adaptive", None) is None) != (getattr(self.loss, "adaptive", None) is None):
            raise ValueError(
                f"A trial cannot change the loss from or to 'adafocal', found {self.args.loss!r}: "
                "search each of the two in a trainer of its own."
            )
        if getattr(self.args, "rule", None) != self.update_rule:
            raise ValueError(
                f"A trial cannot change the update rule from {self.update_rule!r}, found {self.args.rule!r}: search "
                "each of the two in a trainer of its own."
            )
        refuse_streaming(getattr(self.args, "streaming_calibration", False), type(getattr(loss, "adaptive", None)))
        self.loss = loss.to(self.args.device)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TableCallback):
                callback.loss = getattr(self.loss, "adaptive", None)
            if isinstance(callback, TemperatureCallback):
                vars(callback).update(self._steering)

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:
            # Written last, it vouches for the rest; that of an earlier run in the same folder must not.
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / STATE_FILE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # each process writes its own, before trainer_state.json says "complete"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss summed over samples and divided by the labels of the whole optimizer step; the NLL when evaluating.

        Accumulated micro-batches of any size and any number of processes give the gradient of the mean loss.
        """
        if "labels" not in inputs:
            raise ValueError(
                f"The batch must hold `labels`, found {sorted(inputs)}; rename the label column. Labels that are "
                "strings are dropped by the collator: encode them as integers."
            )
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        if not isinstance(outputs, dict):  # the Trainer drops the first entry of anything else
            outputs = {"logits": outputs if isinstance(outputs, torch.Tensor) else outputs[0]}
        if "logits" not in outputs:
            raise ValueError(
                f"The output of {type(self.model).__name__} must hold `logits`, found {sorted(outputs)}. Use a model "
                "with a classification head, or name its scores `logits`."
            )
        refuse_other_batches(outputs["logits"], labels)
        logits = classes_last(outputs["logits"], labels)
        if model.training:
            loss = self._training_loss(logits, labels, num_items_in_batch)
        else:
            loss = self._evaluation_loss(logits, labels)
        return (loss, outputs) if return_outputs else loss

    def _begin_epoch(self):
        if isinstance(self.loss, CombinedLoss):
            self.loss.forget()

    def _training_loss(self, logits, labels, num_items_in_batch):
        logits = logits.movedim(-1, 1)  # losses take the classes second
        # Read by training_step of transformers >= 5.20; older releases draw the same conclusion themselves.
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        if num_items_in_batch is None:
            return self.loss(logits, labels)
        if torch.is_tensor(num_items_in_batch) and num_items_in_batch.numel() > 1:  # DataParallel repeats the count
            num_items_in_batch = num_items_in_batch.flatten()[0]
            if not self.args.average_tokens_across_devices:
                num_items_in_batch = num_items_in_batch * self.args.n_gpu
        loss = self.loss(logits, labels, num_items_in_batch)
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # undoes the mean that DDP takes over ranks
        return loss

    def _evaluation_loss(self, logits, labels):
        rows = per_sample(logits, labels)
        if self._collector is not None:
            gathered = self.accelerator.pad_across_processes(rows, dim=1, pad_index=IGNORED) if rows.ndim > 2 else rows
            self._labelled, self._num_classes = True, logits.shape[-1]
            if self._reads_calibration:
                self._classes.add(labels, logits.shape[-1])
            self._collector.add(self.accelerator.gather_for_metrics(gathered))
        return rows[rows[..., 0] != IGNORED][:, 2].mean()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """As `Trainer.evaluate`; gamma and `calibrate` heed evaluations of the trainer's own data sets alone."""
        outer = self._evaluating
        self._evaluating = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(self._evaluating, str):  # the name of an entry
            self._evaluating = self.eval_dataset[self._evaluating]
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._evaluating = outer

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Evaluate or predict as the Trainer does, and add exact calibration metrics of every counted sample."""
        streaming = getattr(self.args, "streaming_calibration", False)
        self._collector = HistogramCollector() if streaming else SampleCollector()
        self._labelled = False
        if self._reads_calibration:
            self._calibration_samples = None  # never those of an evaluation before, should this one find nothing
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
            )
        finally:
            collected, self._collector = self._collector, None
        if not self._labelled:
            return output
        if collected.not_finite:
            raise ValueError(
                f"{collected.not_finite} of {collected.not_finite + len(collected)} samples of the "
                f"{metric_key_prefix!r} set have logits that are NaN or infinite. Check the learning rate and "
                "gradient clipping (has training diverged?), fp16 overflow (use bf16 or float32) and the inputs."
            )
        if len(collected) == 0:
            raise ValueError(f"Every label of the {metric_key_prefix!r} set is ignored: nothing to evaluate.")
        if self._reads_calibration:
            self._calibration_samples = collected
            self._classes.warn_of_missing(self.accelerator, getattr(self.model, "config", None))
        self._samples[metric_key_prefix] = collected
        metrics = collected.metrics(self._num_bins)
        added = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        for name in added.keys() - output.metrics.keys():  # the user's compute_metrics goes first
            output.metrics[name] = added[name]
            self._added_metrics.add(name)
        # The Trainer's mean of batch means counts the samples that pad the last distributed batch twice.
        output.metrics[f"{metric_key_prefix}_loss"] = metrics["nll"]
        return output

    def calibrate(self) -> BinStats:
        """Statistics of the calibration set under the current model, in equal-mass bins of its confidences.

        If the evaluation set is the calibration set these are the samples of its last evaluation; a calibration set
        of its own is evaluated now, under the prefix "eval_calibration".

        Returns:
            `BinStats` with as many bins as the loss's table, and of single classes if it has tables of them.

        Raises:
            RuntimeError: If the evaluation set is the calibration set and has not been evaluated yet, or if its last
                evaluation found no labelled sample.
        """
        if self._calibration_prefix is None:
            self.evaluate(self.calibration_dataset, metric_key_prefix="eval_calibration")
        if self._calibration_samples is None:
            raise RuntimeError(
                "There is no evaluation of the calibration set: it has not been evaluated yet, or its last evaluation "
                "found no labelled sample. A stream must start anew each time it is iterated."
            )
        adaptive = getattr(self.loss, "adaptive", None)
        return self._calibration_samples.statistics(
            getattr(adaptive, "num_bins", self._num_bins),
            self._num_classes if getattr(adaptive, "needs_class_statistics", False) else None,
        )

    def _temperature_sums(self, indices: np.ndarray) -> torch.Tensor:
        """`steering.temperature_sums` of calibration samples under the model in training, over all processes."""
        own = indices[self.args.process_index :: self.args.world_size].tolist()
        collate = self._get_collator_with_removed_columns(self.data_collator, description="calibration")
        batches = DataLoader(Subset(self.calibration_dataset, own), self.args.eval_batch_size, collate_fn=collate)
        sums = torch.zeros(3)
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()  # schedule-free ones evaluate other weights; the next training step swaps them back
        with torch.no_grad(), evaluating(self.model_wrapped), random_state_kept():
            for batch in batches:
                batch = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    _, outputs = self.compute_loss(self.model_wrapped, batch, return_outputs=True)
                logits = classes_last(outputs["logits"], batch["labels"])
                sums = sums + temperature_sums(logits, batch["labels"])
        return self.accelerator.reduce(sums.float().to(self.args.device)).cpu()

    def create_model_card(self, *args, **kwargs) -> None:
        """The Trainer's card with the calibration report in it; what a user wrote into an earlier card stays.

        The report is `report.json` of the output folder; without one it is the last evaluation under "eval".
        """
        folder = Path(self.args.output_dir)
        earlier = (folder / "README.md").read_text() if (folder / "README.md").exists() else ""
        super().create_model_card(*args, **kwargs)
        report = read_report(folder) or self._evaluation_report()
        if report is None or not self.is_world_process_zero():
            return
        if START in earlier:  # else it is none of ours, and the Trainer has just replaced it, as it does
            (folder / "README.md").write_text(earlier)
        write_card(folder, report, repo_id=self.hub_model_id)

    def _evaluation_report(self) -> dict[str, Any] | None:
        if "eval" not in self._samples:
            return None
        samples = self._samples["eval"]
        counts = {"num_samples": len(samples), "num_bins": self._num_bins}
        return {
            "test": {"raw": {**samples.metrics(self._num_bins), **counts}},
            "split": "evaluation",
            "drove_gamma": getattr(self.loss, "adaptive", None) is not None and samples is self._calibration_samples,
            "loss": {
                "name": name_of(self.loss),
                **(self.args.loss_settings if self._builds_loss else {}),
                **({"update_rule": self.update_rule} if self.update_rule else {}),
            },
            "training": {"model": type(self.model).__name__},
            "versions": versions(),
        }

    def _pictures(self, prefix: str) -> dict[str, Any]:
        plots = pictures()
        if plots is None or prefix not in self._samples:
            return {}
        drawn = {"reliability": plots.reliability_diagram(self._samples[prefix].diagram(self._num_bins))}
        updates = [entry for entry in self.state.log_history if "gamma_00" in entry]
        if updates:
            gammas = [[value for name, value in entry.items() if name.startswith("gamma_")] for entry in updates]
            drawn["gamma"] = plots.gamma_trajectory([entry["step"] for entry in updates], gammas)
        return drawn

    def _tensorboard_writer(self) -> Any:
        callbacks = self.callback_handler.callbacks
        return next((found.tb_writer for found in callbacks if isinstance(found, TensorBoardCallback)), None)

    def _awaited_statistics(self) -> BinStats | None:
        """For the callback: None after the evaluation of a set that somebody handed to `evaluate`."""
        own = [self.calibration_dataset]
        if self._calibration_prefix is None:
            own += self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return self.calibrate() if any(self._evaluating is dataset for dataset in own) else None

    @property
    def _reads_calibration(self) -> bool:
        return self._evaluating is not None and self._evaluating is self.calibration_dataset

    @property
    def _calibration_prefix(self) -> str | None:
        return evaluated_as(self.calibration_dataset, self.eval_dataset)

    @property
    def _num_bins(self) -> int:
        return getattr(self.args, "num_bins", 15)
