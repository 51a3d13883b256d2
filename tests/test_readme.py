"""What the README and the guide for contributors say is run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README, GUIDE = (ROOT / "README.md").read_text(), (ROOT / "CONTRIBUTING.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch):
    pytest.importorskip("timm", reason="timm is the extra `vision`")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert 0 <= names["metrics"]["test_ece"] < 1
    assert names["loss"].gammas.ne(1).any()


@pytest.mark.parametrize("script", ["train_text.py", "train_vision.py", "benchmark.py", "study_short_runs.py"])
def test_the_scripts_it_names_explain_themselves(script):
    assert f"scripts/{script}" in README
    command = [sys.executable, str(ROOT / "scripts" / script), "--help"]
    assert "usage" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_test_command_is_the_one_that_ci_takes():
    found = re.search(r"<!-- tests -->\n```bash\n(.*?)\n```", README)
    assert found and found[1] == 'pip install -e ".[dev]" && pytest -n auto'


def test_links_into_the_repository_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README + GUIDE):
        assert (ROOT / target).exists(), target


def test_each_guarantee_names_tests_that_are_there():
    guarantees = GUIDE.split("## What is guaranteed")[1].split("\n## ")[0]
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", guarantees)
    assert len(named) > 15
    for path, subject in named:
        assert f"class {subject}:" in (ROOT / path).read_text() if subject else (ROOT / path).exists(), (path, subject)
