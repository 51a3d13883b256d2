"""The recorder of evaluations: exact metrics and the best temperature, whatever the batches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from operator_log import FAKE_GPU, OperatorLog, runs_on_mps
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_adafocal.metrics.histogram import CalibrationHistogram, cell_edges
from hf_adafocal.metrics.scores import calibration_report
from hf_adafocal.scaling.fit import fit_temperature
from hf_adafocal.training import collectors
from hf_adafocal.training import recorder as module
from hf_adafocal.training import sample_rows as sample_rows_module
from hf_adafocal.training.collectors import HistogramCollector, SampleCollector, _edges
from hf_adafocal.training.processes import DataProcesses
from hf_adafocal.training.recorder import EvaluationRecorder, SeenClasses
from hf_adafocal.training.sample_rows import IGNORED, counted_rows, sample_rows, split_finite

PROCESS = DataProcesses(Accelerator(cpu=True))


def predictions(size=400, classes=5, temperature=1.0):
    """Logits, float32, whose best temperature is about the one given."""
    logits = 2 * torch.randn(size, classes)
    labels = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
    return logits * temperature, labels


def recorded(logits, labels, *, batch_size=64, of_calibration=True, keep_logits=False, **settings):
    """The recorder and the metrics of an evaluation in batches."""
    recorder = EvaluationRecorder(PROCESS, **{"num_bins": 5, **settings})
    recorder.keep_logits = keep_logits
    recorder.begin(range(len(logits)), of_calibration=of_calibration)
    for start in range(0, len(logits), batch_size):
        recorder.observe(logits[start : start + batch_size], labels[start : start + batch_size])
    return recorder, recorder.end("eval")


class TestMetrics:
    @pytest.mark.parametrize("batch_size", [1, 7, 400])
    def test_they_are_those_of_the_report_whatever_the_batches(self, batch_size):
        logits, labels = predictions()
        _, found = recorded(logits.double(), labels, batch_size=batch_size)
        expected = calibration_report(logits.double().softmax(-1).numpy(), labels.numpy(), 5)
        for name in ("accuracy", "nll", "brier", "ece", "ada_ece"):
            assert found[name] == pytest.approx(expected[name], rel=1e-9)

    def test_ignored_samples_count_nowhere(self):
        logits, labels = predictions(60)
        marked = torch.where(torch.arange(60) < 40, labels, 255)
        recorder, found = recorded(logits, marked, ignore_index=255, keep_logits=True)
        assert found == recorded(logits[:40], labels[:40])[1]
        assert len(recorder.samples["eval"]) == 40 and len(recorder.logits[1]) == 40

    def test_of_no_batch_with_labels_there_is_nothing(self):
        recorder = EvaluationRecorder(PROCESS)
        recorder.begin([], of_calibration=True)
        assert recorder.end("eval") is None and recorder.calibration is None and recorder.logits is None

    def test_an_evaluation_that_failed_is_forgotten(self):
        recorder = EvaluationRecorder(PROCESS)
        recorder.begin(range(3), of_calibration=False)
        recorder.observe(*predictions(3))
        recorder.abort()
        assert not recorder.active and recorder.end("eval") is None


class TestTemperature:
    @pytest.mark.parametrize("temperature", [0.2, 0.5, 0.9, 1.0, 1.3, 3.0, 20.0])
    def test_it_is_what_fit_temperature_finds_on_the_same_logits_to_one_percent(self, temperature):
        logits, labels = predictions(2000, temperature=temperature)
        _, found = recorded(logits, labels)
        expected = fit_temperature(logits, labels)
        assert found["temperature"] == pytest.approx(expected, rel=0.01)
        lowest = torch.nn.functional.cross_entropy(logits.double() / expected, labels).item()
        assert lowest - 1e-6 <= found["refinement"] <= lowest + 1e-3

    def test_ignored_tokens_of_ragged_batches_change_nothing(self):
        logits, labels = predictions(120)
        _, expected = recorded(logits, labels)
        tokens, marked = logits.view(12, 10, 5), labels.view(12, 10)
        wide = torch.cat([tokens, torch.full((12, 3, 5), torch.nan)], dim=1)
        _, found = recorded(wide, torch.cat([marked, torch.full((12, 3), -100)], dim=1), batch_size=5)
        assert found == pytest.approx(expected, rel=1e-6)

    def test_only_the_calibration_set_has_one(self):
        recorder, found = recorded(*predictions(), of_calibration=False)
        assert not {"temperature", "refinement"} & found.keys() and recorder.calibration is None

    def test_a_set_that_is_all_right_keeps_its_temperature(self):
        logits = torch.eye(3).repeat(5, 1) * 4
        _, found = recorded(logits, torch.arange(3).repeat(5))
        assert found["temperature"] == 1.0 and found["refinement"] == pytest.approx(found["nll"], rel=1e-5)

    def test_an_impossible_class_changes_nothing(self):
        logits, labels = predictions()
        masked = torch.cat([logits, torch.full((400, 2), -torch.inf)], dim=1)
        assert recorded(masked, labels)[1] == pytest.approx(recorded(logits, labels)[1], rel=1e-6)


class TestKeptLogits:
    def test_they_are_those_of_the_counted_samples_in_order(self):
        logits, labels = predictions(50)
        marked = torch.where(torch.arange(50) % 3 > 0, labels, -100)
        recorder, _ = recorded(logits, marked, batch_size=8, keep_logits=True)
        kept = marked != -100
        np.testing.assert_array_equal(recorder.logits[0], logits[kept])
        np.testing.assert_array_equal(recorder.logits[1], marked[kept])

    def test_none_are_kept_unless_asked_for(self):
        assert recorded(*predictions())[0].logits is None

    def test_too_many_are_not_kept_and_the_metrics_stay(self, monkeypatch):
        logits, labels = predictions()
        expected = recorded(logits, labels)[1]
        monkeypatch.setattr(module, "MOST_LOGITS", 500)
        recorder, found = recorded(logits, labels, keep_logits=True)
        assert recorder.logits is None and found == expected

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_a_label_of_many_classes_is_exact_in_any_dtype(self, dtype):
        logits, labels = torch.randn(4, 3000).to(dtype), torch.tensor([2999, 257, 1025, 0])
        recorder, _ = recorded(logits, labels, keep_logits=True)
        assert recorder.logits[1].tolist() == labels.tolist()


def tricky_rows(dtype):
    """Rows of samples that are saturated, tiny, ignored, not finite or between the edges of cells; an even number."""
    logits, labels = predictions(3000, temperature=6.0)
    rows = sample_rows(logits.to(dtype), labels)
    rows[:10, 0] = torch.tensor([0, 1, 1e-30, 2.0**-25, 1 - 2.0**-24, 0.5, 1 / 3, 0.1, 1e-12, 0.996], dtype=dtype)
    rows[10:20] = IGNORED
    rows[20, 2], rows[21] = torch.inf, torch.nan
    rows[22, 2], rows[23, 4] = 3e4, -1e-7
    return rows


def finished(*batches):
    """Collector of some batches, and the number of samples that were not finite."""
    collector = HistogramCollector()
    for rows in batches:
        collector.add(rows)
    collector.finish()
    return collector, collector.not_finite


class TestHistogram:
    def test_it_gives_the_metrics_of_all_samples(self):
        logits, labels = predictions(3000)
        exact, counted = (recorded(logits, labels, histogram=histogram)[1] for histogram in (False, True))
        for name in ("accuracy", "nll", "brier", "ece", "temperature", "refinement"):
            assert counted[name] == pytest.approx(exact[name], rel=1e-5)
        assert counted["ada_ece"] == pytest.approx(exact["ada_ece"], abs=1e-3)

    def test_left_out_it_counts_a_long_set_or_stream_and_says_so(self, monkeypatch):
        logits, labels = predictions(300)
        monkeypatch.setattr(module, "MOST_SAMPLES", 200)
        said = []
        monkeypatch.setattr(module.logger, "warning", said.append)
        long, _ = recorded(logits, labels)
        short, _ = recorded(logits[:100], labels[:100])
        stream = EvaluationRecorder(PROCESS, 5)
        stream.begin(iter(()), of_calibration=True)
        for start in range(0, 300, 50):
            stream.observe(logits[start : start + 50], labels[start : start + 50])
        metrics = stream.end("eval")
        kinds = [type(recorder.samples["eval"]) for recorder in (long, short, stream)]
        assert kinds == [HistogramCollector, SampleCollector, HistogramCollector]
        assert len(said) == 2 and all("streaming_calibration=False keeps every sample" in text for text in said)
        assert metrics["nll"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)

    def test_kept_by_wish_a_long_set_stays_exact(self, monkeypatch):
        monkeypatch.setattr(module, "MOST_SAMPLES", 200)
        assert type(recorded(*predictions(300), histogram=False)[0].samples["eval"]) is SampleCollector

    def test_its_counts_are_those_of_the_rows_on_the_host(self):
        """Two digits of 24 bits hold a confidence to 2^-48."""
        for dtype in (torch.float32, torch.float64):
            rows = tricky_rows(dtype)
            found, not_finite = finished(rows)
            expected = CalibrationHistogram()
            held, others = split_finite(counted_rows(rows))
            expected.update(held[:, 0], held[:, 1])
            assert not_finite == others == 2
            table, of_host = found._histogram.to_array(), expected.to_array()
            np.testing.assert_array_equal(table[:2], of_host[:2])
            np.testing.assert_allclose(table[2], of_host[2], rtol=1e-13, atol=len(rows) * 2.0**-48)
            metrics = found.metrics(5)
            assert metrics["nll"] == pytest.approx(held[:, 2].mean(), rel=1e-13)
            assert metrics["brier"] == pytest.approx(held[:, 4].mean(), rel=1e-13)

    @given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20))
    def test_any_float32_is_in_its_cell(self, confidences):
        near = np.array(confidences, dtype=np.float32)
        near = np.concatenate([near, np.nextafter(near, np.float32(1)), np.nextafter(near, np.float32(0)), 1 - near])
        rows = torch.zeros(len(near), 5)
        rows[:, 0] = torch.from_numpy(near)
        expected = CalibrationHistogram()
        expected.update(near, np.zeros(len(near)))
        np.testing.assert_array_equal(finished(rows)[0]._histogram.to_array()[0], expected.to_array()[0])

    def test_neither_batches_nor_their_order_change_a_bit(self, monkeypatch):
        rows = tricky_rows(torch.float32)
        expected = finished(rows)[0].metrics()
        assert finished(*rows.flip(0).split(7))[0].metrics() == expected
        monkeypatch.setattr(collectors, "_ROWS_AT_ONCE", 11)
        assert finished(rows[torch.randperm(len(rows))].reshape(-1, 2, 5))[0].metrics() == expected

    def test_a_device_without_float64_can_count(self):
        rows = tricky_rows(torch.float32)
        _edges(torch.float32, rows.device)
        with OperatorLog() as log:
            collector = HistogramCollector()
            collector.add(rows)
        assert [name for name in set(log.names) if not runs_on_mps(name)] == []
        assert not log.dtypes & {torch.float64}

    def test_it_has_no_statistics_of_single_classes(self):
        collector, _ = finished(sample_rows(*predictions(20, 3)))
        assert collector.statistics(5).class_gap is None
        with pytest.raises(ValueError, match="no statistics of single classes"):
            collector.statistics(5, num_classes=3)

    @FAKE_GPU
    def test_counts_are_added_up_where_the_backend_takes_them(self):
        """nccl reduces tensors of the accelerator alone, and gloo does so with integers of 64 bits as nccl does."""

        class Processes:
            device = torch.device("cuda")

            def sum(self, values):
                given.append((values.device.type, values.dtype))
                raise InterruptedError  # what no GPU has summed cannot be read

        given = []
        for batches in (0, 1):  # of this process
            with FakeTensorMode(allow_non_fake_inputs=True):
                collector = HistogramCollector()
                if batches:
                    collector._cells = torch.zeros(4, len(cell_edges()), dtype=torch.long, device="cuda")
                    collector._totals = torch.zeros(7, dtype=torch.long, device="cuda")
                with pytest.raises(InterruptedError):
                    collector.finish(Processes())
        assert given == [("cuda", torch.long)] * 2


class TestMemory:
    @pytest.mark.parametrize("histogram", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_of_a_large_vocabulary_nothing_as_large_as_the_logits_is_made(self, monkeypatch, dtype, histogram):
        """Nor a part of them in float32 beyond a chunk."""
        logits, labels = torch.randn(2, 160, 8000).to(dtype), torch.randint(8000, (2, 160))
        monkeypatch.setattr(sample_rows_module, "CHUNK_VALUES", 1 << 16)
        monkeypatch.setattr(collectors, "_ROWS_AT_ONCE", 64)
        recorder = EvaluationRecorder(PROCESS, histogram=histogram)
        recorder.begin(range(2), of_calibration=True)
        finished(torch.zeros(1, 5))  # makes the edges of the cells once for all
        with OperatorLog() as log:
            recorder.observe(logits, labels)
        cells = 8 * 4 * len(cell_edges()) if histogram else 0
        assert logits.nbytes >= 4 << 20 > log.largest and log.largest <= max(4 << 18, cells)


class TestSeenClasses:
    def test_missing_ones_are_named_once_by_their_names(self, monkeypatch):
        said, seen = [], SeenClasses()
        monkeypatch.setattr(module.logger, "warning", said.append)
        config = SimpleNamespace(id2label={0: "cat", 1: "dog", 2: "eel"})
        for _ in range(2):
            seen.add(torch.tensor([1, -100, 1]), 3)
            seen.warn_of_missing(PROCESS, config)
        assert len(said) == 1 and "the label 0 (cat), 2 (eel) (2 of 3 classes)" in said[0]

    def test_words_of_a_vocabulary_are_not_missed(self, monkeypatch):
        seen = SeenClasses()
        monkeypatch.setattr(module.logger, "warning", lambda text: pytest.fail(text))
        seen.add(torch.tensor([1]), 50)
        seen.warn_of_missing(PROCESS, SimpleNamespace(vocab_size=50))
