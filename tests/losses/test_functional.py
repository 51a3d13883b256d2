import math
import shutil

import pytest
import reference
import torch
import torch.nn.functional as F

from hf_adafocal.losses.functional import (
    brier_loss,
    confidence_penalty_loss,
    cross_entropy,
    dual_focal_loss,
    focal_loss,
    label_smoothing_loss,
    modulate,
)

GAMMAS = [-2.0, -1.0, -0.3, 0.0, 0.3, 1.0, 2.5, 3.0, 20.0]
GOLDEN_GAMMAS = {"cross_entropy": 0.0, "focal_gamma_1": 1.0, "focal_gamma_3": 3.0}
DENSE_SHAPES = [(5,), (3, 4)]


def name(gamma):
    """Test id of a gamma: a number, or a tensor on one line."""
    return f"tensor{tuple(gamma.shape)}" if torch.is_tensor(gamma) else str(gamma)


def batch(size=12, classes=5, scale=2.0, dtype=torch.float64):
    logits = (scale * torch.randn(size, classes, dtype=dtype)).requires_grad_()
    return logits, torch.randint(classes, (size,))


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def slow_dual_focal(logits, label, gamma):
    p = reference.softmax(logits)
    margin = p[label] - max([q for q in p if q < p[label]], default=0.0)
    return -((1 - margin if gamma > 0 else 1 + margin) ** abs(gamma)) * math.log(p[label])


def slow_label_smoothing(logits, label, smoothing):
    p = reference.softmax(logits)
    targets = [smoothing / len(p) + (1 - smoothing) * (k == label) for k in range(len(p))]
    return -sum(t * math.log(q) for t, q in zip(targets, p, strict=True))


def slow_brier(logits, label):
    return sum((q - (k == label)) ** 2 for k, q in enumerate(reference.softmax(logits)))


def slow_confidence_penalty(logits, label, penalty):
    p = reference.softmax(logits)
    return -math.log(p[label]) - penalty * sum(-q * math.log(q) for q in p)


# name: (loss, its settings, the formula of one sample)
RIVALS = {
    "dual_focal": (dual_focal_loss, {"gamma": 5.0}, slow_dual_focal),
    "dual_focal_fractional": (dual_focal_loss, {"gamma": 0.7}, slow_dual_focal),
    "dual_focal_inverse": (dual_focal_loss, {"gamma": -1.5}, slow_dual_focal),
    "label_smoothing": (label_smoothing_loss, {"smoothing": 0.3}, slow_label_smoothing),
    "label_sharpening": (label_smoothing_loss, {"smoothing": -0.1}, slow_label_smoothing),
    "brier": (brier_loss, {}, slow_brier),
    "confidence_penalty": (confidence_penalty_loss, {"penalty": 0.4}, slow_confidence_penalty),
}
EACH_RIVAL = pytest.mark.parametrize("name", RIVALS)


def rival(name):
    loss, settings, _ = RIVALS[name]
    return lambda logits, labels, **options: loss(logits, labels, **settings, **options)


class TestCrossEntropy:
    def test_value_and_gradient_are_those_of_pytorch(self):
        logits, labels = batch()
        ours, theirs = cross_entropy(logits, labels), F.cross_entropy(logits, labels)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits))

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_every_option_is_that_of_pytorch(self, reduction):
        logits, labels = batch()
        options = {"weight": torch.rand(5, dtype=torch.float64), "ignore_index": 2, "reduction": reduction}
        torch.testing.assert_close(
            cross_entropy(logits, labels, **options), F.cross_entropy(logits, labels, **options)
        )

    def test_bfloat16_logits_are_computed_in_float32(self):
        logits, labels = batch(dtype=torch.bfloat16)
        loss = cross_entropy(logits, labels)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, F.cross_entropy(logits.float(), labels))


