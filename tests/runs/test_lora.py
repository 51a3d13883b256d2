"""A causal language model with LoRA as a classifier: from the command line to a checkpoint that a pipeline loads."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    Qwen3Config,
    Qwen3Model,
    pipeline,
    set_seed,
)

from hf_adafocal import AdaFocalTrainer
from hf_adafocal.metrics.scores import calibration_report, softmax
from hf_adafocal.models import train_word_level_tokenizer
from hf_adafocal.report.files import read_report
from hf_adafocal.report.weights import weights_hash
from hf_adafocal.runs.arguments import parse_arguments
from hf_adafocal.runs.lora import LoraTask, merge_adapter, padding_of
from hf_adafocal.scaling import recorded_scaling

pytestmark = pytest.mark.usefixtures("blank_pictures", "few_digits")

pytest.importorskip("peft", reason="peft (extra `dev`) adapts the model")

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "head_dim": 16,
}
SCRIPT = Path(__file__).parents[2] / "scripts" / "train_lora.py"
MODELS = {"llama": (LlamaModel, LlamaConfig), "qwen3": (Qwen3Model, Qwen3Config)}
TOPICS = ["space", "motor", "faith"]


def texts(size, seed):
    """Some words that all topics share, and two of the topic, which mostly is the label."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(size):
        words = [f"word{word}" for word in generator.integers(0, 30, generator.integers(3, 12))]
        rows.append(" ".join([*words, *generator.choice(TOPICS, 2, p=np.eye(3)[index % 3] * 0.7 + 0.1)]))
    return {"text": rows, "label": [index % 3 for index in range(size)]}


def base(folder: Path, kind: str) -> tuple[str, str]:
    """A base model whose tokenizer ends texts and has nothing to pad with, and a data set."""
    model_class, config_class = MODELS[kind]
    tokenizer = train_word_level_tokenizer(texts(200, 0)["text"], max_length=32)
    tokenizer.add_special_tokens({"eos_token": "[CLS]"})
    tokenizer.pad_token = None
    set_seed(0)
    model_class(config_class(vocab_size=len(tokenizer), eos_token_id=2, pad_token_id=None, **SIZES)).save_pretrained(
        folder / "base"
    )
    tokenizer.save_pretrained(folder / "base")
    for name, (size, seed) in {"train": (300, 0), "test": (120, 1)}.items():
        (folder / "data").mkdir(exist_ok=True)
        Dataset.from_dict(texts(size, seed)).to_parquet(str(folder / "data" / f"{name}.parquet"))
    return str(folder / "base"), str(folder / "data")


def line(folder: Path, kind: str = "llama") -> list[str]:
    model, data = base(folder, kind)
    return [
        *("--model_name_or_path", model, "--dataset", data, "--output_dir", str(folder / "run")),
        *("--num_train_epochs", "3", "--learning_rate", "1e-2", "--lora_rank", "4", "--holdout_fraction", "0.3"),
        *("--use_cpu", "true", "--disable_tqdm", "true", "--logging_steps", "100"),
    ]


