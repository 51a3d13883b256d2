"""Remove what transformers' Trainer generated from a model card and keep what a person wrote."""

import re

COMMENT = re.compile(
    r"<!--\s*This model card has been generated automatically according to the information the Trainer had access to\."
    r".*?-->\n*",
    re.DOTALL,
)
_ADAPTER_COMMENT = re.compile(
    r"\[<img [^\n]*(?:wandb|visualize)[^\n]*\]\([^\n]*\)\n*"
)  # badge of a tracker, under its own link
_INTRO = re.compile(
    r"^This model (?:is a fine-tuned version of|was trained from scratch on) [^\n]*datasets?\.\n"
    r"(?:It achieves the following results on the evaluation set:\n(?:- [^\n]*\n)+)?",
    re.MULTILINE,
)
_EMPTY = "More information needed"
# Headings of the generated sections, and what a body that nobody edited looks like.
_SECTIONS = {
    "## Model description": _EMPTY,
    "## Intended uses & limitations": _EMPTY,
    "## Training and evaluation data": _EMPTY,
    "### Training hyperparameters": r"(The following hyperparameters were used during training:\n(- [^\n]*\n?)+|"
    + _EMPTY
    + r")",
    "### Training results": r"(\|[^\n]*\n?)+",
    "### Framework versions": r"(- [^\n]*\n?)+",
    "## Training procedure": "",
}


def is_stock(text: str) -> bool:
    """Whether the Trainer generated the card and its comment that says so is still there."""
    return COMMENT.search(text) is not None


def without_stock(text: str) -> str:
    r"""Remove the Trainer's comment, introduction and unedited sections from a card.

    Args:
        text: Of a card, without metadata.

    >>> without_stock("# Mine")
    '# Mine'
    """
    if not is_stock(text):
        return text
    text = _INTRO.sub("", _ADAPTER_COMMENT.sub("", COMMENT.sub("", text, count=1), count=1), count=1)
    kept = []
    for part in re.split(r"(?m)^(?=#{1,6} )", text):
        heading, _, body = part.partition("\n")
        kept.append((heading.strip(), body, part))
    for index in range(len(kept) - 1, -1, -1):  # from the end, so that a heading above emptied ones is empty too
        heading, body, _ = kept[index]
        pattern = _SECTIONS.get(heading)
        above_others = index + 1 < len(kept) and kept[index + 1][0].startswith("### ") and heading.startswith("## ")
        if pattern is not None and re.fullmatch(pattern, body.strip()) and not above_others:
            del kept[index]
    return "".join(part for _, _, part in kept)
