"""Fine-tune an image classifier with AdaFocal and report its calibration.

python scripts/train_vision.py                                   # a small ViT on scikit-learn's digits, from scratch
python scripts/train_vision.py --dataset cifar10 --model_name_or_path google/vit-base-patch16-224-in21k
accelerate launch scripts/train_vision.py --loss cross_entropy   # any loss of LOSSES; `--help` lists all arguments
"""

from hf_adafocal.runs.finetune import train
from hf_adafocal.runs.tasks import ImageTask

if __name__ == "__main__":
    train(ImageTask)