@pytest.fixture(scope="module", params=MODELS)
def run(request, tmp_path_factory):
    """A run of the script: its folder, its report, and the merged checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    runpy.run_path(str(SCRIPT))["main"](line(folder, request.param))
    return folder, read_report(folder / "run"), folder / "run" / "merged"


class TestTheRun:
    def test_it_learns_and_the_folder_holds_adapter_and_head_alone(self, run):
        folder, report, _ = run
        assert report.test.rows()["raw"]["accuracy"] > 0.5
        assert (folder / "run" / "adapter_model.safetensors").stat().st_size < 200_000
        assert not (folder / "run" / "model.safetensors").exists()

    def test_the_merged_checkpoint_gives_the_scores_of_the_report_in_a_pipeline(self, run):
        folder, report, merged = run
        test = load_dataset("parquet", data_files=str(folder / "data" / "test.parquet"))["train"]
        classify = pipeline("text-classification", model=str(merged), top_k=None)
        p = np.zeros((len(test), 3))
        for row, scores in enumerate(classify(list(test["text"]), batch_size=7)):
            for score in scores:
                p[row, classify.model.config.label2id[score["label"]]] = score["score"]
        found = calibration_report(p, np.asarray(test["label"][:]))
        rows = report.test.rows()
        expected = rows["temperature_scaled"] if report.folded else rows["raw"]
        for name in ("accuracy", "nll", "ece"):
            assert found[name] == pytest.approx(expected[name], abs=1e-5), name

    def test_the_merged_checkpoint_has_the_report_the_scaling_and_a_padding_token(self, run):
        folder, report, merged = run
        assert read_report(merged).weights == weights_hash(merged) != report.weights
        config = json.loads((merged / "config.json").read_text())
        assert config["pad_token_id"] == 2 and not (merged / "adapter_config.json").exists()
        assert ("adafocal_calibration" in config) == bool(report.folded)

    @pytest.mark.slow
    def test_so_does_onnx_runtime(self, run):
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        folder, report, merged = run
        model = AutoModelForSequenceClassification.from_pretrained(merged, attn_implementation="eager").eval()
        tokenizer = AutoTokenizer.from_pretrained(merged)
        test = load_dataset("parquet", data_files=str(folder / "data" / "test.parquet"))["train"]
        ids = tokenizer(list(test["text"]), padding=True, return_tensors="pt")
        given, file = (ids["input_ids"], ids["attention_mask"]), str(folder / "model.onnx")

        class Logits(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, input_ids, attention_mask):
                return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

        torch.onnx.export(Logits().eval(), given, file, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [found.name for found in session.get_inputs()]
        (logits,) = session.run(None, dict(zip(names, (part.numpy() for part in given), strict=True)))
        found = calibration_report(softmax(logits.astype(float)), np.asarray(test["label"][:]))
        for name in ("accuracy", "nll", "ece"):
            assert found[name] == pytest.approx(report.metrics[name], abs=1e-5), name

    def test_a_folder_without_an_adapter_is_refused(self, run):
        with pytest.raises(ValueError, match="found no adapter_config.json"):
            merge_adapter(run[2], run[0] / "other")


def test_four_bits_spare_the_head(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = LoraTask(model_name_or_path="x", load_in_4bit=True).loading["quantization_config"]
    assert found.load_in_4bit and found.bnb_4bit_quant_type == "nf4"
    assert found.bnb_4bit_compute_dtype == torch.bfloat16 and "score" in found.llm_int8_skip_modules


class TestWhatIsRefused:
    def test_no_model_and_four_bits_without_cuda(self, tmp_path):
        with pytest.raises(ValueError, match="name one with --model_name_or_path"):
            parse_arguments(LoraTask, ["--output_dir", str(tmp_path)])
        if not torch.cuda.is_available():
            with pytest.raises(ValueError, match="needs a CUDA device"):
                LoraTask(model_name_or_path="x", load_in_4bit=True)

    def test_a_tokenizer_that_neither_pads_nor_ends(self):
        tokenizer = train_word_level_tokenizer(["a b"])
        tokenizer.pad_token = None
        with pytest.raises(ValueError, match="has no padding token and no end of a text"):
            padding_of(tokenizer)
        tokenizer.add_special_tokens({"eos_token": "[CLS]"})
        assert padding_of(tokenizer) == 2 and tokenizer.pad_token == "[CLS]"

    @pytest.mark.parametrize("adapted", [False, True])
    def test_a_classifier_on_a_causal_model_without_padding(self, tmp_path, adapted):
        model = LlamaForSequenceClassification(LlamaConfig(vocab_size=tiny.VOCABULARY, num_labels=3, **SIZES))
        if adapted:
            import peft

            model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
        with pytest.raises(ValueError, match="has a padding token. Set tokenizer.pad_token"):
            tiny.trainer(tmp_path, model)

    def test_a_tokenizer_that_pads_is_enough_as_in_the_stock_trainer(self, tmp_path):
        tokenizer = train_word_level_tokenizer([" ".join(map(str, range(40)))])
        model = LlamaForSequenceClassification(LlamaConfig(vocab_size=tiny.VOCABULARY, num_labels=3, **SIZES))
        trainer = AdaFocalTrainer(
            model,
            tiny.arguments(tmp_path, calibrate_at_end=True, num_train_epochs=1),
            train_dataset=tiny.token_dataset(48),
            eval_dataset=tiny.token_dataset(60, seed=1),
            processing_class=tokenizer,
        )
        trainer.train()
        outcome = trainer.calibration_outcome
        assert outcome.folded == (recorded_scaling(trainer.network) is not None)
