"""Fine-tune a classifier with AdaFocal in a bare accelerate loop: an example to copy from, without a Trainer.

python scripts/train_no_trainer.py                                      # a small ViT on scikit-learn's digits
accelerate launch scripts/train_no_trainer.py --task text --loss cross_entropy --gradient_accumulation_steps 4
torchrun --nproc_per_node 2 scripts/train_no_trainer.py --use_cpu       # two processes without a GPU
python scripts/train_no_trainer.py --resume_from_checkpoint runs/vision/step_225

Each task of `runs.tasks` brings arguments of its own. However a batch is cut into micro-batches and processes,
the update is that of the mean loss over its labels; a run resumed at a checkpoint is the run that was never stopped.
"""

import argparse
import math
import os
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import HfArgumentParser, get_scheduler

from hf_adafocal import LOSSES, calibrate
from hf_adafocal.runs.tasks import TASKS
from hf_adafocal.training.processes import end_process_group

DEFAULTS = {
    "output_dir": "runs/no_trainer", "num_train_epochs": 3, "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64, "gradient_accumulation_steps": 1, "optimizer": "AdamW", "learning_rate": 5e-5,
    "weight_decay": 0.01, "max_grad_norm": 1.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "seed": 42,
}  # fmt: skip


def parse_arguments(arguments=None):
    """Parse the arguments of the task and those of the loop."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="vision")
    parser.add_argument("--loss", choices=LOSSES, default="adafocal")
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--checkpointing_steps", type=int, help="Steps between checkpoints; an epoch if left out.")
    parser.add_argument("--resume_from_checkpoint", type=Path, help="A folder step_<n> of the same run.")
    parser.add_argument("--use_cpu", action="store_true")
    args, rest = parser.parse_known_args(arguments)
    (task,) = HfArgumentParser(TASKS[args.task]).parse_args_into_dataclasses(rest)
    parser.set_defaults(**{name: value for name, value in task.training_defaults.items() if name in vars(args)})
    return task, parser.parse_known_args(arguments)[0]


class SeededReads(Dataset):
    """Data set wrapper that reads each sample under its own random seed, so that its augmentation is reproducible."""

    def __init__(self, dataset, seed):
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        seed = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)[0]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))  # torch.manual_seed would seed the GPU's dropout too
            return self.dataset[index]


def accumulate_gradient(accelerator, model, loss, batches):
    """Add the gradient of the mean loss over the labels of `batches` on all processes; returns that mean."""
    num_items = sum(batch["labels"].ne(loss.ignore_index).sum() for batch in batches)
    num_items = accelerator.reduce(num_items, "sum").clamp(min=1)
    total = torch.zeros((), device=accelerator.device)
    for index, batch in enumerate(batches):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with nullcontext() if index == len(batches) - 1 else accelerator.no_sync(model):
            value = loss(model(**inputs), batch["labels"], num_items)
            accelerator.backward(value * accelerator.num_processes)  # undoes the mean that DDP takes over processes
        total += value.detach()
    return accelerator.reduce(total, "sum")


def optimizer_steps(loader, args, accelerator, ignore_index):
    """Group micro-batches by optimizer step; samples that pad the last batch are ignored."""
    size = args.per_device_train_batch_size
    in_last_batch = len(loader.dataset) % (size * accelerator.num_processes)
    iterator = iter(loader)
    while batches := list(islice(iterator, args.gradient_accumulation_steps)):
        if loader.end_of_dataloader and in_last_batch:
            batches[-1]["labels"][max(in_last_batch - size * accelerator.process_index, 0) :] = ignore_index
        yield batches


def train(task, args):
    """Train, save in `args.output_dir`, and return the measurements: one after each epoch, then that of the test."""
    accelerator = Accelerator(
        cpu=args.use_cpu, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed)
    )
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError("The launcher's processes do not know of each other; without GPUs, pass --use_cpu.")
    with accelerator.main_process_first():
        splits, model_init, processing_class, collate = task.prepare(args.seed)[:4]
    set_seed(args.seed, device_specific=True)  # dropout differs between processes; DDP copies the first one's weights

    train_set = SeededReads(splits.train, args.seed)
    loader = DataLoader(
        train_set, args.per_device_train_batch_size, shuffle=True, collate_fn=collate,
        generator=torch.Generator(),  # so that starting over within an epoch takes nothing from the random state
    )  # fmt: skip
    held_out = {"collate_fn": collate, "batch_size": args.per_device_eval_batch_size}
    model = model_init()
    settings = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    optimizer = getattr(torch.optim, args.optimizer)(model.parameters(), **settings)
    model, optimizer, loader, calibration_loader, test_loader = accelerator.prepare(
        model, optimizer, loader, DataLoader(splits.calibration, **held_out), DataLoader(splits.test, **held_out)
    )
    steps_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    total_steps = args.num_train_epochs * steps_per_epoch
    warmup = math.ceil(args.warmup_ratio * total_steps)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer.optimizer, warmup, total_steps)
    loss = LOSSES[args.loss]().to(accelerator.device)
    accelerator.register_for_checkpointing(scheduler, loss)  # the loss: its gammas and edges

    step, measurements = 0, []
    if args.resume_from_checkpoint:
        accelerator.load_state(str(args.resume_from_checkpoint))
        step = int(args.resume_from_checkpoint.name.removeprefix("step_"))
    progress = tqdm(total=total_steps, initial=step, disable=not accelerator.is_local_main_process)
    for epoch in range(step // steps_per_epoch, args.num_train_epochs):
        train_set.epoch = epoch
        loader.set_epoch(epoch)
        skipped = step % steps_per_epoch * args.gradient_accumulation_steps
        rest = skip_first_batches(loader, skipped) if skipped else loader
        rest.set_epoch(epoch)  # accelerate 1.7 would shuffle what is left as in the first epoch
        model.train()
        for batches in optimizer_steps(rest, args, accelerator, loss.ignore_index):
            value = accumulate_gradient(accelerator, model, loss, batches)
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            if not accelerator.optimizer_step_was_skipped:  # float16 skips steps that overflow
                scheduler.step()
            optimizer.zero_grad()
            step += 1
            progress.update()
            progress.set_postfix(loss=value.item())
            if step % steps_per_epoch == 0:
                measurements.append(calibrate(model, calibration_loader, loss, accelerator))
                accelerator.print({"epoch": epoch + 1, **measurements[-1].metrics})
            if step % (args.checkpointing_steps or steps_per_epoch) == 0:  # holds the gammas of the next epoch
                accelerator.save_state(str(Path(args.output_dir, f"step_{step}")))
    progress.close()
    measurements.append(calibrate(model, test_loader, accelerator=accelerator))
    accelerator.print({"test": measurements[-1].metrics})
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir)
        processing_class.save_pretrained(args.output_dir)
    return model, loss, measurements


if __name__ == "__main__":
    train(*parse_arguments())
    end_process_group()
