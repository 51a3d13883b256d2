import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
    set_seed,
)

from hf_adafocal.models import (
    GlobalPoolingCNNConfig,
    GlobalPoolingCNNForSequenceClassification,
    UNet3DConfig,
    UNet3DForSemanticSegmentation,
    timm_classifier,
    train_word_level_tokenizer,
)
from hf_adafocal.scaling import Scaling, fold_checkpoint, fold_scaling, recorded_scaling, unfold_scaling

TEXTS = ["The cat sat on the mat.", "A dog's life: barking, barking!", "Graphics cards and the X window system", ""]


def cnn(**settings) -> GlobalPoolingCNNForSequenceClassification:
    set_seed(0)
    config = GlobalPoolingCNNConfig(vocab_size=50, id2label={0: "calm", 1: "loud"}, label2id={"calm": 0, "loud": 1})
    for name, value in settings.items():
        setattr(config, name, value)
    return GlobalPoolingCNNForSequenceClassification(config).eval()


def padded(rows: list[list[int]], length: int) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def rows(*lengths: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 50, length).tolist() for length in lengths]


class TestGlobalPoolingCNN:
    def test_it_has_the_layers_of_the_paper(self):
        model = cnn()
        assert [(c.in_channels, c.out_channels, c.kernel_size) for c in model.convolutions] == [
            (100, 128, (5,)), (128, 128, (5,)), (128, 128, (5,)),
        ]  # fmt: skip
        assert (model.hidden.out_features, model.dropout.p, model.config.receptive_field) == (128, 0.3, 21)

    @pytest.mark.parametrize("length", [1, 5, 20, 21, 22, 60])
    def test_a_text_scores_the_same_whatever_the_batch_is_padded_to(self, length):
        model = cnn()
        row = rows(length)
        alone = model(**padded(row, length)).logits
        for width in (length + 1, 21, 40, 80):
            if width > length:
                torch.testing.assert_close(model(**padded(row, width)).logits, alone, rtol=1e-5, atol=1e-6)

    def test_it_equals_plain_torch_layers_on_a_text_without_padding(self):
        model = cnn()
        ids = torch.tensor(rows(60))
        x = torch.relu(model.convolutions[0](model.embedding(ids).transpose(1, 2)))
        x = torch.relu(model.convolutions[1](torch.nn.MaxPool1d(5, stride=1)(x)))
        x = torch.relu(model.convolutions[2](torch.nn.MaxPool1d(5, stride=1)(x)))
        expected = model.classifier(torch.relu(model.hidden(torch.nn.AdaptiveMaxPool1d(1)(x).squeeze(-1))))
        torch.testing.assert_close(model(ids).logits, expected)

    def test_every_token_of_a_text_matters(self):
        model = cnn()
        embedded = []
        model.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
        reached = torch.zeros(40, dtype=torch.bool)
        for seed in range(20):  # a maximum passes few positions at a time
            torch.manual_seed(seed)
            logits = model(torch.randint(3, 50, (1, 40))).logits
            reached |= torch.autograd.grad(logits.sum(), embedded[-1])[0][0].abs().sum(-1) > 0
        assert reached.all()

    def test_without_a_mask_padding_is_told_by_its_id(self):
        model = cnn()
        batch = padded(rows(30, 10), 40)
        torch.testing.assert_close(model(batch["input_ids"]).logits, model(**batch).logits)

    def test_labels_give_the_mean_cross_entropy(self):
        model = cnn()
        batch = padded(rows(30, 10), 40)
        output = model(**batch, labels=torch.tensor([0, 1]))
        expected = -output.logits.log_softmax(-1)[[0, 1], [0, 1]].mean()
        torch.testing.assert_close(output.loss, expected)
        assert isinstance(model(**batch, return_dict=False), tuple)

    def test_a_checkpoint_loads_with_the_auto_classes_and_in_a_pipeline(self, tmp_path):
        tokenizer = train_word_level_tokenizer(TEXTS, 50)
        model = cnn(vocab_size=len(tokenizer))
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        ids = AutoTokenizer.from_pretrained(tmp_path)(TEXTS, padding=True, return_tensors="pt")
        assert torch.equal(again(**ids).logits, model(**ids).logits)
        assert AutoConfig.from_pretrained(tmp_path).receptive_field == 21
        classify = pipeline("text-classification", model=str(tmp_path), top_k=None)
        expected = model(**ids).logits.softmax(-1)
        for text, probabilities in zip(TEXTS, expected, strict=True):
            scores = {entry["label"]: entry["score"] for entry in classify([text])[0]}
            assert scores == pytest.approx(
                {"calm": probabilities[0].item(), "loud": probabilities[1].item()}, rel=1e-4
            )

    def test_a_checkpoint_carries_its_code_and_names_its_classes(self, tmp_path):
        cnn().save_pretrained(tmp_path)
        assert (tmp_path / "models.py").read_bytes() == Path(
            inspect.getfile(GlobalPoolingCNNForSequenceClassification)
        ).read_bytes()
        classes = json.loads((tmp_path / "config.json").read_text())["auto_map"]
        assert classes["AutoModelForSequenceClassification"] == "models.GlobalPoolingCNNForSequenceClassification"

    @pytest.mark.slow  # a process that imports transformers; that models.py needs no package is in test_imports.py too
    def test_where_the_package_is_not_installed_the_code_of_a_checkpoint_is_enough(self, tmp_path):
        tokenizer = train_word_level_tokenizer(TEXTS, 50)
        cnn(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "checkpoint")
        tokenizer.save_pretrained(tmp_path / "checkpoint")
        code = (
            "import sys; sys.modules['hf_adafocal'] = None\n"  # as where the package is not installed
            "from transformers import pipeline\n"
            "print(pipeline('text-classification', model='checkpoint', trust_remote_code=True)('a cat')[0]['label'])"
        )
        environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "", "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.split()[-1] in {"calm", "loud"}