class TestFocalLoss:
    @pytest.mark.parametrize("case_name", GOLDEN_GAMMAS)
    def test_value_and_gradient_are_those_of_the_authors_code(self, golden, case_name):
        for case in golden("losses")["cases"]:
            logits = torch.tensor(case["logits"], requires_grad=True)
            loss = focal_loss(logits, torch.tensor(case["labels"]), GOLDEN_GAMMAS[case_name], reduction="sum")
            assert loss.item() == pytest.approx(case[case_name]["value"], rel=1e-5)
            torch.testing.assert_close(
                gradient(loss, logits), torch.tensor(case[case_name]["grad"]), rtol=1e-5, atol=1e-7
            )

    @pytest.mark.parametrize("gamma", GAMMAS)
    def test_each_sample_equals_the_slow_formula(self, gamma):
        logits, labels = batch()
        expected = [reference.focal_loss(z.tolist(), int(y), gamma) for z, y in zip(logits, labels, strict=True)]
        torch.testing.assert_close(focal_loss(logits, labels, gamma, reduction="none").tolist(), expected)

    def test_a_gamma_for_each_sample_equals_the_slow_formula(self):
        logits, labels = batch(size=len(GAMMAS))
        rows = zip(logits, labels, GAMMAS, strict=True)
        expected = [reference.focal_loss(z.tolist(), int(y), gamma) for z, y, gamma in rows]
        gamma = torch.tensor(GAMMAS, dtype=torch.float64)
        torch.testing.assert_close(focal_loss(logits, labels, gamma, reduction="none").tolist(), expected)

    def test_by_hand_at_one_half(self):
        logits, labels = torch.zeros(1, 2), torch.tensor([1])
        assert focal_loss(logits, labels, 2.0).item() == pytest.approx(0.25 * math.log(2))
        assert focal_loss(logits, labels, -2.0).item() == pytest.approx(2.25 * math.log(2))

    def test_gamma_is_3_unless_given(self):
        logits, labels = batch()
        assert focal_loss(logits, labels) == focal_loss(logits, labels, 3.0)

    @pytest.mark.parametrize("gamma", [0, 0.0, -0.0, torch.tensor(0.0), torch.zeros(12)], ids=name)
    def test_gamma_zero_is_cross_entropy_in_value_and_gradient(self, gamma):
        logits, labels = batch()
        ours, theirs = focal_loss(logits, labels, gamma), F.cross_entropy(logits, labels)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits))

    @pytest.mark.parametrize("gamma", GAMMAS)
    def test_a_tensor_gamma_equals_the_same_number(self, gamma):
        logits, labels = batch()
        number = focal_loss(logits, labels, gamma)
        tensor = focal_loss(logits, labels, torch.full((12,), gamma, dtype=torch.float64))
        torch.testing.assert_close(tensor, number)
        torch.testing.assert_close(gradient(tensor, logits), gradient(number, logits))

    def test_a_gamma_function_gets_p_of_the_label_and_carries_no_gradient(self):
        logits, labels = batch()
        seen = []

        def gamma(p):
            seen.append(p)
            return 4 * p - 1

        loss = focal_loss(logits, labels, gamma)
        (p,) = seen
        torch.testing.assert_close(p, logits.detach().softmax(-1)[torch.arange(12), labels])
        assert not p.requires_grad
        torch.testing.assert_close(
            gradient(loss, logits), gradient(focal_loss(logits, labels, (4 * p - 1).detach()), logits)
        )

    @pytest.mark.parametrize("gamma", [-2.0, -0.5, 0.0, 0.5, 1.0, 3.0])
    def test_gradcheck_with_a_number(self, gamma):
        logits, labels = batch(size=6, classes=4)
        assert torch.autograd.gradcheck(lambda z: focal_loss(z, labels, gamma), logits)

    def test_gradcheck_with_a_tensor(self):
        logits, labels = batch(size=6, classes=4)
        gamma = torch.tensor([-2.0, -0.5, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda z: focal_loss(z, labels, gamma), logits)

    def test_gradcheck_with_dense_targets_weights_and_ignored_labels(self):
        logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        labels = torch.randint(3, (2, 4))
        labels[0, 1] = -100
        weight = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda z: focal_loss(z, labels, 2.0, weight=weight), logits)

    @pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
    @pytest.mark.parametrize("gamma", [-2.0, -1.0, -0.5, -0.2, -1e-3, 0.0, 1e-3, 0.2, 0.5, 1.0, 3.0, 20.0])
    def test_value_and_gradient_are_finite_whatever_the_logits(self, gamma, as_tensor):
        for margin in [1e4, 200.0, 104.0, 88.0, 87.3, 17.0, 16.6, 9.0, 1e-3, 0.0]:
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                # p of the label: 1, 0, a tie of two at the top, a tie of all
                rows = [[margin, 0.0, 0.0], [-margin, 0.0, 0.0], [margin, margin, 0.0], [margin] * 3]
                logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
                chosen = torch.full((4,), gamma) if as_tensor else gamma
                losses = focal_loss(logits, torch.zeros(4, dtype=torch.long), chosen, reduction="none")
                assert torch.isfinite(losses).all() and (losses >= 0).all(), (margin, dtype, losses)
                assert torch.isfinite(gradient(losses.sum(), logits)).all(), (margin, dtype)

    @pytest.mark.parametrize("gamma", [-2.0, 0.5, 3.0])
    def test_a_hopeless_sample_costs_its_margin_and_still_pulls(self, gamma):
        logits = torch.tensor([[-1e4, 0.0]], requires_grad=True)
        loss = focal_loss(logits, torch.tensor([0]), gamma)
        assert loss.item() == pytest.approx(1e4)
        torch.testing.assert_close(gradient(loss, logits), torch.tensor([[-1.0, 1.0]]))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("gamma", [-1.0, 0.0, 1.0, torch.tensor(2.0)], ids=name)
    def test_half_precision_logits_are_computed_in_float32(self, dtype, gamma):
        logits, labels = batch(dtype=dtype)
        exact = logits.detach().float().requires_grad_()
        loss, expected = focal_loss(logits, labels, gamma), focal_loss(exact, labels, gamma)
        assert loss.dtype == torch.float32
        assert loss == expected
        found = gradient(loss, logits)
        assert found.dtype == dtype
        torch.testing.assert_close(found, gradient(expected, exact).to(dtype))

    @pytest.mark.parametrize("margin", [9.0, 10.0, 12.0, 15.0])
    def test_a_bfloat16_margin_of_nine_or_more_does_not_give_loss_zero(self, margin):
        logits = torch.tensor([[margin, 0.0]], dtype=torch.bfloat16, requires_grad=True)
        loss = focal_loss(logits, torch.tensor([0]), 1.0)
        # near p = 1 both 1 - p and -log p are exp(-margin); float32 keeps a few digits of it
        assert loss.item() == pytest.approx(math.exp(-2 * margin), rel=0.3)
        assert gradient(loss, logits).abs().min() > 0

    def test_autocast_leaves_the_loss_in_float32(self):
        logits, labels = batch(dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            loss = focal_loss(logits, labels, 2.0)
        assert loss.dtype == torch.float32
        assert loss == focal_loss(logits.float(), labels, 2.0)

    def test_float64_stays_float64(self):
        logits, labels = batch()
        assert focal_loss(logits, labels, torch.tensor(2.0)).dtype == torch.float64

    @pytest.mark.parametrize("gamma", [-1.0, 0.0, 2.0])
    def test_reductions_agree(self, gamma):
        logits, labels = batch()
        each = focal_loss(logits, labels, gamma, reduction="none")
        assert each.shape == labels.shape
        torch.testing.assert_close(focal_loss(logits, labels, gamma, reduction="sum"), each.sum())
        torch.testing.assert_close(focal_loss(logits, labels, gamma, reduction="mean"), each.mean())

    @pytest.mark.parametrize("gamma", [-1.0, 0.0, 2.0])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_ignored_samples_count_for_nothing(self, gamma, reduction):
        logits, labels = batch()
        kept = torch.arange(12) % 3 > 0
        expected = focal_loss(logits[kept], labels[kept], gamma, reduction=reduction)
        loss = focal_loss(logits, labels.where(kept, -100), gamma, reduction=reduction)
        torch.testing.assert_close(loss, expected)
        found = gradient(loss, logits)
        torch.testing.assert_close(found, gradient(expected, logits))
        assert not found[~kept].any()

    def test_ignored_samples_lose_nothing_one_by_one(self):
        logits, labels = batch()
        labels[::3] = -100
        assert (focal_loss(logits, labels, 2.0, reduction="none") == 0).tolist() == (labels == -100).tolist()

    @pytest.mark.parametrize("ignore_index", [-1, 0, 4, 255])
    def test_any_label_can_be_the_ignored_one(self, ignore_index):
        logits, labels = batch()
        kept = torch.arange(12) % 3 > 0
        kept &= labels != ignore_index
        loss = focal_loss(logits, labels.where(kept, ignore_index), 2.0, ignore_index=ignore_index)
        torch.testing.assert_close(loss, focal_loss(logits[kept], labels[kept], 2.0))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_mean_over_no_counted_sample_is_nan_as_in_pytorch(self, dtype):
        logits, labels = torch.zeros(3, 2, dtype=dtype), torch.full((3,), -100)
        assert F.cross_entropy(logits, labels).isnan()
        assert focal_loss(logits, labels).isnan()
        assert focal_loss(logits[:0], labels[:0]).isnan()
        assert focal_loss(logits, labels, reduction="sum") == 0

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("ignored", [False, True])
    def test_class_weights_at_gamma_zero_are_those_of_pytorch(self, reduction, ignored):
        logits, labels = batch()
        if ignored:
            labels[::4] = -100
        options = {"weight": torch.tensor([0.1, 1.0, 2.0, 0.0, 5.0], dtype=torch.float64), "reduction": reduction}
        ours, theirs = focal_loss(logits, labels, 0.0, **options), F.cross_entropy(logits, labels, **options)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradient(ours.sum(), logits), gradient(theirs.sum(), logits))

    def test_class_weights_scale_the_loss_of_a_sample_and_not_p(self):
        logits, labels = batch()
        labels[::4] = -100
        weight = torch.tensor([0.1, 1.0, 2.0, 0.5, 5.0], dtype=torch.float64)
        each, total, divisor = focal_loss(logits, labels, 2.0, reduction="none"), 0.0, 0.0
        for loss, label in zip(each, labels, strict=True):
            if label != -100:
                total, divisor = total + weight[label] * loss, divisor + weight[label]
        torch.testing.assert_close(focal_loss(logits, labels, 2.0, weight=weight, reduction="sum"), total)
        torch.testing.assert_close(focal_loss(logits, labels, 2.0, weight=weight), total / divisor)

    @pytest.mark.parametrize("dims", DENSE_SHAPES, ids=str)
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("gamma", [-1.0, 0.0, 2.0])
    def test_dense_targets_equal_the_flattened_form(self, dims, reduction, gamma):
        logits = torch.randn(2, 4, *dims, dtype=torch.float64, requires_grad=True)
        labels = torch.randint(4, (2, *dims))
        labels.view(-1)[::3] = -100
        options = {"weight": torch.rand(4, dtype=torch.float64), "reduction": reduction}
        dense = focal_loss(logits, labels, gamma, **options)
        flat = focal_loss(logits.movedim(1, -1).reshape(-1, 4), labels.reshape(-1), gamma, **options)
        torch.testing.assert_close(dense, flat.view_as(dense))
        torch.testing.assert_close(gradient(dense.sum(), logits), gradient(flat.sum(), logits))

    def test_a_gamma_for_each_position_of_a_dense_target(self):
        logits, labels = torch.randn(2, 4, 5), torch.randint(4, (2, 5))
        gamma = torch.randn(2, 5)
        flat = focal_loss(logits.movedim(1, -1).reshape(-1, 4), labels.view(-1), gamma.view(-1), reduction="none")
        torch.testing.assert_close(focal_loss(logits, labels, gamma, reduction="none"), flat.view(2, 5))

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
    def test_any_integer_labels_are_accepted(self, dtype):
        logits, labels = batch()
        assert focal_loss(logits, labels.to(dtype)) == focal_loss(logits, labels)

    @pytest.mark.parametrize("label", [5, 1000, -1, -99])
    @pytest.mark.parametrize("dims", [(), *DENSE_SHAPES], ids=str)
    @pytest.mark.parametrize("gamma", [0.0, 2.0])
    def test_a_label_out_of_range_is_an_error_that_names_the_range(self, label, dims, gamma):
        logits, labels = torch.randn(2, 5, *dims), torch.zeros(2, *dims, dtype=torch.long)
        labels.view(-1)[-1] = label
        low, high = min(0, label), max(0, label)
        with pytest.raises(ValueError, match=rf"\[0, 5\).*ignore_index \(-100\).*found {low} to {high}"):
            focal_loss(logits, labels, gamma)

    def test_the_default_ignore_index_is_out_of_range_once_another_is_chosen(self):
        with pytest.raises(ValueError, match=r"\[0, 5\).*found -100 to 0"):
            focal_loss(torch.randn(2, 5), torch.tensor([0, -100]), ignore_index=-1)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.complex64])
    def test_labels_that_are_not_integers_are_an_error(self, dtype):
        with pytest.raises(ValueError, match=rf"integer.*{dtype}.*\(2,\).*\(2, 5\)"):
            focal_loss(torch.randn(2, 5), torch.tensor([0, 1]).to(dtype))

    @pytest.mark.parametrize(
        ("logits", "labels"),
        [
            ((4, 3), (3,)),
            ((4, 3), (4, 1)),
            ((4, 3), ()),
            ((4,), (4,)),
            ((), ()),
            ((2, 3, 5), (2, 3)),
            ((2, 5, 3), (2, 3, 5)),
        ],
        ids=str,
    )
    def test_shapes_that_do_not_fit_are_an_error_that_names_both(self, logits, labels):
        with pytest.raises(ValueError) as error:
            focal_loss(torch.randn(logits), torch.zeros(labels, dtype=torch.long))
        assert f"found {logits} and {labels}" in str(error.value)

    def test_one_hot_labels_are_an_error(self):
        with pytest.raises(ValueError, match=r"\(4, 3\) and \(4, 3\)"):
            focal_loss(torch.randn(4, 3), torch.eye(4, 3))

    @pytest.mark.parametrize("shape", [(4, 1), (2, 4), (3,)], ids=str)
    def test_a_gamma_that_does_not_broadcast_to_the_labels_is_an_error(self, shape):
        with pytest.raises((ValueError, RuntimeError)):
            focal_loss(torch.randn(4, 3), torch.zeros(4, dtype=torch.long), torch.ones(shape))

    @pytest.mark.parametrize("shape", [(2,), (3, 1), (1, 2, 3)], ids=str)
    def test_of_dense_labels_neither(self, shape):
        with pytest.raises(ValueError, match=r"gamma must broadcast to shape \(2, 3\), found"):
            modulate(torch.ones(2, 3), torch.ones(shape))

    @pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 3), (2, 1)], ids=str)
    def test_a_gamma_that_broadcasts_counts_as_one_per_label(self, shape):
        ce, gamma = torch.rand(2, 3), torch.rand(shape) * 4 - 2
        torch.testing.assert_close(modulate(ce, gamma), modulate(ce, gamma.expand(2, 3).contiguous()))

    @pytest.mark.parametrize("size", [2, 9])
    def test_a_class_weight_of_the_wrong_length_is_an_error(self, size):
        with pytest.raises((ValueError, RuntimeError)):
            focal_loss(torch.randn(4, 3), torch.tensor([0, 1, 2, 2]), weight=torch.ones(size))

    @pytest.mark.parametrize("reduction", ["avg", "", None])
    def test_an_unknown_reduction_is_an_error(self, reduction):
        with pytest.raises(ValueError, match="'mean', 'sum' or 'none'"):
            focal_loss(torch.randn(2, 3), torch.tensor([0, 1]), reduction=reduction)

    def test_the_arguments_are_left_alone(self):
        logits, labels = batch()
        before = logits.detach().clone(), labels.clone()
        focal_loss(logits, labels, torch.full((12,), 2.0)).backward()
        assert torch.equal(logits, before[0]) and torch.equal(labels, before[1])

    @pytest.mark.parametrize("gamma", [0.0, -1.0, 0.2, 3.0, torch.tensor([-1.0, 0.0, 0.2, 3.0] * 3)], ids=name)
    def test_compiled_in_one_graph_it_equals_eager(self, gamma):
        torch.compiler.reset()
        logits, labels = batch(dtype=torch.float32)
        labels[3] = -100
        compiled = torch.compile(focal_loss, fullgraph=True, backend="aot_eager")(logits, labels, gamma)
        eager = focal_loss(logits, labels, gamma)
        torch.testing.assert_close(compiled, eager)
        torch.testing.assert_close(gradient(compiled, logits), gradient(eager, logits))

    @pytest.mark.slow
    @pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
    def test_compiled_to_machine_code_it_is_finite_where_eager_is(self):
        torch.compiler.reset()
        gamma = torch.tensor([-1.0, 0.0, 0.2, 3.0])
        compiled = torch.compile(focal_loss, fullgraph=True)
        for margin in (1e4, 200.0, 88.0, 17.0, 1.0):
            logits = torch.tensor([[margin, 0.0], [-margin, 0.0]] * 4, requires_grad=True)
            arguments = logits, torch.zeros(8, dtype=torch.long), gamma.repeat_interleave(2)
            torch.testing.assert_close(compiled(*arguments), focal_loss(*arguments))
            torch.testing.assert_close(
                gradient(compiled(*arguments), logits), gradient(focal_loss(*arguments), logits)
            )


