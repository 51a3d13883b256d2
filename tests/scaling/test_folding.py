import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from operator_log import FAKE_GPU
from PIL import Image
from tiny import LENGTH, NUM_CLASSES, VOCABULARY, bert
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from hf_adafocal.models import (
    GlobalPoolingCNNConfig,
    GlobalPoolingCNNForSequenceClassification,
    timm_classifier,
    train_word_level_tokenizer,
)
from hf_adafocal.scaling import folding
from hf_adafocal.scaling.fit import Scaling, fit_temperature_scaling, fit_vector_scaling
from hf_adafocal.scaling.folding import (
    check_foldable,
    fold_checkpoint,
    fold_scaling,
    forget_scaling,
    recorded_scaling,
    unfold_scaling,
)
from hf_adafocal.scaling.head import example, find_head

TEXTS = ["the cat sat on the mat", "a dog barks", "cats and dogs and mats", "sat"]
TEMPERATURE = Scaling(1 / 2.7, 0.0, 1.5, 1.25, 60)
VECTOR = Scaling((0.4, 1.3, -0.2), (0.5, -1.0, 2.0), 1.5, 1.125, 60)
SCALINGS = pytest.mark.parametrize("scaling", [TEMPERATURE, VECTOR], ids=lambda scaling: scaling.method)

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
LABELED = {"num_labels": NUM_CLASSES}
BLOCK = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def timm_model(architecture, **model_args):
    pytest.importorskip("timm", reason="timm is the extra `vision`")
    return timm_classifier(architecture, ["a", "b", "c"], 16, model_args)


def lora_merged():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.merge_and_unload()


# Name: how to build it, and the name of the layer that makes its logits.
ARCHITECTURES = {
    "bert": (bert, "classifier"),
    "roberta": (
        lambda: RobertaForSequenceClassification(RobertaConfig(vocab_size=VOCABULARY, **SMALL, **LABELED)),
        "classifier.out_proj",
    ),
    "distilbert": (
        lambda: DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=VOCABULARY, dim=16, n_layers=1, n_heads=2, hidden_dim=32, **LABELED)
        ),
        "classifier",
    ),
    "cnn": (
        lambda: GlobalPoolingCNNForSequenceClassification(
            GlobalPoolingCNNConfig(VOCABULARY, embedding_size=8, num_filters=8, hidden_size=16, **LABELED)
        ),
        "classifier",
    ),
    "lora_merged": (lora_merged, "classifier"),
    "vit": (
        lambda: ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SMALL, **LABELED)),
        "classifier",
    ),
    "resnet": (
        lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **LABELED)
        ),
        "classifier.1",
    ),
    "timm_vit": (lambda: timm_model("vit_tiny_patch16_224", img_size=16, **BLOCK), "timm_model.head"),
    "timm_resnet": (lambda: timm_model("resnet10t"), "timm_model.fc"),
}


def classifier(name):
    """A random model whose logits differ by several nats."""
    build, head = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = build().eval()
    layer = model.get_submodule(head)
    nn.init.normal_(layer.weight, std=1.0)
    nn.init.normal_(layer.bias, std=1.0)
    with torch.no_grad():
        layer.weight *= 3 / logits_of(model).std()
    return model


def batch(model, size=8):
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.randint(3, VOCABULARY, (size, LENGTH), generator=generator)}
    return {"pixel_values": torch.randn(size, 3, 16, 16, generator=generator)}


def logits_of(model, inputs=None):
    with torch.no_grad():
        return model(**(inputs or batch(model))).logits


def expected_probabilities(logits, scaling):
    """`softmax(scale * logits + bias)` in float64, by numpy alone."""
    scaled = np.asarray(logits.float(), dtype=np.float64) * np.asarray(scaling.scale) + np.asarray(scaling.bias)
    weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def auto_class(model):
    images = model.main_input_name == "pixel_values"
    return AutoModelForImageClassification if images else AutoModelForSequenceClassification


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}, model.config.to_dict()


