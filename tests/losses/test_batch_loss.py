import json
import math
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from loss_names import ANY_SHAPE
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from hf_adafocal import AdaFocalCallback, AdaFocalTrainer, CombinedLoss
from hf_adafocal.losses import AdaDualFocalLoss, AdaFocalLoss, CrossEntropyLoss, FLSD53Loss, FocalLoss
from hf_adafocal.losses.batch_loss import TERMS
from hf_adafocal.losses.registry import LOSSES, PER_SAMPLE_LOSSES, build_loss

EACH = pytest.mark.parametrize("term", [term for term in TERMS if term in ANY_SHAPE])
BASES = {
    "cross_entropy": CrossEntropyLoss,
    "focal": FocalLoss,
    "flsd_53": FLSD53Loss,
    "adafocal": AdaFocalLoss,
    "weighted": lambda: CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0, 1.0])),
}


def batch(size=12, classes=4, dtype=torch.float64):
    logits = 2 * torch.randn(size, classes, dtype=dtype)
    labels = logits.argmax(1).where(torch.rand(size) < 0.4, torch.randint(classes, (size,)))
    return logits.requires_grad_(), labels


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def share_of_base(term, weight):
    return 1 - weight if term in ("aurc", "aurc_regularised", "selective_au") else 1


class TestValue:
    @pytest.mark.parametrize("base", BASES)
    @EACH
    def test_it_is_the_base_plus_the_weighted_term_or_a_mixture_of_the_two(self, term, base):
        logits, labels = batch()
        labels[3] = -100
        base = BASES[base]()
        found = CombinedLoss(term, base, auxiliary_weight=0.7)(logits, labels)
        alone = TERMS[term].function(logits, labels)
        torch.testing.assert_close(found, share_of_base(term, 0.7) * base(logits, labels) + 0.7 * alone)

    @pytest.mark.parametrize("base", BASES)
    @pytest.mark.parametrize("count", [None, 7, 29])
    @EACH
    def test_with_weight_zero_it_is_the_base_to_the_bit(self, term, base, count):
        logits, labels = batch(dtype=torch.float32)
        labels[3] = -100
        base = BASES[base]()
        found, alone = (
            CombinedLoss(term, base, auxiliary_weight=0.0)(logits, labels, count),
            base(logits, labels, count),
        )
        assert torch.equal(found, alone)
        torch.testing.assert_close(gradient(found, logits), gradient(alone, logits), rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("term", "weight"),
        [
            *(("mmce", 2), ("mmce_w", 2), ("dca", 5), ("mdca", 1), ("soft_ece", 1), ("soft_ece_label_binned", 1)),
            *(("dece", 0.5), ("aurc", 1), ("aurc_regularised", 0.3), ("selective_au", 1)),
        ],
    )
    def test_the_default_is_cross_entropy_and_the_authors_weight(self, term, weight):
        logits, labels = batch()
        base, alone = CrossEntropyLoss()(logits, labels), TERMS[term].function(logits, labels)
        torch.testing.assert_close(
            CombinedLoss(term)(logits, labels), share_of_base(term, weight) * base + weight * alone
        )

    @EACH
    def test_a_term_that_replaces_its_base_does_not_mix_in_what_is_not_a_number(self, term):
        if share_of_base(term, 1) == 0:
            base = CrossEntropyLoss()
            base.formula = lambda *args, **kwargs: torch.tensor(math.nan)
            assert CombinedLoss(term, base, auxiliary_weight=1.0)(*batch()).isfinite()

    def test_settings_reach_the_term(self):
        logits, labels = batch()
        found = CombinedLoss("mmce_w", auxiliary_weight=1.0, reference_code=True)(logits, labels)
        term = TERMS["mmce_w"].function(logits, labels, reference_code=True)
        torch.testing.assert_close(found, CrossEntropyLoss()(logits, labels) + term)

    @EACH
    def test_ignored_labels_count_neither_in_the_base_nor_in_the_term(self, term):
        logits, labels = batch()
        kept = torch.arange(12) % 3 > 0
        kept &= labels != 2
        found = CombinedLoss(term, ignore_index=2)(logits, labels.where(kept, 2))
        torch.testing.assert_close(found, CombinedLoss(term)(logits[kept], labels[kept]))

    @EACH
    def test_it_takes_the_outputs_of_a_model(self, term):
        logits, labels = batch()
        assert CombinedLoss(term)(SimpleNamespace(logits=logits), labels) == CombinedLoss(term)(logits, labels)

    @EACH
    def test_a_sum_is_the_mean_times_the_counted_labels(self, term):
        logits, labels = batch()
        labels[:2] = -100
        found = CombinedLoss(term, reduction="sum")(logits, labels)
        torch.testing.assert_close(found, 10 * CombinedLoss(term)(logits, labels))

    @EACH
    def test_compiled_in_one_graph_it_equals_eager(self, term):
        torch.compiler.reset()
        logits, labels = batch(dtype=torch.float32)
        labels[::5] = -100
        eager = CombinedLoss(term)
        compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
        found, expected = compiled(logits, labels, 30), eager(logits, labels, 30)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient(found, logits), gradient(expected, logits))

    @pytest.mark.slow
    @pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
    @EACH
    def test_compiled_to_machine_code_it_equals_eager(self, term):
        torch.compiler.reset()
        logits, labels = batch(dtype=torch.float32)
        labels[::5] = -100
        compiled, eager = torch.compile(CombinedLoss(term), fullgraph=True), CombinedLoss(term)
        found, expected = compiled(logits, labels, 30), eager(logits, labels, 30)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient(found, logits), gradient(expected, logits), rtol=1e-4, atol=1e-5)

    @EACH
    def test_bfloat16_logits_give_the_float32_loss_of_the_same_values(self, term):
        logits, labels = batch(dtype=torch.bfloat16)
        loss = CombinedLoss(term)(logits, labels)
        assert loss.dtype == torch.float32 and loss == CombinedLoss(term)(logits.float(), labels)


