"""Publish the metrics of this package as Spaces, so that `evaluate.load("<namespace>/ece")` finds them.

A Space carries the metric's script and the modules of this package that it needs, with relative imports. Who loads
the metric installs `evaluate` and nothing of ours, and gets the values of the version that was published.
"""

import ast
import html
import json
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

from hf_adafocal.evaluate_modules import evaluate_module
from hf_adafocal.hub.client import PushResult, push_files

Sdk = Literal["gradio", "static"]

_GRADIO_VERSION = "5.49.1"
_PYTHON_VERSION = "3.11"
_ROOT = Path(__file__).resolve().parents[1]
_PACKAGE = _ROOT.name
# The two columns of the page's table, and the configuration that reads them so.
_CONFIDENCES = (None, ("confidence", "right (1) or wrong (0)"))
_BINARY = ("binary", ("probability of class 1", "label (0 or 1)"))
_COLUMNS: dict[str, tuple[str | None, tuple[str, str]]] = {
    **dict.fromkeys(("ada_ece", "aurc", "ece", "smooth_ece"), _CONFIDENCES),
    **dict.fromkeys(("brier", "classwise_ece", "nll"), _BINARY),
    "ood_detection": (None, ("score", "in-distribution (1) or not (0)")),
}
# What a card says in the package, and in a Space.
_FROM_PACKAGE = f"The metric is part of the `{_PACKAGE}` package and loads without a network connection."
_FROM_SPACE = "The metric is loaded from this Space; all it takes is `pip install evaluate`."
_EXAMPLE = ((0.95, 1), (0.9, 1), (0.85, 1), (0.8, 0), (0.7, 1), (0.6, 0))


def publish_metric(
    name: str,
    namespace: str,
    *,
    sdk: Sdk = "gradio",
    private: bool = False,
    message: str = "Publish a metric of hf-adafocal",
) -> PushResult:
    """Publish a metric as the Space `<namespace>/<name>`, or update it.

    The repository has the metric's name because `evaluate.load` takes the script of that name.

    Args:
        name: The metric's name, for example "ece" or "ada_ece".
        namespace: User or organization.
        sdk: "gradio" adds a page to try the metric, which the Hub may ask money for; "static" is free. The metric
            loads the same.
        private: Create the Space as a private one.
        message: First line of the commit message.

    Raises:
        ValueError: If there is no metric or sdk of that name.
        PushError: As `hub.push_run`.
    """
    repo_id = f"{namespace}/{name}"
    files = {path: text.encode() for path, text in metric_space(name, repo_id, sdk=sdk).items()}
    return push_files(files, repo_id, repo_type="space", private=private, space_sdk=sdk, message=message)


def metric_space(name: str, repo_id: str, *, sdk: Sdk = "gradio") -> dict[str, str]:
    """Return the files of a metric's Space, as text by path.

    They are the script `<name>.py` with the modules it needs, the metric's card, `requirements.txt`, and the page:
    `app.py` with its settings in `widget.json`, or `index.html` for "static".

    Raises:
        ValueError: As `publish_metric`.

    Example:
        >>> sorted(metric_space("nll", "me/nll", sdk="static"))[:2]
        ['README.md', 'evaluate_modules_base.py']
    """
    if sdk not in ("gradio", "static"):
        raise ValueError(f'sdk must be "gradio" or "static", found {sdk!r}.')
    folder = Path(evaluate_module(name))
    script = (folder / f"{name}.py").read_text(encoding="utf-8")
    modules = _needed_modules(script)
    vendored = {
        f"{name}.py": _vendored(f"evaluate_modules/{name}/{name}.py", _with_direct_imports(script, modules)),
        **{f"{_flat(module)}.py": _vendored(_path(module), text) for module, text in modules.items()},
    }
    card = _card(folder / "README.md", repo_id, sdk)
    files = {
        **vendored,
        "README.md": card.text,
        "requirements.txt": "".join(f"{package}\n" for package in sorted(_third_party(*vendored.values()))),
    }
    if sdk == "static":
        return files | {"index.html": _page(card, repo_id)}
    configuration, columns = _COLUMNS[name]
    widget = {
        "metric": name,
        "configuration": configuration,
        "title": card.title,
        "description": card.description,
        "columns": columns,
        "example": _EXAMPLE,
    }
    app = (Path(__file__).parent / "space_app.py").read_text(encoding="utf-8")
    return files | {"app.py": app, "widget.json": json.dumps(widget, indent=2) + "\n"}


# Modules: `hf_adafocal.metrics.scores` becomes `metrics_scores.py` --------------------------------------------------


class _Import(NamedTuple):
    """An import statement that imports from this package; `modules` by their names within the package."""

    node: ast.Import | ast.ImportFrom
    modules: list[str]
    relative: list[str]  # the statements in its place


