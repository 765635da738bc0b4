"""Every shipped config builds at its true size, as shapes only."""

from pathlib import Path

import datasets
import jax
import numpy as np
import pytest
import tokenizers
import transformers
from absl import flags

import run
from configs import common, ptuning_v2, sst2_minilm, xsum_bart
from prefix_tuning import models, setup
from prefix_tuning.data import conll2003, pipeline, superglue, tasks, xsum
from prefix_tuning.heads import with_head
from prefix_tuning.methods import METHODS
from prefix_tuning.models import loading
from prefix_tuning.objectives import OBJECTIVES
from prefix_tuning.optimizer import make_optimizer
from prefix_tuning.registry import call, named
from prefix_tuning.train_step import make_train_step
from prefix_tuning.types import Batch, TrainState

ROOT = Path(run.__file__).parent
CONFIGS = sorted(path.stem for path in ROOT.glob("configs/*.py") if path.stem != "common")
# What the hub's config.json says of the models that configs name.
HUB = {
    "FacebookAI/roberta-large": {
        "model_type": "roberta",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "pad_token_id": 1,
        "type_vocab_size": 1,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
    },
    "facebook/bart-large": {
        "model_type": "bart",
        "d_model": 1024,
        "encoder_layers": 12,
        "encoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "decoder_layers": 12,
        "decoder_attention_heads": 16,
        "decoder_ffn_dim": 4096,
        "vocab_size": 50265,
        "max_position_embeddings": 1024,
        "decoder_start_token_id": 2,
    },
    "google-bert/bert-large-cased": {
        "model_type": "bert",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "vocab_size": 28996,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
    },
    **{
        f"google/t5-{size}-lm-adapt": {
            "model_type": "t5",
            "d_model": width,
            "d_ff": inner,
            "d_kv": 64,
            "num_layers": layers,
            "num_heads": heads,
            "vocab_size": 32128,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        }
        for size, width, inner, layers, heads in (
            ("small", 512, 1024, 8, 6),
            ("base", 768, 2048, 12, 12),
            ("large", 1024, 2816, 24, 16),
            ("xl", 2048, 5120, 24, 32),
            ("xxl", 4096, 10240, 24, 64),
        )
    },
    "openai-community/gpt2-large": {
        "model_type": "gpt2",
        "n_embd": 1280,
        "n_layer": 36,
        "n_head": 20,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
    "openai-community/gpt2-medium": {
        "model_type": "gpt2",
        "n_embd": 1024,
        "n_layer": 24,
        "n_head": 16,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
    "sentence-transformers/all-MiniLM-L6-v2": {
        "model_type": "bert",
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
    },
}
# Of the frozen model; BERT and RoBERTa without the heads that not every file has.
PARAMETERS = {"e2e_smollm2": 134_515_008, "gpt2_table_to_text": 354_823_168, "xsum_bart": 406_291_456 + 50_265}
# Facts of the prefix, see the papers' 0.1 % and 2 %.
STORED = {"e2e_smollm2": 10 * 30 * 2 * 192, "gpt2_table_to_text": 245_760, "xsum_bart": 7_372_800}
SHARE = {"xsum_bart": 0.02}  # a prefix stores at most this much of the model; 1 % in the others


class Words:
    """A tokenizer for initial texts, a token a character."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) % 97 for c in text]}


def at_true_size(name, arg, step=True):
    """Traces a step of a config, or its loss; its sections, the frozen model's size, and what its method alone trains
    and stores."""
    config = run.load_config(f"{ROOT}/configs/{name}.py:{arg}").to_dict()
    where = config["model"]["name"]
    model = models.build(HUB[where] if where in HUB else loading.read_config(Path(setup.resolve(where))))
    method = named("method", METHODS, config["method"], Words())
    counts = setup.parameter_counts(method, model)
    objective = named("objective", OBJECTIVES, config["objective"], Words())
    if objective.head is not None:
        method = with_head(method, objective.head)
    tx, _ = call("optimizer", make_optimizer, config["optimizer"], 1000)
    frozen, trainable = setup.abstract_frozen(method, model), setup.abstract_trainable(method, model)
    setup.abstract_adaptation(method, model)
    A, B, T, S = 1, call("train", setup.Train, config["train"]).batch_size, 50, 70
    N = 2 if config["objective"]["name"] == "span" else 20
    shapes = dict.fromkeys(("tokens", "positions", "segments"), (T,)) | {"examples": ()}
    shapes |= dict.fromkeys(("mask", "targets", "target_index"), (N,))
    if model.is_encoder_decoder:
        shapes |= dict.fromkeys(("source", "source_positions", "source_segments"), (S,))
    if config["objective"]["name"] in ("classify", "choice", "span"):
        shapes["types"] = (T,)
    batch = Batch(
        **{
            field: jax.ShapeDtypeStruct((A, B, *shape), np.float32 if field == "mask" else np.int32)
            for field, shape in shapes.items()
        }
    )
    assert {x.dtype for x in jax.tree.leaves(trainable)} == {np.dtype(np.float32)}
    if not step:
        row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
        loss = lambda frozen, trainable, batch: objective.loss(model, *method.bind(frozen, trainable), batch)  # noqa: E731
        assert jax.eval_shape(loss, frozen, trainable, row)[0].shape == ()
        return config, counts
    state = TrainState(
        jax.ShapeDtypeStruct((), np.int32), trainable, jax.eval_shape(tx.init, trainable), jax.random.key(0)
    )
    after, sums = jax.eval_shape(make_train_step(model, method, objective, tx), frozen, state, batch)
    shape = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shape(after.trainable) == shape(trainable)
    assert sums["loss"].shape == ()
    return config, counts


WITH_METHODS = [f"quick,method={method}" for method in (*common.METHODS, *common.PRESETS, "prefix+lora")]
# One config of each architecture takes every method, the others their own.
ALL_METHODS = ("e2e_smollm2", "gpt2_table_to_text", "prompt_tuning_t5", "ptuning_v2", "xsum_bart")


# Of the methods a whole step is traced on one architecture each in turn: slopes and updates are of what it trains.
WHOLE = {(ALL_METHODS[turn % len(ALL_METHODS)], arg) for turn, arg in enumerate(WITH_METHODS)}


@pytest.mark.parametrize(
    ("name", "arg"),
    [(name, arg) for name in CONFIGS for arg in ("", *(WITH_METHODS if name in ALL_METHODS else ()))],
)
def test_a_step_has_the_right_shapes_at_true_size(name, arg):
    config, counts = at_true_size(name, arg, step=not arg or (name, arg) in WHOLE)
    if name in STORED:
        assert counts["frozen"] == PARAMETERS[name]
    if config["method"]["name"] == "prefix":
        assert counts["stored"] == STORED.get(name, counts["stored"])
        assert counts["stored"] <= SHARE.get(name, 0.01) * counts["frozen"]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ALL_METHODS])
def test_every_method_can_be_made_in_the_other_configs(name):
    for arg in WITH_METHODS:
        config = run.load_config(f"{ROOT}/configs/{name}.py:{arg}").to_dict()
        named("method", METHODS, config["method"], Words())
        call("optimizer", make_optimizer, config["optimizer"], 1000)


@pytest.mark.parametrize(("task", "backbone"), ptuning_v2.ROWS)
def test_deep_prompts_are_keys_and_values_of_24_layers_of_width_1024(task, backbone):
    config, counts = at_true_size("ptuning_v2", f"task={task},backbone={backbone}")
    row = ptuning_v2.ROWS[task, backbone]
    stored, width = row.length * 2 * 24 * 1024, 512
    network = row.length * 1024 + (1024 * width + width) + (width * 2 * 24 * 1024 + 2 * 24 * 1024)
    assert counts["stored"] == stored
    assert counts["trained"] == (network if (task, backbone) == ("wic", "bert") else stored)
    between = "{sep}{sep}" if backbone == "roberta" else "{sep}"  # as the tokenizers put them
    assert between + "{source2}" in config["text"]["prompt"] or task in ("copa", "conll2003")
    assert config["optimizer"]["learning_rate"] == row.learning_rate


@pytest.mark.parametrize(("part", "length"), [("all", 100), ("news_to_sports", 40), ("within_news", 80)])
def test_prefixes_at_three_attentions_of_bart_are_as_large_as_the_paper_says(part, length):
    config, counts = at_true_size("xsum_bart", f"part={part}")
    assert counts["stored"] == 3 * length * 12 * 2 * 1024
    assert counts["trained"] == 61_823_328 - 3 * 1024 * (100 - length)
    assert config["dataset"]["part"] == (None if part == "all" else part)
    assert set(xsum_bart.ROWS) == {"all", *xsum.PARTS}


def test_recipes_name_the_classes_of_their_data_sets():
    for name, task in ptuning_v2.TASKS.items():
        own = {"conll2003": conll2003.LABELS} | {task: shape.labels for task, shape in superglue.TASKS.items()}
        assert task.objective.get("labels") == own.get(name)


def tokenizer_like(backbone):
    """A tokenizer of a few words that puts special tokens where BERT's, or RoBERTa's and BART's, do."""
    texts, special = ["the cat sat on a mat", "it was hot"], ["<s>", "<pad>", "</s>", "<unk>"]
    if backbone == "bert":
        vocabulary = {word: i for i, word in enumerate(special + " ".join(texts).split())}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        backend.post_processor = tokenizers.processors.BertProcessing(("</s>", 2), ("<s>", 0))
    else:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(special_tokens=special, show_progress=False))
        backend.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    ends = dict.fromkeys(("bos_token", "cls_token"), "<s>") | dict.fromkeys(("eos_token", "sep_token"), "</s>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", **ends)


@pytest.mark.parametrize(("task", "backbone"), [row for row in ptuning_v2.ROWS if row[0] != "conll2003"])
def test_two_texts_are_read_as_the_tokenizer_joins_them(task, backbone):
    config = run.load_config(f"{ROOT}/configs/ptuning_v2.py:task={task},backbone={backbone}").to_dict()
    tokenizer, row = tokenizer_like(backbone), {"source": "it was", "source2": "the cat"}
    joined = tokenizer("it was", "the cat")["input_ids"]
    if task == "copa":
        row |= {"choices": ["hot", "on a mat"], "label": 1}
        joined = [token for text in row["choices"] for token in tokenizer("it was the cat", text)["input_ids"]]
    elif task in superglue.TASKS:
        row["label"] = superglue.TASKS[task].labels[1]
    else:
        row |= {"answers": ["cat"], "starts": [4]}
    made = named("objective", tasks.TASKS, config["objective"])
    rows = datasets.Dataset.from_list([row])
    (example,) = made.encode(rows, tokenizer, True, **config["text"], virtual=len(tokenizer)).examples
    assert example.read == joined


def test_articles_and_summaries_are_read_as_the_released_code_does():
    """With a space before them and special tokens around, of which the decoder starts with the last."""
    config = run.load_config(f"{ROOT}/configs/xsum_bart.py").to_dict()
    tokenizer, pair = tokenizer_like("bart"), {"source": 600 * "a ", "target": "it was hot"}
    rows, options = datasets.Dataset.from_list([pair]), config["text"] | {"virtual": len(tokenizer), "start": 2}
    (example,) = pipeline.encode(rows, tokenizer, **options)
    cut = {"truncation": True, "max_length": 512}
    assert example.source == tokenizer(" " + pair["source"], **cut)["input_ids"]
    assert example.targets == tokenizer(" it was hot")["input_ids"]
    assert example.read == [2, *example.targets[:-1]]


def test_every_method_has_options_and_a_rate():
    assert set(common.METHODS) == set(METHODS) - {"compose"}
    for name in CONFIGS:
        rates = {
            method: run.load_config(f"{ROOT}/configs/{name}.py:method={method}").optimizer.learning_rate
            for method in (*common.METHODS, *common.PRESETS, "prefix+lora")
        }
        assert rates["prefix+lora"] == min(rates["prefix"], rates["lora"])


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("method=ia3", "unknown method 'ia3'; valid: prefix, infix"),
        ("method=prefix+ia3", "unknown method 'ia3'; valid: prefix, infix, .* several with"),
        ("method=lora+lora", "has one method twice"),
        ("quick=maybe", "config argument 'quick=maybe' is no bool"),
    ],
)
def test_wrong_arguments(arg, message):
    with pytest.raises(Exception, match=message):
        run.load_config(f"{ROOT}/configs/e2e_smollm2.py:{arg}")


