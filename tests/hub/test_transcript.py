"""From a command line to a stranger's pipeline: trained, pushed, loaded in a fresh process, trained again."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from huggingface_hub import ModelCard

from hf_adafocal.data.images import to_rgb
from hf_adafocal.data.loading import load_splits
from hf_adafocal.metrics.scores import calibration_report
from hf_adafocal.report.weights import weights_hash

pytest.importorskip("timm", reason="timm is the extra `vision`")

pytestmark = pytest.mark.slow
SCRIPTS = Path(__file__).parents[2] / "scripts"
SHORT = [
    "--baseline",
    "none",
    "--use_cpu",
    "true",
    "--disable_tqdm",
    "true",
    "--push_to_hub",
    "true",
    "--calibrate_at_end",
    "true",
]
# A visitor has transformers and not this package.
VISITOR = "import sys; sys.modules['hf_adafocal'] = None\n"
SCORES = """
import json
from pathlib import Path
from transformers import pipeline
classify = pipeline("image-classification", model=sys.argv[1], top_k=10, device=-1)
images = sorted(map(str, Path(sys.argv[2]).glob("*.png")))
print(json.dumps([{entry["label"]: entry["score"] for entry in found} for found in classify(images)]))
"""


class Visitor:
    """Runs code in a fresh process with a cache of its own."""

    def __init__(self, hub, folder):
        self.hub, self.folder = hub, folder

    def run(self, code, *arguments, token=None):
        environment = self.hub.environment(self.folder / "home", token=token)
        command = [sys.executable, *(["-c", code] if isinstance(code, str) else [str(code)]), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def train(self, script, *arguments):
        return self.run(SCRIPTS / script, *SHORT, *arguments, token="hf_writer")

    def card(self, repo_id):
        return ModelCard(self.hub.model(repo_id).files()["README.md"].decode())

    def check_example(self, repo_id):
        """The example of the card prints what the card says, where this package is not installed."""
        code = self.card(repo_id).text.split("```python\n")[1].split("```")[0]
        said = [line.removeprefix("# ") for line in code.splitlines() if line.startswith("# ")]
        assert said and self.run(VISITOR + code).splitlines() == said


@pytest.fixture
def visitor(local_hub, tmp_path):
    return Visitor(local_hub, tmp_path)


def measured(card):
    return {result.metric_type: result.metric_value for result in card.data.eval_results}


def test_images_trained_twice(visitor, tmp_path):
    test = load_splits("digits", seed=42).test
    labels = np.asarray(test["label"])
    (tmp_path / "images").mkdir()
    for number, image in enumerate(test["image"]):
        to_rgb(image).save(tmp_path / "images" / f"{number:03}.png")
    seen = []
    for epochs in ("4", "2"):
        visitor.train(
            "train_vision.py", "--output_dir", str(tmp_path / "run"), "--hub_model_id", "me/digits",
            "--num_train_epochs", epochs, "--seed", "42",
        )  # fmt: skip
        card = visitor.card("me/digits")
        found = json.loads(visitor.run(VISITOR + SCORES, "me/digits", str(tmp_path / "images")))
        probabilities = np.asarray([[scores[str(digit)] for digit in range(10)] for scores in found])
        expected = calibration_report(probabilities, labels, 15)
        for hub_name, name in (("accuracy", "accuracy"), ("nll", "nll"), ("ece", "ece"), ("brier_score", "brier")):
            assert measured(card)[hub_name] == pytest.approx(expected[name], abs=2e-4), (epochs, name)
        visitor.check_example("me/digits")
        files = visitor.hub.model("me/digits").files()
        (tmp_path / f"pushed-{epochs}").mkdir()
        (tmp_path / f"pushed-{epochs}" / "model.safetensors").write_bytes(files["model.safetensors"])
        assert json.loads(files["report.json"])["weights"] == weights_hash(tmp_path / f"pushed-{epochs}")
        assert f"Training: {epochs} epochs" in card.text
        seen.append(measured(card)["nll"])
    assert seen[0] != pytest.approx(seen[1], rel=1e-3)
    assert len(visitor.hub.model("me/digits").history()) == 3  # the Hub's own commit, and one for each run


def test_texts_with_a_network_of_our_own(visitor, tmp_path):
    generator = np.random.default_rng(0)
    topics = ["space", "motor", "faith"]
    rows = [" ".join(generator.choice([*"abcdefghij", *[topics[k % 3]] * 4], 25)) for k in range(240)]
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"text": rows, "label": [k % 3 for k in range(240)]}).to_parquet(tmp_path / "data/train.parquet")
    visitor.train(
        "train_text.py", "--dataset", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run"),
        "--hub_model_id", "me/news", "--num_train_epochs", "2",
    )  # fmt: skip
    files = visitor.hub.model("me/news").files()
    assert "trust_remote_code=True" in files["README.md"].decode()
    visitor.check_example("me/news")
    pushed = b"".join(content for path, content in files.items() if not path.endswith((".safetensors", ".png")))
    assert str(tmp_path).encode() not in pushed and not any(row.encode() in pushed for row in rows)
