"""Fine-tune a language model with LoRA as a classifier of texts, and merge the adapter into an ordinary checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoTokenizer, PreTrainedModel

from hf_adafocal.report.files import read_report, save_report
from hf_adafocal.report.weights import weights_hash
from hf_adafocal.runs.tasks import Prepared, TextTask
from hf_adafocal.scaling.folding import RECORD, recorded_scaling

HEADS = ["score", "classifier"]  # names of classification heads in transformers, which no quantization may touch


@dataclass
class LoraTask(TextTask):
    """Text classification with a causal or masked language model: LoRA trains low-rank adapters and the head."""

    lora_rank: int = field(default=16, metadata={"help": "Rank of the matrices that LoRA adds."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of LoRA's matrices, times 1 / rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before LoRA's matrices."})
    lora_target_modules: str = field(
        default="all-linear", metadata={"help": "Layers that LoRA adapts: all-linear, or names with commas."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Keep the base model in 4 bits (QLoRA); needs CUDA and bitsandbytes."}
    )

    fine_tuned: ClassVar[dict[str, Any]] = {**TextTask.fine_tuned, "learning_rate": 2e-4}

    def __post_init__(self) -> None:
        if self.model_name_or_path is None:
            raise ValueError("LoRA adapts a pretrained model: name one with --model_name_or_path.")
        if self.load_in_4bit and not torch.cuda.is_available():
            raise ValueError("--load_in_4bit needs a CUDA device, and there is none: leave it out.")

    @property
    def loading(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` for the base model."""
        if not self.load_in_4bit:
            return {}
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=HEADS,
        )
        return {"quantization_config": quantization}

    def prepare(self, seed: int) -> Prepared:
        """Prepare as `TextTask.prepare`; pad with the end-of-text token if the tokenizer has no padding token."""
        prepared = super().prepare(seed)
        return prepared._replace(
            model_init=self._adapted(prepared.model_init, padding_of(prepared.processing_class)),
        )

    def _adapted(self, model_init: Callable[[], PreTrainedModel], padding: int) -> Callable[[], Any]:
        from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training

        names = self.lora_target_modules

        def adapted() -> Any:
            model = model_init()
            model.config.get_text_config().pad_token_id = padding
            config = LoraConfig(  # of this type of task PEFT trains and saves the head beside the adapter
                task_type=TaskType.SEQ_CLS,
                r=self.lora_rank,
                lora_alpha=self.lora_alpha,
                lora_dropout=self.lora_dropout,
                target_modules=names if names == "all-linear" else names.split(","),
                auto_mapping={"id2label": model.config.id2label},  # which nothing else saves with an adapter
            )
            return get_peft_model(prepare_model_for_kbit_training(model) if self.load_in_4bit else model, config)

        return adapted


def padding_of(tokenizer: Any) -> int:
    """Return the id of the tokenizer's padding token, which becomes the end-of-text token if it has none.

    Raises:
        ValueError: If it has neither.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no padding token and no end of a text to pad with: a classifier on a "
                "causal language model reads its logits at the last token that is not padding. Set "
                "tokenizer.pad_token and save the tokenizer with the model."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer.pad_token_id


def merge_adapter(folder: str | Path, output: str | Path) -> Path:
    """Merge a LoRA classifier into an ordinary checkpoint, which `pipeline` and servers load without PEFT.

    The logits are those of the adapter's checkpoint to rounding, with the temperature that is folded into its head.
    The report goes along, tied to the merged weights.

    Args:
        folder: Checkpoint of a PEFT classifier, with its tokenizer.
        output: Where the merged checkpoint goes.

    Returns:
        `output`.

    Raises:
        ValueError: If the folder holds no adapter of a classifier.
    """
    from peft import AutoPeftModelForSequenceClassification, PeftConfig

    folder, output = Path(folder), Path(output)
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"Expected the checkpoint of an adapter in {folder}, found no adapter_config.json.")
    labels = PeftConfig.from_pretrained(str(folder)).auto_mapping or {}
    if "id2label" not in labels:
        raise ValueError(f"{folder}/adapter_config.json names no labels: it is no run of scripts/train_lora.py.")
    names = {int(index): name for index, name in labels["id2label"].items()}
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        str(folder),
        num_labels=len(names),
        id2label=names,
        label2id={name: index for index, name in names.items()},
        dtype="auto",
        ignore_mismatched_sizes=True,  # the head, which the adapter brings
    )
    scaling = recorded_scaling(model)
    merged = model.merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    merged.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if scaling is not None:
        setattr(merged.config, RECORD, scaling.to_dict())
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    report = read_report(folder)
    if report is not None:
        save_report(output, replace(report, weights=weights_hash(output)))
    return output