class TestModulate:
    @pytest.mark.parametrize("gamma", [-2.0, 0.0, 0.5, 3.0, torch.tensor([3.0, 0.0, -1.0])], ids=name)
    def test_it_turns_the_cross_entropy_into_the_focal_loss(self, gamma):
        logits, labels = batch(size=3)
        ce = F.cross_entropy(logits, labels, reduction="none")
        torch.testing.assert_close(modulate(ce, gamma), focal_loss(logits, labels, gamma, reduction="none"))

    @pytest.mark.parametrize("gamma", [-1.0, 0.0, 2.0])
    def test_it_keeps_the_shape_and_the_zeros(self, gamma):
        ce = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 50.0]])
        loss = modulate(ce, gamma)
        assert loss.shape == ce.shape
        assert ((loss == 0) == (ce == 0)).all()

    def test_one_minus_p_does_not_cancel_when_p_is_close_to_one(self):
        ce = torch.tensor([1e-9])  # 1 - exp(-1e-9) is 0 in float32
        torch.testing.assert_close(modulate(ce, 1.0), torch.tensor([1e-18]), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("gamma", [0.2, torch.tensor([0.2])], ids=name)
    def test_the_slope_is_finite_at_cross_entropy_zero(self, gamma):
        ce = torch.zeros(1, requires_grad=True)
        modulate(ce, gamma).sum().backward()
        assert torch.isfinite(ce.grad).all()


class TestRivals:
    @EACH_RIVAL
    def test_each_sample_equals_the_slow_formula(self, name):
        _, settings, formula = RIVALS[name]
        logits, labels = batch(size=40)
        expected = [formula(z.tolist(), int(y), **settings) for z, y in zip(logits, labels, strict=True)]
        torch.testing.assert_close(rival(name)(logits, labels, reduction="none").tolist(), expected)

    @EACH_RIVAL
    def test_gradcheck_with_dense_targets_weights_and_ignored_labels(self, name):
        logits = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
        labels = torch.randint(4, (2, 3))
        labels[0, 1] = -100
        weight = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda z: rival(name)(z, labels, weight=weight), logits)

    @EACH_RIVAL
    @pytest.mark.parametrize("size", [1, 2, 12])
    def test_reductions_agree(self, name, size):
        logits, labels = batch(size=size)
        each = rival(name)(logits, labels, reduction="none")
        assert each.shape == labels.shape
        torch.testing.assert_close(rival(name)(logits, labels, reduction="sum"), each.sum())
        torch.testing.assert_close(rival(name)(logits, labels), each.mean())

    @EACH_RIVAL
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_ignored_samples_count_for_nothing(self, name, reduction):
        logits, labels = batch()
        kept = torch.arange(12) % 3 > 0
        expected = rival(name)(logits[kept], labels[kept], reduction=reduction)
        found = rival(name)(logits, labels.where(kept, 9), ignore_index=9, reduction=reduction)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient(found, logits), gradient(expected, logits))

    @EACH_RIVAL
    def test_ignored_samples_lose_nothing_one_by_one(self, name):
        logits, labels = batch()
        labels[::3] = -100
        each = rival(name)(logits, labels, reduction="none")
        assert (each == 0).tolist() == (labels == -100).tolist()
        assert rival(name)(logits, torch.full((12,), -100)).isnan()

    @pytest.mark.parametrize("name", [name for name in RIVALS if not name.startswith("label")])  # those: see below
    def test_class_weights_scale_the_loss_of_a_sample(self, name):
        logits, labels = batch()
        labels[::4] = -100
        weight = torch.tensor([0.1, 1.0, 2.0, 0.5, 5.0], dtype=torch.float64)
        scale = weight[labels.clamp_min(0)] * (labels != -100)
        each = rival(name)(logits, labels, reduction="none") * scale
        torch.testing.assert_close(rival(name)(logits, labels, weight=weight, reduction="none"), each)
        torch.testing.assert_close(rival(name)(logits, labels, weight=weight, reduction="sum"), each.sum())
        torch.testing.assert_close(rival(name)(logits, labels, weight=weight), each.sum() / scale.sum())

    @EACH_RIVAL
    @pytest.mark.parametrize("dims", DENSE_SHAPES, ids=str)
    def test_dense_targets_equal_the_flattened_form(self, name, dims):
        logits = torch.randn(2, 4, *dims, dtype=torch.float64, requires_grad=True)
        labels = torch.randint(4, (2, *dims))
        labels.view(-1)[::3] = -100
        weight = torch.rand(4, dtype=torch.float64)
        dense = rival(name)(logits, labels, weight=weight, reduction="none")
        flat = logits.movedim(1, -1).reshape(-1, 4), labels.reshape(-1)
        expected = rival(name)(*flat, weight=weight, reduction="none").view_as(dense)
        torch.testing.assert_close(dense, expected)
        torch.testing.assert_close(gradient(dense.sum(), logits), gradient(expected.sum(), logits))

    @EACH_RIVAL
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_logits_are_computed_in_float32(self, name, dtype):
        logits, labels = batch(dtype=dtype)
        exact = logits.detach().float().requires_grad_()
        loss, expected = rival(name)(logits, labels), rival(name)(exact, labels)
        assert loss.dtype == torch.float32 and loss == expected
        found = gradient(loss, logits)
        assert found.dtype == dtype
        torch.testing.assert_close(found, gradient(expected, exact).to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            assert rival(name)(logits, labels) == expected

    @EACH_RIVAL
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_value_and_gradient_are_finite_whatever_the_logits(self, name, dtype):
        for margin in [1e4, 200.0, 104.0, 88.0, 17.0, 1e-3, 0.0]:
            rows = [[margin, 0.0, 0.0], [-margin, 0.0, 0.0], [margin, margin, 0.0], [margin] * 3]
            logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
            losses = rival(name)(logits, torch.zeros(4, dtype=torch.long), reduction="none")
            assert torch.isfinite(losses).all(), (margin, losses)
            assert torch.isfinite(gradient(losses.sum(), logits)).all(), margin

    @EACH_RIVAL
    def test_compiled_in_one_graph_it_equals_eager(self, name):
        torch.compiler.reset()
        logits, labels = batch(dtype=torch.float32)
        labels[3] = -100
        compiled = torch.compile(rival(name), fullgraph=True, backend="aot_eager")(logits, labels)
        eager = rival(name)(logits, labels)
        torch.testing.assert_close(compiled, eager)
        torch.testing.assert_close(gradient(compiled, logits), gradient(eager, logits))

    @EACH_RIVAL
    def test_twice_the_same_is_bit_for_bit_the_same(self, name):
        logits, labels = batch(size=64, dtype=torch.float32)
        first, second = rival(name)(logits, labels), rival(name)(logits, labels)
        assert torch.equal(first, second)
        assert torch.equal(gradient(first, logits), gradient(second, logits))

    @EACH_RIVAL
    def test_what_does_not_fit_is_an_error(self, name):
        loss, logits = rival(name), torch.randn(2, 5)
        with pytest.raises(ValueError, match=r"\[0, 5\).*ignore_index \(-100\).*found 0 to 5"):
            loss(logits, torch.tensor([0, 5]))
        with pytest.raises(ValueError, match=r"found \(2, 5\) and \(3,\)"):
            loss(logits, torch.zeros(3, dtype=torch.long))
        with pytest.raises(ValueError, match="integer"):
            loss(logits, torch.rand(2))
        with pytest.raises(ValueError, match="one entry per class"):
            loss(logits, torch.tensor([0, 1]), weight=torch.ones(4))
        with pytest.raises(ValueError, match="'mean', 'sum' or 'none'"):
            loss(logits, torch.tensor([0, 1]), reduction="avg")


class TestDualFocalLoss:
    @pytest.mark.parametrize("gamma", [1, 5])
    def test_value_and_gradient_are_those_of_the_authors_code(self, golden, gamma):
        for case in golden("losses")["cases"]:
            logits = torch.tensor(case["logits"], requires_grad=True)
            loss = dual_focal_loss(logits, torch.tensor(case["labels"]), gamma, reduction="sum")
            expected = case[f"dual_focal_gamma_{gamma}"]
            assert loss.item() == pytest.approx(expected["value"], rel=1e-5)
            torch.testing.assert_close(gradient(loss, logits), torch.tensor(expected["grad"]), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("p", "expected"),
        [
            ([0.5, 0.3, 0.2], 0.3),  # right: the runner-up
            ([0.3, 0.5, 0.2], 0.2),  # wrong: the next below the label, not the predicted one
            ([0.2, 0.5, 0.3], 0.0),  # nothing is below
            ([0.4, 0.4, 0.2], 0.2),  # a tie is not below
        ],
        ids=str,
    )
    def test_the_second_probability_is_the_largest_strictly_below_that_of_the_label(self, p, expected):
        seen = []
        dual_focal_loss(torch.tensor([p]).log(), torch.tensor([0]), lambda margin: seen.append(margin) or margin)
        assert seen[0].item() == pytest.approx(p[0] - expected, abs=1e-6)
        assert not seen[0].requires_grad

    def test_with_two_classes_the_loss_jumps_where_the_prediction_turns_right(self):
        losses = [
            dual_focal_loss(torch.tensor([[p, 1 - p]]).double().log(), torch.tensor([0]), 5.0).item()
            for p in (0.499, 0.5, 0.501)
        ]
        assert losses == pytest.approx([0.0219, 0.0217, 0.684], abs=5e-4)

    def test_gradient_flows_through_the_second_probability(self):
        logits, labels = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True), torch.tensor([0])
        slopes = gradient(dual_focal_loss(logits, labels, 2.0), logits)[0]
        margin = reference.softmax([2.0, 1.0, 0.0])[0] - reference.softmax([2.0, 1.0, 0.0])[1]
        one_weight = (1 - margin) ** 2 * gradient(F.cross_entropy(logits, labels), logits)[0]
        assert slopes[1] / slopes[2] > 1.5 * one_weight[1] / one_weight[2]

    @pytest.mark.parametrize("gamma", [0.0, torch.zeros(12)], ids=name)
    def test_gamma_zero_is_cross_entropy_in_value_and_gradient(self, gamma):
        logits, labels = batch()
        ours, theirs = dual_focal_loss(logits, labels, gamma), F.cross_entropy(logits, labels)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits))

    def test_a_gamma_for_each_sample_equals_the_slow_formula(self):
        logits, labels = batch(size=4)
        gamma = torch.tensor([5.0, -2.0, 0.3, 20.0], dtype=torch.float64)
        rows = zip(logits.tolist(), labels.tolist(), gamma.tolist(), strict=True)
        expected = [slow_dual_focal(*row) for row in rows]
        torch.testing.assert_close(dual_focal_loss(logits, labels, gamma, reduction="none").tolist(), expected)

    def test_gamma_is_5_unless_given(self):
        logits, labels = batch()
        assert dual_focal_loss(logits, labels) == dual_focal_loss(logits, labels, 5.0)