def assert_unchanged(model, before):
    weights, config = before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class TestFoldScaling:
    @SCALINGS
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_the_checkpoint_loads_with_the_stock_class_and_gives_the_scaled_probabilities(
        self, name, scaling, tmp_path
    ):
        model = classifier(name)
        expected = expected_probabilities(logits_of(model), scaling)
        fold_scaling(model, scaling)
        model.save_pretrained(tmp_path)
        again = auto_class(model).from_pretrained(tmp_path).eval()
        assert type(again) is type(model)
        np.testing.assert_allclose(logits_of(again).softmax(-1), expected, atol=1e-5)
        assert recorded_scaling(again.config) == scaling

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_the_layer_that_makes_the_logits_is_found_and_no_other_changes(self, name):
        model, head = classifier(name), ARCHITECTURES[name][1]
        before = snapshot(model)[0]
        assert find_head(model) is model.get_submodule(head)
        fold_scaling(model, VECTOR)
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert changed == {f"{head}.weight", f"{head}.bias"}

    @pytest.mark.parametrize("fit", [fit_temperature_scaling, fit_vector_scaling])
    def test_a_folded_models_nll_is_the_one_that_the_fit_promised(self, fit):
        model, inputs = classifier("bert"), batch(bert(), size=200)
        labels = (logits_of(model, inputs) / 4 + torch.distributions.Gumbel(0.0, 1.0).sample((200, 3))).argmax(-1)
        scaling = fit(logits_of(model, inputs), labels)
        assert scaling.nll_after < scaling.nll_before - 0.1
        fold_scaling(model, scaling)
        assert F.cross_entropy(logits_of(model, inputs), labels).item() == pytest.approx(scaling.nll_after, abs=1e-5)

    def test_a_temperature_suits_a_language_models_head_without_bias(self, tmp_path):
        model = transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(vocab_size=VOCABULARY, **SMALL, **LABELED, pad_token_id=0)
        ).eval()
        nn.init.normal_(model.score.weight)
        expected = expected_probabilities(logits_of(model), TEMPERATURE)  # of the last token
        fold_scaling(model, TEMPERATURE)
        model.save_pretrained(tmp_path)
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        np.testing.assert_allclose(logits_of(again).softmax(-1), expected, atol=1e-5)

    def test_a_model_of_sound_is_measured_with_the_batch_that_one_gives(self):
        model = transformers.Wav2Vec2ForSequenceClassification(
            transformers.Wav2Vec2Config(
                **{**SMALL, **LABELED}, conv_dim=[8], conv_kernel=[4], conv_stride=[4], num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
            )
        ).eval()  # fmt: skip
        inputs = {"input_values": torch.randn(2, 400)}
        with pytest.raises(ValueError, match="takes input_values; give a batch of them as `inputs`"):
            fold_scaling(model, TEMPERATURE)
        expected = expected_probabilities(logits_of(model, inputs), TEMPERATURE)
        fold_scaling(model, TEMPERATURE, inputs)
        np.testing.assert_allclose(logits_of(model, inputs).softmax(-1), expected, atol=1e-5)

    def test_dropout_disturbs_nothing_and_each_module_keeps_its_mode(self):
        model = bert(hidden_dropout_prob=0.5).train()
        model.bert.embeddings.eval()
        modes = {name: module.training for name, module in model.named_modules()}
        fold_scaling(model, TEMPERATURE)
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert model.training and not model.bert.embeddings.training

    def test_no_gradient_and_no_hook_is_left(self):
        model = bert()
        fold_scaling(model, TEMPERATURE)
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())

    def test_bfloat16_is_rounded_once_in_the_head_and_stays_bfloat16(self):
        model = classifier("bert").to(torch.bfloat16)
        weight, bias = model.classifier.weight.double(), model.classifier.bias.double()
        expected = expected_probabilities(logits_of(model), TEMPERATURE)
        fold_scaling(model, TEMPERATURE)
        assert torch.equal(model.classifier.weight, (weight / 2.7).bfloat16())
        assert torch.equal(model.classifier.bias, (bias / 2.7).bfloat16())
        np.testing.assert_allclose(logits_of(model).float().softmax(-1), expected, atol=2e-2)

    @FAKE_GPU
    def test_a_device_without_float64_gets_none(self):
        class Made(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                found = func(*args, **(kwargs or {}))
                if isinstance(found, torch.Tensor):
                    made.append((found.device.type, found.dtype))
                return found

        made = []
        with FakeTensorMode(allow_non_fake_inputs=True):
            head = torch.nn.Linear(4, 3, device="cuda")
            with Made():
                folding._rescale(head, 0.5, (1.0, 2.0, 3.0))
        assert ("cpu", torch.float64) in made and ("cuda", torch.float64) not in made

    def test_a_power_of_two_is_exact_in_bfloat16(self):
        model = classifier("bert").to(torch.bfloat16)
        logits = logits_of(model)
        fold_scaling(model, Scaling(0.25))
        assert torch.equal(logits_of(model), logits / 4)

    def test_the_record_is_plain_json(self, tmp_path):
        model = bert()
        fold_scaling(model, VECTOR)
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["adafocal_calibration"] == {
            "method": "vector",
            "scale": [0.4, 1.3, -0.2],
            "bias": [0.5, -1.0, 2.0],
            "nll_before": 1.5,
            "nll_after": 1.125,
            "num_samples": 60,
        }

    def test_a_model_without_record_has_no_scaling(self):
        assert recorded_scaling(bert().config) is None


class TestRefusals:
    def refused(self, model, match, scaling=TEMPERATURE, error=ValueError):
        before = snapshot(model)
        with pytest.raises(error, match=match):
            fold_scaling(model, scaling)
        assert_unchanged(model, before)

    def test_a_scaling_is_not_folded_twice(self, tmp_path):
        model = bert()
        fold_scaling(model, TEMPERATURE)
        self.refused(model, r"folded into this model already.*unfold_scaling\(model\)")
        model.save_pretrained(tmp_path)
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        self.refused(again, "folded into this model already")
        forget_scaling(again)  # as after further training
        fold_scaling(again, TEMPERATURE)

    def test_a_vector_needs_a_bias_to_put_its_own_into(self):
        model = bert()
        model.classifier.bias = None
        self.refused(model, "The head has no bias.*fit_temperature_scaling", VECTOR)
        fold_scaling(model, Scaling(VECTOR.scale, (0.0, 0.0, 0.0)))

    def test_numbers_for_other_classes(self):
        self.refused(bert(), "The head has 3 outputs, but scale has 2 numbers", Scaling((1.0, 2.0)))

    @pytest.mark.parametrize(
        ("settings", "found"),
        [
            ({"num_labels": 1, "problem_type": "regression"}, "num_labels 1 and problem_type regression"),
            ({"problem_type": "regression"}, "problem_type regression"),
            ({"problem_type": "multi_label_classification"}, "problem_type multi_label_classification"),
        ],
        ids=str,
    )
    def test_a_model_without_softmax(self, settings, found):
        self.refused(bert(**settings), f"softmax over two or more classes, found .*{found}")

    def test_logits_that_are_bent_after_the_last_layer(self):
        class Bounded(BertForSequenceClassification):
            def forward(self, *args, **kwargs):
                output = super().forward(*args, **kwargs)
                output.logits = torch.tanh(output.logits)
                return output

        self.refused(Bounded(bert().config), r"logits of Bounded follow, found none among \['classifier'\]")

    def test_logits_that_are_the_mean_of_two_heads(self):
        config = transformers.DeiTConfig(image_size=16, patch_size=8, **SMALL, **LABELED)
        model = transformers.DeiTForImageClassificationWithTeacher(config)
        self.refused(model, r"found none among \['cls_classifier', 'distillation_classifier'\]")

    def test_a_model_that_ends_in_no_linear_layer(self):
        model = bert()
        model.classifier = nn.Sequential(nn.Unflatten(1, (16, 1)), nn.Conv1d(16, 3, 1), nn.Flatten())
        self.refused(model, r"found none among \[\]")

    def test_one_of_two_linear_layers_when_both_will_do(self):
        model = bert()
        last = nn.Linear(3, 3)
        nn.init.eye_(last.weight)
        nn.init.zeros_(last.bias)
        model.classifier = nn.Sequential(model.classifier, last)
        self.refused(model, r"found \['classifier.0', 'classifier.1'\]")

    def test_a_head_that_is_tied_to_the_embeddings(self):
        model = bert(num_labels=VOCABULARY)
        model.classifier.weight = model.bert.embeddings.word_embeddings.weight
        self.refused(model, "classifier.weight is tied to bert.embeddings.word_embeddings.weight")

    def test_a_quantized_head(self):
        class Int8Linear(nn.Linear):
            def forward(self, hidden):
                return F.linear(hidden, self.weight * 0.01, self.bias)

        model = bert()
        model.classifier = Int8Linear(16, 3)
        model.classifier.weight = nn.Parameter((100 * torch.randn(3, 16)).to(torch.int8), requires_grad=False)
        self.refused(model, "head classifier is a .*Int8Linear with a weight that is a Parameter of torch.int8")

    def test_a_parametrized_head(self):
        model = bert()
        nn.utils.parametrizations.weight_norm(model.classifier)
        self.refused(model, "head classifier is a .*ParametrizedLinear .*without quantization, parametrization")

    def test_the_base_of_an_adapter_which_is_saved_without_its_head(self):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
        self.refused(model.get_base_model(), r"modules are adapters \(bert.*the PeftModel itself.*merge_and_unload")

    def test_a_wrapped_model_is_a_type_error(self):
        with pytest.raises(TypeError, match="Expected a transformers or PEFT model, found DataParallel. Unwrap it"):
            fold_scaling(nn.DataParallel(bert()), TEMPERATURE)


class TestUnfoldScaling:
    @SCALINGS
    @pytest.mark.parametrize("name", ["bert", "timm_resnet"])
    def test_the_head_is_as_it_was(self, name, scaling, tmp_path):
        model = classifier(name)
        weights, config = snapshot(model)
        fold_scaling(model, scaling)
        unfold_scaling(model)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, weights[key], rtol=1e-6, atol=1e-6)
        assert model.config.to_dict() == config

    @SCALINGS
    def test_a_checkpoint_that_was_saved_folded_is_undone_after_loading(self, scaling, tmp_path):
        model = classifier("bert")
        logits = logits_of(model)
        fold_scaling(model, scaling)
        model.save_pretrained(tmp_path)
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        unfold_scaling(again)
        torch.testing.assert_close(logits_of(again), logits, rtol=1e-5, atol=1e-5)
        again.save_pretrained(tmp_path)
        assert "adafocal_calibration" not in json.loads((tmp_path / "config.json").read_text())

    def test_where_nothing_was_folded_there_is_nothing_to_undo(self):
        with pytest.raises(ValueError, match="adafocal_calibration holds no scaling"):
            unfold_scaling(bert())

    def test_a_record_that_is_none_of_ours_is_an_error(self):
        model = bert()
        model.config.adafocal_calibration = {"T": 2.0}
        with pytest.raises(ValueError, match="Expected a scaling as Scaling.to_dict writes it"):
            unfold_scaling(model)


