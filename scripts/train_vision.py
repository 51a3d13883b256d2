"""Fine-tune an image classifier with AdaFocal and report its calibration.

python scripts/train_vision.py                                   # a small ViT on scikit-learn's digits, from scratch
python scripts/train_vision.py --dataset cifar10 --model_name_or_path google/vit-base-patch16-224-in21k
accelerate launch scripts/train_vision.py --loss cross_entropy   # any loss of LOSSES; `--help` lists all arguments
"""

from accelerate import PartialState

from hf_adafocal.report.tables import report_table
from hf_adafocal.runs.finetune import finetune, parse_arguments
from hf_adafocal.runs.tasks import ImageTask

if __name__ == "__main__":
    task, args = parse_arguments(ImageTask)
    report = finetune(task, args)
    if args.process_index == 0:
        print(report_table(report))
    PartialState().destroy_process_group()
