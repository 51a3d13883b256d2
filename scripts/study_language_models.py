"""Small causal language models from scratch: calibration of the next token under three losses, before and after T.

python scripts/study_language_models.py run --newsgroups FOLDER --reuters FOLDER     # some 20 minutes on one core
python scripts/study_language_models.py table                                        # Markdown, from the runs there

A two-layer Llama with a vocabulary of 2,000 pieces of words is trained on the first 48 tokens of 3,000 posts, until it
overfits. The calibration posts move gamma and fit T; the test posts and Reuters texts, which are out of distribution,
are read once. T is folded into the language model's head. A run whose file is there is not repeated.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Bytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_adafocal import AdaFocalTrainer, AdaFocalTrainingArguments
from hf_adafocal.metrics.ood import ood_auroc
from hf_adafocal.report.comparison import paired_difference

LOSSES = {
    "cross_entropy": {"loss": "cross_entropy"},
    "label_smoothing": {"loss": "label_smoothing", "smoothing": 0.1},
    "adafocal": {"loss": "adafocal"},
}
ROWS = {"train": 3000, "calibration": 400, "test": 1000, "ood": 1000}
VOCABULARY, LENGTH, HIDDEN, EPOCHS = 2000, 48, 64, 8
TOKEN_METRICS = ("nll", "accuracy", "ece", "ada_ece")


def main() -> None:
    """Run or tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "table"))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("model_cards/language_models"))
    parser.add_argument("--newsgroups", help="20 Newsgroups: a Hub id or a folder with train and test")
    parser.add_argument("--reuters", help="Reuters R8: a Hub id or a folder with test")
    options = parser.parse_args()
    if options.verb == "table":
        print(table(options.folder, options.losses, options.seeds))
        return
    for seed in options.seeds:
        for loss in options.losses:
            run(loss, seed, options.folder, options.newsgroups, options.reuters)


def posts(path: str, split: str) -> list[str]:
    """Return texts of at least 300 characters, stripped and without duplicates."""
    texts = (text.strip() for text in load_dataset(path, split=split)["text"])
    return list(dict.fromkeys(text for text in texts if len(text) >= 300))


def encoded(newsgroups: str, reuters: str, seed: int) -> dict[str, Dataset]:
    """Tokenize the texts of each role to one fixed length; the tokens are the labels too."""
    generator = np.random.default_rng(seed)
    own = generator.permutation(np.array(posts(newsgroups, "train"), dtype=object)).tolist()
    sizes = ROWS["train"], ROWS["train"] + ROWS["calibration"]
    roles = {"train": own[: sizes[0]], "calibration": own[sizes[0] : sizes[1]]}
    roles |= {"test": posts(newsgroups, "test")[: ROWS["test"]], "ood": posts(reuters, "test")[: ROWS["ood"]]}
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(), Bytes()
    trainer = BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(roles["train"], trainer)
    rows = {role: [found.ids[:LENGTH] for found in tokenizer.encode_batch(texts)] for role, texts in roles.items()}
    rows = {role: [ids for ids in found if len(ids) == LENGTH] for role, found in rows.items()}
    return {role: Dataset.from_dict({"input_ids": found, "labels": found}) for role, found in rows.items()}


