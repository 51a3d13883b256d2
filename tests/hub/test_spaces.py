import ast
import html
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from local_hub import metadata_errors

import hf_adafocal
from hf_adafocal.evaluate_modules.ece.ece import ECE
from hf_adafocal.hub import spaces
from hf_adafocal.hub.client import PushError
from hf_adafocal.hub.space_app import compute_with
from hf_adafocal.hub.spaces import metric_space, publish_metric
from hf_adafocal.metrics import bin_free as estimators
from hf_adafocal.metrics import classwise, ood, selective
from hf_adafocal.metrics import scores as metrics

FOLDER = Path(hf_adafocal.__file__).parent / "evaluate_modules"
NAMES = sorted(path.stem for path in FOLDER.glob("*/*.py") if path.stem == path.parent.name)
every_metric = pytest.mark.parametrize("name", NAMES)


def imports(text):
    """`(level, module, names)` of every import of a file."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    plain = [alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for alias in node.names]
    found = [(node.level, node.module, [alias.name for alias in node.names]) for node in nodes]
    return found + [(0, name, []) for name in plain]


class TestMetricSpace:
    @every_metric
    def test_needs_nothing_of_the_package_and_has_every_module_that_it_needs(self, name):
        files = metric_space(name, "me/metric")
        scripts = {path: text for path, text in files.items() if path.endswith(".py") and path != "app.py"}
        for path, text in scripts.items():
            for level, module, names in imports(text):
                if level:
                    assert all(f"{stem}.py" in files for stem in ([module] if module else names)), path
                else:
                    assert module.split(".")[0] in {*sys.stdlib_module_names, *files["requirements.txt"].split()}
        assert set(files["requirements.txt"].split()) - {"scipy"} == {"datasets", "evaluate", "numpy"}

    @every_metric
    def test_the_script_names_every_module_because_evaluate_fetches_no_other(self, name):
        files = metric_space(name, "me/metric")
        named = {module for level, module, _ in imports(files[f"{name}.py"]) if level and module}
        assert {f"{module}.py" for module in named} == {path for path in files if path.endswith(".py")} - {
            f"{name}.py",
            "app.py",
        }

    def test_ece_carries_the_modules_of_ece_alone(self):
        python = {path for path in metric_space("ece", "me/ece") if path.endswith(".py")}
        assert python == {
            *("ece.py", "app.py", "evaluate_modules_base.py", "metrics_argmax.py", "metrics_binning.py"),
            *("metrics_classwise.py", "metrics_scores.py", "metrics_validation.py"),
        }

    @every_metric
    @pytest.mark.parametrize("sdk", ["gradio", "static"])
    def test_the_card_is_the_metric_card_with_the_front_matter_of_the_space(self, name, sdk):
        files = metric_space(name, f"me/{name}", sdk=sdk)
        _, front_matter, text = files["README.md"].split("---\n", maxsplit=2)
        data = yaml.safe_load(front_matter)
        card = (FOLDER / name / "README.md").read_text()
        assert data["title"] == yaml.safe_load(card.split("---\n")[1])["title"]
        assert data["tags"] == ["evaluate", "metric"]
        assert (data["sdk"], data["license"]) == (sdk, "apache-2.0")
        assert data["app_file"] in files
        assert metadata_errors(files["README.md"], "space") == []
        assert f'evaluate.load("me/{name}")' in text.split("## How to use")[1].split("```")[1]
        assert not re.search(r"(import|from) hf_adafocal", text) and "evaluate_module" not in text
        assert text.split("## Limits")[1] == card.split("## Limits")[1]

    def test_a_static_space_has_a_page_and_no_app(self):
        files = metric_space("ece", "me/ece", sdk="static")
        assert "index.html" in files and not {"app.py", "widget.json"} & set(files)
        assert "sdk_version" not in files["README.md"]

    @every_metric
    def test_the_static_page_shows_what_the_card_says_first(self, name):
        files = metric_space(name, "me/metric", sdk="static")
        page = " ".join(
            html.unescape(re.sub(r"<style.*?</style>|<[^>]+>", "", files["index.html"], flags=re.S)).split()
        )
        data = yaml.safe_load(files["README.md"].split("---\n")[1])
        code = files["README.md"].split("## How to use")[1].split("```python")[1].split("```")[0]
        for said in (data["title"], data["description"], code):
            assert " ".join(said.split()) in page
        assert "hf_adafocal" not in page

    def test_an_unknown_metric_or_sdk_is_refused(self):
        with pytest.raises(ValueError, match="one of ada_ece, .*; found 'accuracy'"):
            metric_space("accuracy", "me/accuracy")
        with pytest.raises(ValueError, match='sdk must be "gradio" or "static", found \'docker\''):
            metric_space("ece", "me/ece", sdk="docker")


class TestImports:
    """The rewriting of imports, on packages that are not there."""

    @pytest.fixture(autouse=True)
    def package(self, tmp_path, monkeypatch):
        monkeypatch.setattr(spaces, "_ROOT", tmp_path)
        for path in ("a/b/c.py", "a/b/__init__.py", "a/d.py", "e.py"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()

    @pytest.mark.parametrize(
        ("statement", "relative"),
        [
            ("from hf_adafocal.a.b.c import x", "from .a_b_c import x"),
            ("from hf_adafocal.a.d import x, y as z  # why", "from .a_d import x, y as z"),
            ("from hf_adafocal.a.d import (\n    x,\n    y,  # why\n)", "from .a_d import x, y"),
            ("from hf_adafocal.a import d", "from . import a_d as d"),
            ("from hf_adafocal.a import d as x", "from . import a_d as x"),
            ("from hf_adafocal import e", "from . import e as e"),
            ("import hf_adafocal.a.b.c as x", "from . import a_b_c as x"),
            ("if x:\n    from hf_adafocal.a.d import x", "if x:\n    from .a_d import x"),
            ("def f():\n\timport hf_adafocal.e as e\n\tpass", "def f():\n\tfrom . import e as e\n\tpass"),
            ('"""\nfrom hf_adafocal.e import x\n"""', '"""\nfrom hf_adafocal.e import x\n"""'),
            ("from hf_adafocalx.e import x\nimport os", "from hf_adafocalx.e import x\nimport os"),
        ],
    )
    def test_imports_become_relative_whatever_their_form(self, statement, relative):
        text = spaces._vendored("a.py", f"x = 1\n{statement}\ny = 2\n")
        assert text.split("\n", 1)[1] == f"x = 1\n{relative}\ny = 2\n"

    def test_several_modules_of_a_package_are_several_statements(self):
        text = spaces._vendored("a.py", "from hf_adafocal.a import d, d as f\n")
        assert text.endswith("\nfrom . import a_d as d\nfrom . import a_d as f\n")

    def test_modules_of_modules_are_found_wherever_they_are_imported(self, tmp_path):
        (tmp_path / "a" / "d.py").write_text("def f():\n    from hf_adafocal.a.b import c\n")
        (tmp_path / "a" / "b" / "c.py").write_text("from hf_adafocal.a.d import f\nimport hf_adafocal.e as e\n")
        assert list(spaces._needed_modules("from hf_adafocal.a import d")) == ["a.b.c", "a.d", "e"]

    @pytest.mark.parametrize(
        "statement",
        [
            "import hf_adafocal",
            "import hf_adafocal.e",
            "from hf_adafocal import name",
            "from hf_adafocal.a.b import x",
        ],
    )
    def test_an_import_of_a_package_is_refused(self, statement):
        with pytest.raises(ValueError, match=f"cannot use `{statement}`: expected"):
            spaces._vendored("a.py", statement)

    def test_an_import_beside_another_statement_is_refused(self):
        for line in ("import hf_adafocal.e as e; x = 1", "x = 1; from hf_adafocal.e import y"):
            with pytest.raises(ValueError, match="a.py, line 1: an import of hf_adafocal must stand on a line"):
                spaces._vendored("a.py", line)


class TestPage:
    """What the button of a Space's page does; the page itself is in `test_space_page.py`."""

    @pytest.fixture
    def compute(self, tmp_path):
        return compute_with(ECE(cache_dir=str(tmp_path)), ("confidence", "right"))

    def test_cells_count_as_typed_whether_they_come_as_text_or_as_numbers(self, compute):
        assert compute([[0.75, "1"], ["0.75", 0], [" 7.5e-1 ", "1.0"], ["0.75", "1"]]) == "ece = 0"
        assert compute([[0.75, 1], [0.25, 0]]) == "ece = 0.25"

    def test_rows_without_an_entry_do_not_count(self, compute):
        assert compute([["", ""], [0.75, "1"], [None, ""], ["", None]]) == "ece = 0.25"

    @pytest.mark.parametrize(
        ("cells", "said"),
        [
            ([["x", 1]], "Row 1, column 'confidence': expected a number, found 'x'."),
            ([[0.5, 1], ["", ""], [0.5, ""]], "Row 3, column 'right': expected a number, found an empty cell."),
            ([[None, "0"]], "Row 1, column 'confidence': expected a number, found an empty cell."),
            ([["0,75", "1"]], "found '0,75'"),
            ([["", ""]], "The table is empty"),
            ([], "The table is empty"),
            ([[1.5, 1]], "[0, 1]"),
            ([["nan", 1]], "nan"),
            ([[0.5, 0.5]], "0.5"),
            ([[0.5, 7]], "7"),
        ],
    )
    def test_what_is_wrong_is_said_in_the_place_of_the_value(self, cells, said, compute):
        text = compute(cells)
        assert text.startswith("No value: ") and said in text

    def test_an_error_leaves_nothing_behind(self, compute):
        for _ in range(2):
            assert compute([[0.5, 1], [1.5, 1]]).startswith("No value")
            assert compute([[0.75, 1]]) == "ece = 0.25"


