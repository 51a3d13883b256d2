"""Per-token results of a language model from its last hidden states, without the logits of all tokens at once."""

import torch
from torch import Tensor

from hf_adafocal.training.sample_rows import COLUMNS, IGNORED

TOKENS_AT_ONCE, CLASSES_AT_ONCE = 1024, 16_384  # of a tile of logits: 64 MiB in float32


def token_rows(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """`sample_rows` of the logits `hidden @ weight.T + bias`, in one pass over tiles of tokens and vocabulary.

    The maximum, the normaliser and the sum of squares of each token's distribution are carried from tile to tile.

    Args:
        hidden: Last hidden states, shape `(N, ..., H)`.
        weight: Of the language model's head, shape `(V, H)`.
        labels: Class indices in `[0, V)` or `ignore_index`, shape `(N, ...)`.
        bias: Of the head, shape `(V,)`.
        scale: Factor of the logits.
        softcap: Logits become `softcap tanh(logits / softcap)` after the factor; None leaves them.
        ignore_index: Label of tokens that do not count; nothing is computed for them.

    Returns:
        Confidence, correctness, NLL (nats), predicted token and Brier score, shape `(N, ..., 5)`, float32.

    Raises:
        ValueError: If the shapes do not fit.

    >>> token_rows(torch.tensor([[1.0]]), torch.tensor([[0.8], [0.2]]).log(), torch.tensor([0]))
    tensor([[0.8000, 1.0000, 0.2231, 0.0000, 0.0800]])
    """
    if labels.shape != hidden.shape[:-1] or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"Expected hidden states (N, ..., H), a head (V, H) and labels (N, ...), found {tuple(hidden.shape)}, "
            f"{tuple(weight.shape)} and {tuple(labels.shape)}."
        )
    rows = torch.full((*labels.shape, len(COLUMNS)), IGNORED, device=hidden.device)
    counted = labels != ignore_index
    parts = zip(hidden[counted].split(TOKENS_AT_ONCE), labels[counted].split(TOKENS_AT_ONCE), strict=True)
    found = [_rows_of(some, weight, of_some.long(), bias, scale, softcap) for some, of_some in parts]
    if found:
        rows[counted] = torch.cat(found)
    return rows


def _rows_of(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    size = len(labels)
    top = hidden.new_full((size,), -torch.inf, dtype=torch.float32)
    total, squares, of_label = (torch.zeros_like(top) for _ in range(3))
    predicted = torch.zeros_like(labels)
    for start in range(0, len(weight), CLASSES_AT_ONCE):
        end = min(start + CLASSES_AT_ONCE, len(weight))
        tile = (hidden @ weight[start:end].to(hidden.dtype).T).float()
        if bias is not None:
            tile += bias[start:end]
        tile *= scale
        if softcap is not None:
            tile = softcap * torch.tanh(tile / softcap)
        here, place = tile.max(-1)
        inside = (labels >= start) & (labels < end)
        picked = tile.gather(-1, (labels - start).where(inside, 0)[:, None])[:, 0]
        of_label = picked.where(inside, of_label)
        predicted = (place + start).where(here > top, predicted)
        higher = torch.maximum(top, here)
        shrunk = (top - higher).exp()
        shares = tile.sub_(higher[:, None]).exp_()
        total = total * shrunk + shares.sum(-1)
        squares = squares * shrunk.square() + shares.square_().sum(-1)
        top = higher
    nll = top + total.log() - of_label
    brier = squares / total.square() - 2 * (-nll).exp() + 1
    correct = (predicted == labels).float()
    return torch.stack([1 / total, correct, nll, predicted.float(), brier], dim=-1)
