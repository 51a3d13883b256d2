"""The model may compute in bfloat16 or be compiled: the loss, the metrics and gamma are computed in float32."""

import contextlib
import shutil

import numpy as np
import pytest
import reference
import tiny
import torch
from transformers import BertForSequenceClassification, TrainerCallback

from hf_adafocal.losses.registry import PER_SAMPLE_LOSSES

# Largest difference of a gamma from that of the float32 run after two updates from 1 on 900 calibration samples. A
# bin holds 180: one that changes sides moves its gap by 1/180, and gammas by less than that.
GAMMA_TOLERANCE = 0.05


@contextlib.contextmanager
def recorded(module):
    """The calls of a module: `(positional arguments, output, table)`, the table None for a module without one."""
    calls = []

    def record(module, inputs, output):
        table = [getattr(module, name, torch.empty(0)).tolist() for name in ("edges", "gammas")]
        calls.append((inputs, output, table))

    handle = module.register_forward_hook(record)
    yield calls
    handle.remove()


def bert16(**settings):
    return tiny.bert(**settings).to(torch.bfloat16)


# How to compute: model, training arguments, dtype of the logits that reach the loss in training.
WAYS = {
    "float32": (tiny.bert, {}, torch.float32),
    "autocast": (tiny.bert, {"bf16": True}, torch.float32),  # accelerate converts the outputs
    "bfloat16_model": (bert16, {}, torch.bfloat16),
    "bfloat16_model_autocast": (bert16, {"bf16": True}, torch.float32),
    "compiled": (tiny.bert, {"torch_compile": True, "torch_compile_backend": "aot_eager"}, torch.float32),
    "compiled_bfloat16_model": (
        bert16,
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        torch.bfloat16,
    ),
}
COMPILED_BFLOAT16 = "compiled_bfloat16_model"  # slow: each of its parts has fast tests
ALL_WAYS = [pytest.param(way, marks=pytest.mark.slow) if way == COMPILED_BFLOAT16 else way for way in WAYS]


def mean_loss(name, logits, labels, table, count):
    """Least and largest loss in float64, one sample at a time.

    They differ where a probability is an edge to seven digits, so that rounding decides its bin: bfloat16 logits take
    few values, and edges are probabilities of such logits.
    """
    totals = np.zeros(2)
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        if name in ("adafocal", "flsd_53"):
            p = reference.softmax(row)[label]
            gammas = {reference.looked_up_gamma(p + rounding, *table) for rounding in (-2e-7, 2e-7)}
        else:
            gammas = {{"cross_entropy": 0.0, "focal": 3.0}[name]}
        losses = [reference.focal_loss(row, label, gamma) for gamma in gammas]
        totals += min(losses), max(losses)
    return totals / int(count)


class TestTrainingLoss:
    @pytest.mark.parametrize("loss", ["cross_entropy", "focal", "flsd_53", "adafocal"])
    @pytest.mark.parametrize("way", ALL_WAYS)
    def test_it_is_the_float64_loss_of_the_logits_whatever_their_dtype(self, tmp_path, way, loss):
        model, settings, dtype = WAYS[way]
        run = tiny.trainer(tmp_path, model(), loss=loss, **settings)
        with recorded(run.loss) as calls:
            run.train()
        assert len(calls) == 12
        if loss == "adafocal":  # the table stays in float32
            assert run.loss.gammas.dtype == run.loss.edges.dtype == torch.float32
            assert run.loss.gammas.ne(1).all()
        for (logits, labels, count), value, table in calls:
            assert (logits.dtype, value.dtype) == (dtype, torch.float32)
            least, largest = mean_loss(loss, logits, labels, table, count)
            assert least * (1 - 1e-6) <= value.item() <= largest * (1 + 1e-6)  # bfloat16 would be off by 1e-3

    @pytest.mark.parametrize("loss", PER_SAMPLE_LOSSES)
    def test_it_is_to_the_bit_that_of_the_same_logits_in_float32(self, tmp_path, loss):
        run = tiny.trainer(tmp_path, bert16(), loss=loss)
        pairs = []

        def compute_again(module, inputs, value):
            logits, labels, count = inputs
            assert logits.dtype == torch.bfloat16
            pairs.append((value.detach(), module.forward(logits.detach().float(), labels, count)))

        run.loss.register_forward_hook(compute_again)
        run.train()
        assert len(pairs) == 12
        for value, again in pairs:
            assert value.dtype == torch.float32 and torch.equal(value, again)


class TestMetrics:
    @pytest.mark.parametrize(
        ("model", "settings", "dtype"),
        [
            *(pytest.param(*WAYS[name], marks=[pytest.mark.slow] * (name == COMPILED_BFLOAT16)) for name in WAYS),
            (tiny.bert, {"bf16_full_eval": True}, torch.bfloat16),
            (tiny.bert, {"bf16_full_eval": True, "streaming_calibration": True}, torch.bfloat16),
        ],
        ids=[*WAYS, "bf16_full_eval", "bf16_full_eval_streaming"],
    )
    def test_they_are_the_float64_metrics_of_the_logits_whatever_their_dtype(self, tmp_path, model, settings, dtype):
        data = tiny.token_dataset(60, seed=1)
        run = tiny.trainer(tmp_path, model(), eval_dataset=data, **settings)
        with recorded(run.model) as calls:
            metrics = run.evaluate()
        logits = torch.cat([output.logits for _, output, _ in calls])
        assert logits.dtype == dtype
        p, labels = logits.double().softmax(-1).numpy(), np.asarray(data["labels"][:])
        assert metrics["eval_nll"] == metrics["eval_loss"]
        assert metrics["eval_nll"] == pytest.approx(reference.negative_log_likelihood(p, labels), rel=1e-6)
        assert metrics["eval_ece"] == pytest.approx(reference.expected_calibration_error(p, labels, 5), rel=1e-5)
        assert metrics["eval_accuracy"] == pytest.approx((p.argmax(1) == labels).mean())


