"""Modules whose optional library is missing are not imported for their doctests."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("trl") else ["hf_adafocal/training/sft.py"]