class TestMicroBatches:
    """A batch is what one call sees; what must not depend on the cut is the scale."""

    @EACH
    def test_equal_micro_batches_average_to_the_mean_of_their_losses(self, term):
        (logits, labels), loss_fn = batch(size=12), CombinedLoss(term)
        halves = [(logits[:6], labels[:6]), (logits[6:], labels[6:])]
        parts = sum(loss_fn(*half, num_items_in_batch=torch.tensor(12)) for half in halves)
        mean = sum(loss_fn(*half) for half in halves) / 2
        torch.testing.assert_close(parts, mean)
        torch.testing.assert_close(gradient(parts, logits), gradient(mean, logits))

    @EACH
    def test_copies_of_one_micro_batch_add_up_to_it(self, term):
        (logits, labels), loss_fn = batch(size=6), CombinedLoss(term)
        torch.testing.assert_close(4 * loss_fn(logits, labels, 24), loss_fn(logits, labels))

    @EACH
    def test_unequal_micro_batches_weigh_by_their_counted_labels(self, term):
        (logits, labels), loss_fn = batch(size=12), CombinedLoss(term, auxiliary_weight=1.0)
        labels[:3], labels[10] = -100, -100  # 1 and 7 counted
        parts = loss_fn(logits[:4], labels[:4], 8) + loss_fn(logits[4:], labels[4:], 8)
        terms = [TERMS[term].function(logits[cut], labels[cut]) for cut in (slice(4), slice(4, 12))]
        base = share_of_base(term, 1) * CrossEntropyLoss()(logits, labels)
        torch.testing.assert_close(parts, base + (1 * terms[0] + 7 * terms[1]) / 8)

    @EACH
    def test_a_micro_batch_without_a_counted_label_adds_nothing(self, term):
        logits, labels = batch(size=3)
        loss = CombinedLoss(term)(logits, torch.full_like(labels, -100), 8)
        assert loss == 0 and not gradient(loss, logits).any()

    def test_the_value_does_depend_on_the_cut(self):
        # One half is over-confident and the other under-confident by as much: together they cancel.
        logits, labels, loss_fn = torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]), CombinedLoss("dca")
        parts = loss_fn(logits[:2], labels[:2], 4) + loss_fn(logits[2:], labels[2:], 4)
        assert loss_fn(logits, labels).item() == pytest.approx(math.log(2))
        assert parts.item() == pytest.approx(math.log(2) + 5 / 2)

    @pytest.mark.parametrize(("term", "base"), [("mmce", "adafocal"), ("dece", "cross_entropy"), ("aurc", None)])
    def test_a_step_of_the_trainer_follows_the_mean_over_micro_batches(self, term, base):
        """SGD without clipping: the update is the gradient. 14 samples in batches of 4 are 4, 4, 4 and 2."""
        data, rate = tiny.token_dataset(14), 1.0

        def loss_fn():
            loss = CombinedLoss(term, BASES[base]() if base else None)
            if base == "adafocal":
                loss.base.reset = lambda: None  # the callback would start from gamma 1
                loss.base.gammas.copy_(torch.linspace(-2, 3, 15))
            return loss

        network, module = tiny.bert().train(), loss_fn()
        start = torch.cat([p.detach().flatten().clone() for p in network.parameters()])
        tokens, labels = torch.tensor(data["input_ids"][:]), torch.tensor(data["labels"][:])
        args = tiny.arguments(
            "unused", max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=4, optim="sgd",
            learning_rate=rate, max_grad_norm=0.0, eval_strategy="steps", eval_steps=100,
        )  # fmt: skip

        class InOrder(AdaFocalTrainer):
            def _get_train_sampler(self, *_):
                return SequentialSampler(data)

        run = InOrder(
            tiny.bert(), args, train_dataset=data, eval_dataset=tiny.token_dataset(60, seed=1), loss=loss_fn()
        )
        run.train()
        update = torch.cat([p.detach().flatten() for p in run.model.parameters()]) - start
        total = 0.0
        for cut in (slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 14)):
            logits = network(tokens[cut]).logits
            total = total + module(logits, labels[cut]) * len(logits) / 14
        total.backward()
        expected = [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]
        expected = -rate * torch.cat([g.flatten() for g in expected])
        assert (update - expected).norm() < 1e-5 * expected.norm()


