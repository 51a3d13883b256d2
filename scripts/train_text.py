"""Fine-tune a text classifier with AdaFocal and report its calibration.

python scripts/train_text.py                                     # a CNN on 20 Newsgroups, from scratch
python scripts/train_text.py --model_name_or_path distilbert/distilbert-base-uncased
accelerate launch scripts/train_text.py --loss cross_entropy     # any loss of LOSSES; `--help` lists all arguments
"""

from hf_adafocal.runs.finetune import train
from hf_adafocal.runs.tasks import TextTask

if __name__ == "__main__":
    train(TextTask)
