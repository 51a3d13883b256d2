"""Models and data small enough for a test to train them."""

import copy
import functools

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from transformers import BertConfig, BertForSequenceClassification, set_seed

from hf_adafocal import AdaFocalTrainer, AdaFocalTrainingArguments

NUM_CLASSES, LENGTH, VOCABULARY = 3, 8, 40


def token_dataset(size: int = 48, seed: int = 0) -> Dataset:
    """Sequences whose first token mostly tells the class, so that a model can learn and still errs."""
    return copy.copy(_tokens(size, seed))  # formats are set in place, the table is never changed


@functools.cache
def _tokens(size: int, seed: int) -> Dataset:
    generator = np.random.default_rng(seed)
    labels = np.arange(size) % NUM_CLASSES
    tokens = generator.integers(10, VOCABULARY, (size, LENGTH))
    tokens[:, 0] = 1 + np.where(generator.random(size) < 0.8, labels, generator.integers(0, NUM_CLASSES, size))
    features = Features({"input_ids": Sequence(Value("int64")), "labels": ClassLabel(num_classes=NUM_CLASSES)})
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()}, features=features)


def bert(seed: int = 0, **settings) -> BertForSequenceClassification:
    """A one-layer BERT without dropout."""
    set_seed(seed)
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": NUM_CLASSES,
    }
    return BertForSequenceClassification(BertConfig(**{**defaults, **settings}))


def arguments(folder, **settings) -> AdaFocalTrainingArguments:
    """Two epochs with a constant learning rate, on the CPU, silent."""
    defaults = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "num_bins": 5,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return AdaFocalTrainingArguments(str(folder), **{**defaults, **settings})


def trainer(folder, model=None, args=None, **settings) -> AdaFocalTrainer:
    """A trainer on tiny data; `settings` with names of the constructor go there, the rest are training arguments.

    A loss by name is a training argument.
    """
    ours = {"train_dataset", "eval_dataset", "calibration_dataset", "loss", "compute_metrics", "callbacks"}
    data = {name: settings.pop(name) for name in ours & settings.keys() if not isinstance(settings[name], str)}
    data.setdefault("train_dataset", token_dataset(48, seed=0))
    data.setdefault("eval_dataset", token_dataset(60, seed=1))
    return AdaFocalTrainer(model or bert(), args or arguments(folder, **settings), **data)


def probabilities(model, dataset) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels by a plain forward pass over the whole set, in float64."""
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(dataset["input_ids"][:])).logits
    return logits.double().softmax(-1).numpy(), np.asarray(dataset["labels"][:])
