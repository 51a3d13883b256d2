"""Public names of the package, each with the module that defines it: read by type checkers and by `_lazy.py`."""

from hf_adafocal.runs.compare import compare as compare
from hf_adafocal.runs.evaluate import evaluate_checkpoint as evaluate_checkpoint
from hf_adafocal.runs.evaluate import scale_checkpoint as scale_checkpoint
from hf_adafocal.runs.finetune import finetune as finetune
