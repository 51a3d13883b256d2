"""A log of the operators that reach a device, what PyTorch has a kernel for, and how much memory they write."""

from functools import cache
from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

FAKE_GPU = pytest.mark.skipif(
    torch.__version__ < "2.7" and torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="this torch asks the driver even for tensors without data",
)


class OperatorLog(TorchDispatchMode):
    """Names every operator that reaches a device, the dtypes they make, and the bytes of the largest tensor."""

    def __init__(self):
        super().__init__()
        self.names, self.largest, self.dtypes = [], 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().removeprefix("aten::"))
        given = {storage(value) for value in torch.utils._pytree.tree_leaves((args, kwargs or {}))}
        outputs = func(*args, **(kwargs or {}))
        for output in torch.utils._pytree.tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                self.dtypes.add(output.dtype)
            if storage(output) not in given | {None}:  # neither a view nor written in place
                self.largest = max(self.largest, output.untyped_storage().nbytes())
        return outputs

    @property
    def kernels(self):
        return [name for name in self.names if name != "detach"]  # which launches nothing


def storage(value):
    """Address of the memory of a tensor; None for anything else."""
    return (
        value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) and value.device.type == "cpu" else None
    )


@cache
def operator_table():
    """PyTorch's own list of operators and of the backends that have a kernel for each."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return {entry["func"].split("(")[0]: entry for entry in yaml.load(path.read_text(), loader)}


def runs_on_mps(name):
    entry = operator_table()[name]
    dispatch = entry.get("dispatch", {})
    backends = {backend.strip() for key in dispatch for backend in key.split(",")}
    if "structured_delegate" in entry and not backends & {"MPS", "CompositeExplicitAutograd"}:
        return runs_on_mps(entry["structured_delegate"])
    return not dispatch or any(backend == "MPS" or backend.startswith("Composite") for backend in backends)
