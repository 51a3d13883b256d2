"""AdaFocal over tokens through TRL: the loss of whole logits, gamma that moves, the calibration of answers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from datasets import Dataset
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from hf_adafocal.losses import AdaFocalLoss, CrossEntropyLoss, FocalLoss, LabelSmoothingLoss
from hf_adafocal.losses.functional import focal_loss
from hf_adafocal.metrics.scores import calibration_report
from hf_adafocal.models import train_word_level_tokenizer

trl = pytest.importorskip("trl", reason="trl is the extra `sft`")

from trl import SFTConfig, SFTTrainer  # noqa: E402

from hf_adafocal.training.sft import AdaFocalSFTTrainer  # noqa: E402

WORDS = [f"w{index}" for index in range(40)]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "head_dim": 8,
}


def tokenizer():
    found = train_word_level_tokenizer([" ".join(WORDS)], max_length=32)
    found.add_special_tokens({"eos_token": "[CLS]"})
    return found


def texts(size, seed, prompts=False):
    """Each word mostly follows from the one before."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(size):
        words = [int(generator.integers(40))]
        for _ in range(int(generator.integers(6, 12))):
            words.append((words[-1] + 3) % 40 if generator.random() < 0.8 else int(generator.integers(40)))
        rows.append([WORDS[word] for word in words])
    if prompts:
        split = {
            "prompt": [" ".join(row[:4]) for row in rows],
            "completion": [" " + " ".join(row[4:]) for row in rows],
        }
        return Dataset.from_dict(split)
    return Dataset.from_dict({"text": [" ".join(row) for row in rows]})


def llama(**settings):
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer()), **{**SIZES, **settings}))


def gemma():
    set_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=len(tokenizer()), final_logit_softcapping=2.0, **SIZES))


def trainer(folder, model=None, loss=None, train=None, held_out=None, cls=AdaFocalSFTTrainer, **settings):
    common = {
        "num_train_epochs": 2, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no",
        "bf16": False, "lr_scheduler_type": "constant", "gradient_checkpointing": False, "max_length": 32,
    }  # fmt: skip
    args = SFTConfig(str(folder), **{**common, **settings})
    given = {} if cls is SFTTrainer else {"loss": loss}
    return cls(
        model or llama(), args, train_dataset=train or texts(64, 0), eval_dataset=held_out or texts(24, 1),
        processing_class=tokenizer(), **given,
    )  # fmt: skip


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def whole(run, dataset=None):
    """Logits and labels of all predicted tokens of the evaluation set, by plain forward passes."""
    logits, labels, prompts = [], [], []
    for row in run.eval_dataset if dataset is None else dataset:
        ids = torch.tensor([row["input_ids"]])
        run.model.eval()
        with torch.no_grad():
            logits.append(run.model(input_ids=ids).logits[0, :-1].double())
        labels.append(ids[0, 1:])
        prompts.append(torch.tensor(row["labels"][1:]) == -100)
    return torch.cat(logits), torch.cat(labels), torch.cat(prompts)


@pytest.mark.parametrize("gamma", [2.0, -1.0, 0.0, 3.5])
class TestLoss:
    def test_value_and_gradient_are_those_of_focal_loss_on_whole_logits(self, tmp_path, gamma):
        run = trainer(tmp_path, loss=FocalLoss(gamma))
        batch = next(iter(run.get_train_dataloader()))
        run.model.train()
        loss = run.compute_loss(run.model, dict(batch))
        found = torch.autograd.grad(loss, list(run.model.parameters()))
        logits = run.model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
        expected = focal_loss(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), gamma)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
        for mine, theirs in zip(found, torch.autograd.grad(expected, list(run.model.parameters())), strict=True):
            assert (mine - theirs).abs().max() < 1e-7

    def test_accumulated_micro_batches_weigh_every_token_the_same(self, tmp_path, gamma):
        settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
        steps = []
        for size, accumulation in ((16, 1), (4, 4)):
            run = trainer(
                tmp_path, loss=FocalLoss(gamma), train=texts(16, 0), per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation, **settings,
            )  # fmt: skip
            run.train()
            steps.append(weights(run.model) - weights(llama()))
        assert (steps[0] - steps[1]).norm() / steps[0].norm() < 1e-5