class TestPublishMetric:
    def test_the_repository_is_a_space_of_the_name_of_the_metric(self, local_hub):
        result = publish_metric("ada_ece", "me", private=True)
        space = local_hub.space("me/ada_ece")
        assert (result.repo_id, result.url) == ("me/ada_ece", f"{local_hub.endpoint}/spaces/me/ada_ece")
        assert (space.sdk, space.private) == ("gradio", True)
        files = metric_space("ada_ece", "me/ada_ece")
        assert space.files() == {path: text.encode() for path, text in files.items()}

    def test_publishing_again_makes_no_commit(self, local_hub):
        assert [publish_metric("ece", "me").new_commit for _ in range(2)] == [True, False]

    def test_a_static_space_costs_nothing_where_a_gradio_one_does(self, local_hub):
        local_hub.paying = False
        with pytest.raises(PushError, match='asks for payment .402.*sdk="static" is free'):
            publish_metric("ece", "me")
        publish_metric("ece", "me", sdk="static")
        assert local_hub.space("me/ece").sdk == "static"

    def test_another_namespace_takes_the_right(self, local_hub):
        with pytest.raises(PushError, match="may not write to someone-else/ece .403"):
            publish_metric("ece", "someone-else")
        publish_metric("ece", "team")


# Without the package: evaluate loads each metric from the Hub, its card's examples run, and its page computes.
SCRIPT = """if True:
    import doctest, json, re, runpy, sys
    from pathlib import Path
    import numpy as np
    sys.modules["hf_adafocal"] = None
    import evaluate
    folder, *names = sys.argv[1:]
    inputs = {name: dict(np.load(f"{folder}/{name}.npz")) for name in ("rows", "pairs")}
    values, pages, examples = {}, {}, {}
    for name in names:
        metric = evaluate.load(f"me/{name}")
        values[name] = metric.compute(**inputs["pairs" if name == "ood_detection" else "rows"])
        app = runpy.run_path(f"{folder}/{name}/app.py")
        widget = json.loads(Path(f"{folder}/{name}/widget.json").read_text())
        metric = evaluate.load(f"{folder}/{name}/{name}.py", widget["configuration"])
        compute = app["compute_with"](metric, widget["columns"])
        pairs = zip(inputs["pairs"]["predictions"].tolist(), inputs["pairs"]["references"].tolist())
        cells = [[str(score), reference] for score, reference in pairs]
        pages[name] = [compute(cells), compute(widget["example"])]
        card = Path(f"{folder}/{name}/README.md").read_text()
        test = doctest.DocTestParser().get_doctest(
            re.sub("```(python)?", "", card), {}, name, f"{name}/README.md", 0
        )
        results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test)
        examples[name] = [results.attempted, results.failed]
    assert sys.modules["hf_adafocal"] is None
    Path(folder, "results.json").write_text(json.dumps([values, pages, examples]))
"""


