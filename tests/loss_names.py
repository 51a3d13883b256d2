"""Names of losses, by what they take."""

from hf_adafocal.losses.registry import LOSSES

ANY_SHAPE = [name for name in LOSSES if name != "topological_focal"]  # which takes images and volumes alone
ADAPTIVE = [name for name in ANY_SHAPE if LOSSES[name]().adaptive is not None]