class TestPipelines:
    @pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "cnn", "lora_merged"])
    def test_text_classification_scores_are_the_scaled_probabilities(self, name, tmp_path):
        tokenizer = train_word_level_tokenizer(TEXTS, VOCABULARY)
        model = classifier(name)
        ids = tokenizer(TEXTS, padding=True, return_tensors="pt")
        expected = expected_probabilities(logits_of(model, ids), VECTOR)
        fold_scaling(model, VECTOR)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        classify = pipeline("text-classification", model=str(tmp_path), top_k=None)
        for text, probabilities in zip(TEXTS, expected, strict=True):
            scores = {entry["label"]: entry["score"] for entry in classify([text])[0]}
            assert [scores[model.config.id2label[k]] for k in range(3)] == pytest.approx(probabilities, abs=1e-5)

    @pytest.mark.parametrize("name", ["vit", "resnet", "timm_vit", "timm_resnet"])
    def test_image_classification_scores_are_the_scaled_probabilities(self, name, tmp_path):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
        pixels = torch.tensor(np.asarray(image).transpose(2, 0, 1)[None] / 127.5 - 1, dtype=torch.float32)
        model = classifier(name)
        expected = expected_probabilities(logits_of(model, {"pixel_values": pixels}), VECTOR)[0]
        fold_scaling(model, VECTOR)
        model.save_pretrained(tmp_path)
        if not name.startswith("timm"):  # whose processor reads config.json
            ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
        classify = pipeline("image-classification", model=str(tmp_path), top_k=None)
        scores = {entry["label"]: entry["score"] for entry in classify(image)}
        assert [scores[model.config.id2label[k]] for k in range(3)] == pytest.approx(expected, abs=1e-5)


