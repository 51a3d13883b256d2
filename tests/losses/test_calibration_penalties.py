import math

import pytest
import reference_auxiliary as slow
import torch
from reference import softmax

from hf_adafocal.losses.aurc import aurc, regularised_aurc, selective_au
from hf_adafocal.losses.calibration_penalties import (
    dca,
    differentiable_ece,
    mdca,
    mmce,
    mmce_weighted,
    soft_binned_ece,
    soft_label_binned_ece,
)

SETTINGS = {
    mmce: [{}, {"reference_code": True}],
    mmce_weighted: [{}, {"reference_code": True}],
    dca: [{}],
    mdca: [{}],
    soft_binned_ece: [{}, {"num_bins": 4, "temperature": 0.1}],
    soft_label_binned_ece: [{}, {"num_bins": 4, "temperature": 0.1}],
    differentiable_ece: [{}, {"num_bins": 4, "accuracy_slope": 20.0, "bin_temperature": 0.1}],
    aurc: [{}, {"score": "margin"}],
    regularised_aurc: [{}, {"regularization_strength": 0.2, "score": "neg_entropy"}, {"rank_gradient": False}],
    selective_au: [{}, {"quantile": 0.3, "sigma": 0.1, "num_bins": 10, "score": "l2_norm"}],
}
TERMS = list(SETTINGS)
ERRORS = TERMS[:7]  # the rest are losses in nats
PAIRS = [(term, settings) for term, choices in SETTINGS.items() for settings in choices]
# The other weights are constants on purpose, tested below.
DIFFERENTIABLE = [(term, rest) for term, rest in PAIRS if term is not aurc and rest.get("rank_gradient", True)]


def name(value):
    return value.__name__ if callable(value) else str(value)


EACH = pytest.mark.parametrize("term", TERMS, ids=name)
EACH_SETTING = pytest.mark.parametrize(("term", "settings"), PAIRS, ids=name)


def batch(size=14, classes=5, dtype=torch.float64):
    """Logits of a model that is right about half of the time."""
    logits = 2 * torch.randn(size, classes, dtype=dtype)
    labels = logits.argmax(1).where(torch.rand(size) < 0.4, torch.randint(classes, (size,)))
    return logits.requires_grad_(), labels


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def lists(logits, labels):
    return logits.tolist(), labels.tolist()