class TestAdaFocalAsBase:
    def test_the_trainer_moves_the_base_table_and_logs_it(self, tmp_path):
        loss = CombinedLoss("mmce", AdaFocalLoss(num_bins=5))
        run = tiny.trainer(tmp_path, loss=loss, eval_dataset=tiny.token_dataset(60, seed=1))
        run.train()
        logged = [entry["gamma_mean"] for entry in run.state.log_history if "gamma_mean" in entry]
        assert len(logged) == 2 and logged[-1] == pytest.approx(loss.base.gammas.mean().item()) != 1
        assert run.state.stateful_callbacks["adafocal"]["gammas"] == loss.base.gammas.tolist()

    def test_with_weight_zero_the_run_is_that_of_adafocal_alone(self, tmp_path):
        runs = [
            tiny.trainer(tmp_path, loss=loss)
            for loss in (AdaFocalLoss(num_bins=5), CombinedLoss("dca", AdaFocalLoss(num_bins=5), auxiliary_weight=0))
        ]
        for run in runs:
            run.train()
        gammas = [run.loss.adaptive.gammas for run in runs]
        assert torch.equal(*gammas)
        for ours, theirs in zip(*(run.model.parameters() for run in runs), strict=True):
            assert torch.equal(ours, theirs)

    def test_its_callback_serves_a_stock_trainer(self, tmp_path):
        loss = CombinedLoss("mdca", AdaFocalLoss(num_bins=2))
        stats = SimpleNamespace(edges=[0.1, 0.5, 0.9], gap=[0.1, -0.1])
        args = TrainingArguments(
            str(tmp_path), num_train_epochs=1, eval_strategy="epoch", save_strategy="no", use_cpu=True,
            report_to="none",
        )  # fmt: skip
        Trainer(
            tiny.bert(), args, train_dataset=tiny.token_dataset(16), eval_dataset=tiny.token_dataset(16),
            compute_loss_func=loss, callbacks=[AdaFocalCallback(loss.adaptive, lambda: stats)],
        ).train()  # fmt: skip
        assert loss.base.gammas.tolist() == pytest.approx([math.exp(0.1), math.exp(-0.1)])