def train(folder, batch_size, processes):
    """Two epochs of 32 texts, two updates of gamma; write what this process ended with."""
    torch.set_num_threads(1)
    run = trainer(
        folder, llama().double(), AdaFocalLoss(num_bins=5), train=texts(32, 0), held_out=texts(21, 1),
        eval_strategy="epoch", per_device_train_batch_size=batch_size, per_device_eval_batch_size=batch_size,
        optim="sgd", learning_rate=0.1,
    )  # fmt: skip
    assert run.args.world_size == processes
    run.train()
    found = run.evaluate()
    result = {name: found[f"eval_{name}"] for name in ("accuracy", "nll", "brier", "ece", "ada_ece")}
    result |= {
        "weights": weights(run.model).tolist(),
        "table": run.loss.table(),
        "moved": run.adaptive_callback.updates,
    }
    (folder / f"rank-{run.args.process_index}.json").write_text(json.dumps(result))


class TestTwoProcesses:
    def test_they_have_one_table_the_metrics_and_the_weights_of_one_process(self, tmp_path):
        one, two = tmp_path / "one", tmp_path / "two"
        for folder in (one, two):
            folder.mkdir()
        debug_launcher(train, args=(two, 4, 2), num_processes=2)
        train(one, 8, 1)
        expected, first, second = (
            json.loads((folder / f"rank-{rank}.json").read_text()) for folder, rank in ((one, 0), (two, 0), (two, 1))
        )
        assert first == second and first["moved"] == expected["moved"] == 2
        assert np.ptp(first["table"]["gammas"]) > 0
        for name, values in expected.pop("table").items():
            np.testing.assert_allclose(first["table"][name], values, rtol=0, atol=1e-5)
        for name, value in expected.items():
            np.testing.assert_allclose(first[name], value, rtol=0, atol=1e-5, err_msg=name)


class TestTraining:
    def test_cross_entropy_ends_in_the_weights_of_the_stock_sft_trainer(self, tmp_path):
        stock, run = trainer(tmp_path, cls=SFTTrainer), trainer(tmp_path, loss=CrossEntropyLoss())
        stock.train(), run.train()
        assert torch.equal(weights(stock.model), weights(run.model)) and run.adaptive_callback is None

    @pytest.mark.parametrize("strategy", ["no", "epoch"])
    def test_gamma_moves_by_the_gaps_of_the_tokens(self, tmp_path, strategy):
        run = trainer(tmp_path, loss=AdaFocalLoss(num_bins=5), eval_strategy=strategy)
        run.train()
        assert run.adaptive_callback.updates == 2 and run.loss.gammas.ne(1).all()
        stats = run.recorder.calibration.statistics(5)
        torch.testing.assert_close(run.loss.edges.double(), torch.as_tensor(stats.edges))
        found = run.evaluate()
        assert run.adaptive_callback.updates == 2 and found["eval_accuracy"] > 0.2

    def test_the_table_is_saved_and_a_resumed_run_goes_on_with_it(self, tmp_path):
        settings = {"loss": AdaFocalLoss(num_bins=5), "eval_strategy": "epoch", "save_strategy": "epoch"}
        run = trainer(tmp_path, **settings)
        run.train()
        table = run.loss.table()
        again = trainer(tmp_path, **{**settings, "loss": AdaFocalLoss(num_bins=5)})
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
        assert again.loss.table() == table and torch.equal(weights(again.model), weights(run.model))

    def test_lora_trains_and_is_evaluated(self, tmp_path):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
        run = trainer(tmp_path, model, eval_strategy="epoch")
        run.train()
        assert run.adaptive_callback.updates == 2 and run.evaluate()["eval_nll"] > 0


