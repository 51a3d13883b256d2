"""Fine-tune a segmentation model with AdaFocal and report its calibration, overlap and topology.

python scripts/train_segmentation.py                                  # a 3D U-Net on synthetic volumes, from scratch
python scripts/train_segmentation.py --loss topological_focal --auxiliary_base adafocal   # needs the extra topology
python scripts/train_segmentation.py --dataset FOLDER --model_name_or_path nvidia/mit-b0  # images with label masks
accelerate launch scripts/train_segmentation.py --loss cross_entropy    # any loss of LOSSES; see `--help`
"""

from hf_adafocal.runs.finetune import train
from hf_adafocal.runs.tasks import SegmentationTask

if __name__ == "__main__":
    train(SegmentationTask)
