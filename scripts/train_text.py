"""Fine-tune a text classifier with AdaFocal and report its calibration.

python scripts/train_text.py                                     # a CNN on 20 Newsgroups, from scratch
python scripts/train_text.py --model_name_or_path distilbert/distilbert-base-uncased
accelerate launch scripts/train_text.py --loss cross_entropy     # any loss of LOSSES; `--help` lists all arguments
"""

from accelerate import PartialState

from hf_adafocal.report.tables import report_table
from hf_adafocal.runs.finetune import finetune, parse_arguments
from hf_adafocal.runs.tasks import TextTask

if __name__ == "__main__":
    task, args = parse_arguments(TextTask)
    report = finetune(task, args)
    if args.process_index == 0:
        print(report_table(report))
    PartialState().destroy_process_group()
