"""The architecture: which module may import which, and what an import costs."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_adafocal"

# A package (or top-level module) may import these of ours and nothing else.
# Leaves import nothing of ours but leaves, and may be imported by anybody.
LEAVES = {"_lazy", "betti", "preserved_state", "checkpoint_files", "upload_selection"}
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "_lazy": set(),
    "betti": set(),
    "preserved_state": set(),
    "checkpoint_files": set(),
    "upload_selection": set(),
    "metrics": set(),
    "losses": set(),
    "data": set(),
    "models": set(),
    "scaling": {"models"},  # its Auto classes
    "evaluate_modules": {"metrics"},
    "report": {"metrics", "scaling"},
    "training": {"metrics", "losses", "scaling", "data", "report"},
    "runs": {"training", "metrics", "losses", "scaling", "data", "report", "models"},
    "hub": {"report", "evaluate_modules"},
    "cli": {"runs", "metrics", "losses", "report", "hub"},
}


def drawing() -> str:
    """The table as text: one line a package, those that import it above it, with what it may import."""
    names = ALLOWED.keys() - LEAVES - {"__init__"}
    floor: dict[str, int] = {}
    while len(floor) < len(names):
        floor |= {
            name: 1 + max((floor[below] for below in ALLOWED[name]), default=-1)
            for name in names
            if ALLOWED[name] <= floor.keys()
        }
    rows = sorted(names, key=lambda name: (-floor[name], name))
    lines = [f"{floor[name]}  {name:<17} {' '.join(sorted(ALLOWED[name])) or '-'}" for name in rows]
    return "\n".join([*lines, f"   anybody may import {' '.join(sorted(LEAVES))}"])


def modules() -> dict[str, Path]:
    return {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path.name} uses a relative import")
        elif isinstance(node, ast.ImportFrom):
            # `from hf_adafocal import x` names a package or a public name, and the latter is none inside the package.
            whole = node.module == "hf_adafocal"
            names = [f"hf_adafocal.{alias.name}" for alias in node.names] if whole else [node.module]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("hf_adafocal.")}
    return found


class TestArchitecture:
    @pytest.mark.parametrize("name", modules())
    def test_a_module_imports_only_what_the_design_allows(self, name):
        room = name.split("/")[0].removesuffix(".py")
        extra = imported(modules()[name]) - ALLOWED[room] - LEAVES - ({room} if "/" in name else set())
        assert not extra, f"{name} must not import {sorted(extra)}"

    def test_the_table_of_allowed_imports_names_every_module_and_no_other(self):
        assert {name.split("/")[0].removesuffix(".py") for name in modules()} == set(ALLOWED)

    def test_the_drawing_in_the_guide_for_contributors_is_that_of_the_table(self):
        guide = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
        assert drawing() in guide, f"CONTRIBUTING.md must hold this drawing:\n{drawing()}"

    def test_a_forbidden_import_is_found(self, tmp_path):
        file = tmp_path / "bad.py"
        file.write_text(
            "def f():\n    from hf_adafocal.training.trainer import AdaFocalTrainer\n    import hf_adafocal.cli\n"
        )
        assert imported(file) == {"training", "cli"}

    def test_scripts_are_thin(self):
        example = "train_no_trainer.py"  # a whole loop to copy from, not a front end
        for script in (PACKAGE.parent / "scripts").glob("train_*.py"):
            assert len(script.read_text().splitlines()) <= (165 if script.name == example else 60)


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


class TestImportCost:
    def test_the_package_loads_neither_torch_nor_transformers(self):
        assert not loaded_by("import hf_adafocal") & {"torch", "transformers", "datasets", "evaluate", "numpy"}

    @pytest.mark.parametrize(
        "name", ["scores", "bin_free", "selective", "ood", "histogram", "bootstrap", "gate", "segmentation"]
    )
    def test_metrics_need_numpy_alone(self, name):
        heavy = {"torch", "transformers", "datasets", "evaluate", "scipy", "sklearn", "matplotlib"}
        loaded = loaded_by(f"import hf_adafocal.metrics.{name}")
        assert "numpy" in loaded and not loaded & heavy

    def test_a_loss_needs_no_transformers(self):
        assert not loaded_by("from hf_adafocal import AdaFocalLoss") & {"transformers", "datasets"}


PACKAGES = ["hf_adafocal", *(f"hf_adafocal.{stub.parent.name}" for stub in sorted(PACKAGE.glob("*/__init__.pyi")))]


class TestPublicNames:
    @pytest.mark.parametrize("package", PACKAGES)
    def test_every_public_name_resolves(self, package):
        module = importlib.import_module(package)
        assert len(module.__all__) > 2 and dir(module) == module.__all__
        for name in module.__all__:
            assert getattr(module, name) is not None

    @pytest.mark.slow  # without a cache mypy reads torch and transformers
    def test_type_checkers_see_the_class_itself(self, tmp_path):
        api = pytest.importorskip("mypy.api", reason="mypy is of the extra `ci`")
        names = ("AdaFocalTrainer", "calibration_report")
        code = f"from hf_adafocal import {', '.join(names)}" + "".join(f"; reveal_type({name})" for name in names)
        (tmp_path / "user.py").write_text(code + "\n")
        output, errors, _ = api.run(
            ["--config-file", str(PACKAGE.parent / "pyproject.toml"), str(tmp_path / "user.py")]
        )
        assert "-> hf_adafocal.training.trainer.AdaFocalTrainer" in output, output + errors
        assert "-> dict[str, float | int]" in output

    def test_an_unknown_name_is_an_attribute_error(self):
        import hf_adafocal

        with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
            _ = hf_adafocal.Nothing

    def test_the_version_is_that_of_the_installed_distribution(self):
        from importlib.metadata import version

        import hf_adafocal

        assert hf_adafocal.__version__ == version("hf-adafocal")
