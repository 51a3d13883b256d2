"""Files of a report: written whole or not at all, read back, refused with their name."""

import contextlib
import json
import os
import resource
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_report import report
from tiny import bert

from hf_adafocal.report.atomic import write_atomically
from hf_adafocal.report.files import FILE, add_baselines, read_report, save_report
from hf_adafocal.report.weights import weights_hash


@contextlib.contextmanager
def full_disk():
    """Files cannot grow beyond 100 bytes, as on a disk that is full; pytest's own log among them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


class TestWriteAtomically:
    def test_where_the_disk_is_full_the_earlier_file_stays_and_nothing_is_left_behind(self, tmp_path):
        path = tmp_path / "report.json"
        write_atomically(path, "old")
        with full_disk(), pytest.raises(OSError):
            write_atomically(path, "x" * 1000)
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.json"]

    def test_a_link_is_replaced_and_what_it_points_to_stays(self, tmp_path):
        (tmp_path / "blob").write_text("shared")
        (tmp_path / "README.md").symlink_to(tmp_path / "blob")
        write_atomically(tmp_path / "README.md", "mine")
        assert (tmp_path / "blob").read_text() == "shared" and (tmp_path / "README.md").read_text() == "mine"

    def test_the_file_has_the_rights_that_any_new_file_has(self, tmp_path):
        (tmp_path / "plain").write_text("")
        write_atomically(tmp_path / "report.json", "")
        assert (tmp_path / "report.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


class TestSaveReport:
    def test_the_folder_holds_report_card_and_pictures(self, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is the extra `plots`")
        facts = report()
        save_report(tmp_path / "run", facts)
        assert {path.name for path in (tmp_path / "run").iterdir()} == {
            FILE, "README.md", "reliability.png", "gamma.png",
        }  # fmt: skip
        assert read_report(tmp_path / "run").to_dict() == facts.to_dict()

    def test_pictures_of_an_earlier_report_go(self, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is the extra `plots`")
        save_report(tmp_path, report())
        save_report(tmp_path, report(adaptation=[{"step": 0, "smoothing": 0.0}, {"step": 5, "smoothing": 0.1}]))
        assert not (tmp_path / "gamma.png").exists() and (tmp_path / "smoothing.png").exists()
        assert "gamma.png" not in (tmp_path / "README.md").read_text()

    def test_a_report_of_other_weights_is_not_written(self, tmp_path):
        bert().save_pretrained(tmp_path)
        facts = report(weights=weights_hash(bert(seed=1)))
        before = {path.name for path in tmp_path.iterdir()}
        with pytest.raises(ValueError, match="other weights"):
            save_report(tmp_path, facts)
        assert {path.name for path in tmp_path.iterdir()} == before

    def test_baselines_stand_in_the_reports_and_cards_of_the_other_runs(self, tmp_path):
        for name in ("cross_entropy-0", "adafocal-0"):
            save_report(tmp_path / name, report())
        add_baselines({name: [tmp_path / f"{name}-0"] for name in ("cross_entropy", "adafocal")})
        found = read_report(tmp_path / "adafocal-0").baselines
        assert list(found) == ["cross_entropy", "cross_entropy + temperature scaling"]
        assert "baseline: cross\\_entropy" in (tmp_path / "adafocal-0" / "README.md").read_text()
        assert read_report(tmp_path / "cross_entropy-0").baselines == {}


class TestReadReport:
    def test_a_folder_without_one_has_none(self, tmp_path):
        assert read_report(tmp_path) is None

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "cannot be read"),
            (b"\xff\xfe", "cannot be read"),
            (b'{"schema_version": 1', "cannot be read"),
            (b"[" * 100_000, "cannot be read"),
            (b"[]", "must be an object"),
            (b"{}", "schema_version is missing"),
            (b'{"schema_version": 1}', "test must be an object, found None"),
            (b'{"schema_version": NaN}', "schema_version must be a whole number, found nan"),
        ],
        ids=str,
    )
    def test_what_is_no_report_is_a_value_error_that_names_the_file(self, tmp_path, content, message):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(ValueError, match=f"{FILE} .*{message}"):
            read_report(tmp_path)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def test_so_is_one_with_damaged_bytes_unless_it_can_still_be_read(self, tmp_path, data):
        content = bytearray(CONTENT)
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        Path(tmp_path / FILE).write_bytes(content)
        try:
            read_report(tmp_path)
        except ValueError as error:
            assert FILE in str(error)


CONTENT = json.dumps(report().to_dict()).encode()
