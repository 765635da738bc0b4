"""Tasks whose answers are chosen: how rows become examples, what their objectives compute, and whole runs on BERT."""

import json
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
import transformers

import run
from prefix_tuning import models, setup
from prefix_tuning.data import pipeline, tasks
from prefix_tuning.errors import UserError
from prefix_tuning.files import read_lines
from prefix_tuning.models import loading
from prefix_tuning.objectives import OBJECTIVES
from prefix_tuning.train_step import make_train_step
from prefix_tuning.types import Adaptation, Batch, Method, Objective, TrainState

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "a", "b", "c", "d", "e", "f", "##x", "##y", "good", "bad", "?"]
PAD, CLS, SEP, MASK = range(4)
V = len(WORDS)


def make_tokenizer():
    """A WordPiece tokenizer of a few letters."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)


TOKENIZER = make_tokenizer()


def ids(text):
    return [WORDS.index(word) for word in text.split()]


def encode(task, rows, prompt, first=True, **options):
    return task.encode(datasets.Dataset.from_list(rows), TOKENIZER, first, prompt=prompt, virtual=V, **options)


# --- From rows to examples


def test_classify_by_hand():
    task = tasks.classify(labels=("no", "yes"))
    rows = [{"source": "a bx", "source2": "c d", "label": "yes"}, {"source": "e", "source2": "f", "label": "no"}]
    found = encode(task, rows, "{cls}{source}{sep}{source2}{sep}")
    assert found.examples[0].read == ids("[CLS] a b ##x [SEP] c d [SEP]")
    assert found.examples[0].types == [0] * 5 + [1] * 3
    assert [(x.index, x.targets) for x in found.examples] == [([0], [1]), ([0], [0])]
    last = encode(task, rows, "{source} ?", first=False).examples[0]
    assert (last.read, last.index) == (ids("a b ##x ?"), [3])
    masked = encode(task, rows, "{cls}{source} {mask}{sep}").examples[0]
    assert (masked.read, masked.index) == (ids("[CLS] a b ##x [MASK] [SEP]"), [4])
    behind = encode(task, rows, "{rows:2}{cls}{source}{sep}{source2}{rows:1}").examples[1]
    assert (behind.read, behind.index) == ([V, V + 1, *ids("[CLS] e [SEP] f"), V + 2], [2])
    scores = [np.float32([[0.1, 0.2]]), np.float32([[2.0, 0.2]])]
    assert tasks.answers(task, found, scores) == ["yes", "no"]
    assert task.references(rows[0]) == ["yes"]
    assert task.source(rows[0]) == "a bx\tc d"


def test_the_longer_text_is_cut_first():
    task = tasks.classify(labels=("no", "yes"))
    rows = [{"source": "a b c d e", "source2": "f a"}, {"source": "a", "source2": "b"}]
    found = encode(task, rows, "{cls}{source}{sep}{source2}{sep}", max_length=7).examples
    assert found[0].read == ids("[CLS] a b [SEP] f a [SEP]")
    assert found[1].read == ids("[CLS] a [SEP] b [SEP]")
    assert encode(task, rows, "{cls}{source}{sep}", max_length=4).examples[0].read == ids("[CLS] a b [SEP]")
    with pytest.raises(UserError, match=r"row 0: text\.max_length leaves no token of source, source2"):
        encode(task, rows, "{cls}{source}{sep}{source2}{sep}", max_length=3)


def test_a_mask_that_is_cut_off_is_missed(monkeypatch):
    """A text may be more tokens once it is cut; then the template's end goes."""
    monkeypatch.setattr(tasks, "shortened", lambda dataset, *_: dataset)
    task, rows = tasks.classify(labels=("no", "yes")), [{"source": "a b c"}]
    with pytest.raises(UserError, match=r"row 0: text\.max_length=3 cuts {mask} off; expected more"):
        encode(task, rows, "{source} {mask}", max_length=3)