class TestTokenizer:
    def test_words_are_lower_cased_and_punctuation_is_dropped(self):
        tokenizer = train_word_level_tokenizer(TEXTS, 50)
        tokens = tokenizer.convert_ids_to_tokens(tokenizer("The DOG's (cat)!")["input_ids"])
        assert tokens == ["[CLS]", "the", "dog's", "cat"]

    def test_an_empty_text_still_has_a_token(self):
        assert train_word_level_tokenizer(TEXTS, 50)("")["input_ids"] == [2]

    def test_the_most_frequent_words_are_kept_and_the_rest_are_unknown(self):
        tokenizer = train_word_level_tokenizer(["common common rare"], vocab_size=4)
        assert tokenizer("common rare")["input_ids"] == [2, 3, tokenizer.unk_token_id]

    def test_padding_is_id_0_on_the_right(self):
        tokenizer = train_word_level_tokenizer(TEXTS, 50)
        batch = tokenizer(["cat", "the cat sat"], padding=True)
        assert batch["input_ids"][0][-2:] == [0, 0] and batch["attention_mask"][0] == [1, 1, 0, 0]


class TestTimmClassifier:
    def model(self):
        pytest.importorskip("timm", reason="timm is the extra `vision`")
        set_seed(0)
        args = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
        return timm_classifier("vit_tiny_patch16_224", ["low", "high"], 16, args).eval()

    def test_a_checkpoint_loads_offline_with_processor_and_pipeline(self, tmp_path):
        model = self.model()
        model.save_pretrained(tmp_path)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
        pixels = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"]
        np.testing.assert_allclose(pixels[0], np.asarray(image).transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
        assert torch.equal(
            AutoModelForImageClassification.from_pretrained(tmp_path).eval()(pixels).logits, model(pixels).logits
        )
        scores = {e["label"]: e["score"] for e in pipeline("image-classification", model=str(tmp_path))(image)}
        expected = model(pixels).logits.softmax(-1)[0].tolist()
        assert scores == pytest.approx(dict(zip(("low", "high"), expected, strict=True)), rel=1e-5)

    def test_weights_follow_torchs_seed(self):
        assert torch.equal(self.model().timm_model.head.weight, self.model().timm_model.head.weight)


def network(**config):
    torch.manual_seed(0)
    return UNet3DForSemanticSegmentation(UNet3DConfig(widths=[4, 6, 8], num_labels=3, **config)).eval()


@pytest.fixture
def volumes():
    return torch.randn(2, 1, 6, 9, 11, generator=torch.Generator().manual_seed(0))


class TestUNet3D:
    def test_logits_have_the_size_of_the_volume_whatever_it_is(self, volumes):
        assert network()(volumes).logits.shape == (2, 3, 6, 9, 11)
        assert network()(volumes[..., :1, :1, :1]).logits.shape == (2, 3, 1, 1, 1)

    def test_its_own_loss_is_the_cross_entropy_of_the_voxels_that_count(self, volumes):
        labels = torch.randint(0, 3, (2, 6, 9, 11))
        labels[0] = 255
        outputs = network()(volumes, labels=labels)
        expected = torch.nn.functional.cross_entropy(outputs.logits[1:], labels[1:])
        torch.testing.assert_close(outputs.loss, expected)

    def test_a_saved_checkpoint_loads_through_the_auto_class(self, volumes, tmp_path):
        model = network()
        model.save_pretrained(tmp_path)
        loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(volumes).logits, model(volumes).logits)
        assert (tmp_path / "models.py").exists()

    def test_a_scaling_is_folded_into_its_head_and_out_of_it(self, volumes):
        model = network()
        before = model(volumes).logits
        fold_scaling(model, Scaling(scale=(0.5, 2.0, 1.0), bias=(0.1, 0.0, -0.3)))
        factors, offsets = (torch.tensor(part)[:, None, None, None] for part in ((0.5, 2.0, 1.0), (0.1, 0.0, -0.3)))
        torch.testing.assert_close(model(volumes).logits, before * factors + offsets)
        unfold_scaling(model)
        torch.testing.assert_close(model(volumes).logits, before, rtol=1e-4, atol=1e-5)

    def test_a_checkpoint_is_folded_on_disk(self, volumes, tmp_path):
        model = network()
        model.save_pretrained(tmp_path / "plain")
        fold_checkpoint(tmp_path / "plain", Scaling(0.5), tmp_path / "folded")
        loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "folded")
        torch.testing.assert_close(loaded(volumes).logits, model(volumes).logits / 2)
        assert recorded_scaling(loaded) is not None