class TestLabelSmoothingLoss:
    @pytest.mark.parametrize("smoothing", [0.0, 0.05, 0.5])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_it_is_that_of_pytorch_weights_and_ignored_labels_too(self, smoothing, reduction, weighted):
        logits, labels = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True), torch.randint(5, (4, 3))
        labels[1:, 0] = -100
        weight = torch.tensor([0.1, 1.0, 2.0, 0.5, 5.0], dtype=torch.float64) if weighted else None
        options = {"weight": weight, "reduction": reduction}
        ours = label_smoothing_loss(logits, labels, smoothing, **options)
        theirs = F.cross_entropy(logits, labels, label_smoothing=smoothing, **options)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradient(ours.sum(), logits), gradient(theirs.sum(), logits))

    @pytest.mark.parametrize("classes", [2, 10])
    def test_mdcas_alpha_over_the_other_classes_is_a_larger_smoothing_here(self, classes):
        logits, labels, alpha = torch.randn(7, classes, dtype=torch.float64), torch.randint(classes, (7,)), 0.05
        targets = torch.full((7, classes), alpha / (classes - 1), dtype=torch.float64)
        targets[torch.arange(7), labels] = 1 - alpha
        theirs = -(targets * logits.log_softmax(-1)).sum(-1).mean()
        torch.testing.assert_close(label_smoothing_loss(logits, labels, alpha * classes / (classes - 1)), theirs)
        assert abs(label_smoothing_loss(logits, labels, alpha) - theirs) > 1e-5

    def test_a_tensor_is_the_same_number(self):
        logits, labels = batch()
        found = label_smoothing_loss(logits, labels, torch.tensor(-0.05, dtype=torch.float64))
        torch.testing.assert_close(found, label_smoothing_loss(logits, labels, -0.05))

    @pytest.mark.parametrize("smoothing", [-0.11, 0.51, math.nan])
    def test_a_smoothing_out_of_range_is_an_error(self, smoothing):
        with pytest.raises(ValueError, match=r"smoothing must lie in \[-0.1, 0.5\], found"):
            label_smoothing_loss(torch.randn(2, 3), torch.tensor([0, 1]), smoothing)