class TestEvaluation:
    @pytest.mark.parametrize("model", [llama, gemma])
    def test_metrics_are_those_of_whole_logits(self, tmp_path, model):
        run = trainer(tmp_path, model(), per_device_eval_batch_size=5)
        found = run.evaluate()
        logits, labels, _ = whole(run)
        expected = calibration_report(logits.softmax(-1).numpy(), labels.numpy(), 15)
        for name in ("accuracy", "nll", "brier", "ece", "ada_ece"):
            assert found[f"eval_{name}"] == pytest.approx(expected[name], abs=1e-6), name
        assert found["eval_loss"] == found["eval_nll"] and not any("text" in name for name in found)

    def test_where_a_prompt_is_masked_they_are_of_the_answer_and_text_of_both(self, tmp_path):
        run = trainer(tmp_path, train=texts(32, 0, prompts=True), held_out=texts(24, 1, prompts=True))
        found = run.evaluate()
        logits, labels, prompt = whole(run)
        p, labels = logits.softmax(-1).numpy(), labels.numpy()
        assert 0 < prompt.sum() < len(labels)
        for prefix, rows in (("eval_", ~prompt.numpy()), ("eval_text_", np.ones(len(labels), dtype=bool))):
            expected = calibration_report(p[rows], labels[rows], 15)
            for name in ("accuracy", "nll", "ece", "ada_ece"):
                assert found[f"{prefix}{name}"] == pytest.approx(expected[name], abs=1e-6), (prefix, name)
        assert len(run.text_recorder.samples["eval"]) > len(run.recorder.samples["eval"])

    def test_packed_texts_are_those_of_single_ones(self, tmp_path):
        single = trainer(tmp_path).evaluate()
        packed = trainer(tmp_path, padding_free=True, max_length=None).evaluate()
        assert packed["eval_nll"] == pytest.approx(single["eval_nll"], abs=1e-5)

    def test_the_logits_of_all_tokens_are_never_made(self, tmp_path):
        run = trainer(tmp_path, eval_strategy="epoch")
        seen = []
        run.model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        run.train()
        assert not seen and run.adaptive_callback.updates == 2

    def test_of_several_sets_the_one_called_calibration_moves_gamma(self, tmp_path):
        sets = {"calibration": texts(24, 1), "other": texts(8, 2)}
        run = trainer(tmp_path, held_out=sets, eval_strategy="epoch")
        run.train()
        assert run.adaptive_callback.updates == 2
        assert {"eval_calibration_ece", "eval_other_ece"} <= {name for log in run.state.log_history for name in log}


class TestWhatIsRefused:
    def test_no_held_out_data(self, tmp_path):
        trl_args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
        for given in (None, {"validation": texts(8, 1)}):
            with pytest.raises(ValueError, match="give an `eval_dataset`"):
                AdaFocalSFTTrainer(llama(), trl_args, train_dataset=texts(8, 0), eval_dataset=given)

    @pytest.mark.parametrize("loss", [LabelSmoothingLoss(0.1), AdaFocalLoss(weight=torch.ones(3))])
    def test_a_loss_that_needs_more_than_the_probability_of_the_label(self, tmp_path, loss):
        with pytest.raises(ValueError, match="must be one of the focal family"):
            trainer(tmp_path, loss=loss)

    def test_another_loss_of_trl(self, tmp_path):
        with pytest.raises(ValueError, match="leave them as they are"):
            trainer(tmp_path, loss_type="dft")

    def test_a_head_that_does_something_else_with_its_logits(self, tmp_path):
        run = trainer(tmp_path)
        run.model.config.logit_scale = 50.0  # after TRL has read that there is none
        with pytest.raises(ValueError, match="does more with its logits"):
            run.evaluate()


@pytest.mark.slow
def test_the_script_trains_on_a_folder_of_texts_and_prints_the_calibration(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    texts(120, 0).to_json(str(tmp_path / "data" / "train.jsonl"))
    flags = {
        "model_name_or_path": tmp_path / "base", "dataset": tmp_path / "data", "output_dir": tmp_path / "out",
        "use_cpu": "true", "bf16": "false", "learning_rate": "1e-2", "disable_tqdm": "true", "report_to": "none",
    }  # fmt: skip
    line = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    script = Path(__file__).parents[2] / "scripts" / "train_sft.py"
    done = subprocess.run([sys.executable, str(script), *line], check=True, capture_output=True, text=True)
    assert "'eval_ece': " in done.stdout.splitlines()[-1] and (tmp_path / "out" / "model.safetensors").is_file()
