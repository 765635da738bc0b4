"""Conversations: the forms they are written in, and that the answers of the assistant are all that is learnt."""

import json

import datasets
import pytest
import tokenizers
import transformers

from prefix_tuning.data import chat, pipeline
from prefix_tuning.errors import UserError

WORDS = ["<eos>", "<user>", "<assistant>", "<system>", "a", "b", "c", "d", "e", "{", "}"]
EOS, USER, ASSISTANT, SYSTEM = range(4)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(template=TEMPLATE):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="e"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    special = {"eos_token": "<eos>", "additional_special_tokens": ["<user>", "<assistant>", "<system>"]}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template
    return tokenizer


def ids(text):
    return [WORDS.index(word) for word in text.split()]


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def encode(messages, prompt="{chat}", completion="{chat}", tokenizer=None, **options):
    options = {"max_source": None, "max_target": None, "virtual": len(WORDS)} | options
    dataset = datasets.Dataset.from_list([{"source": "a", "target": "b", "messages": messages}])
    return pipeline.encode(dataset, tokenizer or make_tokenizer(), prompt=prompt, completion=completion, **options)[0]


def test_every_answer_is_a_target():
    example = encode(turns("ab", "c{", "d", "ea"))
    assert example.read == ids("<user> a b <eos> <assistant> c { <eos> <user> d <eos> <assistant> e a")
    assert example.targets == ids("c { <eos> e a <eos>")
    assert example.index == [4, 5, 6, 11, 12, 13]
    # what is predicted at each of these places is what stands behind it, but for the last end token
    assert [example.read[i + 1] for i in example.index[:-1]] == example.targets[:-1]
    batch = pipeline.collate([[example]], 14, 6)
    assert batch["mask"].tolist() == [[1] * 6]


def test_a_conversation_of_one_turn_is_a_pair():
    example = encode(turns("ab", "c"))
    pair = encode(turns("ab", "c"), prompt="<user>ab<eos><assistant>", completion="c").example
    assert example == pair


def test_virtual_tokens_stand_around_a_conversation():
    first, second = len(WORDS), len(WORDS) + 1
    example = encode(turns("a", "b", "c", "d"), prompt="{rows:1}{chat}{rows:1}")
    assert example.read == [
        first,
        *ids("<user> a <eos> <assistant> b <eos> <user> c <eos> <assistant>"),
        second,
        *ids("d"),
    ]
    assert example.index == [4, 5, 11, 12]


def test_what_is_generated_from():
    dataset = datasets.Dataset.from_list([{"source": "-", "messages": turns("a", "b", "c", "d")}])
    options = {"prompt": "{chat}", "max_source": None, "virtual": None}
    prompts = pipeline.encode_prompts(dataset, make_tokenizer(), **options)
    assert prompts == [ids("<user> a <eos> <assistant> b <eos> <user> c <eos> <assistant>")]
    alone = datasets.Dataset.from_list([{"source": "ab"}])
    assert pipeline.encode_prompts(alone, make_tokenizer(), **options) == [ids("<user> a b <eos> <assistant>")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"completion": "c"}, r"expected \{chat\} in both or none"),
        ({"prompt": "a"}, r"expected \{chat\} in both or none"),
        ({"max_target": 3}, r"text\.max_target would cut answers short"),
        ({"max_source": 3}, r"text\.max_source would cut a conversation's form"),
        ({"tokenizer": make_tokenizer(None)}, "the tokenizer has no chat template"),
        ({"tokenizer": make_tokenizer("{{ raise_exception('no system here') }}")}, "refuses a conversation: no system"),
        ({"tokenizer": make_tokenizer("{{ messages | length }}")}, "changes earlier turns of a conversation"),
    ],
)
def test_what_does_not_work(options, message):
    with pytest.raises(UserError, match=message):
        encode(turns("a", "b", "c", "d"), **options)


# --- Files


def written(tmp_path, rows, name="train.jsonl"):
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text)
    return str(tmp_path)


def test_three_forms_of_one_conversation(tmp_path):
    told = turns("a", "b", "c", "d")
    shared = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in told]
    found = chat.load(written(tmp_path, [{"messages": told}, {"conversations": shared}]), "train")
    assert found["messages"][0] == found["messages"][1] == told
    assert found["target"][0] == "d"
    assert found["source"][0] == "user: a\nassistant: b\nuser: c"
    alpaca = {"instruction": "a", "input": "b", "output": "c"}
    path = written(tmp_path, [alpaca, alpaca | {"input": ""}], "test.json")
    found = chat.load(path, "test", system="s")
    assert found["messages"][0][1:] == turns("a\n\nb", "c")
    assert found["messages"][1] == [{"role": "system", "content": "s"}, *turns("a", "c")]
    assert chat.load(path, "test")["source"][:] == ["a\n\nb", "a"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": turns("a")}, r"train\.jsonl:1: turns of user; expected user and assistant by turns, to the end"),
        ({"messages": turns("a", "b")[::-1]}, "turns of assistant, user; expected user and assistant by turns"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "a turn of 'tool' with 'a'; expected a text of system",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "a turn of 'user' with 3; expected a text"),
        ({"messages": "a"}, "messages holds 'a'; expected a list of turns"),
        ({"text": "a"}, "no messages, conversations or instruction; present: text"),
        ({"instruction": "a"}, "no column 'output'; present: instruction"),
    ],
)
def test_rows_that_are_no_conversation(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        chat.load(written(tmp_path, [row]), "train")


def test_files_that_are_no_array(tmp_path):
    for text, message in (("{", "is not JSON"), ("{}", "is not a JSON array of objects")):
        (tmp_path / "train.json").write_text(text)
        with pytest.raises(UserError, match=message):
            chat.load(str(tmp_path), "train")
