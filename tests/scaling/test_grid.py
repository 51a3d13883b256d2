"""Sums of the NLL on a grid of temperatures, against a search on the logits themselves."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hf_adafocal.scaling.fit import fit_temperature
from hf_adafocal.scaling.grid import SumsOnGrid, best_temperature, inverse_temperatures, nll_on_grid


def drawn(size, classes, spread, seed=0):
    """Logits and labels drawn from their softmax, so that T = 1 fits best but for chance."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(size, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


class TestSums:
    def test_each_node_holds_the_nll_and_its_derivative_as_autograd_has_them(self):
        logits, labels = drawn(50, 7, 2.0)
        inverse = inverse_temperatures().requires_grad_()
        expected = torch.stack([F.cross_entropy(node * logits.double(), labels, reduction="sum") for node in inverse])
        (slope,) = torch.autograd.grad(expected.sum(), inverse)
        found = nll_on_grid(logits.double(), labels)
        torch.testing.assert_close(found, torch.stack([expected, slope]).detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(nll_on_grid(logits, labels), found, rtol=1e-4, atol=1e-3)

    def test_sums_of_batches_add_up_to_those_of_the_whole(self):
        logits, labels = drawn(101, 5, 3.0)
        parts = sum(nll_on_grid(*part) for part in zip(logits.split(17), labels.split(17), strict=True))
        torch.testing.assert_close(parts, nll_on_grid(logits, labels), rtol=1e-5, atol=1e-5)

    def test_more_classes_than_the_temporary_array_holds_change_nothing(self, monkeypatch):
        logits, labels = drawn(20, 30, 3.0)
        whole = nll_on_grid(logits, labels)
        monkeypatch.setattr("hf_adafocal.scaling.grid._VALUES_AT_ONCE", {"cpu": 1})
        torch.testing.assert_close(nll_on_grid(logits, labels), whole, rtol=1e-5, atol=1e-5)

    def test_ignored_samples_add_nothing_even_if_their_logits_are_nan(self):
        logits, labels = drawn(12, 3, 2.0)
        tokens, of_tokens = logits.reshape(3, 4, 3).clone(), labels.reshape(3, 4).clone()
        of_tokens[1], tokens[1] = -100, float("nan")
        kept = of_tokens.flatten() != -100
        expected = nll_on_grid(logits[kept], labels[kept])
        torch.testing.assert_close(nll_on_grid(tokens, of_tokens), expected, rtol=1e-6, atol=1e-6)

    def test_classes_of_probability_zero_count_as_absent(self):
        logits, labels = drawn(30, 4, 2.0)
        padded = torch.cat([logits, torch.full((30, 2), -torch.inf)], dim=1)
        torch.testing.assert_close(nll_on_grid(padded, labels), nll_on_grid(logits, labels), rtol=1e-5, atol=1e-5)

    def test_half_precision_is_computed_in_float32(self):
        logits, labels = drawn(30, 4, 2.0)
        coarse = logits.bfloat16()
        torch.testing.assert_close(nll_on_grid(coarse, labels), nll_on_grid(coarse.float(), labels))

    def test_shapes_that_do_not_fit_are_an_error(self):
        with pytest.raises(ValueError, match=r"found \(3, 2\) and \(2,\)"):
            nll_on_grid(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))


class TestSumsOfBatches:
    @given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.sampled_from([3, 1000]))
    def test_they_are_those_of_all_samples_whatever_the_batches(self, sizes, classes):
        logits, labels = drawn(sum(sizes), classes, 2.0)
        labels[::7] = -100
        sums = SumsOnGrid()
        for rows, of_rows in zip(logits.split(sizes), labels.split(sizes), strict=True):
            sums.add(rows, of_rows)
        torch.testing.assert_close(sums.total(), nll_on_grid(logits, labels), rtol=1e-6, atol=1e-6)
        assert torch.equal(sums.total(), sums.total())

    def test_a_batch_may_be_overwritten_after_it_was_added(self):
        logits, labels = drawn(4, 3, 2.0)
        expected, sums = nll_on_grid(logits, labels), SumsOnGrid()
        sums.add(logits, labels)
        logits.zero_(), labels.zero_()
        assert torch.equal(sums.total(), expected)

    def test_tokens_and_narrow_types_can_be_mixed(self):
        logits, labels = drawn(12, 5, 2.0)
        sums = SumsOnGrid()
        sums.add(logits[:6].view(2, 3, 5).bfloat16(), labels[:6].view(2, 3))
        sums.add(logits[6:], labels[6:])
        both = torch.cat([logits[:6].bfloat16().float(), logits[6:]])
        torch.testing.assert_close(sums.total(), nll_on_grid(both, labels), rtol=1e-6, atol=1e-6)

    def test_of_no_batch_there_are_none(self):
        assert SumsOnGrid().total() is None

    def test_shapes_that_do_not_fit_are_an_error_at_once(self):
        with pytest.raises(ValueError, match=r"found \(3, 2\) and \(2,\)"):
            SumsOnGrid().add(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))


class TestBestTemperature:
    @pytest.mark.parametrize("classes", [2, 10, 1000])
    @pytest.mark.parametrize("temperature", [0.2, 0.3, 0.7, 1.0, 1.9, 4.0, 11.0, 20.0])
    def test_it_is_within_one_percent_of_the_search_on_the_logits(self, classes, temperature):
        logits, labels = drawn(500, classes, 2.0)
        logits = logits * temperature
        expected = fit_temperature(logits, labels)
        found, nll = best_temperature(nll_on_grid(logits, labels), len(labels))
        assert 0.9 * temperature < expected < 1.1 * temperature  # the case is the one meant
        assert found == pytest.approx(expected, rel=0.01)
        assert nll == pytest.approx(F.cross_entropy(logits.double() / expected, labels).item(), abs=5e-4)

    @given(st.integers(0, 10_000), st.integers(2, 22), st.floats(0.3, 6.0), st.floats(0.2, 15.0))
    def test_so_it_is_for_any_logits_that_err_sometimes(self, seed, classes, spread, temperature):
        logits, labels = drawn(200, classes, spread, seed)
        logits = logits * temperature
        wrong = int((logits.argmax(1) != labels).sum())
        expected = fit_temperature(logits, labels) if wrong else 1.0
        if wrong and 1 / 30 < expected < 30:
            assert best_temperature(nll_on_grid(logits, labels), 200)[0] == pytest.approx(expected, rel=0.01)

    def test_where_all_are_right_it_stays_at_one_as_the_search_does(self):
        logits, labels = drawn(40, 3, 2.0)
        found, nll = best_temperature(nll_on_grid(logits, logits.argmax(1)), 40)
        assert found == 1.0 and nll == pytest.approx(F.cross_entropy(logits, logits.argmax(1)).item(), rel=1e-5)

    def test_where_logits_tell_nothing_it_is_the_hottest_node(self):
        logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
        found, nll = best_temperature(nll_on_grid(logits, torch.tensor([1, 0])), 2)
        assert found == pytest.approx(2 ** (11 / 2)) and nll == pytest.approx(np.log(2), abs=0.1)

    @pytest.mark.parametrize(
        ("sums", "size", "message"),
        [
            (torch.zeros(2, 5), 3, r"shape \(2, 22\), found \(2, 5\)"),
            (torch.zeros(2, 22), 0, "at least one counted sample, found 0"),
            (torch.full((2, 22), torch.nan), 3, "must be finite"),
        ],
    )
    def test_what_cannot_be_sums_is_an_error(self, sums, size, message):
        with pytest.raises(ValueError, match=message):
            best_temperature(sums, size)