class TestEveryTerm:
    @pytest.mark.parametrize(("term", "settings"), DIFFERENTIABLE, ids=name)
    def test_gradcheck(self, term, settings):
        logits, labels = batch(size=9)
        labels[2] = -100
        assert torch.autograd.gradcheck(lambda z: term(z, labels, **settings), logits)

    @EACH_SETTING
    @pytest.mark.parametrize("ignore_index", [-100, 2])
    def test_ignored_samples_count_for_nothing(self, term, settings, ignore_index):
        logits, labels = batch()
        kept = torch.arange(14) % 3 > 0
        kept &= labels != ignore_index
        loss = term(logits, labels.where(kept, ignore_index), ignore_index=ignore_index, **settings)
        expected = term(logits[kept], labels[kept], **settings)
        torch.testing.assert_close(loss, expected)
        found = gradient(loss, logits)
        torch.testing.assert_close(found, gradient(expected, logits))
        assert not found[~kept].any()

    @EACH
    def test_dense_targets_equal_the_flattened_form(self, term):
        logits, labels = torch.randn(2, 4, 3, 2, dtype=torch.float64), torch.randint(4, (2, 3, 2))
        labels[0, 1] = -100
        flat = term(logits.movedim(1, -1).reshape(-1, 4), labels.reshape(-1))
        torch.testing.assert_close(term(logits, labels), flat)

    @EACH_SETTING
    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_value_and_gradient_are_finite_for_the_smallest_and_the_surest_batches(self, term, settings, size):
        first_right = torch.tensor([0, 1, 1])[:size]
        all_labels = [torch.zeros(size, dtype=torch.long), torch.ones(size, dtype=torch.long), first_right]
        for margin in (0.0, 1e-3, 1.0, 17.0, 200.0, 1e4):  # samples tie; at margin 0 their classes too
            for labels in all_labels:
                for dtype in (torch.float32, torch.bfloat16):
                    logits = torch.tensor([[margin, 0.0, 0.0]] * size, dtype=dtype, requires_grad=True)
                    loss = term(logits, labels, **settings)
                    assert torch.isfinite(loss) and loss >= 0, (margin, labels, dtype)
                    assert torch.isfinite(gradient(loss, logits)).all(), (margin, labels, dtype)

    @EACH_SETTING
    def test_value_and_gradient_are_zero_if_every_label_is_ignored(self, term, settings):
        logits, labels = batch(size=4)
        loss = term(logits, torch.full_like(labels, -100), **settings)
        assert loss.item() == pytest.approx(0, abs=1.01e-5)  # the epsilon under a root
        assert not gradient(loss, logits).any()

    @EACH
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_logits_are_computed_in_float32(self, term, dtype):
        logits, labels = batch(dtype=dtype)
        exact = logits.detach().float().requires_grad_()
        loss, expected = term(logits, labels), term(exact, labels)
        assert loss.dtype == torch.float32 and loss == expected
        torch.testing.assert_close(gradient(loss, logits), gradient(expected, exact).to(dtype))

    @EACH
    def test_autocast_leaves_the_term_in_float32(self, term):
        logits, labels = batch(dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            loss = term(logits, labels)
        assert loss.dtype == torch.float32
        assert loss == term(logits.float(), labels)

    # With default settings, as a module: tests/losses/test_batch_loss.py.
    @pytest.mark.parametrize(("term", "settings"), [pair for pair in PAIRS if pair[1]], ids=name)
    def test_compiled_in_one_graph_it_equals_eager(self, term, settings):
        torch.compiler.reset()
        logits, labels = batch(dtype=torch.float32)
        labels[::5] = -100
        compiled = torch.compile(term, fullgraph=True, backend="aot_eager")(logits, labels, **settings)
        eager = term(logits, labels, **settings)
        torch.testing.assert_close(compiled, eager)
        torch.testing.assert_close(gradient(compiled, logits), gradient(eager, logits))

    @EACH_SETTING
    def test_it_is_the_same_to_the_bit_each_time(self, term, settings):
        logits, labels = batch(size=64, dtype=torch.float32)
        first, second = term(logits, labels, **settings), term(logits, labels, **settings)
        assert torch.equal(first, second)
        assert torch.equal(gradient(first, logits), gradient(second, logits))

    @EACH
    def test_the_order_of_the_samples_does_not_matter(self, term):
        logits, labels = batch()
        order = torch.randperm(14)
        torch.testing.assert_close(term(logits[order], labels[order]), term(logits, labels))

    @pytest.mark.parametrize("term", ERRORS, ids=name)
    def test_it_is_larger_for_a_sure_model_that_is_half_wrong_than_for_one_that_knows(self, term):
        labels = torch.tensor([0, 1] * 20)
        unsure, sure = torch.tensor([[0.01, 0.0]] * 40), torch.tensor([[9.0, 0.0]] * 40)
        assert term(unsure, labels) < 0.06 and term(sure, labels) > 0.2

    @EACH
    def test_labels_that_make_no_sense_are_an_error(self, term):
        with pytest.raises(ValueError, match=r"\[0, 5\).*found 0 to 5"):
            term(torch.randn(2, 5), torch.tensor([0, 5]))
        with pytest.raises(ValueError, match=r"\(2, 5\) and \(3,\)"):
            term(torch.randn(2, 5), torch.tensor([0, 1, 2]))

    @EACH
    def test_class_weights_are_not_taken(self, term):
        with pytest.raises(TypeError, match="weight"):
            term(torch.randn(2, 5), torch.tensor([0, 1]), weight=torch.ones(5))


class TestMMCE:
    def test_value_and_gradient_without_the_root_are_those_of_the_authors_code(self, golden):
        for case in golden("losses")["cases"]:
            logits = torch.tensor(case["logits"], requires_grad=True)
            loss = mmce(logits, torch.tensor(case["labels"]), reference_code=True)
            assert loss.item() == pytest.approx(case["mmce_squared"]["value"], rel=1e-5)
            torch.testing.assert_close(
                gradient(loss, logits), torch.tensor(case["mmce_squared"]["grad"]), rtol=1e-5, atol=1e-7
            )

    def test_it_is_the_root_of_the_slow_formula(self):
        logits, labels = batch()
        square = slow.mmce_square(*lists(logits, labels))
        assert mmce(logits, labels).item() == pytest.approx(math.sqrt(square))
        assert mmce(logits, labels, reference_code=True).item() == pytest.approx(square)

    def test_samples_of_one_confidence_give_the_gap_of_their_mean(self):
        logits = torch.tensor([[2.0, 0.0]] * 4)
        gap = softmax([2.0, 0.0])[0] - 0.75
        assert mmce(logits, torch.tensor([0, 0, 1, 0])).item() == pytest.approx(gap, rel=1e-5)


class TestMMCEWeighted:
    @pytest.mark.parametrize("reference_code", [False, True])
    def test_it_is_the_root_of_the_slow_formula(self, reference_code):
        logits, labels = batch()
        square = slow.mmce_weighted_square(*lists(logits, labels), double=reference_code)
        found = mmce_weighted(logits, labels, reference_code=reference_code)
        assert found.item() == pytest.approx(math.sqrt(square))

    @pytest.mark.parametrize("labels", [[0, 1, 1, 1], [0, 0, 0, 1]], ids=["one right", "one wrong"])
    def test_a_single_sample_of_a_kind_weighs_as_much_as_the_others(self, labels):
        logits = torch.tensor([[margin, 0.0] for margin in (0.3, 2.0, 1.0, 1.5)], dtype=torch.float64)
        square = slow.mmce_weighted_square(logits.tolist(), labels)
        assert square > 0.01
        assert mmce_weighted(logits, torch.tensor(labels)).item() == pytest.approx(math.sqrt(square))

    def test_the_authors_code_weighs_it_less_the_larger_the_batch_is(self):
        logits, labels = batch(size=128)
        for size, least in ((16, 2), (128, 20)):
            ours = mmce_weighted(logits[:size], labels[:size])
            assert ours / mmce_weighted(logits[:size], labels[:size], reference_code=True) > least

    def test_of_a_calibrated_model_it_stays_far_from_zero_where_mmce_does_not(self):
        logits = 4 * torch.randn(2000, 2)
        labels = torch.multinomial(logits.softmax(1), 1)[:, 0]
        assert mmce(logits, labels) < 0.02 and mmce_weighted(logits, labels) > 0.5

    @pytest.mark.parametrize("label", [0, 1])
    def test_it_is_zero_without_both_right_and_wrong_samples(self, label):
        logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]], requires_grad=True)
        loss = mmce_weighted(logits, torch.full((2,), label))
        assert loss == 0 and not gradient(loss, logits).any()

    def test_rounding_below_zero_does_not_reach_the_root(self):
        # Equal embeddings: 1 - c of the right ones against c of the wrong ones, at c = 1/2.
        for size in range(3, 80):
            logits = torch.zeros(size, 2, requires_grad=True)
            loss = mmce_weighted(logits, (torch.arange(size) % 3 == 0).long())
            assert loss < 1e-3 and torch.isfinite(gradient(loss, logits)).all()