def test_tag_by_hand():
    task = tasks.tag(labels=("O", "B-X", "I-X"))
    rows = [{"words": ["a", "bxy", "c"], "tags": ["O", "B-X", "I-X"]}]
    found = encode(task, rows, "{cls}{words}{sep}")
    assert found.examples[0].read == ids("[CLS] a b ##x ##y c [SEP]")
    assert (found.examples[0].index, found.examples[0].targets) == ([1, 2, 5], [0, 1, 2])
    scores = np.float32([[[9, 0, 0], [0, 9, 0], [0, 0, 9], [0, 9, 0]]])  # a batch has more targets than this row
    assert tasks.answers(task, found, scores) == ["O B-X I-X"]
    cut = encode(task, rows, "{cls}{words}{sep}", max_length=6)
    assert cut.examples[0].read == ids("[CLS] a b ##x ##y [SEP]")
    assert tasks.answers(task, cut, scores) == ["O B-X O"]
    assert task.references(rows[0]) == ["O B-X I-X"]
    plain = encode(task, [{"source": "a bxy"}], "{cls}{words}{sep}")
    assert plain.examples[0].read == ids("[CLS] a b ##x ##y [SEP]")


def test_choice_by_hand():
    task = tasks.choice()
    rows = [{"source": "a", "choices": ["b c", "d"], "label": 1}, {"source": "e", "choices": ["f"] * 3, "label": 0}]
    found = encode(task, rows, "{cls}{source}{sep}{choice}{sep}")
    example = found.examples[0]
    assert example.read == ids("[CLS] a [SEP] b c [SEP] [CLS] a [SEP] d [SEP]")
    assert example.types == [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1]
    assert (example.parts, example.index, example.targets) == ([6, 5], [0, 6], [0, 1])
    batch = pipeline.collate([[x] for x in found.examples], 16, 3)
    assert batch["segments"][0].tolist() == [1] * 6 + [2] * 5 + [0] * 5
    assert batch["positions"][0].tolist() == [*range(6), *range(5), *[0] * 5]
    assert batch["mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert tasks.answers(task, found, np.float32([[1, 2, -np.inf], [0, 0, 1]])) == ["d", "f"]
    assert task.references(rows[0]) == ["d"]


QUESTION = {"source": "a ?", "source2": "b c dx e f a b c", "answers": ["dx e"], "starts": [4]}
SPAN = "{cls}{source}{sep}{source2}{sep}"


def test_span_by_hand():
    task = tasks.span()
    found = encode(task, [QUESTION], SPAN)
    example = found.examples[0]
    assert example.read == ids("[CLS] a ? [SEP] b c d ##x e f a b c [SEP]")
    assert example.types == [0] * 4 + [1] * 9 + [0]
    assert (example.index, example.targets) == ([6, 8], [0, 0])
    score = np.full((1, 20, 2), -9, np.float32)
    score[0, 6, 0] = score[0, 8, 1] = 5
    assert tasks.answers(task, found, score) == ["dx e"]
    score[0, 0] = 6  # no answer is better than that one
    assert tasks.answers(task, found, score) == [""]
    backwards = np.full((1, 20, 2), -9, np.float32)
    backwards[0, 8, 0] = backwards[0, 6, 1] = 5
    assert tasks.answers(task, found, backwards) != ["dx e"]
    nothing = encode(task, [QUESTION | {"answers": [], "starts": []}], SPAN)
    assert nothing.examples[0].index == [0, 0]
    assert task.references(QUESTION | {"answers": []}) == [""]


def test_long_contexts_are_read_in_windows():
    task = tasks.span()
    found = encode(task, [QUESTION, QUESTION | {"source2": "dx e", "starts": [0]}], SPAN, max_length=10, stride=2)
    assert found.owners == [0, 0, 0, 1]
    windows = [example.read[4:-1] for example in found.examples]
    assert windows == [ids("b c d ##x e"), ids("##x e f a b"), ids("a b c"), ids("d ##x e")]
    assert [x.index for x in found.examples] == [[6, 8], [0, 0], [0, 0], [4, 6]]
    score = np.zeros((4, 10, 2), np.float32)
    score[:, 0] = -1
    score[2, 5] = 7  # the second token of the third window
    assert tasks.answers(task, found, score)[0] == "b"


def test_without_virtual_tokens():
    """The untuned model reads what is left; a hidden state that was a virtual token's is the one before it."""
    example = pipeline.Example([V, 5, 6, V + 1, 7], [1, 3], [0, 1], [0, 0, 1, 1, 1], parts=[2, 3])
    bare = pipeline.Example([5, 6, 7], [0, 1], [0, 1], [0, 1, 1], parts=[1, 2])
    assert pipeline.without(example, V) == bare
    assert pipeline.without(bare, V) == bare


def test_rows_that_do_not_fit_their_task():
    classify, tag, span, choice = (
        tasks.classify(labels=("no", "yes")),
        tasks.tag(labels=("O", "B")),
        *(make() for make in (tasks.span, tasks.choice)),
    )
    pair, chosen = {"source": "a", "label": "maybe"}, {"source": "a", "choices": ["b", "c"], "label": 2}
    for task, row, prompt, options, message in (
        (classify, pair, "{source}", {}, r"row 0: label 'maybe'; valid, by objective\.labels: no, yes"),
        (classify, {"source": "", "label": "no"}, "{source}", {}, "row 0: the prompt '{source}' has no tokens"),
        (tag, {"words": ["a"], "tags": ["I"]}, "{words}", {}, r"row 0: tags 'I'; valid, by objective\.labels: O, B"),
        (tag, {"words": ["a"], "tags": ["O"]}, "{cls}", {}, r"must have {words} once"),
        (tag, {"words": ["a"], "tags": ["O", "B"]}, "{words}", {}, "row 0: 2 tags for 1 words; expected one each"),
        (
            classify,
            {"source": "a", "label": "no"},
            "{cls}{mask}",
            {"max_length": 1},
            "row 0: text.max_length leaves no",
        ),
        (choice, chosen, "{source} {choice}", {}, "row 0: label 2; expected 0 to 1"),
        (choice, chosen | {"label": 1}, "{source}", {}, "must have {choice}, where each of the choices stands"),
        (span, QUESTION, SPAN, {"stride": -1}, "text.stride is -1; expected at least 0 tokens of overlap"),
        (span, QUESTION, "{cls}{source}", {}, "must have {source2} once"),
        (span, QUESTION, "{source}{source2}", {}, "must begin with {cls}, which stands for no answer"),
        (span, QUESTION, SPAN, {"max_length": 8, "stride": 3}, r"leaves 3 of text\.max_length=8 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            encode(task, [row], prompt, **options)
    with pytest.raises(UserError, match="objective 'span' needs an encoder"):
        encode(span, [QUESTION], SPAN, first=False)


# --- What is computed

D = 6


class Stub:
    """A model whose hidden states are given, D wide, and whose logits are their first V numbers."""

    config, entry, pool = {"initializer_range": 0.5}, "encoder", None
    sites = {"encoder": type("Sites", (), {"width": D})}  # noqa: RUF012

    def __init__(self, hidden):
        self.hidden = lambda params, adaptation, batch: jnp.asarray(hidden, jnp.float32)
        self.unembed = lambda params, x: x


def batch_of(examples, length, targets, filler=1):
    return Batch(**pipeline.collate([*([x] for x in examples), *[[]] * filler], length, targets))


def head(outputs):
    rng = np.random.default_rng(1)
    return {"kernel": rng.normal(size=(D, outputs)).astype(np.float32), "bias": np.float32(rng.normal(size=outputs))}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("name", ["classify", "tag"])
def test_loss_of_classes_by_hand(name):
    hidden = np.random.default_rng(0).normal(size=(3, 4, D))
    objective = OBJECTIVES[name](None, labels=("x", "y", "z"))
    examples = [pipeline.Example([5, 6, 7, 8], [2], [1]), pipeline.Example([5, 6], [0], [2])]
    own = head(3)
    loss, count, sums = objective.loss(Stub(hidden), {"head": own}, Adaptation(), batch_of(examples, 4, 1))
    p = softmax(np.stack([hidden[0, 2], hidden[1, 0]]) @ own["kernel"] + own["bias"])
    np.testing.assert_allclose(loss, -np.log(p[0, 1]) - np.log(p[1, 2]), rtol=1e-5)
    assert (float(count), float(sums["examples"]), float(sums["tokens"])) == (2, 2, 6)
    assert float(sums["correct"]) == (p.argmax(1) == [1, 2]).sum()
    assert "nll" not in sums  # there is no perplexity of it
    fresh = objective.head(jax.random.key(0), Stub(hidden))
    assert fresh["kernel"].shape == (D, 3)
    assert not fresh["bias"].any()
    assert 0.3 < np.std(fresh["kernel"]) < 0.7


def test_classes_by_the_mean_of_their_text():
    """Of its own segment, without padding and virtual tokens, whichever token is the target's."""
    hidden = np.random.default_rng(0).normal(size=(2, 6, D))
    objective = OBJECTIVES["classify"](None, labels=("x", "y", "z"), pooling="mean")
    one, two = pipeline.Example([5, V, 7], [0], [1]), pipeline.Example([5, 6], [1], [2])
    packed = Batch(**pipeline.collate([[one, two], []], 6, 2))
    stub, own = Stub(hidden), head(3)
    stub.vocabulary = V
    found = objective.predict(stub, {"head": own}, Adaptation(), packed)
    means = np.stack([hidden[0, [0, 2]].mean(0), hidden[0, 3:5].mean(0)])
    np.testing.assert_allclose(found[0], means @ own["kernel"] + own["bias"], rtol=1e-5)
    assert np.isfinite(found).all()
    with pytest.raises(UserError, match=r"objective\.words are predicted at one token without a head"):
        OBJECTIVES["classify"](TOKENIZER, labels=("pos", "neg"), words=("good", "bad"), pooling="mean")
    with pytest.raises(UserError, match=r"objective\.pooling"):
        OBJECTIVES["classify"](TOKENIZER, labels=("pos", "neg"), pooling="max")


@pytest.mark.parametrize("name", ["classify", "tag", "choice", "span"])
def test_dropout_is_on_what_the_head_reads_and_only_with_a_key(name):
    hidden = np.ones((1, 3, 4000))
    labels = {"labels": ("x", "y")} if name in ("classify", "tag") else {}
    objective = OBJECTIVES[name](None, dropout=0.25, **labels)
    own = {"kernel": np.full((4000, 2), 1 / 4000, np.float32), "bias": np.zeros(2, np.float32)}
    batch = batch_of([pipeline.Example([5, 6, 7], [0], [1], types=[1, 1, 1])], 3, 1, filler=0)
    given = (Stub(hidden), {"head": own}, Adaptation(), batch)
    np.testing.assert_allclose(objective.predict(*given), 1.0, rtol=1e-4)
    drawn = np.asarray(objective.predict(*given, jax.random.key(0)))
    assert 1e-3 < np.abs(drawn - 1.0).max() < 0.05  # the mean is kept
    with pytest.raises(UserError, match=r"objective\.dropout must be in \[0, 1\), got 1.0"):
        OBJECTIVES[name](None, dropout=1.0, **labels)


def test_a_step_draws_the_heads_dropout():
    """From a key that differs from step to step; evaluation draws nothing."""
    seen = []

    def loss(model, params, adaptation, batch, key=None):
        seen.append(key)
        return jnp.sum(params["w"] * jax.random.normal(key)), jnp.float32(1), {}

    method = Method(lambda *_: None, lambda frozen, trainable, key=None: (trainable, Adaptation()))
    tx = optax.sgd(1.0)
    batch = batch_of([pipeline.Example([5], [0], [0])], 1, 1, filler=0)
    batch = jax.tree.map(lambda x: x[None], batch)
    start = {"w": jnp.zeros(1)}
    state = TrainState(jnp.int32(0), start, tx.init(start), jax.random.key(0))
    step = jax.jit(make_train_step(None, method, Objective(loss), tx))
    first, _ = step({}, state, batch)
    second, _ = step({}, first, batch)
    moved = [float(first.trainable["w"][0]), float(second.trainable["w"][0] - first.trainable["w"][0])]
    assert all(moved)
    assert moved[0] != moved[1]


def test_classes_by_words_of_the_vocabulary():
    hidden = np.random.default_rng(0).normal(size=(2, 3, V))
    objective = OBJECTIVES["classify"](TOKENIZER, labels=("pos", "neg"), words=("good", "bad"))
    assert objective.head is None
    batch = batch_of([pipeline.Example([5, MASK, 6], [1], [1])], 3, 1)
    found = objective.predict(Stub(hidden), {}, Adaptation(), batch)[0, 0]
    np.testing.assert_allclose(found, hidden[0, 1, [WORDS.index("good"), WORDS.index("bad")]], rtol=1e-6)
    for words, message in (
        (("good",), "must be a tuple with a word for each of pos, neg"),
        (("good", "ax"), "'ax' is 2 tokens; expected words of one token"),
        (("good", "good"), "are not all different tokens"),
    ):
        with pytest.raises(UserError, match=message):
            OBJECTIVES["classify"](TOKENIZER, labels=("pos", "neg"), words=words)
    for labels in (("one",), "yes", ("a", "a")):
        with pytest.raises(UserError, match="must be a tuple of at least two different names"):
            OBJECTIVES["tag"](None, labels=labels)


def test_loss_of_a_choice_by_hand():
    hidden, own = np.random.default_rng(0).normal(size=(3, 5, D)), head(1)
    two = pipeline.Example([5, 6], [0, 1], [0, 1], parts=[1, 1])
    three = pipeline.Example([5, 6, 7], [0, 1, 2], [1, 0, 0], parts=[1, 1, 1])
    objective = OBJECTIVES["choice"](None)
    loss, count, sums = objective.loss(Stub(hidden), {"head": own}, Adaptation(), batch_of([two, three], 5, 3))
    score = (hidden @ own["kernel"] + own["bias"])[..., 0]
    expected = -np.log(softmax(score[0, :2])[1]) - np.log(softmax(score[1, :3])[0])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert float(count) == 2
    assert float(sums["correct"]) == (score[0, :2].argmax() == 1) + (score[1, :3].argmax() == 0)


def test_loss_of_a_span_by_hand():
    hidden, own = np.random.default_rng(0).normal(size=(2, 7, D)), head(2)
    example = pipeline.Example([CLS, 5, SEP, 6, 7, SEP], [3, 4], [0, 0], [0, 0, 0, 1, 1, 0])
    objective = OBJECTIVES["span"](None)
    batch = batch_of([example], 7, 2)
    loss, count, _ = objective.loss(Stub(hidden), {"head": own}, Adaptation(), batch)
    allowed = [0, 3, 4]
    score = (hidden @ own["kernel"] + own["bias"])[0, allowed]
    expected = -np.log(softmax(score[:, 0])[1]) - np.log(softmax(score[:, 1])[2])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert float(count) == 2
    assert np.isneginf(
        np.asarray(objective.predict(Stub(hidden), {"head": own}, Adaptation(), batch))[0, [1, 2, 5, 6]]
    ).all()
    assert np.isfinite(
        jax.grad(lambda h: objective.loss(Stub(hidden), {"head": h}, Adaptation(), batch)[0])(own)["bias"]
    ).all()


# --- Whole runs

CONFIG = """
from configs import common


def get_config(arg=None):
    settings = common.parse(arg)
    return common.section(
        seed=3,
        model=common.section(name="{folder}/model", dtype="float32"),
        dataset=common.section(name="rows", path="{folder}/data"),
        text=common.section(prompt={prompt!r}, {cut}),
        method=common.method(settings["method"], prefix={{"length": 3, "init": "random", "text": None}}),
        objective=common.section({objective}),
        optimizer=common.section(name="adamw", learning_rate=0.005, schedule="constant", warmup_steps=0, clip=1.0),
        train=common.section(batch_size=16, epochs={epochs}, examples=None, accumulate=1, packing=False, shapes=1,
                             prefetch=2, log_every=50, eval_every=None, checkpoint_every=500, keep=2),
        evaluation=common.section(metrics=("exact_match",), batch_size=8, split="validation", final_split="test",
                                  examples=None, samples=1),
    )
"""
LETTERS = "abcdef"


def sentence(rng, size=4):
    return " ".join(rng.choice(list(LETTERS), size))


def classified(rng):
    """Whether there is an f in the second text; the first one is noise."""
    row = {"source": sentence(rng), "source2": sentence(rng)}
    return row | {"label": "yes" if "f" in row["source2"] else "no"}


def tagged(rng):
    words = sentence(rng, 5).split()
    return {"words": words, "tags": ["B-V" if word in "ae" else "O" for word in words]}


def chosen(rng):
    """The choice that holds an f."""
    choices, label = [" ".join(rng.choice(list("abcde"), 2)) for _ in range(3)], int(rng.integers(3))
    choices[label] = "f " + choices[label][2:]
    return {"source": sentence(rng), "choices": choices, "label": label}


def extracted(rng):
    """The letter behind the only f of a context, if it has one."""
    letters = [str(x) for x in rng.choice(list("abcde"), 6)]
    at = int(rng.integers(7))
    if at < 5:
        letters[at] = "f"
    answers = [letters[at + 1]] if at < 5 else []
    return {"source": "?", "source2": " ".join(letters), "answers": answers, "starts": [2 * at + 2] * len(answers)}


RUNS = {
    "classify": (
        classified,
        "{cls}{source}{sep}{source2}{sep}",
        'name="classify", labels=("no", "yes"), words=None',
        6,
    ),
    "classify by a decoder": (classified, "{source} ? {source2} ?", 'name="classify", labels=("no", "yes")', 12),
    "classify by words": (
        classified,
        "{cls}{source2} {mask}{sep}",
        'name="classify", labels=("no", "yes"), words=("bad", "good")',
        12,
    ),
    "tag by a decoder": (tagged, "{words}", 'name="tag", labels=("O", "B-V")', 12),
    "choice by a decoder": (chosen, "{source} ? {choice} ?", 'name="choice"', 12),
    "tag": (tagged, "{cls}{words}{sep}", 'name="tag", labels=("O", "B-V")', 4),
    "choice": (chosen, "{cls}{source}{sep}{choice}{sep}", 'name="choice"', 6),
    "span": (extracted, "{cls}{source}{sep}{source2}{sep}", 'name="span"', 8),
}


@pytest.fixture
def folder(tmp_path, monkeypatch, request):
    """A tiny BERT, rows of one task, and a config."""
    make, prompt, objective, epochs = RUNS[request.param]
    config = {
        "hidden_size": 24,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "vocab_size": V,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    kind = {"model_type": "llama"} if "decoder" in request.param else {"model_type": "bert", "type_vocab_size": 2}
    model = models.build(config | kind)
    loading.save_pretrained(tmp_path / "model", model, loading.initialise(jax.random.key(1), model))
    TOKENIZER.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for split, size in (("train", 160), ("validation", 9), ("test", 30)):
        rows = [json.dumps(make(rng)) for _ in range(size)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    loads = lambda path, split: datasets.Dataset.from_list(read_lines(Path(path) / f"{split}.jsonl"))  # noqa: E731
    monkeypatch.setitem(setup.data.DATASETS, "rows", loads)
    cut = "max_length=24, stride=4" if request.param == "span" else "max_length=24"
    text = CONFIG.format(folder=tmp_path, prompt=prompt, cut=cut, objective=objective, epochs=epochs)
    (tmp_path / "config.py").write_text(text)
    return tmp_path


@pytest.mark.parametrize(("folder", "by_words"), [(name, "words" in name) for name in RUNS], indirect=["folder"])
def test_a_run_learns_its_task_and_answers_new_rows(folder, by_words, capsys):
    """Fine-tuning with a head learns what the rows say; answers come out in order, also of the commands."""
    workdir = folder / "run"
    assert run.main(["train", f"--config={folder}/config.py:method=finetune", f"--workdir={workdir}"]) == 0
    summary = json.loads((workdir / "summary.json").read_text())
    # The model's own words say something before training; a fresh head does not.
    assert ("exact_match" in summary["untuned"]) == by_words
    assert "perplexity" not in summary["tuned"]
    share = summary["tuned"]["exact_match"]
    assert share >= 80, summary
    assert summary["records"] == 30
    rows = read_lines(workdir / "predictions" / f"test_{summary['steps']}.jsonl")
    assert np.isclose(share, 100 * np.mean([row["prediction"] in row["references"] for row in rows]))
    capsys.readouterr()
    if not by_words:
        assert summary["adapter"] is None
        for kind, message in (("peft", "holds no fine-tuned weights"), ("kv", "its task head has no place in")):
            assert run.main(["export", f"--workdir={workdir}", f"--format={kind}", f"--output={folder}/out"]) == 1
            assert message in capsys.readouterr().err
    assert run.main(["eval", f"--workdir={workdir}", "--split=test"]) == 0
    assert json.loads(capsys.readouterr().out)["exact_match"] == share
    given = read_lines(folder / "data" / "test.jsonl")
    asked = [{"source": "", **{k: v for k, v in row.items() if k not in ("label", "tags", "answers")}} for row in given]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    assert run.main(["generate", f"--workdir={workdir}", f"--input={folder}/in.jsonl", f"--output={folder}/out"]) == 0
    assert [row["prediction"] for row in read_lines(folder / "out")] == [row["prediction"] for row in rows]


@pytest.mark.parametrize("folder", ["classify"], indirect=True)
def test_a_prefix_and_its_head_resume_and_are_inspected(folder):
    """Stopped between two checkpoints and started again, a run ends where it would have ended, bit for bit."""
    config = f"--config={folder}/config.py"
    short = ["--config.train.epochs=2", "--config.train.checkpoint_every=7"]
    whole, resumed = folder / "whole", folder / "resumed"
    assert run.main(["train", config, *short, f"--workdir={whole}"]) == 0
    assert run.main(["train", config, *short, f"--workdir={resumed}"]) == 0
    (resumed / "summary.json").unlink()
    newest = max((resumed / "checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1)
    for path in sorted(newest.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    newest.rmdir()
    assert run.main(["train", config, *short, f"--workdir={resumed}"]) == 0
    results = [json.loads((workdir / "summary.json").read_text())["tuned"] for workdir in (whole, resumed)]
    assert results[0] == results[1]
    assert run.main(["inspect", f"--workdir={whole}"]) == 0
    assert (whole / "inspect.png").exists()


@pytest.mark.parametrize("folder", ["classify"], indirect=True)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((":method=prompt", "--config.train.packing=True"), "an encoder's prompt belongs to one; drop it"),
        (("", "--config.objective.labels=('no',)"), "must be a tuple of at least two different names of classes"),
        (("", "--config.objective.labels=('no', 'perhaps')"), "label 'yes'; valid, by objective.labels: no, perhaps"),
        (("", "--config.text.max_length=2"), "row 0: text.max_length leaves no token of source"),
    ],
)
def test_configs_that_cannot_work(folder, capsys, options, message):
    arguments = ["train", f"--config={folder}/config.py{options[0]}", *options[1:], f"--workdir={folder}/w"]
    assert run.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("folder", ["choice"], indirect=True)
def test_what_objectives_ask_of_models_and_configs(folder, capsys):
    config = run.load_config(f"{folder}/config.py:method=prompt").to_dict()
    with pytest.raises(UserError, match="objective 'choice' reads several texts in a row"):
        setup.make_base(config)
    prefix = run.load_config(f"{folder}/config.py").to_dict()
    written = prefix | {"objective": {"name": "lm"}}
    with pytest.raises(UserError, match="a config with objective 'lm' lacks the section decode"):
        setup.make_base(written)
    decode = {"max_new_tokens": 3}
    with pytest.raises(UserError, match=r"a bert model writes no text, .* valid: classify, tag, choice, span"):
        setup.make_base(written | {"decode": decode, "text": {"prompt": "{source}"}})
    with pytest.raises(UserError, match="objective 'choice' has a section decode, which would do nothing"):
        setup.make_base(prefix | {"decode": decode})
    fewer = prefix | {"evaluation": prefix["evaluation"] | {"pairs": 2}}
    with pytest.raises(UserError, match=r"evaluation\.pairs=2 is for texts with several references; objective\.name="):
        setup.make_run(fewer, setup.make_base(prefix))
