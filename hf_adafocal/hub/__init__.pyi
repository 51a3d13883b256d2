"""Public names of the package, each with the module that defines it: read by type checkers and by `_lazy.py`."""

from hf_adafocal.hub.client import PushError as PushError
from hf_adafocal.hub.push import push_run as push_run
from hf_adafocal.hub.spaces import publish_metric as publish_metric
