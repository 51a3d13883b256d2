"""The runs at the paper's length: resumable, equal to the recipes they stand for, and tabulated as printed."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torch import nn

from hf_adafocal import AdaFocalTrainingArguments

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield [importlib.import_module(name) for name in ("paper_settings", "paper_tables", "reproduce_paper")]


@pytest.fixture
def paper(modules):
    return modules[2]


@pytest.fixture
def tables(modules):
    return modules[1]


def tiny_parts(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def part(count: int) -> tuple:
        pixels = torch.randint(256, (count, 3, 8, 8), generator=generator).to(torch.uint8)
        return pixels, torch.randint(10, (count,), generator=generator)

    return {"train": part(40), "calibration": part(60), "test": part(60), "ood": {"noise": part(20)[0]}}


@pytest.fixture
def tiny(paper, tmp_path, monkeypatch):
    """A setting of four epochs of two steps on random images."""
    setting = dataclasses.replace(paper.SETTINGS["small_images"], epochs=4, batch_size=20, save_every=1)
    monkeypatch.setitem(paper.SETTINGS, "small_images", setting)
    (tmp_path / "data").mkdir()
    torch.save(tiny_parts(), tmp_path / "data" / "small_images-0.pt")
    return setting


def run(paper, folder: Path, method: str, reports: str) -> dict:
    paper.run("small_images", method, 0, Path("nowhere"), folder, folder / reports)
    report = json.loads((folder / reports / "small_images" / f"{method}-0.json").read_text())
    return {name: value for name, value in report.items() if name != "cpu_seconds"}


class TestRun:
    @pytest.mark.parametrize("method", ["adafocal", "adaptive_label_smoothing"])
    def test_an_interrupted_run_ends_with_the_report_of_an_uninterrupted_one(
        self, paper, tiny, tmp_path, monkeypatch, method
    ):
        whole = run(paper, tmp_path, method, "whole")
        note = paper.Curve.on_epoch_end

        def interrupted(self, args, state, control, **kwargs):
            note(self, args, state, control, **kwargs)
            if state.epoch == 3:
                raise KeyboardInterrupt

        monkeypatch.setattr(paper.Curve, "on_epoch_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(paper, tmp_path, method, "parts")
        monkeypatch.setattr(paper.Curve, "on_epoch_end", note)
        if method == "adafocal":  # as if it went on elsewhere
            monkeypatch.setattr(paper, "device", lambda: "a GPU")
            whole["device"] = "cpu, then a GPU"
        assert (tmp_path / "small_images" / f"{method}-0" / "checkpoint-4").exists()
        assert run(paper, tmp_path, method, "parts") == whole
        assert not (tmp_path / "small_images" / f"{method}-0").exists()  # a report needs no checkpoints

    def test_the_report_has_what_the_tables_and_the_figure_need(self, paper, tables, tiny, tmp_path, monkeypatch):
        for method in ("cross_entropy", "adafocal"):
            report = run(paper, tmp_path, method, "reports")
            assert len(report["log"]["validation"]["ece"]) == 4 and report["log"]["test"]["epoch"] == [1, 2, 3, 4]
            # The last reading of the curve is the final model, which the report reads by another way.
            assert report["log"]["test"]["ece"][-1] == pytest.approx(report["raw"]["ece"], rel=1e-3)
            assert report["log"]["test"]["temperature"][-1] == pytest.approx(report["temperature"], rel=1e-3)
            assert report["log"]["validation"]["nll"][-1] == pytest.approx(report["calibration"]["nll"], rel=1e-3)
        assert report["log"]["gammas"][0] == [1.0] * 15  # in force during the first epoch
        assert report["log"]["gammas"][1] != [1.0] * 15
        printed = tables.tables(tmp_path / "reports")
        assert "| adafocal" in printed and "OOD AUROC % noise" in printed
        with pytest.raises(ValueError, match="found no report of AdaFocal in small_texts, cifar, news"):
            tables.figure(tmp_path / "reports", tmp_path / "length.png")
        monkeypatch.setattr(tables, "FIGURE_SETTINGS", ("news", "small_images"))
        tables.figure(tmp_path / "reports", tmp_path / "length.png")
        assert (tmp_path / "length.png").stat().st_size > 10_000

    @pytest.mark.slow  # two processes import transformers
    def test_runs_end_with_the_script_that_is_killed(self, tmp_path):
        program = f"""
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
sys.path.insert(0, {str(SCRIPTS)!r})
import reproduce_paper
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, reproduce_paper.start_worker) as pool:
        pool.submit(os.getpid).result()
        pool.submit(time.sleep, 600)
        os._exit(1)
