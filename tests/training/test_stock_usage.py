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
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    DefaultDataCollator,
    HfArgumentParser,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_adafocal import AdaFocalTrainer as Trainer  # the one changed import
from hf_adafocal.metrics import classwise_calibration_error, entity_report, softmax
from hf_adafocal.models import train_word_level_tokenizer

pytestmark = pytest.mark.slow

COMMON = ["--do_train", "--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no", "--learning_rate", "1e-3"]


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def run(trainer, args, task="text-classification") -> dict[str, float]:
    """What an example script does with its trainer."""
    outcome = trainer.train(resume_from_checkpoint=None)
    trainer.save_model()
    trainer.log_metrics("train", outcome.metrics)
    trainer.save_metrics("train", outcome.metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.create_model_card(finetuned_from="tiny", tasks=task)
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


def test_a_token_classification_script_needs_no_other_change(tmp_path, real_data):
    stored = Dataset.from_parquet(str(real_data / "20_newsgroups" / "train.parquet"), cache_dir=str(tmp_path))
    rows = []
    for row in stored:
        words = row["text"].split()[:40]
        kinds = ["NUM" if word[0].isdigit() else "CAP" if word[0].isupper() else "" for word in words]
        tags = [
            "O" if not kind else f"{'I' if place and kinds[place - 1] == kind else 'B'}-{kind}"
            for place, kind in enumerate(kinds)
        ]
        if words:
            rows.append({"tokens": words, "ner_tags": tags})
    for name, part in (("train", rows[:150]), ("validation", rows[150:200]), ("test", rows[200:])):
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, part)))
    train_word_level_tokenizer([" ".join(row["tokens"]) for row in rows], 2000, 256).save_pretrained(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    BertForTokenClassification(config).save_pretrained(tmp_path / "tiny")

    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        [*COMMON, "--do_eval", "--do_predict", "--output_dir", str(tmp_path / "out"), "--num_train_epochs", "3"]
    )
    files = {name: str(tmp_path / f"{name}.json") for name in ("train", "validation", "test")}
    raw = load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    names = sorted({tag for tags in raw["train"]["ner_tags"] for tag in tags})
    model = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "tiny", num_labels=len(names), ignore_mismatched_sizes=True
    )
    model.config.label2id = {name: index for index, name in enumerate(names)}
    model.config.id2label = dict(enumerate(names))

    def tokenize_and_align(batch):
        encoded = tokenizer(batch["tokens"], truncation=True, max_length=256, is_split_into_words=True)
        encoded["labels"] = []
        for index, tags in enumerate(batch["ner_tags"]):
            words = encoded.word_ids(batch_index=index)
            first = [word is not None and word not in words[:place] for place, word in enumerate(words)]
            encoded["labels"].append(
                [names.index(tags[word]) if new else -100 for word, new in zip(words, first, strict=True)]
            )
        return encoded

    raw = raw.map(tokenize_and_align, batched=True)

    def entity_metrics(prediction) -> dict[str, float]:
        report = entity_report(softmax(prediction.predictions), prediction.label_ids, names)
        return {name: report[name] for name in ("precision", "recall", "f1") if name in report}

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=raw["train"],
        eval_dataset=raw["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=entity_metrics,
    )
    metrics = run(trainer, args, "token-classification")
    assert 0 <= metrics["eval_f1"] <= 1 and metrics["eval_ece"] >= 0
    check(trainer, tmp_path / "out", 3)
    predictions, labels, predicted = trainer.predict(raw["test"], metric_key_prefix="predict")
    counted = labels != -100
    assert counted.sum() == sum(label != -100 for row in raw["test"]["labels"] for label in row)  # words, each once
    right = (predictions.argmax(2) == labels)[counted]
    assert predicted["predict_accuracy"] == pytest.approx(right.mean())
    assert len(trainer.recorder.samples["predict"]) == counted.sum()
    probabilities = softmax(predictions)
    of_classes = classwise_calibration_error(probabilities[counted], labels[counted])
    of_entities = entity_report(probabilities, labels, names)
    assert 0 < of_classes < 1 and of_entities["num_entities"] > 0 and "f1_CAP" in of_entities
