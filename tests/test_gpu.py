"""On a GPU: what the CPU computes, and no waiting for it. Run with `pytest -m gpu`; skipped without one."""

import warnings

import pytest
import tiny
import torch
from loss_names import ANY_SHAPE
from torch.utils.data import DataLoader

from hf_adafocal import calibrate
from hf_adafocal.losses.registry import LOSSES, build_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = "cuda"


def waits(function) -> int:
    """Count the calls in which the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


class TestLosses:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", LOSSES)
    def test_values_and_gradients_are_those_of_the_cpu(self, name, dtype):
        shape = (256, 100) if name in ANY_SHAPE else (2, 3, 12, 12)
        logits, labels = torch.randn(shape).to(dtype), torch.randint(shape[1], shape[:1] + shape[2:])
        on_cpu, on_gpu = logits.clone().requires_grad_(), logits.to(DEVICE).requires_grad_()
        expected = build_loss(name)(on_cpu, labels)
        found = build_loss(name)(on_gpu, labels.to(DEVICE))
        expected.backward(), found.backward()
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(on_gpu.grad.cpu(), on_cpu.grad, rtol=2e-2, atol=1e-5)

    @pytest.mark.parametrize("name", ANY_SHAPE)
    def test_a_step_waits_for_nothing(self, name):
        logits = torch.randn(256, 100, device=DEVICE, requires_grad=True)
        labels, items = torch.randint(100, (256,), device=DEVICE), torch.tensor(256, device=DEVICE)
        loss = build_loss(name).to(DEVICE)
        assert waits(lambda: loss(logits, labels, items).backward()) == 0


class TestTrainer:
    @pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=["float32", "bf16", "fp16"])
    def test_gamma_moves_as_on_the_cpu(self, tmp_path, precision):
        tables = {}
        for device in ("cpu", DEVICE):
            settings = precision if device == DEVICE else {}
            run = tiny.trainer(tmp_path / device, loss="adafocal", use_cpu=device == "cpu", **settings)
            run.train()
            assert next(run.model.parameters()).device.type == device
            assert not run._further_terms.found
            tables[device] = run.loss.table()["gammas"]
        assert tables["cpu"] != [1.0] * 5
        assert tables[DEVICE] == pytest.approx(tables["cpu"], rel=0.05 if precision else 1e-3)

    def test_a_look_at_held_out_data_keeps_the_random_state(self):
        model = tiny.bert().to(DEVICE)
        state = torch.cuda.get_rng_state()
        calibrate(model, DataLoader(tiny.token_dataset(48).with_format("torch"), 16))
        assert torch.equal(torch.cuda.get_rng_state(), state)
