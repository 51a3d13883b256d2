"""Public names of the package, each with the module that defines it: read by type checkers and by `_lazy.py`."""

from hf_adafocal.scaling.fit import Scaling as Scaling
from hf_adafocal.scaling.fit import fit_temperature as fit_temperature
from hf_adafocal.scaling.fit import fit_temperature_scaling as fit_temperature_scaling
from hf_adafocal.scaling.fit import fit_vector_scaling as fit_vector_scaling
from hf_adafocal.scaling.folding import check_foldable as check_foldable
from hf_adafocal.scaling.folding import fold_checkpoint as fold_checkpoint
from hf_adafocal.scaling.folding import fold_scaling as fold_scaling
from hf_adafocal.scaling.folding import forget_scaling as forget_scaling
from hf_adafocal.scaling.folding import recorded_scaling as recorded_scaling
from hf_adafocal.scaling.folding import unfold_scaling as unfold_scaling
from hf_adafocal.scaling.grid import best_temperature as best_temperature
from hf_adafocal.scaling.grid import nll_on_grid as nll_on_grid
from hf_adafocal.scaling.platt import fit_platt_scaling as fit_platt_scaling