class LogitsOnly(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return self.model(inputs).logits


class TestONNX:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    @pytest.mark.slow
    def test_an_exported_model_gives_the_scaled_probabilities(self, name, tmp_path):
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        model = classifier(name)
        expected = expected_probabilities(logits_of(model), VECTOR)
        fold_scaling(model, VECTOR)
        (inputs,) = batch(model).values()
        file = str(tmp_path / "model.onnx")
        torch.onnx.export(LogitsOnly(model).eval(), (inputs,), file, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        np.testing.assert_allclose(expected_probabilities(torch.tensor(logits), Scaling(1.0)), expected, atol=1e-5)


@pytest.fixture
def checkpoint(tmp_path):
    """A text classifier and its tokenizer on disk, with the rest that a run leaves there."""
    folder = tmp_path / "trained"
    classifier("bert").save_pretrained(folder)
    train_word_level_tokenizer(TEXTS, VOCABULARY).save_pretrained(folder)
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "training_args.bin",
        "notes.md",
    ):
        (folder / name).write_bytes(b"{}")
    (folder / "runs").mkdir()
    return folder


class TestFoldCheckpoint:
    def scores(self, folder):
        classify = pipeline("text-classification", model=str(folder), top_k=None)
        return [[score["score"] for score in sorted(e, key=lambda s: s["label"])] for e in classify(TEXTS)]

    def expected(self, folder, scaling=TEMPERATURE):
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        ids = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
        return expected_probabilities(logits_of(model, ids), scaling)

    def test_a_pipeline_loads_the_new_folder_and_the_old_one_is_as_it_was(self, checkpoint, tmp_path):
        before, expected = contents(checkpoint), self.expected(checkpoint)
        output = fold_checkpoint(checkpoint, TEMPERATURE, tmp_path / "new" / "calibrated")
        assert output == tmp_path / "new" / "calibrated"
        np.testing.assert_allclose(self.scores(output), expected, atol=1e-5)
        assert contents(checkpoint) == before

    def test_what_stands_beside_the_weights_comes_along_but_not_the_state_of_the_run(self, checkpoint, tmp_path):
        names = {path.name for path in fold_checkpoint(checkpoint, TEMPERATURE, tmp_path / "new").iterdir()}
        assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "notes.md"}

    def test_without_an_output_the_folder_itself_is_calibrated(self, checkpoint):
        names, expected = set(contents(checkpoint)), self.expected(checkpoint)
        assert fold_checkpoint(checkpoint, TEMPERATURE) == checkpoint
        np.testing.assert_allclose(self.scores(checkpoint), expected, atol=1e-5)
        assert {path.name for path in checkpoint.iterdir()} == names | {"runs"}

    def test_weights_in_other_files_are_replaced(self, checkpoint):
        expected = self.expected(checkpoint)
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
        (checkpoint / "model.safetensors").unlink()
        model.save_pretrained(checkpoint, max_shard_size="5KB")
        assert len(list(checkpoint.glob("*.safetensors"))) > 1
        (checkpoint / "pytorch_model.bin").write_bytes(b"old weights")
        fold_checkpoint(checkpoint, TEMPERATURE)
        assert [path.name for path in checkpoint.glob("*model*")] == ["model.safetensors"]
        np.testing.assert_allclose(self.scores(checkpoint), expected, atol=1e-5)

    def test_an_image_classifier_comes_with_its_processor(self, tmp_path):
        classifier("vit").save_pretrained(tmp_path / "old")
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "old")
        output = fold_checkpoint(tmp_path / "old", TEMPERATURE, tmp_path / "new")
        assert type(transformers.AutoImageProcessor.from_pretrained(output)) is type(
            transformers.AutoImageProcessor.from_pretrained(tmp_path / "old")
        )
        assert recorded_scaling(AutoModelForImageClassification.from_pretrained(output).config) == TEMPERATURE

    def test_a_checkpoint_stays_in_its_dtype(self, tmp_path):
        classifier("bert").to(torch.bfloat16).save_pretrained(tmp_path)
        fold_checkpoint(tmp_path, TEMPERATURE)
        assert AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16

    @pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_the_global_pooling_cnn_keeps_its_code_and_needs_no_import_of_it(self, tmp_path, fresh):
        classifier("cnn").save_pretrained(tmp_path / "old")
        if fresh:  # the Auto classes do not know it yet
            code = "from hf_adafocal import Scaling, fold_checkpoint; fold_checkpoint('old', Scaling(0.5), 'new')"
            result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
        else:
            fold_checkpoint(tmp_path / "old", Scaling(0.5), tmp_path / "new")
        assert (tmp_path / "new" / "models.py").read_bytes() == (tmp_path / "old" / "models.py").read_bytes()
        assert "auto_map" in json.loads((tmp_path / "new" / "config.json").read_text())

    def refused(self, folder, match):
        before = contents(folder)
        with pytest.raises(ValueError, match=match):
            fold_checkpoint(folder, TEMPERATURE)
        assert contents(folder) == before
        with pytest.raises(ValueError, match=match):
            fold_checkpoint(folder, TEMPERATURE, folder.parent / "new")
        assert not (folder.parent / "new").exists()

    def test_a_folded_checkpoint_is_not_folded_again(self, checkpoint):
        fold_checkpoint(checkpoint, TEMPERATURE)
        self.refused(checkpoint, "folded into this model already")

    def test_a_checkpoint_without_head_is_refused(self, checkpoint):
        shutil.rmtree(checkpoint / "runs")
        model = bert()
        state = {name: value for name, value in model.state_dict().items() if not name.startswith("classifier")}
        model.save_pretrained(checkpoint, state_dict=state)
        self.refused(checkpoint, r"no weights for \['classifier.bias', 'classifier.weight'\]")

    def test_a_model_that_classifies_nothing_is_refused(self, tmp_path):
        transformers.BertForMaskedLM(bert().config).save_pretrained(tmp_path / "old")
        self.refused(tmp_path / "old", "Expected the checkpoint of a classifier.*names BertForMaskedLM")

    def test_an_adapter_folder_is_refused(self, tmp_path):
        peft = pytest.importorskip("peft")
        bert().save_pretrained(tmp_path / "old")
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "old")
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
        peft.get_peft_model(base, config).save_pretrained(tmp_path / "old")
        self.refused(tmp_path / "old", "merge them first|has no weights for .*lora")  # transformers 5.0 loads none