class TestBrierLoss:
    @pytest.mark.parametrize(("row", "expected"), [([0.0, 0.0], 0.5), ([50.0, 0.0], 0.0), ([-50.0, 0.0], 2.0)])
    def test_by_hand(self, row, expected):
        assert brier_loss(torch.tensor([row]), torch.tensor([0])).item() == pytest.approx(expected)

    def test_a_nearly_certain_sample_keeps_its_loss_and_its_slope(self):
        logits = torch.tensor([[20.0, 0.0]], requires_grad=True)  # 1 - p is 0 in float32
        loss = brier_loss(logits, torch.tensor([0]))
        assert loss.item() == pytest.approx(2 * math.exp(-40), rel=1e-4, abs=0)
        assert gradient(loss, logits)[0, 0].item() == pytest.approx(-4 * math.exp(-40), rel=1e-4, abs=0)


class TestConfidencePenaltyLoss:
    def test_by_hand_at_one_half(self):
        loss = confidence_penalty_loss(torch.zeros(1, 2), torch.tensor([0]), penalty=0.3)
        assert loss.item() == pytest.approx(0.7 * math.log(2))

    def test_it_pulls_a_certain_prediction_back(self):
        logits, labels = torch.tensor([[4.0, 0.0]], requires_grad=True), torch.tensor([0])
        pulls = [gradient(confidence_penalty_loss(logits, labels, beta), logits)[0, 0] for beta in (0.0, 0.1, 1.0)]
        assert pulls[0] < pulls[1] < 0 < pulls[2]

    def test_without_penalty_it_is_cross_entropy(self):
        logits, labels = batch()
        torch.testing.assert_close(confidence_penalty_loss(logits, labels, 0.0), F.cross_entropy(logits, labels))

    def test_a_class_that_is_masked_out_adds_nothing(self):
        logits = torch.tensor([[1.0, 0.0, -math.inf]], requires_grad=True)
        loss = confidence_penalty_loss(logits, torch.tensor([0]), 1.0)
        without = confidence_penalty_loss(logits[:, :2], torch.tensor([0]), 1.0)
        torch.testing.assert_close(loss, without)
        torch.testing.assert_close(gradient(loss, logits), gradient(without, logits))

    @pytest.mark.parametrize("penalty", [-0.1, math.nan, math.inf])
    def test_a_penalty_that_makes_no_sense_is_an_error(self, penalty):
        with pytest.raises(ValueError, match="penalty must be a finite number from 0"):
            confidence_penalty_loss(torch.randn(2, 3), torch.tensor([0, 1]), penalty)


@EACH_RIVAL
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_of_a_single_class_nothing_is_lost_and_labels_may_be_ignored(name, reduction):
    logits, labels = torch.tensor([[3.0], [-2.0], [0.5]]), torch.tensor([0, -100, 0])
    for weight in (None, torch.tensor([2.0])):
        assert not rival(name)(logits, labels, weight=weight, reduction=reduction).any()


@pytest.mark.parametrize(
    ("function", "setting"),
    [
        *((cross_entropy, ()), (focal_loss, (3.0,)), (dual_focal_loss, (5.0,)), (label_smoothing_loss, (0.05,))),
        *((brier_loss, ()), (confidence_penalty_loss, (0.1,))),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_defaults_are_the_documented_ones(function, setting):
    logits, labels = batch(size=5)
    labels[1] = -100
    expected = function(logits, labels, *setting, weight=None, ignore_index=-100, reduction="mean")
    assert torch.equal(function(logits, labels), expected)