@pytest.mark.parametrize(
    ("name", "arg", "message"),
    [
        (
            "ptuning_v2",
            "task=squad",
            "unknown config arguments task=squad,backbone=bert; valid: task=boolq,backbone=bert",
        ),
        ("xsum_bart", "part=sports", "unknown part 'sports'; valid: all, news_to_sports, within_news"),
    ],
)
def test_unknown_rows_of_a_recipe(name, arg, message):
    with pytest.raises(Exception, match=message):
        run.load_config(f"{ROOT}/configs/{name}.py:{arg}")


def test_options_that_are_none_can_be_overridden():
    arguments = ["train", f"--config={ROOT}/configs/quickstart.py:method=prefix+adapter", "--workdir=w"]
    given = ["prefix.layers=(0, 2)", "prefix.shift=False", "prefix.scale=0.3", "adapter.form=parallel"]
    given += ["adapter.sublayer=attention", "prefix.reparametrisation=7"]
    _, values, _ = run.parse([*arguments, *(f"--config.method.parts.{option}" for option in given)])
    parts = values["config"]["method"]["parts"]
    assert parts["prefix"]["layers"] == (0, 2)
    assert parts["prefix"]["shift"] is False
    assert parts["prefix"]["reparametrisation"] == 7
    assert parts["adapter"]["sublayer"] == "attention"