class TestCheckFoldable:
    def test_it_passes_what_can_be_folded_and_changes_nothing(self):
        model = bert()
        model.train()
        before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
        check_foldable(model)
        assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert recorded_scaling(model.config) is None and torch.equal(torch.get_rng_state(), state)

    def test_it_raises_what_folding_would(self):
        model = bert(problem_type="multi_label_classification")
        messages = []
        for attempt in (lambda: check_foldable(model), lambda: fold_scaling(model, TEMPERATURE)):
            with pytest.raises(ValueError) as error:
                attempt()
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def adapted(**settings):
    """A LoRA classifier of texts whose head is trained with it."""
    peft = pytest.importorskip("peft")
    base = bert(**settings)
    base.config._name_or_path = ""
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


class TestAdapters:
    @SCALINGS
    def test_the_adapter_alone_brings_the_scaled_probabilities_to_a_fresh_base(self, scaling, tmp_path):
        peft = pytest.importorskip("peft")
        model = adapted()
        expected = scaling.apply(logits_of(model)).softmax(-1)
        fold_scaling(model, scaling)
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
        torch.testing.assert_close(logits_of(again).softmax(-1), expected, rtol=1e-5, atol=1e-6)

    def test_the_record_is_in_the_adapters_config_and_a_second_folding_is_refused(self, tmp_path):
        peft = pytest.importorskip("peft")
        model = adapted()
        fold_scaling(model, TEMPERATURE)
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(bert(), tmp_path)
        assert recorded_scaling(again) == TEMPERATURE
        with pytest.raises(ValueError, match="folded into this model already"):
            fold_scaling(again, TEMPERATURE)
        unfold_scaling(again)
        assert recorded_scaling(again) is None
        torch.testing.assert_close(logits_of(again), logits_of(adapted()), rtol=1e-5, atol=1e-5)

    def test_merging_after_folding_keeps_the_scaled_probabilities(self):
        model = adapted()
        expected = TEMPERATURE.apply(logits_of(model))
        fold_scaling(model, TEMPERATURE)
        torch.testing.assert_close(logits_of(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("head", ["frozen", "adapted"])
    def test_a_head_that_the_adapter_does_not_hold_whole_is_refused(self, head):
        peft = pytest.importorskip("peft")
        targets = ["query", "classifier"] if head == "adapted" else ["query"]
        model = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=targets))
        with pytest.raises(ValueError, match="not saved with the adapter: put it into .*modules_to_save"):
            fold_scaling(model, TEMPERATURE)


