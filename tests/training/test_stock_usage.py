"""Training scripts written for the stock Trainer, as transformers' examples are, with one import changed."""

import json

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DefaultDataCollator,
    HfArgumentParser,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_adafocal import AdaFocalTrainer as Trainer  # the one changed import
from hf_adafocal.models import train_word_level_tokenizer

pytestmark = pytest.mark.slow

COMMON = ["--do_train", "--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no", "--learning_rate", "1e-3"]


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def run(trainer, args) -> dict[str, float]:
    """What an example script does with its trainer."""
    outcome = trainer.train(resume_from_checkpoint=None)
    trainer.save_model()
    trainer.log_metrics("train", outcome.metrics)
    trainer.save_metrics("train", outcome.metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.create_model_card(finetuned_from="tiny", tasks="text-classification")
    return metrics


def check(trainer, folder, epochs: int) -> None:
    history = trainer.adaptive_callback.history
    assert len(history) == epochs + 1 and history[-1]["gammas"] != history[0]["gammas"]
    looks = [entry for entry in trainer.state.log_history if "eval_ece" in entry and "eval_refinement" in entry]
    assert len(looks) >= epochs
    assert "ECE" in (folder / "README.md").read_text()


@pytest.mark.parametrize("flags", [["--do_eval"], ["--do_eval", "--eval_strategy", "epoch"]])
def test_a_text_classification_script_needs_no_other_change(tmp_path, real_data, flags):
    stored = Dataset.from_parquet(str(real_data / "20_newsgroups" / "train.parquet"), cache_dir=str(tmp_path))
    rows = [{"text": row["text"][:300], "label": f"group {row['label'] % 4}"} for row in stored if row["text"].strip()]
    for name, part in (("train", rows[:120]), ("validation", rows[120:180])):
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, part)))
    tokenizer = train_word_level_tokenizer([row["text"] for row in rows], 500, 32)
    tokenizer.save_pretrained(tmp_path / "tiny")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "tiny")

    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        [*COMMON, *flags, "--output_dir", str(tmp_path / "out"), "--num_train_epochs", "2"]
    )
    files = {name: str(tmp_path / f"{name}.json") for name in ("train", "validation")}
    raw = load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    names = sorted(set(raw["train"]["label"]))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "tiny", num_labels=len(names), ignore_mismatched_sizes=True
    )

    def preprocess(batch):
        encoded = tokenizer(batch["text"], padding="max_length", max_length=32, truncation=True)
        return {**encoded, "label": [names.index(label) for label in batch["label"]]}

    raw = raw.map(preprocess, batched=True)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=raw["train"],
        eval_dataset=raw["validation"],
        compute_metrics=accuracy,
        processing_class=tokenizer,
    )
    metrics = run(trainer, args)
    assert 0 <= metrics["eval_accuracy"] <= 1 and len(trainer.train_dataset) <= 120
    check(trainer, tmp_path / "out", 2)


def test_an_image_classification_script_without_a_held_out_set_needs_no_other_change(tmp_path):
    digits = load_digits()
    for index, (image, label) in enumerate(zip(digits.images[:200], digits.target[:200], strict=True)):
        folder = tmp_path / "images" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype("uint8")).convert("RGB").resize((16, 16)).save(folder / f"{index}.png")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=10, **sizes)).save_pretrained(
        tmp_path / "vit"
    )
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")

    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        [*COMMON, "--output_dir", str(tmp_path / "out"), "--num_train_epochs", "2", "--remove_unused_columns", "False"]
    )
    raw = load_dataset("imagefolder", data_dir=str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))["train"]
    processor = AutoImageProcessor.from_pretrained(tmp_path / "vit")

    def transform(batch):
        pixels = processor([image.convert("RGB") for image in batch["image"]], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": np.asarray(batch["label"])}

    trainer = Trainer(
        model=AutoModelForImageClassification.from_pretrained(tmp_path / "vit"),
        args=args,
        train_dataset=raw.with_transform(transform),
        compute_metrics=accuracy,
        processing_class=processor,
        data_collator=DefaultDataCollator(),
    )
    run(trainer, args)
    assert (len(trainer.train_dataset), len(trainer.calibration_dataset)) == (180, 20)
    check(trainer, tmp_path / "out", 2)