def test_presets_are_what_they_are_called():
    mam = common.method("mam").to_dict()
    assert mam["name"] == "compose"
    assert mam["parts"]["prefix"]["length"] == 30
    assert (mam["parts"]["adapter"]["form"], mam["parts"]["adapter"]["bottleneck"]) == ("scaled_parallel", 512)
    assert mam["gates"] is False
    assert common.method("unipelt").to_dict()["gates"] is True
    assert common.method("bitfit").to_dict()["biases"] is True
    assert common.method("ft_top2").to_dict()["top_layers"] == 2


def test_compare_has_a_variant_for_each_of_four_methods():
    config = run.load_config(f"{ROOT}/configs/quickstart.py:compare,quick").to_dict()
    assert set(config["compare"]) == {"prompt", "prefix", "lora", "finetune"}
    for name, sections in config["compare"].items():
        alone = run.load_config(f"{ROOT}/configs/quickstart.py:quick,method={name}").to_dict()
        assert {key: value for key, value in config.items() if key != "compare"} | sections == alone


@pytest.mark.parametrize("name", CONFIGS)
def test_every_section_is_what_its_factory_takes(name):
    config = run.load_config(f"{ROOT}/configs/{name}.py").to_dict()
    chosen = {"decode"} if config["objective"]["name"] in tasks.TASKS else set()  # nothing is decoded
    assert set(config) == set(setup.SECTIONS) - chosen
    call("train", setup.Train, config["train"])
    call("evaluation", setup.Evaluation, config["evaluation"])


def test_sst2_starts_from_a_text_or_at_random():
    assert sst2_minilm.get_config().method.init == "text"
    method = sst2_minilm.get_config("random").method
    assert (method.init, method.text, method.length) == ("random", None, 20)
    assert sst2_minilm.get_config("random,method=lora").method == sst2_minilm.get_config("method=lora").method


def test_what_a_prefix_starts_from_needs_a_prefix():
    assert run.load_config("configs/e2e_smollm2.py:method=mam,init=random").method.parts.prefix.init == "random"
    with pytest.raises(flags.Error, match="init=banana is what a prefix starts from, and method=lora has none"):
        run.load_config("configs/e2e_smollm2.py:method=lora,init=banana")
