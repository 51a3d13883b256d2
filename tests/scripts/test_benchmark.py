"""The benchmark still runs, and what it measures without a clock."""

import importlib.util
import re
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"


@pytest.fixture
def script(monkeypatch):
    """The script as a module, with sizes for a test."""
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = {"STEPS": 3, "BATCH": 8, "SAMPLES": 20_000, "CLASSES": 10, "IMAGES": 40}
    for name, value in sizes.items():
        monkeypatch.setattr(module, name, value)
    vit = {"num_labels": 10, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "patch_size": 16}
    monkeypatch.setattr(module, "VIT", {**module.VIT, **vit})
    return module


class TestInterleaved:
    def test_a_ratio_is_the_median_over_rounds_to_the_first_candidate_of_the_round(self, script):
        times = {"base": iter([9, 1, 2, 4]), "other": iter([9, 3, 2, 20])}  # the first of each is the warm-up
        found = script.interleaved({name: name for name in times}, lambda name: next(times[name]), rounds=3)
        assert found == {"base": (2, 1), "other": (3, 3)}  # ratios 3, 1, 5


class TestTokens:
    def test_the_table_names_both_losses_and_adafocal_holds_no_more_memory(self, script, capsys, monkeypatch):
        pytest.importorskip("trl", reason="trl is the extra `sft`")
        monkeypatch.syspath_prepend(str(SCRIPT.parent))
        from benchmark_tokens import benchmark_tokens

        benchmark_tokens("cpu", 1, 64, script.peak_bytes, (500, 900))
        rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()][2:]
        assert [(row[0].strip(), row[1].strip()) for row in rows] == [
            (f"64 x {size}", loss) for size in (500, 900) for loss in ("cross_entropy", "adafocal")
        ]
        assert all(float(row[5]) < 1.05 for row in rows)


class TestTrainer:
    def test_the_tables_name_every_trainer_and_calibration_holds_under_48_bytes_a_sample(self, script, capsys):
        script.benchmark_trainer("cpu", rounds=1)
        out = capsys.readouterr().out
        lines = [line.split("|") for line in out.splitlines() if line.startswith("| ")]
        rows = [line[1].strip() for line in lines]
        assert rows[1:5] == ["---", "Trainer", "cross_entropy", "adafocal"]
        shares = {line[1].strip(): float(line[2].split()[0]) for line in lines if "%" in line[2]}
        assert shares.keys() == {"8", "32", "256"} and min(shares.values()) > 0
        assert rows[-2:] == ["small ViT, 10 classes", "logits known, 10 classes"]
        held = float(re.search(r"Calibration holds ([\d.]+) MB", out).group(1))
        assert 0.6 < held < 0.96  # 40 bytes for each of 20,000 samples, and the objects around them
