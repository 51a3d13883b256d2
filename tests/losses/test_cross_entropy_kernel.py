"""The cross-entropy that keeps p is PyTorch's in value and in every gradient, and stands in only where it gains."""

import math
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from hf_adafocal.losses import cross_entropy_kernel
from hf_adafocal.losses.cross_entropy_kernel import cross_entropy
from hf_adafocal.losses.functional import focal_loss, label_smoothing_loss

IGNORED = -100
# name: (logits, labels)
LAYOUTS = {
    "flat": lambda: (torch.randn(12, 5), torch.randint(5, (12,))),
    "tokens": lambda: (torch.randn(2, 5, 6), torch.randint(5, (2, 6))),
    "tokens_transposed": lambda: (torch.randn(2, 6, 5).transpose(1, 2), torch.randint(5, (2, 6))),
    "pixels": lambda: (torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))),
}
EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def batch(layout="flat", dtype=torch.float64):
    logits, labels = LAYOUTS[layout]()
    return (2 * logits).to(dtype).requires_grad_(), labels


def keeps_p(ce):
    """Whether the cross-entropy came from our own kernel."""
    return type(ce.grad_fn).__name__ == "_CrossEntropyByPBackward"


def ours(logits, labels, ignore_index=IGNORED):
    ce = cross_entropy(logits, labels, ignore_index)
    assert keeps_p(ce)
    return ce


def theirs(logits, labels, ignore_index=IGNORED):
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")


def gradient(ce, logits, slope):
    return torch.autograd.grad(ce, logits, slope, retain_graph=True)[0]


def assert_same(logits, labels, ignore_index=IGNORED, **tolerances):
    """Value and gradient are PyTorch's, each sample with a slope of its own."""
    found, expected = (kernel(logits, labels, ignore_index) for kernel in (ours, theirs))
    slope = torch.rand_like(expected)
    torch.testing.assert_close(found, expected, equal_nan=True, **tolerances)
    torch.testing.assert_close(
        gradient(found, logits, slope), gradient(expected, logits, slope), equal_nan=True, **tolerances
    )