def run(loss: str, seed: int, folder: Path, newsgroups: str, reuters: str) -> None:
    """Train once and write the calibration of the tokens, and how well texts of other kinds are detected."""
    file = folder / f"{loss}-{seed}.json"
    if file.exists():
        return
    data = encoded(newsgroups, reuters, seed)
    set_seed(seed)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes))
    steps = -(-len(data["train"]) // 32)
    with tempfile.TemporaryDirectory() as scratch:
        args = AdaFocalTrainingArguments(
            scratch, num_train_epochs=EPOCHS, per_device_train_batch_size=32, learning_rate=3e-3, seed=seed,
            lr_scheduler_type="cosine", eval_strategy="steps", eval_steps=max(steps // 2, 1), save_strategy="no",
            use_cpu=not torch.cuda.is_available(), disable_tqdm=True, per_device_eval_batch_size=64, **LOSSES[loss],
        )  # fmt: skip
        trainer = AdaFocalTrainer(model, args, train_dataset=data["train"], calibration_dataset=data["calibration"])
        seconds = trainer.train().metrics["train_runtime"]
        temperature = trainer.measure(data["calibration"], "calibration")[0]["temperature"]
        found = {"tokens": {role: len(part) * (LENGTH - 1) for role, part in data.items()}, "seconds": seconds}
        found |= {"temperature": temperature, "gammas": getattr(trainer.loss, "gammas", torch.empty(0)).tolist()}
        for name in ("raw", "scaled"):
            found[name] = {
                role: {metric: trainer.measure(data[role], role)[0][metric] for metric in TOKEN_METRICS}
                for role in ("train", "test", "ood")
            }
            inside, outside = (scores(model, data[role]) for role in ("test", "ood"))
            found[name]["auroc"] = {kind: ood_auroc(inside[kind], outside[kind]) for kind in inside}
            with torch.no_grad():
                model.lm_head.weight.div_(temperature)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")


@torch.no_grad()
def scores(model: LlamaForCausalLM, data: Dataset) -> dict[str, np.ndarray]:
    """Compute for each text the mean confidence of its tokens and their mean log-likelihood."""
    model.eval()
    confidence, likelihood = [], []
    for ids in torch.tensor(data["input_ids"][:]).split(64):
        log_p = model(input_ids=ids.to(model.device)).logits[:, :-1].float().log_softmax(-1).cpu()
        confidence.append(log_p.amax(-1).exp().mean(1))
        likelihood.append(log_p.gather(-1, ids[:, 1:, None]).mean((1, 2)))
    return {"confidence": torch.cat(confidence).numpy(), "likelihood": torch.cat(likelihood).numpy()}


def table(folder: Path, losses: list[str], seeds: list[int]) -> str:
    """Render means over the seeds that every loss has, as trained and with T, and differences from cross-entropy."""
    files = {loss: [folder / f"{loss}-{seed}.json" for seed in seeds] for loss in losses}
    there = [index for index in range(len(seeds)) if all(paths[index].exists() for paths in files.values())]
    runs = {loss: [json.loads(paths[index].read_text()) for index in there] for loss, paths in files.items()}
    lines = [
        f"Seeds {', '.join(str(seeds[index]) for index in there)}; test tokens, and Reuters for the last columns.\n",
        "| loss | scores | T | NLL | accuracy % | ECE % | AdaECE % | ECE % Reuters | AUROC % confidence | "
        "AUROC % likelihood |",
        "| --- " * 10 + "|",
    ]
    for loss, found in runs.items():
        for name in ("raw", "scaled"):
            of = [one[name] for one in found]
            nll, *shares = ([one["test"][metric] for one in of] for metric in TOKEN_METRICS)
            shares += [[one["ood"]["ece"] for one in of]]
            shares += [[one["auroc"][kind] for one in of] for kind in ("confidence", "likelihood")]
            cells = [f"{np.mean(nll):.3f}", *(f"{100 * np.mean(values):.2f}" for values in shares)]
            title = "as trained" if name == "raw" else "with T"
            lines.append(
                f"| {loss} | {title} | {np.mean([one['temperature'] for one in found]):.3f} | {' | '.join(cells)} |"
            )
    if "cross_entropy" in runs:
        lines.append("\nDifferences from cross-entropy, paired by seed, in ECE points:\n")
        for loss, found in runs.items():
            for name, title in (("raw", "as trained"), ("scaled", "with T")) if loss != "cross_entropy" else ():
                pairs = zip(found, runs["cross_entropy"], strict=True)
                differences = [100 * (one[name]["test"]["ece"] - other[name]["test"]["ece"]) for one, other in pairs]
                lines.append(f"- {loss}, {title}: {paired_difference(np.array(differences))}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