class TestDCA:
    def test_it_is_the_slow_formula(self):
        logits, labels = batch()
        assert dca(logits, labels).item() == pytest.approx(slow.dca(*lists(logits, labels)))


class TestMDCA:
    def test_it_is_the_slow_formula(self):
        logits, labels = batch()
        assert mdca(logits, labels).item() == pytest.approx(slow.mdca(*lists(logits, labels)))

    def test_a_class_that_never_occurs_counts_too(self):
        logits = torch.tensor([[0.0, 0.0, 0.0]])
        assert mdca(logits, torch.tensor([0])).item() == pytest.approx((2 / 3 + 1 / 3 + 1 / 3) / 3)


class TestSoftBinnedECE:
    @pytest.mark.parametrize("settings", SETTINGS[soft_binned_ece], ids=str)
    def test_it_is_the_root_of_the_slow_formula(self, settings):
        logits, labels = batch()
        square = slow.soft_binned_ece_square(*lists(logits, labels), **settings)
        assert soft_binned_ece(logits, labels, **settings).item() == pytest.approx(math.sqrt(square))

    def test_at_a_low_temperature_it_is_the_l2_error_of_hard_bins(self):
        from hf_adafocal.metrics.scores import calibration_error

        logits, labels = batch(size=60)
        confidence, predicted = logits.detach().softmax(1).max(1)
        hard = calibration_error(confidence.numpy(), (predicted == labels).numpy(), 10, norm="l2")
        assert soft_binned_ece(logits, labels, num_bins=10, temperature=1e-6).item() == pytest.approx(hard, rel=1e-4)

    def test_by_hand_with_a_bin_that_hardly_anything_is_in(self):
        # Right at c = 3/4, the middle of the second of two bins: in the first is a share of 1 / (1 + e^(1 / (4 T))).
        logits, rare = torch.tensor([[3.0, 1.0]], dtype=torch.float64).log(), 5e-6
        temperature = 0.25 / math.log(1 / rare - 1)
        square = ((1 - rare) + rare * (rare / 1e-5) ** 2) / 4**2  # of its gap as much as it has of the least mass
        found = soft_binned_ece(logits, torch.tensor([0]), num_bins=2, temperature=temperature)
        assert found.item() ** 2 == pytest.approx(square + 1e-10, rel=1e-9)

    def test_the_gradient_is_finite_where_the_error_is_zero(self):
        logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
        loss = soft_binned_ece(logits, torch.tensor([0]))
        assert loss.item() == pytest.approx(1e-5) and torch.isfinite(gradient(loss, logits)).all()

    @pytest.mark.parametrize("term", [soft_binned_ece, soft_label_binned_ece])
    @pytest.mark.parametrize(
        ("settings", "message"),
        [({"num_bins": 0}, "num_bins"), ({"temperature": 0.0}, "temperature must be .* above 0")],
    )
    def test_bins_that_make_no_sense_are_an_error(self, term, settings, message):
        with pytest.raises(ValueError, match=message):
            term(*batch(), **settings)


