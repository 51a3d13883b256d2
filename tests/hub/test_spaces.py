import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from local_hub import metadata_errors

import hf_adafocal
from hf_adafocal.hub.client import PushError
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
        scripts = {path: text for path, text in files.items() if path.endswith(".py")}
        for path, text in scripts.items():
            for level, module, names in imports(text):
                if level:
                    assert all(f"{stem}.py" in files for stem in ([module] if module else names)), path
                else:
                    assert module.split(".")[0] in {*sys.stdlib_module_names, "numpy", "datasets", "evaluate", "scipy"}

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
        shared = {"argmax.py", "binning.py", "classwise.py", "scores.py", "validation.py"}
        assert python == {"ece.py", "app.py", "base.py"} | shared

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
        assert f'evaluate.load("me/{name}")' in text
        assert text.split("## Examples")[1] == card.split("## Examples")[1]

    def test_a_static_space_has_a_page_and_no_app(self):
        files = metric_space("ece", "me/ece", sdk="static")
        assert "index.html" in files and "app.py" not in files
        assert "sdk_version" not in files["README.md"]

    def test_an_unknown_metric_or_sdk_is_refused(self):
        with pytest.raises(ValueError, match="one of ada_ece, .*; found 'accuracy'"):
            metric_space("accuracy", "me/accuracy")
        with pytest.raises(ValueError, match='sdk must be "gradio" or "static", found \'docker\''):
            metric_space("ece", "me/ece", sdk="docker")


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


# Without the package: evaluate loads each metric from the Hub, and its widget from the files of the Space.
SCRIPT = """if True:
    import json, pathlib, runpy, sys, types
    import numpy as np
    import pandas as pd
    sys.modules["hf_adafocal"] = None
    import evaluate
    folder, *names = sys.argv[1:]
    inputs = {name: dict(np.load(f"{folder}/{name}.npz")) for name in ("rows", "pairs")}
    interfaces = []
    gradio = types.ModuleType("gradio")  # what evaluate 0.4.6 needs of it
    gradio.inputs = types.SimpleNamespace(Dataframe=lambda **options: options)
    gradio.outputs = types.SimpleNamespace(Textbox=lambda **options: options)
    gradio.Interface = lambda **options: interfaces.append(options) or types.SimpleNamespace(launch=lambda: None)
    sys.modules["gradio"] = gradio
    values, widgets = {}, {}
    for name in names:
        metric = evaluate.load(f"me/{name}")
        values[name] = metric.compute(**inputs["pairs" if name == "ood_detection" else "rows"])
        runpy.run_path(f"{folder}/{name}/app.py")
        headers = interfaces[-1]["inputs"]["headers"]
        text = interfaces[-1]["inputs"]["datatype"][0] == "str"
        columns = {key: [json.dumps(x) for x in inputs["pairs"][key].tolist()] if text else inputs["pairs"][key]
                   for key in headers}
        widgets[name] = interfaces[-1]["fn"](pd.DataFrame(columns))
    assert sys.modules["hf_adafocal"] is None
    print(json.dumps([values, widgets]))
"""


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
    values, widgets = json.loads(done.stdout)
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
        assert widgets[name] == values[name]  # the same samples, as pairs
    report = metrics.binary_calibration_report(confidence, correct)
    assert widgets["brier"] == {"brier": pytest.approx(report["brier"])}
    assert widgets["nll"] == {"nll": pytest.approx(report["nll"])}
    assert widgets["classwise_ece"] == {
        "classwise_ece": pytest.approx(classwise.classwise_calibration_error(columns, correct))
    }
    fetched = [path for _, path, status, _ in local_hub.asked("/spaces/me/ece/resolve/main/", "GET") if status == 200]
    assert {path.rsplit("/", 1)[-1] for path in fetched} >= {"ece.py", "base.py", "scores.py", "binning.py"}
