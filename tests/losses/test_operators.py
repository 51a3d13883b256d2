"""What the losses ask of a device: which operators, how many, on which device, and how often a compiler runs."""

import numpy as np
import pytest
import torch
from loss_names import ADAPTIVE, ANY_SHAPE
from operator_log import FAKE_GPU, OperatorLog, runs_on_mps
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_adafocal.losses import AdaFocalLoss, CombinedLoss, CrossEntropyLoss
from hf_adafocal.losses.registry import LOSSES, PER_SAMPLE_LOSSES
from hf_adafocal.metrics.binning import BinStats

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


# Operators forward and backward, each a kernel launch on a GPU: F.cross_entropy takes 5, with label smoothing 25.
MOST_OPERATORS = {
    **{"cross_entropy": 15, "focal": 25, "inverse_focal": 25, "flsd_53": 25, "adafocal": 25, "classwise_adafocal": 25},
    **{"label_smoothing": 36, "adaptive_label_smoothing": 36, "confidence_penalty": 33, "brier": 37},
    **{"dual_focal": 63, "ada_dual_focal": 76, "mmce": 92, "mmce_w": 107, "dca": 56, "mdca": 68, "soft_ece": 111},
    **{"soft_ece_label_binned": 122, "dece": 105, "aurc": 45, "aurc_regularised": 142, "selective_au": 139},
}


class TestOperatorCount:
    @EACH
    def test_a_loss_takes_no_more_operators_forward_and_backward_than_the_table_says(self, name):
        if name not in PER_SAMPLE_LOSSES and torch.__version__ < "2.7":
            pytest.skip("this torch takes more operators backward through a batch term")
        assert len(operators(LOSSES[name]()).kernels) <= MOST_OPERATORS[name]

    def test_nor_does_adafocal_with_a_table_for_each_class(self):
        """Whose shared and own gammas are weighed, and looked up by class and bin."""
        loss = LOSSES["classwise_adafocal"]()
        loss.update(torch.linspace(0, 1, 16), torch.zeros(15), torch.zeros(5, 15), torch.ones(5))
        assert len(operators(loss).kernels) <= 35

    def test_more_classes_or_samples_take_no_more(self):
        for name in ("adafocal", "classwise_adafocal", "ada_dual_focal", "adaptive_label_smoothing"):
            logits, labels = torch.randn(400, 300, requires_grad=True), torch.arange(400) % 300
            loss = LOSSES[name]()
            with OperatorLog() as log:
                loss(logits, labels).backward()
            assert len(log.kernels) <= MOST_OPERATORS[name]

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

    @FAKE_GPU
    def test_its_buffers_move_with_it(self):
        loss = AdaFocalLoss(weight=torch.ones(5))
        with FakeTensorMode(allow_non_fake_inputs=True):
            logits, labels = torch.randn(4, 5, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
            assert loss(logits, labels).device.type == "cuda"
            assert {buffer.device.type for buffer in loss.buffers()} == {"cuda"}

    @FAKE_GPU
    def test_the_base_of_a_combined_loss_moves_with_it(self):
        loss = CombinedLoss("mdca", AdaFocalLoss(weight=torch.ones(5)))
        with FakeTensorMode(allow_non_fake_inputs=True):
            logits, labels = torch.randn(4, 5, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
            assert loss(logits, labels, 4).device.type == "cuda"
            assert {buffer.device.type for buffer in loss.buffers()} == {"cuda"}


class TestRecompilation:
    @pytest.mark.parametrize("name", ADAPTIVE)
    def test_updates_of_what_adapts_compile_nothing_anew(self, name):
        torch.compiler.reset()
        loss, counter = LOSSES[name](), CompileCounter()
        logits, labels = torch.randn(16, 5), torch.arange(16) % 5

        def update(step):
            if loss.follows == "temperature":
                loss.steer(0.1)
                return
            count, share = np.full(15, 4), np.linspace(0, 1, 15)
            edges = np.linspace(0.1 + step / 20, 1, 16)
            of_classes = np.tile(2 * share - 1, (5, 1)) if loss.needs_class_statistics else None
            counts = np.arange(1, 6) * (step + 1) if loss.needs_class_statistics else None
            loss.update_from(BinStats(edges, count, share, 1 - share, of_classes, counts))

        if loss.needs_class_statistics:
            update(0)  # before it there are no tables of classes, and a shape is a reason to compile
        compiled = torch.compile(loss, backend=counter, fullgraph=True)
        values = []
        for step in range(5):
            values.append(compiled(logits, labels).item())
            update(step)
        assert counter.frame_count == 1 and len(set(values)) == 5
