import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from loss_cases import FAMILY, FORMULAS, batch, gradient, moved

from hf_adafocal.losses import CrossEntropyLoss
from hf_adafocal.losses.base import finite
from hf_adafocal.losses.functional import focal_loss
from hf_adafocal.losses.registry import PER_SAMPLE_LOSSES as LOSSES


class TestClassificationLoss:
    @FAMILY
    def test_two_micro_batches_sum_to_the_mean_over_the_whole_batch(self, make):
        loss_fn = moved(make())
        logits, labels = batch(size=8)
        whole = loss_fn(logits, labels)
        parts = loss_fn(logits[:3], labels[:3], 8) + loss_fn(
            logits[3:], labels[3:], num_items_in_batch=torch.tensor(8)
        )
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(gradient(parts, logits), gradient(whole, logits))

    @FAMILY
    def test_micro_batches_with_ignored_labels_sum_to_the_mean_over_counted_labels(self, make):
        loss_fn = moved(make(), classes=3)
        logits, labels = torch.randn(4, 3, 5), torch.randint(3, (4, 5))
        labels[0, :4], labels[3, 2:] = -100, -100
        counted = (labels != -100).sum()
        parts = loss_fn(logits[:1], labels[:1], counted) + loss_fn(logits[1:], labels[1:], counted)
        torch.testing.assert_close(parts, loss_fn(logits, labels))

    @FAMILY
    def test_it_takes_the_outputs_of_a_model(self, make):
        logits, labels = batch()
        assert make()(SimpleNamespace(logits=logits), labels) == make()(logits, labels)

    @pytest.mark.parametrize("name", LOSSES)
    def test_weight_ignore_index_and_reduction_reach_the_formula(self, name):
        options = {"weight": torch.rand(6), "ignore_index": 2, "reduction": "none"}
        loss_fn = LOSSES[name](**options)
        logits, labels = batch()
        if name in FORMULAS:
            expected = FORMULAS[name](logits, labels, **options)
        else:
            expected = focal_loss(logits, labels, loss_fn.gamma, **options)
        assert torch.equal(loss_fn(logits, labels), expected)
        assert ((expected == 0) == (labels == 2)).all()

    @FAMILY
    def test_dense_targets_equal_the_flattened_form(self, make):
        loss_fn = moved(make())
        for dims in [(5,), (3, 4)]:
            logits, labels = torch.randn(2, 6, *dims), torch.randint(6, (2, *dims))
            flat = loss_fn(logits.movedim(1, -1).reshape(-1, 6), labels.reshape(-1))
            torch.testing.assert_close(loss_fn(logits, labels), flat)

    @FAMILY
    def test_bfloat16_logits_give_the_float32_loss_of_the_same_values(self, make):
        loss_fn = moved(make())
        logits, labels = batch(dtype=torch.bfloat16)
        loss = loss_fn(logits, labels)
        assert loss.dtype == torch.float32
        assert loss == loss_fn(logits.float(), labels)
        assert gradient(loss, logits).dtype == torch.bfloat16

    @FAMILY
    def test_value_and_gradient_are_finite_whatever_the_logits(self, make):
        loss_fn = moved(make(reduction="sum"), classes=3)
        for margin in (1e4, 200.0, 88.0, 17.0, 0.0):
            rows = [[margin, 0.0, 0.0], [-margin, 0.0, 0.0], [margin, margin, 0.0]]
            logits = torch.tensor(rows, requires_grad=True)
            loss = loss_fn(logits, torch.zeros(3, dtype=torch.long))
            assert torch.isfinite(loss) and torch.isfinite(gradient(loss, logits)).all()

    @FAMILY
    @pytest.mark.parametrize("size", [1, 2])
    def test_a_batch_of_one_or_two_is_the_mean_of_its_samples(self, make, size):
        loss_fn = moved(make())
        logits, labels = batch(size=size)
        each = torch.stack([loss_fn(z[None], y[None]) for z, y in zip(logits, labels, strict=True)])
        torch.testing.assert_close(loss_fn(logits, labels), each.mean())

    @FAMILY
    def test_gradcheck(self, make):
        loss_fn = moved(make()).double()
        logits, labels = batch(size=10, dtype=torch.float64)
        labels[2] = -100
        assert torch.autograd.gradcheck(lambda z: loss_fn(z, labels), logits)

    @FAMILY
    def test_labels_out_of_range_are_an_error(self, make):
        with pytest.raises(ValueError, match=r"\[0, 3\).*found 0 to 3"):
            make()(torch.randn(2, 3), torch.tensor([0, 3]))

    @FAMILY
    def test_the_class_weight_moves_with_the_module_and_is_not_saved(self, make):
        loss_fn = make(weight=torch.ones(3)).double()
        assert loss_fn.weight.dtype == torch.float64
        assert "weight" not in loss_fn.state_dict()

    @FAMILY
    def test_compiled_in_one_graph_it_equals_eager(self, make):
        torch.compiler.reset()
        loss_fn = moved(make())
        logits, labels = batch()
        labels[::5] = -100
        compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")(logits, labels)
        eager = loss_fn(logits, labels)
        torch.testing.assert_close(compiled, eager)
        torch.testing.assert_close(gradient(compiled, logits), gradient(eager, logits))

    @pytest.mark.slow
    @pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
    @FAMILY
    def test_compiled_to_machine_code_it_equals_eager(self, make):
        torch.compiler.reset()
        loss_fn = moved(make())
        logits, labels = batch()
        labels[::5] = -100
        compiled, eager = torch.compile(loss_fn, fullgraph=True)(logits, labels), loss_fn(logits, labels)
        torch.testing.assert_close(compiled, eager)
        torch.testing.assert_close(gradient(compiled, logits), gradient(eager, logits))


class TestClassWeights:
    @pytest.mark.parametrize(
        ("weight", "dtype"),
        [([1, 0, 2], torch.float32), (torch.tensor([1, 0, 2]), torch.float32), ([1.0, 0.0, 2.0], torch.float32)]
        + [(torch.tensor([1.0, 0.0, 2.0], dtype=dtype), dtype) for dtype in (torch.float64, torch.bfloat16)],
        ids=str,
    )
    def test_whole_numbers_become_floats_and_0_leaves_a_class_out(self, weight, dtype):
        loss_fn = CrossEntropyLoss(weight=weight)
        assert loss_fn.weight.dtype == dtype and loss_fn.weight.tolist() == [1, 0, 2]
        assert loss_fn.count(torch.tensor([0, 1, 1, 2, -100])) == 3


@pytest.mark.parametrize(
    ("value", "lowest", "found"),
    [
        (-1.0, 0.0, "number from 0, found -1"),
        (math.inf, 0.0, "found inf"),
        (-math.inf, -math.inf, "number, found -inf"),
    ]
    + [(math.nan, lowest, "found nan") for lowest in (0.0, -math.inf)],
)
def test_a_setting_is_a_finite_number_from_its_lowest_on(value, lowest, found):
    assert finite("gamma", lowest if lowest == 0 else -5.0, lowest) == max(lowest, -5.0)
    with pytest.raises(ValueError, match=f"gamma must be a finite .*{found}"):
        finite("gamma", value, lowest)
