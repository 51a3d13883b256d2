"""Entries of a benchmark's leaderboard."""

import pytest
import yaml
from sample_report import report

from hf_adafocal.report.eval_results import write_eval_results

hub = pytest.importorskip("huggingface_hub")
if not hasattr(hub, "EvalResultEntry"):
    pytest.skip("huggingface_hub knows no entries of .eval_results before 2.0", allow_module_level=True)


class TestWriteEvalResults:
    def test_the_hubs_own_reader_finds_value_task_revision_date_and_source(self, tmp_path):
        from huggingface_hub import parse_eval_result_entries

        facts = report(folded=True)
        where = {"source_url": "https://huggingface.co/me/x", "source_name": "its card"}
        path = write_eval_results(tmp_path, facts, "default", dataset_revision="a" * 40, **where)
        assert path == tmp_path / ".eval_results" / "me__news.yaml"
        (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
        assert entry.value == pytest.approx(100 * facts.metrics["accuracy"], abs=1e-3)
        assert (entry.dataset_id, entry.task_id, entry.dataset_revision) == ("me/news", "default", "a" * 40)
        assert (str(entry.date), entry.source_url, entry.source_name) == (facts.date, *where.values())

    @pytest.mark.parametrize(
        ("changes", "options", "message"),
        [
            ({"evaluated_on": "../imgs"}, {}, "data set of the Hub .* found imgs"),
            ({"evaluated_on": None}, {}, "found unknown data"),
            ({}, {"dataset_revision": "main"}, "commit of 40 hexadecimal digits, found 'main'"),
            ({}, {"source_name": "its card"}, "source_url"),
        ],
    )
    def test_what_is_no_result_of_a_benchmark_is_refused(self, tmp_path, changes, options, message):
        with pytest.raises(ValueError, match=message):
            write_eval_results(tmp_path, report(**changes), "default", **options)
        assert not list(tmp_path.iterdir())
