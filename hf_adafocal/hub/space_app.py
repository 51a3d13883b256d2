"""Web page of a metric's Space: an input table, the value of the metric, and its card.

`hub.spaces` copies this file into the Space as `app.py`, beside the metric's script, its card and `widget.json`.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def read_number(cell: Any, row: int, column: str) -> float:
    """Parse a table cell as a number; browsers send text for edited cells and numbers for the others.

    Raises:
        ValueError: If it is none, with the place of the cell.
    """
    try:
        return float(str(cell).strip())
    except ValueError as error:
        found = repr(cell) if cell not in ("", None) else "an empty cell"
        raise ValueError(f"Row {row}, column {column!r}: expected a number, found {found}.") from error


def read_table(cells: Sequence[Sequence[Any]], columns: Sequence[str]) -> tuple[list[float], list[float]]:
    """Read predictions and references from a table of two columns; empty rows are skipped.

    Raises:
        ValueError: If a cell holds no number, or the table is empty.

    Example:
        >>> read_table([[0.75, "1"], ["", ""], ["0.5", "0"]], ["confidence", "right"])
        ([0.75, 0.5], [1, 0])
    """
    rows = [
        [read_number(cell, number, column) for cell, column in zip(row, columns, strict=True)]
        for number, row in enumerate(cells, start=1)
        if any(cell not in ("", None) for cell in row)
    ]
    if not rows:
        raise ValueError("The table is empty: type a row for each sample.")
    return [row[0] for row in rows], [int(row[1]) if row[1].is_integer() else row[1] for row in rows]


def compute_with(metric: Any, columns: Sequence[str]) -> Callable[[Sequence[Sequence[Any]]], str]:
    """Build the callback of the button: it returns the metric of a table as text, or an error message."""

    def compute(cells: Sequence[Sequence[Any]]) -> str:
        try:
            predictions, references = read_table(cells, columns)
            values = metric.compute(predictions=predictions, references=references)
        except ValueError as error:
            return f"No value: {error}"
        return "\n".join(f"{name} = {value:.6g}" for name, value in values.items())

    return compute


def build() -> Any:
    """Build the page, a `gradio.Blocks`."""
    import evaluate
    import gradio

    widget = json.loads((FOLDER / "widget.json").read_text(encoding="utf-8"))
    name, columns, example = widget["metric"], widget["columns"], widget["example"]
    compute = compute_with(evaluate.load(str(FOLDER / f"{name}.py"), widget["configuration"]), columns)
    card = (FOLDER / "README.md").read_text(encoding="utf-8").split("---\n", maxsplit=2)[2]
    with gradio.Blocks(title=widget["title"]) as page:
        gradio.Markdown(f"# {widget['title']}\n\n{widget['description']}")
        with gradio.Row():
            table = gradio.Dataframe(
                value=example,
                headers=columns,
                datatype=["str", "str"],  # numbers are read here, with an error that names the cell
                type="array",
                col_count=(len(columns), "fixed"),
                row_count=(len(example), "dynamic"),
                interactive=True,
                label="A row for each sample; the menu of a cell adds and deletes rows",
            )
            with gradio.Column():
                result = gradio.Textbox(
                    value=compute(example), label="Value", lines=4, interactive=False, elem_id="value"
                )
                button = gradio.Button("Compute", variant="primary")
        button.click(compute, table, result)
        gradio.Markdown(card)
    return page


if __name__ == "__main__":
    build().launch()
