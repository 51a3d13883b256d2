"""Fine-tune a language model with LoRA as a classifier of texts, and report its calibration (needs peft).

python scripts/train_lora.py --model_name_or_path Qwen/Qwen3-0.6B --bf16 true             # on 20 Newsgroups
python scripts/train_lora.py --model_name_or_path meta-llama/Llama-3.2-1B --load_in_4bit true     # with CUDA
accelerate launch scripts/train_lora.py --model_name_or_path FOLDER --dataset FOLDER --loss cross_entropy

The folder of the run holds adapter and head; FOLDER/merged, the ordinary checkpoint that pipelines and servers load.
"""

from collections.abc import Sequence
from pathlib import Path

from hf_adafocal.report.tables import report_table
from hf_adafocal.runs.arguments import parse_arguments
from hf_adafocal.runs.finetune import finetune
from hf_adafocal.runs.lora import LoraTask, merge_adapter
from hf_adafocal.training.processes import end_process_group


def main(arguments: Sequence[str] | None = None) -> None:
    """Fine-tune, report, and merge the adapter; arguments are those of the command line."""
    task, args = parse_arguments(LoraTask, arguments)
    report = finetune(task, args)
    if args.process_index == 0:
        print(report_table(report))
        if not task.load_in_4bit:  # weights of 4 bits hold no sum: merge where the model is loaded whole
            print(merge_adapter(args.output_dir, Path(args.output_dir, "merged")))


if __name__ == "__main__":
    main()
    end_process_group()
