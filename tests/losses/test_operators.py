"""What the losses ask of a device: which operators, how many, on which device, and how often a compiler runs."""

import pytest
import torch
from loss_names import ANY_SHAPE
from operator_log import OperatorLog, runs_on_mps
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_adafocal.losses import AdaFocalLoss, CombinedLoss, CrossEntropyLoss
from hf_adafocal.losses.registry import LOSSES, PER_SAMPLE_LOSSES

EACH = pytest.mark.parametrize("name", ANY_SHAPE)


def operators(loss, logits=None, **options):
    """Operators of a forward and a backward pass, with an ignored label."""
    logits = torch.randn(16, 5) if logits is None else logits
    labels = torch.arange(16) % 5
    labels[3] = -100
    logits.requires_grad_()
    with OperatorLog() as log:
        loss(logits, labels, **options).backward()
    return log


class TestAppleSilicon:
    @EACH
    def test_every_operator_has_an_mps_kernel(self, name):
        assert [found for found in set(operators(LOSSES[name]()).names) if not runs_on_mps(found)] == []

    @pytest.mark.parametrize("name", ["aurc_regularised", "selective_au"])
    @pytest.mark.parametrize("score", ["neg_entropy", "margin", "l2_norm"])
    def test_so_have_those_of_the_other_scores(self, name, score):
        assert all(map(runs_on_mps, operators(LOSSES[name](score=score)).names))

    def test_one_without_is_found(self):
        assert not runs_on_mps("take") and not runs_on_mps("put_")
        assert runs_on_mps("bucketize.Tensor") and runs_on_mps("remainder.Scalar") and runs_on_mps("copysign.Tensor")


class TestOperatorCount:
    @pytest.mark.parametrize("name", ["adafocal", "classwise_adafocal", "flsd_53", "focal", "inverse_focal"])
    def test_a_focal_loss_takes_at_most_25_operators_forward_and_backward(self, name):
        assert len(operators(LOSSES[name]()).kernels) <= 25

    def test_with_the_items_of_a_step_it_takes_fewer(self):
        loss = AdaFocalLoss()
        assert len(operators(loss, num_items_in_batch=16).kernels) <= 23
        assert len(operators(CrossEntropyLoss()).kernels) <= 15

    @EACH
    def test_training_copies_nothing_to_the_host(self, name):
        names = {found.split(".")[0] for found in operators(LOSSES[name]()).names}
        assert not names & {"_local_scalar_dense", "nonzero", "masked_select", "item", "_to_copy_host", "equal"}


class TestDevice:
    @EACH
    def test_a_loss_follows_its_logits(self, name):
        options = {"weight": torch.ones(5)} if name in PER_SAMPLE_LOSSES else {}
        loss = LOSSES[name](**options)
        before = {key: value.clone() for key, value in loss.named_buffers()}
        logits, labels = torch.randn(4, 5, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
        assert loss(logits, labels).device.type == "meta"
        assert loss.count(labels).device.type == "meta"
        # From "meta" there is no way back, so the loss itself has stayed.
        assert all(torch.equal(value, before[key]) for key, value in loss.named_buffers())

    def test_its_buffers_move_with_it(self):
        loss = AdaFocalLoss(weight=torch.ones(5))
        with FakeTensorMode(allow_non_fake_inputs=True):
            logits, labels = torch.randn(4, 5, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
            assert loss(logits, labels).device.type == "cuda"
            assert {buffer.device.type for buffer in loss.buffers()} == {"cuda"}

    def test_the_base_of_a_combined_loss_moves_with_it(self):
        loss = CombinedLoss("mdca", AdaFocalLoss(weight=torch.ones(5)))
        with FakeTensorMode(allow_non_fake_inputs=True):
            logits, labels = torch.randn(4, 5, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
            assert loss(logits, labels, 4).device.type == "cuda"
            assert {buffer.device.type for buffer in loss.buffers()} == {"cuda"}


class TestRecompilation:
    @pytest.mark.parametrize("name", ["adafocal", "ada_dual_focal"])
    def test_updates_of_the_table_compile_nothing_anew(self, name):
        torch.compiler.reset()
        loss, counter = LOSSES[name](), CompileCounter()
        compiled = torch.compile(loss, backend=counter, fullgraph=True)
        logits, labels = torch.randn(16, 5), torch.arange(16) % 5
        values = []
        for step in range(6):
            values.append(compiled(logits, labels).item())
            loss.update(torch.linspace(0.1 + step / 20, 1, 16), torch.linspace(-1, 1, 15))
        assert counter.frame_count == 1 and len(set(values)) == 6

    def test_steps_of_the_smoothing_compile_nothing_anew(self):
        torch.compiler.reset()
        loss, counter = LOSSES["adaptive_label_smoothing"](), CompileCounter()
        compiled = torch.compile(loss, backend=counter, fullgraph=True)
        logits, labels = torch.randn(16, 5), torch.arange(16) % 5
        values = []
        for _ in range(4):
            values.append(compiled(logits, labels).item())
            loss.steer(0.1)
        assert counter.frame_count == 1 and len(set(values)) == 4