def peak_bytes(kernel, logits, labels):
    """Most memory held at once during a forward and backward pass, the gradient's own with it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kernel(logits, labels).sum().backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    logits.grad = None
    return max(accumulate(changes))


def large(samples=1024, classes=1024):
    return torch.randn(samples, classes, requires_grad=True), torch.randint(classes, (samples,))


@pytest.fixture
def everywhere(monkeypatch):
    """Our kernel for few logits too."""
    monkeypatch.setattr(cross_entropy_kernel, "LEAST_LOGITS", 0)
    monkeypatch.setattr(cross_entropy_kernel, "LEAST_CLASSES", 0)


@pytest.mark.usefixtures("everywhere")
class TestItIsPyTorchs:
    @EACH_LAYOUT
    @pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-14), (torch.float32, 2e-6)], ids=str)
    def test_in_value_and_gradient(self, layout, dtype, rounding):
        assert_same(*batch(layout, dtype), rtol=rounding, atol=rounding)

    @EACH_LAYOUT
    @pytest.mark.parametrize("ignore_index", [IGNORED, 2, 5])
    def test_with_ignored_labels(self, layout, ignore_index):
        logits, labels = batch(layout)
        labels.view(-1)[::3] = ignore_index
        assert_same(logits, labels, ignore_index)
        ignored = labels == ignore_index
        assert (ours(logits, labels, ignore_index) == 0).equal(ignored)
        slopes = gradient(ours(logits, labels, ignore_index), logits, torch.ones_like(labels, dtype=logits.dtype))
        assert slopes.any(dim=1).equal(~ignored)

    def test_where_every_label_is_ignored(self):
        logits, labels = batch()
        assert_same(logits, torch.full_like(labels, IGNORED))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_as_exact_as_pytorch_whatever_the_margin(self, dtype):
        margins = torch.cat([torch.linspace(-1, 1, 400) * 120, torch.logspace(-6, 2, 200), torch.logspace(2, 6, 50)])
        logits = torch.randn(len(margins), 10).to(dtype)
        logits[:, 0] += margins.to(dtype)
        labels = torch.zeros(len(margins), dtype=torch.long)
        exact = theirs(logits.double(), labels)
        logits.requires_grad_()
        error, their_error = ((ce.double() - exact).abs() for ce in (ours(logits, labels), theirs(logits, labels)))
        assert (error <= 2 * their_error + 2 * torch.finfo(dtype).eps * (1 + exact)).all()

    @pytest.mark.parametrize("gap", [88.0, 104.0, 200.0, 1000.0, 1e30])
    @pytest.mark.parametrize("layout", ["flat", "pixels"])
    def test_where_the_labels_p_underflows(self, gap, layout):
        logits, labels = batch(layout, torch.float32)
        with torch.no_grad():
            logits[0, labels[0].flatten()[0]] -= gap
        labels[1].fill_(IGNORED)
        assert ours(logits, labels).max() > 80
        assert_same(logits, labels, rtol=1e-5, atol=1e-6)

    def test_looking_again_at_no_sample_but_those_that_underflow(self, monkeypatch):
        logits, labels = batch()
        labels[4:8] = IGNORED
        with torch.no_grad():
            logits[[2, 9], labels[[2, 9]]] -= 1e3
            logits[3, labels[3]] -= 600  # p is near 1e-260, small but exact
        seen = []
        monkeypatch.setattr(cross_entropy_kernel, "_cross_entropy", lambda *args: seen.append(args) or theirs(*args))
        ours(logits, labels)
        ((rows, their_labels),) = seen
        assert rows.equal(logits[[2, 9]]) and their_labels.equal(labels[[2, 9]])

    @pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan], ids=str)
    @pytest.mark.parametrize("at_the_label", [False, True])
    def test_with_a_logit_that_is_no_number(self, value, at_the_label):
        logits, labels = batch(dtype=torch.float32)
        with torch.no_grad():
            logits[3, labels[3] - (0 if at_the_label else 1)] = value
            logits[5, labels[5]] -= 1e3  # a NaN elsewhere does not hide the underflow
        assert_same(logits, labels, rtol=1e-5, atol=1e-6)

    def test_with_a_class_that_is_masked_out(self):
        logits, labels = batch()
        with torch.no_grad():
            logits[:, 4] = -math.inf
        labels.clamp_(max=3)
        assert_same(logits, labels)
        assert ours(logits, labels).isfinite().all()

    @pytest.mark.parametrize("wrong", [5, -1])
    @EACH_LAYOUT
    def test_a_label_out_of_range_is_the_same_error(self, layout, wrong, monkeypatch):
        logits, labels = batch(layout)
        labels.view(-1)[1] = wrong
        messages = []
        for least in (0, 2**20):
            monkeypatch.setattr(cross_entropy_kernel, "LEAST_LOGITS", least)
            with pytest.raises(ValueError, match=r"labels must lie in \[0, 5\) or equal ignore_index") as error:
                cross_entropy(logits, labels, IGNORED)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


@pytest.mark.usefixtures("everywhere")
class TestGradients:
    @EACH_LAYOUT
    def test_of_first_and_second_order_are_those_of_finite_differences(self, layout):
        logits, labels = batch(layout)
        labels.view(-1)[::5] = IGNORED
        assert torch.autograd.gradcheck(lambda z: ours(z, labels), logits)
        assert torch.autograd.gradgradcheck(lambda z: ours(z, labels), logits)

    def test_of_second_order_flow_through_what_is_made_of_the_cross_entropy(self):
        logits, labels = batch()
        with torch.no_grad():
            logits[0, labels[0]] -= 800  # underflows
        assert torch.autograd.gradcheck(lambda z: focal_loss(z, labels, 2.0), logits)
        assert torch.autograd.gradgradcheck(lambda z: focal_loss(z, labels, 2.0), logits)

    def test_of_third_order_are_pytorchs(self):
        logits, labels = batch()

        def third(kernel):
            value = kernel(logits, labels).sum()
            for _ in range(3):
                (slopes,) = torch.autograd.grad(value, logits, create_graph=True)
                value = slopes.pow(2).sum()
            return slopes

        torch.testing.assert_close(third(ours), third(theirs))

    def test_twice_through_one_graph_are_twice_the_same(self):
        logits, labels = batch()
        labels[3] = IGNORED
        ce = ours(logits, labels)
        slope = torch.rand_like(ce)
        assert gradient(ce, logits, slope).equal(gradient(ce, logits, slope))

    def test_are_the_same_with_saved_tensors_elsewhere(self):
        logits, labels = batch()
        slope = torch.rand(len(labels), dtype=logits.dtype)
        with torch.autograd.graph.save_on_cpu():
            ce = ours(logits, labels)
        assert gradient(ce, logits, slope).equal(gradient(ours(logits, labels), logits, slope))

    def test_need_one_matrix_kept(self):
        logits, labels = batch()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape), lambda x: x):
            ours(logits, labels)
        assert sorted(kept, key=len) == [labels.shape, logits.shape]


class TestWhere:
    def test_large_trained_logits_go_by_p(self):
        logits, labels = large()
        assert_same(logits, labels, rtol=1e-5, atol=1e-5)
        assert keeps_p(cross_entropy(logits.double(), labels, IGNORED))

    def test_they_need_two_matrices_where_pytorch_needs_three(self):
        logits, labels = large()
        matrix = logits.nbytes
        assert 2 * matrix <= peak_bytes(ours, logits, labels) < 2.1 * matrix
        assert 3 * matrix <= peak_bytes(theirs, logits, labels)

    def test_a_focal_loss_goes_there(self, monkeypatch):
        seen = []
        by_p = cross_entropy_kernel._by_p
        noted = lambda *args, **kwargs: seen.append(1) or by_p(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(cross_entropy_kernel, "_by_p", noted)
        focal_loss(*large())
        focal_loss(*batch())
        assert seen == [1]

    @pytest.mark.parametrize("shape", [(1024, 1023), (2**20 // 128, 128)], ids=str)
    def test_few_logits_or_classes_do_not(self, shape):
        assert not keeps_p(cross_entropy(*large(*shape), IGNORED))

    def test_logits_without_gradient_do_not(self, monkeypatch):
        logits, labels = large()
        monkeypatch.setattr(cross_entropy_kernel, "_by_p", None)
        cross_entropy(logits.detach(), labels, IGNORED)
        with torch.no_grad():
            cross_entropy(logits, labels, IGNORED)

    @pytest.mark.usefixtures("everywhere")
    def test_a_compiler_gets_pytorchs_in_one_graph(self):
        torch.compiler.reset()
        logits, labels = batch()
        compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")(logits, labels, IGNORED)
        slope = torch.rand_like(compiled)
        found = ours(logits, labels)
        torch.testing.assert_close(compiled, found)
        torch.testing.assert_close(gradient(compiled, logits, slope), gradient(found, logits, slope))

    @pytest.mark.usefixtures("everywhere")
    def test_transformed_functions_agree(self):
        logits, labels = batch()

        def loss(z, y):
            return cross_entropy(z, y, IGNORED).sum()

        expected = gradient(theirs(logits, labels), logits, torch.ones(12, dtype=logits.dtype))
        torch.testing.assert_close(torch.func.grad(loss)(logits, labels), expected)
        by_sample = torch.func.vmap(torch.func.grad(loss))(logits[:, None], labels[:, None])
        torch.testing.assert_close(by_sample[:, 0], expected)
        each = torch.func.vmap(loss)(logits[:, None], labels[:, None])  # of logits that require grad outside
        torch.testing.assert_close(gradient(each, logits, torch.ones_like(each)), expected)

    @pytest.mark.usefixtures("everywhere")
    def test_forward_mode_agrees(self):
        logits, labels = batch()
        tangent = torch.randn_like(logits)
        with forward_ad.dual_level():
            ce = cross_entropy(forward_ad.make_dual(logits, tangent), labels, IGNORED)
            found = forward_ad.unpack_dual(ce).tangent
        slopes = gradient(theirs(logits, labels), logits, torch.ones(12, dtype=logits.dtype))
        torch.testing.assert_close(found, (slopes * tangent).sum(1))

    @pytest.mark.usefixtures("everywhere")
    def test_another_device_gets_pytorchs(self):
        logits, labels = batch()
        assert not keeps_p(cross_entropy(logits.detach().to("meta").requires_grad_(), labels.to("meta"), IGNORED))

    @pytest.mark.usefixtures("everywhere")
    def test_a_subclass_of_tensor_gets_pytorchs(self):
        logits, labels = batch()
        assert not keeps_p(cross_entropy(logits.as_subclass(type("Mine", (torch.Tensor,), {})), labels, IGNORED))


def test_the_nll_of_log_probabilities_is_checked_too():
    logits, labels = batch()
    labels[0] = 7
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 5\) .*, found 0 to 7"):
        label_smoothing_loss(logits, labels)
