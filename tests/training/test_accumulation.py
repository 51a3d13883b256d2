"""One optimizer step over the same samples is one update, however they are cut into micro-batches."""

import functools
import itertools

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_adafocal import AdaFocalTrainer
from hf_adafocal.losses.adafocal import AdaFocalLoss, ClasswiseAdaFocalLoss
from hf_adafocal.losses.registry import PER_SAMPLE_LOSSES
from hf_adafocal.models import (
    GlobalPoolingCNNConfig,
    GlobalPoolingCNNForSequenceClassification,
    timm_classifier,
    train_word_level_tokenizer,
)

# SGD, because Adam's first step is the same for any scale of the gradient; no clipping, for the same reason. The rate
# is high, so that the update is not lost in the rounding of the weights it is added to.
LEARNING_RATE = 10.0
TABLE = {"edges": [0.0, 0.2, 0.3, 0.35, 0.5, 1.0], "gammas": [5.0, -1.0, 0.7, 2.0, -0.3]}
CLASS_GAMMAS = [[1.0, 2.0, -0.5, 3.0, 4.0], [0.3, -2.0, 1.5, 6.0, -1.0], [2.5, 0.9, -0.7, 0.4, 8.0]]


def cnn():
    set_seed(0)
    config = GlobalPoolingCNNConfig(
        vocab_size=tiny.VOCABULARY, embedding_size=8, num_filters=8, kernel_size=2, pool_size=2, hidden_size=8,
        dropout=0.0, num_labels=tiny.NUM_CLASSES,
    )  # fmt: skip
    return GlobalPoolingCNNForSequenceClassification(config)


def vit():
    set_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=tiny.NUM_CLASSES,
    )  # fmt: skip
    return ViTForImageClassification(config)


def timm_convnext():
    # A network with layer norm: batch norm takes its statistics from each micro-batch, so there no loss could make
    # the update independent of the cut.
    pytest.importorskip("timm", reason="timm (extra `vision`) builds the network")
    set_seed(0)
    # Layer scale starts at 1e-6, which would hide the gradients of the blocks behind rounding.
    settings = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "ls_init_value": 1.0}
    return timm_classifier("convnext_atto", list("abc"), image_size=32, model_args=settings)


def images(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(size, 3, 32, 32, generator=generator)
    return [{"pixel_values": image, "labels": index % tiny.NUM_CLASSES} for index, image in enumerate(pixels)]


MODELS = {
    "bert": (tiny.bert, tiny.token_dataset),
    "global_pooling_cnn": (cnn, tiny.token_dataset),
    "vit": (vit, images),
    "timm_convnext": (timm_convnext, images),
}


class UseTable(TrainerCallback):
    """Gives AdaFocal a table with a gamma of its own for each bin from the first step on."""

    def __init__(self, loss):
        self.loss = loss

    def on_step_begin(self, args, state, control, **kwargs):
        set_table(self.loss)


def set_table(loss):
    if isinstance(loss, ClasswiseAdaFocalLoss):
        loss.set_table(**TABLE, class_gammas=CLASS_GAMMAS, class_counts=[50, 150, 600])
    elif isinstance(loss, AdaFocalLoss):
        loss.set_table(**TABLE)


def build_loss(name):
    """Any loss of single samples; a term of a batch depends on the batch it sees, so on the cut."""
    adaptive = issubclass(PER_SAMPLE_LOSSES[name], AdaFocalLoss)
    return PER_SAMPLE_LOSSES[name](**({"num_bins": 5} if adaptive else {}))


def weights(model):
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def update(model, data, loss, *, batch_size, accumulation, steps=1, learning_rate=LEARNING_RATE, **settings):
    """What `steps` optimizer steps of the trainer add to the parameters, flat."""
    args = tiny.arguments(
        "unused",  # nothing is saved
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=learning_rate,
        max_grad_norm=0.0,
        eval_strategy="steps",
        eval_steps=1000,
        split_overlap="skip",  # what an evaluation says is no matter here
    )
    run = AdaFocalTrainer(model, args, train_dataset=data, eval_dataset=data, loss=loss, **settings)
    run.add_callback(UseTable(loss))
    before = weights(model)
    run.train()
    assert run.state.global_step == steps
    return weights(run.model) - before


def relative_error(update, expected):
    return ((update - expected).norm() / expected.norm()).item()


@functools.cache
def in_one_batch(model, loss, size):
    build, data = MODELS[model]
    return update(build(), data(size), build_loss(loss), batch_size=size, accumulation=1)


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        *(("bert", loss) for loss in PER_SAMPLE_LOSSES),  # a loss sees logits, whatever the model
        *itertools.product([model for model in MODELS if model != "bert"], ["cross_entropy", "adafocal", "brier"]),
    ],
)
class TestOneStep:
    def test_in_one_batch_it_follows_the_gradient_of_the_mean_loss(self, model, loss):
        build, data = MODELS[model]
        network, module = build().train(), build_loss(loss)
        set_table(module)
        samples = data(16)
        column = next(name for name in samples[0] if name != "labels")
        inputs = torch.stack([torch.as_tensor(sample[column]) for sample in samples])
        labels = torch.tensor([sample["labels"] for sample in samples])
        module(network(inputs).logits, labels).backward()
        gradient = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in network.parameters()]
        )
        assert relative_error(in_one_batch(model, loss, 16), -LEARNING_RATE * gradient) < 1e-5

    @pytest.mark.parametrize(("size", "batch_size", "accumulation"), [(16, 8, 2), (16, 4, 4), (13, 4, 4)])
    def test_accumulated_micro_batches_give_the_update_of_one_batch(self, model, loss, size, batch_size, accumulation):
        build, data = MODELS[model]  # 13 samples in batches of 4 are 4, 4, 4 and 1
        parts = update(build(), data(size), build_loss(loss), batch_size=batch_size, accumulation=accumulation)
        assert relative_error(parts, in_one_batch(model, loss, size)) < 1e-5


class TestOtherCuts:
    def test_a_short_last_step_of_an_epoch_weighs_its_own_samples(self):
        data, settings = tiny.token_dataset(20), {"steps": 2, "learning_rate": 1.0}  # steps of 16 and of 4 samples
        whole = update(tiny.bert(), data, build_loss("adafocal"), batch_size=16, accumulation=1, **settings)
        parts = update(tiny.bert(), data, build_loss("adafocal"), batch_size=4, accumulation=4, **settings)
        assert relative_error(parts, whole) < 1e-5

    @pytest.mark.parametrize("loss", PER_SAMPLE_LOSSES)
    def test_micro_batches_of_unequal_numbers_of_tokens_weigh_every_token_the_same(self, loss):
        generator = np.random.default_rng(0)
        rows = [generator.integers(1, tiny.VOCABULARY, length).tolist() for length in generator.integers(2, 12, 16)]
        data = Dataset.from_dict(
            {"input_ids": rows, "labels": [[t % 3 if t % 5 else -100 for t in row] for row in rows]}
        )
        tokenizer = train_word_level_tokenizer(["a b c"])

        def tagger():
            set_seed(0)
            config = BertConfig(
                vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
            )  # fmt: skip
            return BertForTokenClassification(config)

        settings = {"data_collator": DataCollatorForTokenClassification(tokenizer)}
        whole = update(tagger(), data, build_loss(loss), batch_size=16, accumulation=1, **settings)
        parts = update(tagger(), data, build_loss(loss), batch_size=4, accumulation=4, **settings)
        assert relative_error(parts, whole) < 1e-5
