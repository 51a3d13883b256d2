"""Language models and sentences small enough for a test to train them."""

import numpy as np
import tiny
import torch
from datasets import Dataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from hf_adafocal import AdaFocalTrainer

WORDS = 30
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}


def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, num_key_value_heads=2, **SIZES))


def mixtral(**settings):
    sizes = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=WORDS, output_router_logits=True, **sizes, **settings))


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            bos_token_id=1,
            eos_token_id=2,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        )
    )


def bart():
    return BartForConditionalGeneration(BartConfig(vocab_size=WORDS, max_position_embeddings=32, dropout=0.0, **BART))


def t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=WORDS,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


def built(make, **settings):
    set_seed(0)
    return make(**settings)


def sentences(size, seed, labels=None):
    """Each word mostly is the one before it plus 3; some labels are ignored.

    Where labels are shifted the first one is: for GPT-2 the stock Trainer counts it, though nothing predicts it.
    """
    generator = np.random.default_rng(seed)
    words = np.zeros((size, 8), dtype=int)
    words[:, 0] = generator.integers(3, WORDS, size)
    for place in range(1, 8):
        follows = (words[:, place - 1] - 3 + 3) % (WORDS - 3) + 3
        words[:, place] = np.where(generator.random(size) < 0.8, follows, generator.integers(3, WORDS, size))
    targets = words if labels is None else words[:, :labels]
    targets = np.where(generator.random(targets.shape) < 0.2, -100, targets)
    if labels is None:
        targets[:, 0] = -100
    return Dataset.from_dict({"input_ids": words.tolist(), "labels": targets.tolist()})


MODELS = {"llama": (llama, None), "gpt2": (gpt2, None), "bart": (bart, 5), "t5": (t5, 5)}
SETTINGS = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "lr_scheduler_type": "constant",
    "disable_tqdm": True,
    "report_to": [],
    "save_strategy": "no",
}


def ours(folder, model, data, held_out, loss="cross_entropy", **settings):
    args = tiny.arguments(folder, **{**SETTINGS, "loss": loss, "split_overlap": "skip", **settings})
    return AdaFocalTrainer(model, args, train_dataset=data, eval_dataset=held_out)


def weights(model):
    return torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()])