"""
        (tmp_path / "program.py").write_text(program)
        # The worker holds the same standard output, whose end is waited for.
        subprocess.run([sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE, timeout=120)

    def test_a_finished_run_is_not_repeated(self, paper, tiny, tmp_path, monkeypatch):
        run(paper, tmp_path, "cross_entropy", "reports")
        monkeypatch.setattr(paper, "make_trainer", lambda *_: pytest.fail("it was trained again"))
        run(paper, tmp_path, "cross_entropy", "reports")

    def test_the_best_epoch_by_validation_accuracy_is_kept(self, paper, tiny, tmp_path, monkeypatch):
        monkeypatch.setitem(
            paper.SETTINGS, "small_images", dataclasses.replace(tiny, best_validation=True, optimizer="adam")
        )
        report = run(paper, tmp_path, "cross_entropy", "reports")
        accuracies = report["log"]["validation"]["accuracy"]
        assert report["log"]["best_epoch"] == int(np.argmax(accuracies)) + 1
        assert report["calibration"]["accuracy"] == pytest.approx(max(accuracies), abs=1e-3)


class TestSettings:
    def test_the_scaled_mean_takes_the_steps_of_the_clipped_sum(self, paper, modules, tmp_path):
        class Linear(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(192, 10)

            def forward(self, pixel_values, labels=None):
                return {"logits": self.layer(pixel_values.flatten(1))}

        base = paper.SETTINGS["small_images_sum"]
        assert base.summed and (base.learning_rate, base.weight_decay, base.clip) == (0.1, 5e-4, 2.0)
        setting = dataclasses.replace(base, network=Linear, batch_size=40, epochs=7, image=0)
        parts = tiny_parts()
        trainer, _ = paper.make_trainer(setting, "cross_entropy", 0, parts, tmp_path)
        paper.set_seed(0)
        model = Linear()
        images, labels = parts["train"]
        images = images.float() / 127.5 - 1
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
        for row in trainer.train_dataset, trainer.eval_dataset:
            row.horizontal_flip = False
        for epoch in range(7):  # a step each; the rate falls after 3/7 and 5/7 of them
            optimizer.param_groups[0]["lr"] = 0.1 * 0.1 ** sum(epoch >= milestone for milestone in (3, 5))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images)["logits"], labels, reduction="sum").backward()
            assert torch.cat([p.grad.flatten() for p in model.parameters()]).norm() > 2  # clipping acts
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
        trainer.train()
        for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
            assert torch.allclose(ours.cpu(), theirs, rtol=1e-4, atol=1e-6)

    def test_the_network_for_cifar_has_the_weights_of_the_three_stage_network(self, modules):
        network = modules[0].ResNet8()
        convolutions = 9 * (3 * 16 + 2 * 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64)
        normalisations = 2 * (3 * 16 + 2 * 32 + 2 * 64)
        assert sum(p.numel() for p in network.parameters()) == convolutions + normalisations + 650
        assert network(torch.zeros(2, 3, 32, 32))["logits"].shape == (2, 10)

    def test_resnet_50_has_its_weights_and_does_not_shrink_small_images_at_once(self, modules):
        network, sizes = modules[0].ResNet50(), []
        network.network.layer1.register_forward_hook(lambda _, __, output: sizes.append(output.shape))
        # He et al.'s bottlenecks: 1 x 1, 3 x 3 and 1 x 1 convolutions, each with two weights a channel to normalise.
        weights, before = 27 * 64 + 2 * 64, 64
        for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
            for block in range(blocks):
                weights += before * width + 9 * width**2 + 4 * width**2 + 2 * (width + width + 4 * width)
                weights += (before + 2) * 4 * width if block == 0 else 0  # the shortcut
                before = 4 * width
        assert sum(p.numel() for p in network.parameters()) == weights + 2049 * 10
        assert network.eval()(torch.zeros(1, 3, 32, 32))["logits"].shape == (1, 10)
        assert sizes == [(1, 256, 32, 32)]

    def test_every_method_is_a_loss_of_the_trainer(self, modules, tmp_path):
        for method in modules[0].METHODS.values():
            assert AdaFocalTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **method).build_loss() is not None

    def test_a_setting_and_its_summed_twin_differ_in_the_recipe_alone(self, modules):
        settings = modules[0].SETTINGS
        for name in ("small_images", "small_texts"):
            twin = dataclasses.replace(settings[f"{name}_sum"], summed=False, clip=settings[name].clip)
            assert twin == settings[name]

    def test_batches_of_the_small_settings_are_never_short(self, modules):
        for name in ("small_images", "small_texts"):
            assert modules[0].DATA[name][1]["train"] % modules[0].SETTINGS[name].batch_size == 0


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Folders with a few rows of the form of the real data sets."""
    folder = tmp_path_factory.mktemp("data")
    words = [f"{first}{second}" for first in ("ball", "moon", "disk", "car") for second in ("s", "ed", "ing")]
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(words, 12)) for _ in range(80)] + ["", "  "] + ["moons moons"] * 6
    for name, part, rows in (("20_newsgroups", "train", texts[:50]), ("20_newsgroups", "test", texts[50:])):
        (folder / name).mkdir(exist_ok=True)
        labels = [index % 20 for index in range(len(rows))]
        Dataset.from_dict({"text": rows, "label": labels}).to_parquet(folder / name / f"{part}.parquet")
    (folder / "reuters_r8").mkdir()
    Dataset.from_dict({"text": ["disks moons", "cars"]}).to_parquet(folder / "reuters_r8" / "test.parquet")
    (folder / "cifar10").mkdir()
    features = Features({"img": Image(), "label": ClassLabel(num_classes=10)})
    for part, count in (("train", 12), ("test", 5)):
        pixels = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        rows = {"img": [PILImage.fromarray(image) for image in pixels], "label": [i % 10 for i in range(count)]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / "cifar10" / f"{part}.parquet")
    return folder