@pytest.mark.slow
def test_evaluate_loads_every_metric_from_its_space_without_the_package_with_the_values_of_the_library(
    local_hub, tmp_path
):
    rng = np.random.default_rng(0)
    rows = metrics.softmax(2 * rng.normal(size=(90, 4)))
    labels = np.where(rng.random(90) < 0.4, rng.integers(0, 4, 90), rows.argmax(axis=1))
    confidence, correct = rows.max(axis=1), (rows.argmax(axis=1) == labels).astype(int)
    np.savez(tmp_path / "rows.npz", predictions=rows, references=labels)
    np.savez(tmp_path / "pairs.npz", predictions=confidence, references=correct)
    for name in NAMES:
        publish_metric(name, "me", private=name == "ece")
        (tmp_path / name).mkdir()
        for path, content in local_hub.space(f"me/{name}").files().items():
            (tmp_path / name / path).write_bytes(content)
    environment = local_hub.environment(tmp_path / "home", token="hf_writer")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), *NAMES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path / "ece")
    assert done.returncode == 0, done.stderr[-3000:]
    values, pages, examples = json.loads((tmp_path / "results.json").read_text())
    assert {name: failed for name, (_, failed) in examples.items()} == dict.fromkeys(NAMES, 0), done.stdout[-3000:]
    assert min(attempted for attempted, _ in examples.values()) > 5
    typed = {
        name: {key: float(value) for key, value in (line.split(" = ") for line in on_pairs.splitlines())}
        for name, (on_pairs, _) in pages.items()
    }
    assert all(" = " in on_example and "No value" not in on_example for _, on_example in pages.values())
    inside, outside = confidence[correct == 1], confidence[correct == 0]
    columns = np.column_stack([1 - confidence, confidence])
    assert values == {
        "ada_ece": {"ada_ece": metrics.adaptive_calibration_error(rows, labels)},
        "aurc": {"aurc": selective.area_under_risk_coverage(confidence, correct)},
        "brier": {"brier": pytest.approx(metrics.brier_score(rows, labels), rel=1e-12)},
        "classwise_ece": {"classwise_ece": classwise.classwise_calibration_error(rows, labels)},
        "ece": {"ece": metrics.expected_calibration_error(rows, labels)},
        "nll": {"nll": pytest.approx(metrics.negative_log_likelihood(rows, labels), rel=1e-12)},
        "ood_detection": {
            "ood_auroc": ood.ood_auroc(inside, outside),
            "ood_aupr_in": ood.ood_aupr(inside, outside, positive="in"),
            "ood_aupr_out": ood.ood_aupr(inside, outside, positive="out"),
            "ood_fpr95": ood.ood_fpr95(inside, outside),
        },
        "smooth_ece": {"smooth_ece": estimators.smooth_calibration_error(confidence, correct)},
    }
    assert values["ece"]["ece"] > 0.05
    for name in ("ece", "ada_ece", "aurc", "smooth_ece", "ood_detection"):
        assert typed[name] == pytest.approx(values[name], rel=1e-5)  # the same samples, as pairs
    report = metrics.binary_calibration_report(confidence, correct)
    assert typed["brier"] == {"brier": pytest.approx(report["brier"], rel=1e-5)}
    assert typed["nll"] == {"nll": pytest.approx(report["nll"], rel=1e-5)}
    assert typed["classwise_ece"] == {
        "classwise_ece": pytest.approx(classwise.classwise_calibration_error(columns, correct), rel=1e-5)
    }
    fetched = [path for _, path, status, _ in local_hub.asked("/spaces/me/ece/resolve/main/", "GET") if status == 200]
    assert {path.rsplit("/", 1)[-1] for path in fetched} >= {
        "ece.py",
        "metrics_scores.py",
    }
