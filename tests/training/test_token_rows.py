"""Results of tokens from tiles of the vocabulary against those of whole logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_adafocal.training import token_rows as module
from hf_adafocal.training.sample_rows import sample_rows
from hf_adafocal.training.token_rows import token_rows


@given(
    st.integers(0, 9), st.integers(1, 40), st.integers(1, 7), st.integers(1, 11), st.booleans(),
    st.sampled_from([1.0, 0.3, 4.0]), st.sampled_from([None, 5.0]), st.integers(0, 10**6),
)  # fmt: skip
def test_tiles_of_any_size_give_the_rows_of_whole_logits(tokens, classes, many, width, biased, scale, softcap, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, tokens, 6, generator=generator)
    weight, bias = torch.randn(classes, 6, generator=generator), torch.randn(classes, generator=generator)
    labels = torch.randint(0, classes, (2, tokens), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    logits = (hidden @ weight.T + (bias if biased else 0)) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TOKENS_AT_ONCE", many)
        patch.setattr(module, "CLASSES_AT_ONCE", width)
        found = token_rows(hidden, weight, labels, bias if biased else None, scale=scale, softcap=softcap)
    expected = sample_rows(logits, labels)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_a_tie_goes_to_the_first_class_and_impossible_classes_have_no_share():
    weight = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, -torch.inf])
    (row,) = token_rows(torch.ones(1, 1), weight, torch.tensor([2]), bias)
    e = torch.tensor(1.0).exp()
    assert row.tolist() == pytest.approx(
        [(e / (2 * e + 1)).item(), 0, ((2 * e + 1) / e).log().item(), 1, row[4].item()]
    )


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"found \(2, 3, 4\), \(9, 5\) and \(2, 3\)"):
        token_rows(torch.zeros(2, 3, 4), torch.zeros(9, 5), torch.zeros(2, 3, dtype=torch.long))
