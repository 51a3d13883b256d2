"""Sentence pairs, and the length at which texts are cut."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import AutoConfig, BertConfig, GPT2Config, RobertaConfig, T5Config

from hf_adafocal.data.encoding import encode_texts, longest_input
from hf_adafocal.data.loading import Splits, load_splits
from hf_adafocal.models import train_word_level_tokenizer

ANIMALS = ["cat", "dog", "emu", "fox"]


def pairs(size: int = 40, first: str = "premise", second: str = "hypothesis") -> Dataset:
    rows = [(f"{ANIMALS[i % 4]} w{i}", f"{ANIMALS[i % 3]} v{i}") for i in range(size)]
    one, two = zip(*rows, strict=True)
    return Dataset.from_dict({first: one, second: two, "label": [i % 2 for i in range(size)]})


class TestSentencePairs:
    @pytest.mark.parametrize(
        "names", [("premise", "hypothesis"), ("sentence1", "sentence2"), ("question", "sentence")]
    )
    def test_known_pairs_are_found(self, tmp_path, names):
        pairs(40, *names).to_parquet(str(tmp_path / "train.parquet"))
        splits = load_splits(str(tmp_path))
        assert set(splits.train.column_names) == {"text", "text_pair", "label"}
        given = {(row[names[0]], row[names[1]]) for row in pairs(40, *names)}
        assert {(row["text"], row["text_pair"]) for part in splits[:3] for row in part} == given

    def test_other_pairs_can_be_named(self, tmp_path):
        pairs(40, "context", "claim").to_parquet(str(tmp_path / "train.parquet"))
        splits = load_splits(str(tmp_path), input_column="context, claim")
        assert splits.train["text_pair"][0].split()[1][0] == "v"
        with pytest.raises(ValueError, match=r"or two of texts; found context \(Value.*label"):
            load_splits(str(tmp_path), input_column="context,label")

    def test_rows_are_copies_only_if_both_texts_are(self, tmp_path):
        train = Dataset.from_dict(
            {"premise": ["a"] * 20, "hypothesis": [f"h{i}" for i in range(20)], "label": [0, 1] * 10}
        )
        test = Dataset.from_dict({"premise": ["a", "a"], "hypothesis": ["h0", "other"], "label": [0, 1]})
        for name, part in {"train": train, "test": test}.items():
            part.to_parquet(str(tmp_path / f"{name}.parquet"))
        splits = load_splits(str(tmp_path))
        assert len(splits.train) + len(splits.calibration) == 19

    def test_both_texts_are_tokenized_with_a_separator_between_them(self):
        tokenizer = train_word_level_tokenizer([" ".join(ANIMALS)], 100)
        data = pairs(4).rename_columns({"premise": "text", "hypothesis": "text_pair"})
        encoded = encode_texts(Splits(data, data.select([]), data.select([])), tokenizer)
        cat, start = tokenizer.convert_tokens_to_ids("cat"), tokenizer.cls_token_id
        assert encoded.train[0]["input_ids"] == [
            start,
            cat,
            tokenizer.unk_token_id,
            start,
            cat,
            tokenizer.unk_token_id,
        ]
        assert encoded.train.column_names == ["labels", "input_ids", "attention_mask"]


def tokenizer(limit: int | float):
    made = train_word_level_tokenizer(["w"], 10)
    made.model_max_length = limit
    return made


class TestLength:
    @pytest.mark.parametrize(
        ("limit", "config", "expected"),
        [
            (10**30, BertConfig(max_position_embeddings=512), 512),
            (10**30, RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
            (10**30, GPT2Config(n_positions=1024), 1024),
            (77, BertConfig(max_position_embeddings=512), 77),
            (10**30, None, None),
            (10**30, AutoConfig.for_model("xlnet"), None),
            (512, T5Config(), 512),
        ],
    )
    def test_the_limit_is_the_least_of_tokenizer_and_model(self, limit, config, expected):
        assert longest_input(SimpleNamespace(model_max_length=limit), config) == expected

    def splits(self) -> Splits:
        long = Dataset.from_dict({"text": ["w " * 5000], "label": [0]})
        return Splits(long, long.select([]), long.select([]))

    def test_a_long_text_is_cut_at_the_models_own_limit(self):
        encoded = encode_texts(self.splits(), tokenizer(10**30), config=BertConfig(max_position_embeddings=64))
        assert len(encoded.train[0]["input_ids"]) == 64

    def test_without_any_limit_it_is_an_error(self):
        with pytest.raises(ValueError, match="Neither the tokenizer nor the model limits the length.*Set max_length"):
            encode_texts(self.splits(), tokenizer(10**30))
        assert len(encode_texts(self.splits(), tokenizer(10**30), 9).train[0]["input_ids"]) == 9

    def test_more_tokens_than_the_model_takes_are_cut_with_a_warning(self, caplog, log_propagates):
        encoded = encode_texts(self.splits(), tokenizer(10**30), 256, config=BertConfig(max_position_embeddings=64))
        assert len(encoded.train[0]["input_ids"]) == 64
        assert "cut at 64 tokens, which is all that the model takes, instead of 256" in caplog.text