class TestData:
    def test_images_of_the_two_parts_are_different_ones_and_the_test_set_is_whole(self, modules, data):
        parts = modules[0].images(data, 1, size=16, train=7, calibration=5)
        sizes = {role: len(parts[role][0]) for role in ("train", "calibration", "test")}
        assert sizes == {"train": 7, "calibration": 5, "test": 5}
        both = torch.cat([parts["train"][0], parts["calibration"][0]])
        assert len(torch.unique(both.flatten(1), dim=0)) == 12
        assert both.shape[1:] == (3, 16, 16)

    def test_noise_and_blur_have_the_strength_they_say(self, modules):
        folder_free = torch.full((50, 3, 16, 16), 128, dtype=torch.uint8)
        noisy, blurred = (found.float() for found in modules[0].corruptions(folder_free, 0).values())
        assert (noisy / 255).std() == pytest.approx(0.1, rel=0.02)
        assert (blurred == 128).all()  # a flat image has nothing to blur
        point = torch.zeros(1, 3, 15, 15, dtype=torch.uint8)
        point[..., 7, 7] = 255
        _, blurred = (found.float() for found in modules[0].corruptions(point, 0).values())
        # the middle of a Gaussian of one pixel, normalised over nine: (1 / 2.5066)^2 of 255
        assert blurred[0, 0, 7, 7] == pytest.approx(255 * 0.3989**2, abs=1)

    def test_no_held_out_text_stands_in_an_earlier_part(self, modules, data):
        parts = modules[0].text_features(data, 0, train=40, calibration=10, size=5)
        rows = {role: {row.numpy().tobytes() for row in parts[role][0]} for role in ("train", "calibration", "test")}
        assert not rows["calibration"] & rows["train"] and not rows["test"] & (rows["train"] | rows["calibration"])
        assert len(parts["train"][0]) == 40 and len(parts["calibration"][0]) == 10
        assert parts["train"][0].pow(2).sum(1).max() == pytest.approx(5, rel=1e-4)  # a mean square of 1
        assert parts["ood"]["reuters"].shape == (2, 5)

    def test_tokens_are_split_as_in_the_authors_code(self, modules, data):
        parts = modules[0].text_tokens(data, 0, length=16, calibration=9)
        assert len(parts["test"][0]) == 88 // 5 and len(parts["calibration"][0]) == 9
        rows = {role: {tuple(row.tolist()) for row in parts[role][0]} for role in ("train", "calibration", "test")}
        assert not rows["train"] & (rows["calibration"] | rows["test"])
        assert parts["train"][0].shape[1] == 16


