"""Public names of the package, each with the module that defines it: read by type checkers and by `_lazy.py`."""

from hf_adafocal.report.card import write_card as write_card
from hf_adafocal.report.eval_results import write_eval_results as write_eval_results
from hf_adafocal.report.files import read_report as read_report
from hf_adafocal.report.files import save_report as save_report
from hf_adafocal.report.plots import gamma_trajectory as gamma_trajectory
from hf_adafocal.report.plots import reliability_diagram as reliability_diagram
from hf_adafocal.report.plots import reliability_of_confidences as reliability_of_confidences
from hf_adafocal.report.plots import reliability_of_probabilities as reliability_of_probabilities
from hf_adafocal.report.schema import Report as Report
from hf_adafocal.report.schema import build_report as build_report
from hf_adafocal.report.weights import weights_hash as weights_hash