class TestConvolutionalHeads:
    def test_a_segmenter_gives_the_scaled_probabilities_of_each_pixel(self, tmp_path):
        config = transformers.SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
            strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, image_size=24,
            num_labels=3,
        )  # fmt: skip
        torch.manual_seed(0)
        transformers.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "old")
        old = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "old").eval()
        fold_checkpoint(tmp_path / "old", VECTOR, tmp_path / "new")
        new = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "new").eval()
        pixels = {"pixel_values": torch.randn(2, 3, 32, 40)}
        before, after = (logits_of(model, pixels).movedim(1, -1) for model in (old, new))
        torch.testing.assert_close(after, VECTOR.apply(before), rtol=1e-4, atol=1e-5)


class TestExample:
    def config(self, **settings):
        return transformers.PretrainedConfig(**settings)

    @pytest.mark.parametrize(
        ("settings", "shape"),
        [
            ({"image_size": 32, "num_channels": 1}, (1, 1, 32, 32)),
            ({"image_size": [16, 24]}, (1, 3, 16, 24)),
            ({"image_size": {"height": 16, "width": 24}}, (1, 3, 16, 24)),
            ({"vision_config": transformers.PretrainedConfig(image_size=48)}, (1, 3, 48, 48)),
            ({"vision_config": {"image_size": 48, "num_channels": 4}}, (1, 4, 48, 48)),
            ({"pretrained_cfg": {"input_size": [3, 10, 12]}}, (1, 3, 10, 12)),
            ({}, (1, 3, 224, 224)),
        ],
    )
    def test_an_image_has_the_size_that_the_config_tells(self, settings, shape):
        class Model(torch.nn.Module):
            main_input_name, device, dtype = "pixel_values", "cpu", torch.float32

        model = Model()
        model.config = transformers.PretrainedConfig(**settings)
        assert example(model)["pixel_values"].shape == shape

    def test_a_model_with_a_nested_vision_config_is_folded(self):
        vision = {**SMALL, "image_size": 48, "patch_size": 16}
        model = transformers.SiglipForImageClassification(
            transformers.SiglipConfig(vision_config=vision, text_config={**SMALL, "vocab_size": 50}, **LABELED)
        ).eval()
        pixels = {"pixel_values": torch.randn(2, 3, 48, 48)}
        expected = TEMPERATURE.apply(logits_of(model, pixels))
        fold_scaling(model, TEMPERATURE)
        torch.testing.assert_close(logits_of(model, pixels), expected, rtol=1e-4, atol=1e-5)

    def test_a_model_that_takes_no_such_batch_asks_for_one(self):
        class Video(BertForSequenceClassification):
            def forward(self, input_ids=None, **kwargs):
                raise RuntimeError("expected 5 dimensions")

        with pytest.raises(ValueError, match="does not take the batch .*expected 5 dimensions.* as `inputs`"):
            fold_scaling(Video(bert().config), TEMPERATURE)