def _imports(text: str) -> Iterator[_Import]:
    """Find every import from this package in a file, also inside functions.

    Raises:
        ValueError: If one names no module, but a package or a name that a package lends.
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module or ""):
            module = _within(node.module or "")
            if _is_module(module):
                names = ", ".join(map(ast.unparse, node.names))
                yield _Import(node, [module], [f"from .{_flat(module)} import {names}"])
                continue
            parts = [(f"{module}.{alias.name}".lstrip("."), alias.asname or alias.name) for alias in node.names]
        elif isinstance(node, ast.Import) and any(_is_ours(alias.name) for alias in node.names):
            parts = [(_within(alias.name), alias.asname or "") for alias in node.names]
        else:
            continue
        if not all(_is_module(module) and name for module, name in parts):
            raise ValueError(
                f"A published metric cannot use `{ast.unparse(node)}`: expected `from <module> import <name>` with a "
                f"module of {_PACKAGE}, or `from <package> import <module>`."
            )
        relative = [f"from . import {_flat(module)} as {name}" for module, name in parts]
        yield _Import(node, [module for module, _ in parts], relative)


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == _PACKAGE


def _within(module: str) -> str:
    return module.removeprefix(_PACKAGE).lstrip(".")


def _is_module(module: str) -> bool:
    return (_ROOT / _path(module)).is_file()


def _path(module: str) -> str:
    return f"{module.replace('.', '/')}.py"


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _needed_modules(script: str) -> dict[str, str]:
    """Return the modules of this package that a script imports, directly or indirectly, each with its text."""
    modules: dict[str, str] = {}
    waiting = [script]
    while waiting:
        for found in _imports(waiting.pop()):
            for module in found.modules:
                if module not in modules:
                    modules[module] = (_ROOT / _path(module)).read_text(encoding="utf-8")
                    waiting.append(modules[module])
    return dict(sorted(modules.items()))


def _with_direct_imports(script: str, modules: dict[str, str]) -> str:
    """Add imports of all needed modules to the script, since `evaluate` downloads only those it imports directly.

    No comment may follow on such a line: `evaluate` would take it for the address of the module.
    """
    lines = script.splitlines(keepends=True)
    first = min(found.node.lineno for found in _imports(script)) - 1
    reason = "# evaluate.load fetches the modules named in this file alone.\n"
    announced = [f"from .{_flat(module)} import __name__ as _{_flat(module)}\n" for module in modules]
    return "".join([*lines[:first], reason, *announced, *lines[first:]])


def _vendored(path: str, text: str) -> str:
    """Copy a file of this package with relative imports and a comment that names its origin.

    Raises:
        ValueError: If an import shares its line with another statement.
    """
    lines = text.splitlines(keepends=True)
    for node, _, relative in sorted(_imports(text), key=lambda found: found.node.lineno, reverse=True):
        first, last = lines[node.lineno - 1], lines[(node.end_lineno or node.lineno) - 1]
        indent, rest = first[: node.col_offset], last.encode()[node.end_col_offset :].decode().strip()
        if indent.strip() or (rest and not rest.startswith("#")):
            raise ValueError(f"{path}, line {node.lineno}: an import of {_PACKAGE} must stand on a line of its own.")
        lines[node.lineno - 1 : node.end_lineno] = [f"{indent}{statement}\n" for statement in relative]
    release = f"hf-adafocal {version('hf-adafocal')}, Apache License 2.0"
    return f"# {_PACKAGE}/{path} of {release}, with relative imports.\n{''.join(lines)}"


def _third_party(*texts: str) -> set[str]:
    """Return the packages that these files import, apart from Python's own and this one."""
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


# Card and pages --------------------------------------------------------------------------------------------------


class _Card(NamedTuple):
    """README.md of a Space, and the parts of it that the page shows."""

    text: str
    title: str
    description: str
    usage: str  # the code under "How to use"


def _card(path: Path, repo_id: str, sdk: Sdk) -> _Card:
    """Write the metric's card with the Space's front matter and its namespace in all examples."""
    _, front_matter, text = path.read_text(encoding="utf-8").split("---\n", maxsplit=2)
    data = yaml.safe_load(front_matter) | {"sdk": sdk, "license": "apache-2.0", "app_file": "index.html"}
    data.pop("sdk_version", None)
    if sdk == "gradio":
        data |= {"sdk_version": _GRADIO_VERSION, "python_version": _PYTHON_VERSION, "app_file": "app.py"}
    text = re.sub(rf'{_PACKAGE}\.evaluate_module\("(\w+)"\)', rf'"{repo_id.rpartition("/")[0]}/\1"', text)
    text = text.replace(f">>> import {_PACKAGE}\n", "").replace(_FROM_PACKAGE, _FROM_SPACE)
    usage = re.search(r"^## How to use$.*?^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    if usage is None or f"import {_PACKAGE}" in text or f"from {_PACKAGE}" in text:
        raise ValueError(f"{path} must have code under `## How to use`, and import nothing else of {_PACKAGE}.")
    settings = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return _Card(f"---\n{settings}---\n{text}", data["title"], data["description"], usage[1])


def _page(card: _Card, repo_id: str) -> str:
    """Build a static page without scripts: description of the metric, how to load it, link to its card."""
    title, description, usage = map(html.escape, (card.title, card.description, card.usage))
    address = html.escape(f"https://huggingface.co/spaces/{repo_id}/blob/main/README.md")
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ max-width: 46rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.6 system-ui, sans-serif; }}
pre {{ overflow-x: auto; padding: 1rem; background: color-mix(in srgb, currentColor 8%, Canvas); }}
code {{ font: 14px/1.5 ui-monospace, monospace; }}
</style>
<h1>{title}</h1>
<p>{description}</p>
<h2>How to use</h2>
<p>{html.escape(_FROM_SPACE).replace("`pip install evaluate`", "<code>pip install evaluate</code>")}</p>
<pre><code>{usage}</code></pre>
<p><a href="{address}">The metric's card</a>: inputs, examples, limits and bias, citation.</p>
</html>
"""