class TestGammas:
    @pytest.fixture(scope="class")
    def gammas(self, tmp_path_factory):
        def train(model, **settings):
            run = tiny.trainer(
                tmp_path_factory.mktemp("run"),
                model,
                eval_dataset=tiny.token_dataset(900, seed=1),
                per_device_eval_batch_size=128,
                **settings,
            )
            run.train()
            return run.loss.gammas

        return train

    @pytest.fixture(scope="class")
    def exact(self, gammas):
        return gammas(tiny.bert())

    @pytest.mark.parametrize("way", ALL_WAYS[1:])
    def test_they_agree_with_those_of_the_float32_run(self, gammas, exact, way):
        model, settings, _ = WAYS[way]
        assert (1 - exact).abs().min() > 0.5  # there is something to agree on
        found = gammas(model(), **settings)
        assert (found - exact).abs().max() < (1e-3 if way == "compiled" else GAMMA_TOLERANCE)

    def test_evaluating_in_bfloat16_within_training_changes_no_gamma(self, gammas, exact):
        # transformers casts the model only outside of training.
        assert torch.equal(gammas(tiny.bert(), bf16_full_eval=True), exact)

    @pytest.mark.slow
    def test_inductor_gives_those_of_the_eager_run(self, gammas, exact):
        if shutil.which("g++") is None:
            pytest.skip("inductor compiles C++ on the CPU: there is no g++")
        found = gammas(tiny.bert(), torch_compile=True, torch_compile_backend="inductor")
        assert (found - exact).abs().max() < 1e-3


class Saturated(BertForSequenceClassification):
    """Logits so large that many confidences are 1 to the last bit, right or wrong."""

    def forward(self, input_ids, labels=None):
        output = super().forward(input_ids)
        output.logits = output.logits * self.scale
        return output


class Watch(TrainerCallback):
    """Gradients of each optimizer step and tables after each update; added after AdaFocal's callback."""

    def __init__(self, loss):
        self.loss, self.gradients, self.tables = loss, [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(gradients))

    def on_evaluate(self, args, state, control, **kwargs):
        if hasattr(self.loss, "edges"):
            self.tables.append((self.loss.edges.clone(), self.loss.gammas.clone()))


class TestSaturation:
    def watched(self, folder, scale=1e4, dtype=torch.float32, epochs=3, **settings):
        model = Saturated(tiny.bert().config)
        model.load_state_dict(tiny.bert().state_dict())
        model.scale = scale
        run = tiny.trainer(folder, model.to(dtype), num_train_epochs=epochs, **settings)
        watch = Watch(run.loss)
        run.add_callback(watch)
        run.train()
        confidence = run.predict(tiny.token_dataset(60, seed=1)).predictions
        confidence = torch.tensor(confidence).softmax(-1).amax(-1)
        assert (confidence == 1).float().mean() > 0.3  # as claimed
        assert torch.cat([p.flatten() for p in run.model.parameters()]).isfinite().all()
        assert len(watch.gradients) == 6 * epochs
        for gradient in watch.gradients:
            assert gradient.isfinite().all()
            # The wrong ones still teach, but for the Brier score, which is flat where the softmax is.
            assert gradient.norm() > 0 or settings.get("loss") == "brier"
        return watch

    @pytest.mark.parametrize("loss", PER_SAMPLE_LOSSES)
    @pytest.mark.parametrize(
        "settings",
        # with autocast the loss is given float32 too, which TestTrainingLoss sees
        [{}, {"dtype": torch.bfloat16}, pytest.param({"bf16": True}, marks=pytest.mark.slow)],
        ids=str,
    )
    def test_gradients_stay_finite_with_every_loss(self, tmp_path, loss, settings):
        self.watched(tmp_path, epochs=2, loss=loss, **settings)

    @pytest.mark.parametrize("scale", [1e4, 1e7])
    @pytest.mark.parametrize("gamma_initial", [20.0, 1.0, 0.2, -0.2, -2.0])
    def test_the_table_stays_sane_from_any_gamma(self, tmp_path, scale, gamma_initial):
        watch = self.watched(tmp_path, scale, gamma_initial=gamma_initial, gamma_lambda=5.0)
        assert len(watch.tables) == 3
        for edges, gammas in watch.tables:
            assert (edges == 1).sum() >= (2 if scale == 1e4 else 4)  # of 6; bins between equal edges are empty
            assert (edges.diff() >= 0).all() and edges.min() >= 0 and edges.max() <= 1
            assert gammas.isfinite().all() and gammas.min() >= -2 and gammas.max() <= 20
        assert not torch.equal(watch.tables[0][1], watch.tables[-1][1]) or gamma_initial in (20.0, -2.0)

    def test_the_bin_of_the_saturated_samples_follows_their_gap(self, tmp_path):
        watch = self.watched(tmp_path, 1e7)
        (_, before), (edges, after) = watch.tables[-2:]
        full = torch.nonzero(edges[1:] == 1)[0]  # (lo, 1]: ties share the first bin that reaches them
        assert (after[full] > before[full]).all()  # confidence 1, accuracy below: over-confident
