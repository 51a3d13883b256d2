"""Public names of the package, each with the module that defines it: read by type checkers and by `_lazy.py`."""

from hf_adafocal.training.arguments import AdaFocalTrainingArguments as AdaFocalTrainingArguments
from hf_adafocal.training.callbacks import AdaFocalCallback as AdaFocalCallback
from hf_adafocal.training.checkpoints import last_complete_checkpoint as last_complete_checkpoint
from hf_adafocal.training.loop import calibrate as calibrate
from hf_adafocal.training.stock_trainer import CalibrationMetrics as CalibrationMetrics
from hf_adafocal.training.term_start import TermStart as TermStart
from hf_adafocal.training.trainer import AdaFocalTrainer as AdaFocalTrainer
