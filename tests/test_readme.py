"""What the README and the guide for contributors say is run."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification

from hf_adafocal.models import train_word_level_tokenizer

ROOT = Path(__file__).parent.parent
README, GUIDE = (ROOT / "README.md").read_text(), (ROOT / "CONTRIBUTING.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def write_tiny_model(folder: Path) -> None:
    """Write the data and the checkpoint that the first block reads: sentences of two kinds, and a one-layer BERT."""
    good, bad = ("a pleasure", "fine and clear", "well made"), ("a mess", "dull and slow", "badly made")
    rows = [
        f'"number {index} was {words[index % 3]}",{label}'
        for label, words in ((1, good), (0, bad))
        for index in range(40)
    ]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    tokenizer = train_word_level_tokenizer([row.split('"')[1] for row in rows], vocab_size=200, max_length=64)
    tokenizer.save_pretrained(folder / "tiny-model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder / "tiny-model")


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    write_tiny_model(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names: dict = {}
    try:
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), names)
    finally:  # `evaluate.load` makes a package of this name, in the folder that is configured
        for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
            del sys.modules[name]
    assert 0 <= json.loads((tmp_path / "runs/reviews/report.json").read_text())["test"]["raw"]["ece"] < 1
    assert names["loss"].gammas.ne(1).any()


@pytest.mark.parametrize("script", ["train_text.py", "train_vision.py", "benchmark.py", "study_short_runs.py"])
def test_the_scripts_it_names_explain_themselves(script, monkeypatch, capsys):
    assert f"scripts/{script}" in README
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    assert end.value.code in (None, 0) and "usage" in capsys.readouterr().out


def test_the_test_command_is_the_one_that_ci_takes():
    found = re.search(r"<!-- tests -->\n```bash\n(.*?)\n```", README)
    assert found and found[1] == 'pip install --no-compile -e ".[dev]" && pytest -n auto'


def test_links_into_the_repository_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README + GUIDE):
        assert (ROOT / target).exists(), target


def test_each_guarantee_names_tests_that_are_there():
    guarantees = GUIDE.split("## What is guaranteed")[1].split("\n## ")[0]
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", guarantees)
    assert len(named) > 15
    for path, subject in named:
        assert f"class {subject}:" in (ROOT / path).read_text() if subject else (ROOT / path).exists(), (path, subject)
