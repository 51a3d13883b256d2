"""A metric's Space with the real gradio, in a real browser: what is typed, computed and said.

gradio needs an environment of its own: SPACE_PYTHON names the interpreter of one with `space_requirements.txt`.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from hf_adafocal.hub import spaces
from hf_adafocal.hub.spaces import metric_space
from hf_adafocal.metrics.scores import binary_calibration_report, calibration_error

pytestmark = pytest.mark.slow

PYTHON = os.environ.get("SPACE_PYTHON", sys.executable)
ENTER, CONTROL = "\ue007", "\ue009"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element in the WebDriver protocol
SWITCHES = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1180,1400"]


class Browser:
    """Chromium, by the WebDriver protocol."""

    def __init__(self, address):
        self.address = address
        options = {"goog:chromeOptions": {"args": SWITCHES}}
        self.session = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": options}})["sessionId"]

    def ask(self, method, path, content=None):
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            self.address + path, body, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def do(self, method, path, content=None):
        return self.ask(method, f"/session/{self.session}{path}", content)

    def run(self, script, *args):
        return self.do("POST", "/execute/sync", {"script": script, "args": list(args)})

    def find(self, selector):
        return self.do("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector, times=1):
        point = {"type": "pointerMove", "origin": {ELEMENT: self.find(selector)}, "x": 0, "y": 0, "duration": 0}
        press = [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        mouse = {"type": "pointer", "id": "mouse", "actions": [point, *press * times]}
        self.do("POST", "/actions", {"actions": [mouse]})

    def type(self, *keys):
        """Press each key; a tuple is pressed together."""
        actions = []
        for key in keys:
            held = key if isinstance(key, tuple) else (key,)
            actions += [{"type": "keyDown", "value": one} for one in held]
            actions += [{"type": "keyUp", "value": one} for one in reversed(held)]
        self.do("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})


def until(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            found = condition()
        except (urllib.error.URLError, ConnectionError):
            found = None
        if found:
            return found
        time.sleep(0.1)
    pytest.fail(f"after {seconds} s: {what}")


def answers(address):
    with urllib.request.urlopen(address, timeout=5) as response:
        return response.status == 200


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if shutil.which("chromedriver") is None or shutil.which("chromium") is None:
        pytest.skip("chromium and chromedriver are missing: apt-get install chromium chromium-driver")
    port = free_port()
    with (tmp_path_factory.mktemp("driver") / "log").open("w") as log:
        driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            until(lambda: answers(f"{address}/status"), "chromedriver does not answer")
            found = Browser(address)
            yield found
            found.do("DELETE", "")
        finally:
            driver.terminate()
            driver.wait()


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """Start the Space of a metric as the Hub does, in an environment without this package; returns its address."""
    needs = [PYTHON, "-c", "import evaluate, gradio; print(gradio.__version__)"]
    found = subprocess.run(needs, capture_output=True, text=True) if Path(PYTHON).exists() else None
    if found is None or found.returncode:
        pytest.skip(f"gradio is missing in {PYTHON}: set SPACE_PYTHON to an environment with space_requirements.txt")
    assert found.stdout.strip() == spaces._GRADIO_VERSION
    started = []

    def start(name):
        folder = tmp_path_factory.mktemp(name)
        for path, text in metric_space(name, f"me/{name}").items():
            (folder / path).write_text(text)
        port = free_port()
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
        environment = kept | {
            "HF_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "1",
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_SERVER_PORT": str(port),
            "NO_PROXY": "127.0.0.1",
        }
        log = (folder / "log").open("w")
        started.append(subprocess.Popen([PYTHON, "app.py"], cwd=folder, env=environment, stdout=log, stderr=log))
        address = f"http://127.0.0.1:{port}"
        until(lambda: answers(address) or started[-1].poll(), f"the page of {name} does not answer", 120)
        assert started[-1].poll() is None, (folder / "log").read_text()
        return address

    yield start
    for process in started:
        process.terminate()
        process.wait()


class Page:
    """The page of a Space, as a visitor uses it."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.do("POST", "/url", {"url": address})
        until(lambda: self.cells() and self.value(), "the table does not show")

    def cells(self):
        found = self.browser.run(
            "return [...document.querySelectorAll('td[data-row]')].map(c => [+c.dataset.row, c.textContent.trim()])"
        )
        rows = {}
        for row, text in found:
            rows.setdefault(row, []).append(text)
        return list(rows.values())

    def value(self):
        return self.browser.run("return document.querySelector('#value textarea').value")

    def text(self):
        return self.browser.run("return document.body.innerText")

    def enter(self, row, column, text):
        """Replace what is in a cell, without a last Enter."""
        self.browser.click(f"td[data-row='{row}'][data-col='{column}']", times=2)
        selected = "const a = document.activeElement; return a.closest('td') !== null"
        until(lambda: self.browser.run(selected), "the cell does not open")
        self.browser.type((CONTROL, "a"), *text)

    def compute(self):
        before = self.value()
        self.browser.click("button.primary")
        until(lambda: self.value() != before, f"the value stays {before!r}")
        return self.value()


class TestPage:
    @pytest.fixture(scope="class")
    def address(self, serve):
        return serve("ece")

    @pytest.fixture
    def page(self, browser, address):
        return Page(browser, address)

    @staticmethod
    def ece(rows):
        pairs = [(float(confidence), float(right)) for confidence, right in rows]
        return f"ece = {calibration_error(*zip(*pairs, strict=True)):.6g}"

    def test_it_begins_with_an_example_and_its_value(self, page):
        cells = page.cells()
        assert len(cells) == 6 and page.value() == self.ece(cells)

    def test_a_typed_number_counts_with_and_without_enter(self, page):
        expected = page.cells()
        for row, column, text, ends in ((0, 0, "0.75", ENTER), (3, 1, "1", ""), (5, 0, ".625", "")):
            expected[row][column] = text
            page.enter(row, column, text + ends)
            assert page.compute() == self.ece(expected)
        assert page.cells() == expected

    def test_an_error_is_said_where_the_value_was_and_the_next_value_is_right(self, page):
        example = page.cells()
        page.enter(1, 0, "1.5")
        assert page.compute().startswith("No value: Probabilities must lie in [0, 1]")
        page.enter(1, 0, "high")
        assert page.compute() == "No value: Row 2, column 'confidence': expected a number, found 'high'."
        page.enter(1, 0, example[1][0])
        assert page.compute() == self.ece(example)

    def test_it_tells_a_visitor_to_load_the_metric_from_the_space(self, page):
        text = page.text()
        assert 'evaluate.load("me/ece")' in text and "Expected calibration error of a classifier" in text
        assert "import hf_adafocal" not in text and "from hf_adafocal" not in text


def test_the_page_of_a_metric_of_class_probabilities_reads_those_of_class_1(serve, browser):
    page = Page(browser, serve("brier"))
    page.enter(0, 0, "0.5")
    pairs = [(float(probability), int(label)) for probability, label in [["0.5", "1"], *page.cells()[1:]]]
    assert page.compute() == f"brier = {binary_calibration_report(*zip(*pairs, strict=True))['brier']:.6g}"


def test_the_static_page_is_readable_as_it_stands(browser, tmp_path):
    page = Path(tmp_path, "index.html")
    page.write_text(metric_space("ece", "me/ece", sdk="static")["index.html"])
    browser.do("POST", "/url", {"url": page.as_uri()})
    assert "mean absolute gap" in browser.run("return document.querySelector('p').innerText")
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