class TestSoftLabelBinnedECE:
    @pytest.mark.parametrize("settings", SETTINGS[soft_label_binned_ece], ids=str)
    def test_it_is_the_slow_formula(self, settings):
        logits, labels = batch()
        expected = slow.soft_label_binned_ece(*lists(logits, labels), **settings)
        # The share of a uniform membership moves the value by less than pytest's own tolerance.
        assert soft_label_binned_ece(logits, labels, **settings).item() == pytest.approx(expected, rel=1e-11)


class TestDifferentiableECE:
    @pytest.mark.parametrize(("num_bins", "slope", "temperature"), [(15, 100.0, 0.01), (4, 20.0, 0.1)])
    def test_it_is_the_slow_formula_over_all_pairs_of_classes(self, num_bins, slope, temperature):
        logits, labels = batch()
        found = differentiable_ece(
            logits, labels, num_bins=num_bins, accuracy_slope=slope, bin_temperature=temperature
        )
        expected = slow.differentiable_ece(*lists(logits, labels), num_bins, slope, temperature)
        assert found.item() == pytest.approx(expected)

    def test_the_defaults_are_the_documented_ones(self):
        logits, labels = torch.tensor([[0.51, 0.49]], dtype=torch.float64).log(), torch.tensor([0])
        expected = slow.differentiable_ece(*lists(logits, labels), num_bins=15, slope=100.0, temperature=0.01)
        assert differentiable_ece(logits, labels).item() == pytest.approx(expected)
        assert differentiable_ece(logits, labels, accuracy_slope=150.0).item() != pytest.approx(expected, rel=0.1)

    def test_bins_begin_at_zero(self):
        # Right in the lowest bin and wrong in the next: gaps of two signs, which one bin for both would cancel.
        logits = torch.linspace(0, 1, 40, dtype=torch.float64)[:, None] * torch.randn(40, 60, dtype=torch.float64)
        confidence, predicted = logits.softmax(1).max(1)
        lowest = confidence < 1 / 15
        assert 10 < lowest.sum() < 30 and confidence.max() < 3 / 15
        labels = predicted.where(lowest, (predicted + 1) % 60)
        expected = slow.differentiable_ece(*lists(logits, labels), slope=2e4)  # the soft rank must tell p apart
        assert differentiable_ece(logits, labels, accuracy_slope=2e4).item() == pytest.approx(expected)

    def test_no_tensor_of_all_pairs_of_classes_is_made(self):
        logits, labels = torch.randn(4, 20_000), torch.tensor([0, 1, 2, 3])  # 4 x 20,000 x 20,000 would be 6.4 GB
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, record_shapes=False
        ) as profile:
            differentiable_ece(logits, labels)
        sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        assert 0 < max(sizes) <= 8 * logits.numel()

    @pytest.mark.parametrize("name", ["accuracy_slope", "bin_temperature"])
    def test_a_softness_of_zero_is_an_error(self, name):
        with pytest.raises(ValueError, match=f"{name} must be a finite number above 0, found 0"):
            differentiable_ece(*batch(), **{name: 0})
