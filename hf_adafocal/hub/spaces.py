"""Publish the metrics of this package as Spaces, so that `evaluate.load("<namespace>/ece")` finds them.

A Space carries the metric's script and the modules of this package that it needs, with relative imports: these are
numpy alone, so who loads the metric installs `evaluate` and nothing of ours, and gets the values of the version that
was published.
"""

import html
import re
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import yaml

from hf_adafocal.evaluate_modules import evaluate_module
from hf_adafocal.hub.client import PushResult, push_files

Sdk = Literal["gradio", "static"]

# The widget of evaluate 0.4.6, the latest release, needs gradio 3; this commit builds it with gradio 5.
_EVALUATE = "git+https://github.com/huggingface/evaluate@a7dd338386a4fae9a1767e05eb9ef9479513d9e8"
_GRADIO_VERSION = "5.49.1"
_ROOT = Path(__file__).resolve().parents[1]
_IMPORT = re.compile(r"^from hf_adafocal\.(?:metrics|evaluate_modules)(?:\.(\w+) import| import (\w+))", re.MULTILINE)
# A widget hands over two columns, which these metrics read as a binary classifier's.
_METRICS_OF_ROWS = ("brier", "classwise_ece", "nll")


def publish_metric(
    name: str,
    namespace: str,
    *,
    sdk: Sdk = "gradio",
    private: bool = False,
    message: str = "Publish a metric of hf-adafocal",
) -> PushResult:
    """Publish a metric as the Space `<namespace>/<name>`; again to bring it up to date.

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
    """The files of a metric's Space, path and text.

    They are the script `<name>.py` with the modules it needs, the metric's card, `requirements.txt`, and the page:
    `app.py`, or `index.html` for "static".

    Raises:
        ValueError: As `publish_metric`.
    """
    if sdk not in ("gradio", "static"):
        raise ValueError(f'sdk must be "gradio" or "static", found {sdk!r}.')
    folder = Path(evaluate_module(name))
    script = (folder / f"{name}.py").read_text(encoding="utf-8")
    modules = _needed_modules(script)
    files = {
        f"{name}.py": _vendored(f"evaluate_modules/{name}/{name}.py", _announced(script, modules)),
        **{Path(module).name: _vendored(module, text) for module, text in modules.items()},
        "README.md": _card((folder / "README.md").read_text(encoding="utf-8"), name, repo_id, sdk),
        "requirements.txt": f"{_EVALUATE}\nnumpy\n",
    }
    return files | ({"app.py": _app(name)} if sdk == "gradio" else {"index.html": _page(name, repo_id)})


def _needed_modules(script: str) -> dict[str, str]:
    """Path in the package and text of the modules that a script imports, and those that they import."""
    modules: dict[str, str] = {}
    waiting = [script]
    while waiting:
        for match in _IMPORT.finditer(waiting.pop()):
            stem = match[1] or match[2]
            path = next(
                path for path in (f"metrics/{stem}.py", f"evaluate_modules/{stem}.py") if (_ROOT / path).is_file()
            )
            if path not in modules:
                modules[path] = (_ROOT / path).read_text(encoding="utf-8")
                waiting.append(modules[path])
    return dict(sorted(modules.items(), key=lambda item: Path(item[0]).stem))


def _announced(script: str, modules: dict[str, str]) -> str:
    """The script, importing from every module: `evaluate` fetches what a script imports, not what that imports.

    No comment may follow on such a line: `evaluate` would take it for the address of the module.
    """
    stems = (Path(module).stem for module in modules)
    lines = [f"from .{stem} import __name__ as _{stem}\n" for stem in stems]
    reason = "# evaluate.load fetches the modules named in this file alone.\n"
    first = _IMPORT.search(script).start()
    return "".join([script[:first], reason, *lines, script[first:]])


def _vendored(path: str, text: str) -> str:
    release = f"hf-adafocal {version('hf-adafocal')}, Apache License 2.0"
    return f"# hf_adafocal/{path} of {release}, with relative imports.\n{_IMPORT.sub(_relative, text)}"


def _relative(match: re.Match) -> str:
    return f"from .{match[1]} import" if match[1] else f"from . import {match[2]}"


def _card(card: str, name: str, repo_id: str, sdk: Sdk) -> str:
    """The metric's card with the front matter of this Space, and how to load the metric from it."""
    _, front_matter, text = card.split("---\n", maxsplit=2)
    data = yaml.safe_load(front_matter) | {"sdk": sdk, "license": "apache-2.0"}
    if sdk == "gradio":
        data |= {"sdk_version": _GRADIO_VERSION, "app_file": "app.py"}
    else:
        data |= {"app_file": "index.html"}
        data.pop("sdk_version", None)
    usage = (
        f"## How to use\n\nFrom this Space, with `evaluate` and NumPy alone:\n\n```python\n>>> import evaluate\n"
        f'>>> {name} = evaluate.load("{repo_id}")\n```\n\nThe rest of this card loads it from the package.\n'
    )
    front_matter = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"---\n{front_matter}---\n{text.replace('## How to use' + chr(10), usage, 1)}"


def _app(name: str) -> str:
    configuration = ', "binary"' if name in _METRICS_OF_ROWS else ""
    return (
        "from pathlib import Path\n\nimport evaluate\nfrom evaluate.utils import launch_gradio_widget\n\n"
        f'script = Path(__file__).resolve().with_name("{name}.py")\n'
        f"launch_gradio_widget(evaluate.load(str(script){configuration}))\n"
    )


def _page(name: str, repo_id: str) -> str:
    code = html.escape(f'import evaluate\n\n{name} = evaluate.load("{repo_id}")')
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{name}</title>\n'
        f"<pre><code>{code}</code></pre>\n<p>README.md of this Space is the metric's card.</p>\n</html>\n"
    )
