"""Fine-tune a language model on texts, prompts or chats with TRL and AdaFocal (needs the extra `sft`).

python scripts/train_sft.py --model_name_or_path Qwen/Qwen3-0.6B --dataset FOLDER --output_dir runs/sft
accelerate launch scripts/train_sft.py --model_name_or_path FOLDER --dataset FOLDER --loss cross_entropy

The data set, a Hub id or a folder of files, has the columns that TRL takes: `text`, `prompt` and `completion`, or
`messages`. A tenth of its training split is held out: it moves gamma, and the last line printed measures it.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import HfArgumentParser
from trl import SFTConfig

from hf_adafocal.data.holdout import hold_out
from hf_adafocal.losses import LOSSES
from hf_adafocal.training.processes import end_process_group
from hf_adafocal.training.sft import AdaFocalSFTTrainer


@dataclass
class Arguments:
    """What to train and on what."""

    model_name_or_path: str = field(metadata={"help": "A causal language model: a Hub id or a local folder."})
    dataset: str = field(metadata={"help": "A Hub id or a local folder."})
    loss: str = field(default="adafocal", metadata={"help": "A loss of the focal family."})
    holdout_fraction: float = field(default=0.1, metadata={"help": "Share of train that is held out."})


def main() -> None:
    """Train, save, and print the calibration of the held-out tokens."""
    script, args = HfArgumentParser((Arguments, SFTConfig)).parse_args_into_dataclasses()
    train, held_out = hold_out(load_dataset(script.dataset, split="train"), script.holdout_fraction, args.seed)
    model, loss = script.model_name_or_path, LOSSES[script.loss]()
    trainer = AdaFocalSFTTrainer(model, args, loss=loss, train_dataset=train, eval_dataset=held_out)
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        print({name: round(value, 4) for name, value in metrics.items() if name.endswith(("nll", "ece", "accuracy"))})


if __name__ == "__main__":
    main()
    end_process_group()