class TestTables:
    def test_the_page_shows_what_the_command_prints(self, paper, tables):
        page = (ROOT / "model_cards" / "paper.md").read_text()
        assert tables.tables(paper.REPORTS) in page

    def test_the_readme_has_the_means_of_the_reports(self, paper, tables):
        number = r"([\d.]+) \|"
        row = rf"^\| `(\w+)`, (\w+) \| (\d) \| {number} {number} {number}$"
        table = re.findall(row, (ROOT / "README.md").read_text(), re.MULTILINE)
        assert 0 < len(table) <= 10
        for setting, method, seeds, *cells in table:
            reports = tables.read(paper.REPORTS, setting)[method].values()
            assert len(reports) == int(seeds)
            values = [
                [1 - report["raw"]["accuracy"], report["raw"]["ece"], report["temperature_scaled"]["ece"]]
                for report in reports
            ]
            assert cells == [f"{100 * value:.1f}" for value in np.mean(values, axis=0)]

    def test_every_committed_report_is_of_the_setting_and_recipe_it_is_filed_under(self, paper, modules):
        found = sorted(paper.REPORTS.glob("*/*.json"))
        assert found
        for path in found:
            report = json.loads(path.read_text())
            assert path.parent.name == report["setting"]
            assert path.name == f"{report['method']}-{report['seed']}.json"
            recipe = modules[0].SETTINGS[report["setting"]].recipe | modules[0].METHODS[report["method"]]
            assert recipe.items() <= report["training"].items()
            assert re.fullmatch("[0-9a-f]{40}", report["commit"])

    @pytest.mark.parametrize(
        ("ours", "theirs", "expected"),
        [
            ([9, 5, 1, 1], [8, 8, 8, 8], 1),  # below from the second reading, after epoch 2, on
            ([9, 5, 9, 1], [8, 8, 8, 8], 3),  # not yet for good
            ([9, 9, 9, 9], [8, 8, 8, 8], None),
            ([1, 1, 1, 9], [8, 8, 8, 8], None),
            ([1, 1, 1, 1], [8, 8, 8, 8], 0),
        ],
    )
    def test_a_crossing_is_the_first_reading_from_which_the_curve_stays_below(self, tables, ours, theirs, expected):
        epochs = [1, 2, 4, 8]
        expected = {1: 1, 3: 7, None: None, 0: 0}[expected]
        assert tables.crossing({"epoch": epochs, "ece": ours}, {"epoch": epochs, "ece": theirs}, "ece") == expected

    def test_late_gaps_are_those_that_moved_the_gammas_of_free_bins(self, tables):
        gaps = np.array([[0.5, gap] for gap in (0.4, 0.4, 0.4, 0.4, 0.02, 0.03, 0.01)])  # the first bin meets the cap
        gammas = np.vstack([np.ones((5, 2)), np.exp(0.5 * np.cumsum(gaps, axis=0))]).clip(max=3.0)
        # of twelve epochs the last four, between them 0.02, 0.03 and 0.01: a deviation of sqrt(2 / 3) hundredths
        assert tables.late_gaps(gammas, gammas >= 3.0, 0.5) == ("0.020", "0.008")
        assert tables.late_gaps(np.full((6, 2), 20.0), np.full((6, 2), True), 1.0) == ("", "")

    def test_differences_are_paired_by_seed_and_leave_out_lone_seeds(self, tables):
        def report(ece, scaled, accuracy):
            return {
                "raw": {"ece": ece, "accuracy": accuracy},
                "temperature_scaled": {"ece": scaled, "nll": 10 * scaled},
            }

        runs = {
            "cross_entropy": {0: report(0.30, 0.03, 0.5), 1: report(0.32, 0.03, 0.5), 2: report(0.34, 0.03, 0.5)},
            "adafocal": {0: report(0.04, 0.04, 0.48), 1: report(0.05, 0.04, 0.48), 2: report(0.06, 0.04, 0.48)},
            "brier": {2: report(0.14, 0.04, 0.50), 3: report(0.9, 0.9, 0.9)},
        }
        _, _, ours, brier = tables.differences_table(runs).splitlines()
        # 4 - 30, 5 - 32, 6 - 34: -26, -27, -28; a standard error of 1 / sqrt 3, t(2) = 4.303
        cells = [cell.strip() for cell in ours.strip("|").split("|")]
        assert cells[:3] == ["adafocal", "3", "-27.00 points (-29.48 to -24.52)"]
        assert cells[3] == "+2.00 points (-0.48 to +4.48, noise)"
        assert cells[-2:] == ["+2.00 points (+2.00 to +2.00)", "+10.00 points (+10.00 to +10.00)"]
        assert brier.startswith("| brier | 1 | -20.00 points |")

    def test_ablations_are_compared_with_adafocal_of_the_same_seeds(self, tables):
        def report(ece, scaled, accuracy):
            return {
                "raw": {"ece": ece, "accuracy": accuracy},
                "temperature_scaled": {"ece": scaled, "nll": 1 + scaled},
            }

        published = {0: report(0.04, 0.02, 0.60), 1: report(0.06, 0.02, 0.60)}
        texts = {"adafocal": published, "adafocal_cap_5": {1: report(0.05, 0.03, 0.59), 2: report(0.9, 0.9, 0.9)}}
        more = {"cross_entropy": published, "adafocal": {0: report(0.03, 0.02, 0.60), 1: report(0.03, 0.02, 0.60)}}
        _, _, cap, samples = tables.ablation_table({"small_texts": texts, "small_texts_6000": more}).splitlines()
        # one seed in common: 5 - 6, 3 - 2, 41 - 40, 103 - 102
        assert (
            cap == "| small_texts | adafocal_cap_5 | 1 | -1.00 points | +1.00 points | +1.00 points | +1.00 points |"
        )
        # 3 - 4 and 3 - 6: a mean of -2 with a standard error of 1, t(1) = 12.706
        assert samples.startswith("| small_texts | small_texts_6000 | 2 | -2.00 points (-14.71 to +10.71, noise) |")
