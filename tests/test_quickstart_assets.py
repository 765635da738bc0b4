"""The quick start's shipped model and task: small, reproducible, and really unseen by the pretraining text."""

import itertools
import json
import re
from pathlib import Path

import pytest
import transformers

from experiments import quickstart_text
from experiments.quickstart_text import SPLITS, documents, owner, task

ASSETS = Path(__file__).parents[1] / "configs" / "quickstart_assets"
NUMBER = 5000  # of pretraining documents looked at
WORD = re.compile(r"\b[A-Z][a-z]+\b")  # a value, or a word that starts a sentence


def records(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ASSETS / "task" / f"{split}.jsonl").read_text().splitlines()]


def values(split: str) -> set[str]:
    return {value for example in records(split) for value in re.findall(r"\[([^\]]+)\]", example["source"])}


def test_the_assets_are_small():
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) <= 8 * 2**20


def test_the_generator_is_deterministic():
    first, again, other = (list(itertools.islice(documents(seed), 50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_the_shipped_task_is_the_generators(tmp_path):
    quickstart_text.write_task(tmp_path)
    for split, number in SPLITS.items():
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (ASSETS / "task" / f"{split}.jsonl").read_bytes()
        assert len(records(split)) == number


@pytest.mark.parametrize("split", SPLITS)
def test_every_value_belongs_to_its_split_and_is_in_the_target(split):
    for example in records(split):
        for value in re.findall(r"\[([^\]]+)\]", example["source"]):
            assert owner(value) == split
            assert re.search(rf"\b{value}\b", example["target"])
            assert WORD.fullmatch(value)


def test_no_value_of_the_task_is_seen_in_pretraining_or_in_another_split():
    pretraining = {word for text in itertools.islice(documents(1), NUMBER) for word in WORD.findall(text)}
    assert sum(owner(word) == "pretraining" for word in pretraining) > NUMBER  # so the pattern finds values
    for one, other in itertools.combinations(map(values, SPLITS), 2):
        assert not one & other
    for split in SPLITS:
        assert not values(split) & pretraining


def test_the_tasks_format_is_unknown_to_pretraining():
    written = re.compile(r"\w\[")
    assert all(written.search(example["source"]) for split in SPLITS for example in records(split))
    assert not any(written.search(text) for text in itertools.islice(documents(1), NUMBER))


def test_the_tokenizer_keeps_every_text():
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / "model")
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    texts = [*itertools.islice(documents(2), 100), next(task("test"))["source"], "Zürich — 東京 \t\r\n", " a  b "]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)


def test_a_value_has_the_same_tokens_wherever_it_stands():
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / "model")
    ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("Lestemgar"))
    for text in ("name[Lestemgar]", "at Lestemgar.", "Lestemgar", '"Lestemgar"'):
        found = tokenizer(text)["input_ids"]
        assert any(found[i : i + len(ids)] == ids for i in range(len(found)))