class TestAdaptive:
    def test_it_is_the_loss_itself_its_base_or_nothing(self):
        loss, dual, smoothing = AdaFocalLoss(), AdaDualFocalLoss(), LOSSES["adaptive_label_smoothing"]()
        assert loss.adaptive is loss and dual.adaptive is dual and smoothing.adaptive is smoothing
        assert CombinedLoss("mmce", loss).adaptive is loss
        assert CombinedLoss("mmce").adaptive is None and FocalLoss().adaptive is None


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"term": "ece"}, "term must be one of mmce, .*found 'ece'"),
            ({"term": "mmce", "weight": torch.ones(3)}, "Class weights make no sense.*base=CrossEntropyLoss"),
            ({"term": "aurc", "weight": torch.ones(3)}, "Class weights make no sense"),
            ({"term": "mmce", "reduction": "none"}, "'mean' or 'sum', found 'none'.*no value per sample"),
            ({"term": "mmce", "reduction": "avg"}, "'mean' or 'sum', found 'avg'"),
            ({"term": "mmce", "auxiliary_weight": -1.0}, "must be a finite number from 0, found -1.0"),
            ({"term": "mmce", "auxiliary_weight": math.nan}, "must be a finite number from 0, found nan"),
            ({"term": "mmce", "auxiliary_weight": math.inf}, "must be a finite number from 0, found inf"),
            ({"term": "aurc", "auxiliary_weight": 1.5}, r"must lie in \[0, 1\], found 1.5"),
            ({"term": "selective_au", "auxiliary_weight": -0.5}, r"must lie in \[0, 1\], found -0.5"),
            ({"term": "aurc", "base": AdaFocalLoss()}, "AdaFocalLoss would do nothing"),
            ({"term": "mmce", "base": CombinedLoss("dca")}, "per-sample loss.*found CombinedLoss"),
            (
                {"term": "mmce", "base": torch.nn.CrossEntropyLoss()},
                "per-sample loss.*found CrossEntropyLoss",
            ),
            ({"term": "mmce", "base": FocalLoss(reduction="sum")}, "reduction 'mean', found 'sum'"),
            ({"term": "mmce", "base": FocalLoss(ignore_index=0), "ignore_index": 1}, "is 1 here and 0 in the base"),
            ({"term": "soft_ece", "num_bins": 0}, "num_bins must be at least 1, found 0"),
            ({"term": "selective_au", "quantile": 2}, "quantile"),
        ],
        ids=str,
    )
    def test_what_makes_no_sense_is_refused_when_the_loss_is_made(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            CombinedLoss(**arguments)

    def test_an_unknown_setting_is_a_type_error_when_the_loss_is_made(self):
        with pytest.raises(TypeError, match="num_bins"):
            CombinedLoss("mmce", num_bins=15)

    def test_the_base_says_which_label_is_ignored(self):
        assert CombinedLoss("mmce", FocalLoss(ignore_index=7)).ignore_index == 7

    def test_it_prints_what_it_is_made_of(self):
        text = repr(CombinedLoss("soft_ece", FocalLoss(2.0), num_bins=5))
        assert "'soft_ece', auxiliary_weight=1.0, num_bins=5" in text and "(base): FocalLoss(gamma=2.0)" in text


class TestRegistry:
    def test_the_names_of_losses_of_a_batch_are_those_users_type(self):
        assert set(LOSSES) - set(PER_SAMPLE_LOSSES) == {
            *("mmce", "mmce_w", "dca", "mdca", "soft_ece", "soft_ece_label_binned", "dece"),
            *("aurc", "aurc_regularised", "selective_au", "topological_focal"),
        }

    @pytest.mark.parametrize("name", ANY_SHAPE)
    def test_every_loss_builds_without_settings_and_trains(self, name):
        logits, labels = batch()
        assert gradient(build_loss(name)(logits, labels, 12), logits).any()

    def test_a_base_is_built_from_its_own_settings(self):
        loss = build_loss("dca", base={"name": "adafocal", "num_bins": 7}, auxiliary_weight=3.0)
        assert type(loss.base) is AdaFocalLoss and loss.base.num_bins == 7 and loss.auxiliary_weight == 3

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"name": "hinge"}, "loss must be one of .*found 'hinge'"),
            ({"name": "focal", "base": {"name": "focal"}}, "'focal' is a per-sample loss and takes no base"),
            ({"name": "mmce", "base": {"name": "dca"}}, "base must be one of .*found 'dca'"),
            ({"name": "mmce", "base": {}}, "base must be one of .*found None"),
        ],
        ids=str,
    )
    def test_names_that_make_no_sense_are_an_error(self, settings, message):
        with pytest.raises(ValueError, match=message):
            build_loss(**settings)


class TestTrainingArguments:
    @EACH
    def test_one_argument_switches_the_trainer_to_it(self, tmp_path, term):
        run = tiny.trainer(tmp_path, loss=term, train_dataset=tiny.token_dataset(16), num_train_epochs=1)
        run.train()
        assert run.loss.term == term and math.isfinite(run.state.log_history[-1]["train_loss"])
        assert "eval_ece" in run.state.log_history[-2]

    def test_weight_and_base_reach_the_loss_and_are_reported(self, tmp_path):
        args = tiny.arguments(tmp_path, loss="mmce", auxiliary_weight=8.0, auxiliary_base="adafocal", gamma_lambda=2.0)
        loss = args.build_loss()
        assert (loss.auxiliary_weight, loss.base.num_bins, loss.base.update_settings["lambda_"]) == (8, 5, 2)
        base = {"name": "adafocal", "num_bins": 5, "gamma_initial": 1.0, "lambda_": 2.0, "switch": 0.2}
        assert args.loss_settings == {"auxiliary_weight": 8.0, "base": {**base, "gamma_min": -2.0, "gamma_max": 20.0}}
        json.dumps(args.loss_settings)

    def test_the_weight_that_is_used_is_reported_if_none_is_given(self, tmp_path):
        settings = tiny.arguments(tmp_path, loss="dca").loss_settings
        assert settings == {"auxiliary_weight": 5.0, "base": {"name": "cross_entropy"}}

    def test_a_combination_with_adafocal_moves_its_gamma(self, tmp_path):
        run = tiny.trainer(tmp_path, loss="soft_ece", auxiliary_base="adafocal", num_train_epochs=1)
        run.train()
        assert run.loss.base.gammas.ne(1).any()
