"""What the tests share: eight CPU devices, no network, our own warnings as errors, and tiny models with torch twins.

The sizes are all different, so that a swapped axis cannot pass; where a family ties two of them together, the others
still differ.
"""

import contextlib
import functools
import gc
import importlib.metadata
import os
import shutil
import signal
import sys
import tempfile
import types

# What is imported below stays, and Python's collector would go through those objects again and again.
gc.disable()

# Tests compile much and compute little: no optimisation, one LLVM module, no MLIR pipeline for every fused kernel.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        # XLA ends at a flag that it lacks, as later ones do.
        *(["--xla_cpu_use_fusion_emitters=false"] if importlib.metadata.version("jaxlib").startswith("0.10.") else []),
    ]
)
os.environ["JAX_PLATFORMS"] = "cpu"
# What one test has compiled, no other compiles again: processes share it for a session, and the first takes it away.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="prefix_tuning_tests_")
os.environ |= {f"JAX_PERSISTENT_CACHE_MIN_{what}": "0" for what in ("COMPILE_TIME_SECS", "ENTRY_SIZE_BYTES")}
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # nobody asks where operations come from, and it takes long
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import prefix_tuning
import run
from prefix_tuning import launch, parallel, stacks
from prefix_tuning import train as loop
from prefix_tuning.data import pipeline
from prefix_tuning.metrics import meteor
from prefix_tuning.progress import Interrupted
from prefix_tuning.train_step import make_train_step
from prefix_tuning.types import KV, Adaptation, Batch, Cache, LayerHooks, Model, TrainState

gc.freeze()
gc.enable()
gc.set_threshold(50_000, 10, 10)  # tracing makes many objects, few of them garbage

B, T, P, L, K, F, V = 8, 7, 5, 3, 2, 11, 13
LLAMA = {
    "hidden_size": 16,  # transformers wants a multiple of the 8 heads, and has H=6 beside it
    "num_attention_heads": 8,
    "num_key_value_heads": K,
    "head_dim": 6,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "max_position_embeddings": 64,
    "vocab_size": V,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},  # so that seven positions turn visibly
}
RELATIVE = LLAMA | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # their own are beyond the vocabulary
WINDOW = {"sliding_window": 3}  # less than half of the longest row
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA = RELATIVE | WINDOW | {"query_pre_attn_scalar": 5, "layer_types": [SLIDING, FULL, SLIDING]}
FAMILIES = {
    "gpt2": {
        "n_embd": 10,
        "n_head": K,
        "n_inner": F,
        "n_layer": L,
        "n_positions": 32,
        "vocab_size": V,
        "bos_token_id": V - 1,
        "eos_token_id": V - 1,
    },
    "gpt_neox": {
        "hidden_size": 20,
        "num_attention_heads": K,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "max_position_embeddings": 64,
        "vocab_size": V,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # 6 of the 10 numbers of a head
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.6},
    },
    "llama": LLAMA,
    "mistral": RELATIVE | WINDOW,
    "qwen2": RELATIVE,
    "qwen3": RELATIVE,
    "phi3": RELATIVE | WINDOW,
    # The caps are so low that nearly every score and logit meets them.
    "gemma2": GEMMA | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0},
    "gemma3_text": GEMMA
    | {
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 2.5, "rope_theta": 100.0},
            SLIDING: {"rope_type": "default", "rope_theta": 7.0},
        }
    },
}
BERT = {
    "hidden_size": 10,
    "num_attention_heads": K,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "max_position_embeddings": 32,
    "vocab_size": V,
}
ENCODERS = {
    "bert": BERT,
    "roberta": BERT | {"type_vocab_size": 1, "pad_token_id": 1},
    "electra": BERT | {"embedding_size": 10},
    "distilbert": {
        "dim": 10,
        "n_heads": K,
        "hidden_dim": F,
        "n_layers": L,
        "max_position_embeddings": 32,
        "vocab_size": V,
    },
}
T5 = {
    "d_model": 10,
    "d_kv": 6,
    "num_heads": K,
    "d_ff": F,
    "num_layers": L,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,  # so that seven positions fill every kind of bucket
    "vocab_size": V,
    "decoder_start_token_id": 0,
}
SEQ2SEQ = {
    "bart": {
        "d_model": 10,
        "encoder_attention_heads": K,
        "decoder_attention_heads": 5,
        "encoder_ffn_dim": F,
        "decoder_ffn_dim": 9,
        "encoder_layers": L,
        "decoder_layers": 2,
        "max_position_embeddings": 32,
        "vocab_size": V,
    },
    "t5": T5,
    "mt5": T5 | {"feed_forward_proj": "gated-gelu"},
}


# The files that take longest, in their order: a worker gets whole files, and one that begins last is waited for.
LONGEST = (
    "seq2seq methods sharded population hosts run hooks tasks tables peft_kinds decode publish sharded_hosts models "
    "accounting sweep stream configs quantised quickstart encoders kv inspection train_step selection "
    "vocabulary method_options metrics_triples adaptation prefix growth compare_runs metrics merged peft windows"
).split()


def pytest_collection_modifyitems(items):
    rank = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish():
    gc.freeze()  # as above: what the tests' own files import stays as well


def pytest_configure(config):
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # as in a shell's background, where tests send it all the same
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for module in ("prefix_tuning", "configs", "experiments"):
        config.addinivalue_line("filterwarnings", rf"error:::{module}(\.|$)")
    config.addinivalue_line("filterwarnings", "error:::run$")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs of a finished file are dropped: thousands use up the memory maps that a process may have."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def in_one_stack(request, monkeypatch):
    """Texts are written out of the stack, compiled once for all of its layers, but in tests marked `apart`.

    That layers which lie apart write the same is for those tests, and for the commands that run as users run them.
    """
    if request.node.get_closest_marker("apart") is None:
        monkeypatch.setattr(stacks, "apart", lambda params, model: params)


@pytest.fixture
def commands_here(monkeypatch):
    """What a launcher starts as processes are calls in this one, which has imported what they need already.

    How processes end, and one sweep's, is for test_sweep.py.
    """

    class Called:
        def __init__(self, command, *, stdout, stderr, **_):
            assert command[:2] == [sys.executable, str(run.ROOT / "run.py")]
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                self.code = run.main(command[2:])

        def poll(self):
            return self.code

    monkeypatch.setattr(launch, "subprocess", types.SimpleNamespace(Popen=Called))
    monkeypatch.setattr(launch.Local, "interval", 0)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


class Twin(NamedTuple):
    """A tiny random model: transformers' and, from the folder that it saved, ours."""

    reference: transformers.PreTrainedModel
    folder: Path
    model: Model
    frozen: Any


@pytest.fixture(scope="session")
def twin(tmp_path_factory):
    """(family, further entries of its config.json) -> Twin, made once."""
    made = {}

    def make(family, **options):
        name = f"{family} {options}"
        if name not in made:
            reference = random_reference(family, **options)
            folder = tmp_path_factory.mktemp(family)
            reference.save_pretrained(folder)
            made[name] = Twin(reference, folder, *prefix_tuning.load_model(folder)[:2])
        return made[name]

    return make


@pytest.fixture(scope="session")
def meteor_running():
    """METEOR's program; only for tests that need Java."""
    with meteor.meteor_program() as program:
        yield program


@pytest.fixture
def one_meteor(meteor_running, monkeypatch):
    """Every METEOR is that of one program, which takes longer to start than all else that is asked of it."""
    monkeypatch.setattr(meteor, "meteor_program", lambda: contextlib.nullcontext(meteor_running))


@pytest.fixture
def torch_prefixes(monkeypatch):
    """(reference, adaptation) -> None: from then on transformers' own attention has these slots before its keys."""

    def install(reference, adaptation):
        module = transformers.models.bart.modeling_bart
        if reference.config.model_type != "bart":
            module = getattr(transformers.models, reference.config.model_type)
            module = getattr(module, f"modeling_{reference.config.model_type}")
        slots = {}
        for stack in ("encoder", "decoder"):
            body = getattr(reference.base_model, stack)
            for number, layer in enumerate(body.layers if hasattr(body, "layers") else body.block):
                if hasattr(layer, "self_attn"):
                    parts = {"self": layer.self_attn, "cross": getattr(layer, "encoder_attn", None)}
                else:
                    parts = {"self": layer.layer[0].SelfAttention}
                    parts["cross"] = layer.layer[1].EncDecAttention if stack == "decoder" else None
                for site, kv in (getattr(adaptation, stack).kv or {}).items():
                    slots[parts[site]] = [torch.tensor(np.asarray(x[number])).transpose(0, 1) for x in (kv.k, kv.v)]

        def attention(own, q, k, v, mask, scaling=None, dropout=0.0, position_bias=None, **_):
            scale = q.shape[-1] ** -0.5 if scaling is None else scaling
            scores = scale * q @ k.transpose(-1, -2)
            scores = scores if position_bias is None else scores + position_bias
            scores = scores if mask is None else scores + mask[..., : k.shape[-2]]
            if own in slots:
                before, values = (x.expand(len(q), *x.shape) for x in slots[own])
                scores = torch.cat([scale * q @ before.transpose(-1, -2), scores], -1)
                v = torch.cat([values, v], -2)
            weights = scores.softmax(-1)
            return (weights @ v).transpose(1, 2).contiguous(), weights

        monkeypatch.setattr(module, "eager_attention_forward", attention)

    return install


def random_reference(family, **options):
    """transformers' model, every weight drawn: fresh ones have biases of 0 and scales of 1, which hide mistakes."""
    if family in ENCODERS:
        kind = options.pop("kind", transformers.AutoModel)
        reference = kind.from_config(transformers.AutoConfig.for_model(family, **ENCODERS[family] | options)).eval()
    elif family in SEQ2SEQ:
        untied = options.pop("untied", False)
        config = transformers.AutoConfig.for_model(family, **SEQ2SEQ[family] | options)
        reference = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval()
        if untied:
            reference.lm_head.weight = torch.nn.Parameter(torch.empty_like(reference.shared.weight))
        if family == "bart":
            reference.final_logits_bias = torch.linspace(-1, 1, V)[None]
    else:
        config = transformers.AutoConfig.for_model(family, **FAMILIES[family] | options)
        # In eager code, since faster attention cannot cap scores.
        reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            scale = "ln_" in name or "norm" in name.lower()
            weight.normal_(float(scale and name.endswith("weight")), 0.3, generator=generator)
    return reference


def letters(text, add_special_tokens):
    """A tokenizer: token 0 for a, 1 for b, ..."""
    assert not add_special_tokens
    return {"input_ids": [ord(letter) - ord("a") for letter in text]}


def random_rows(seed, lengths=(T, 1, 4, 2, T, 3, 5, 6), vocabulary=V):
    """Rows of token ids."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, n).tolist() for n in lengths]


def random_prefix(model, seed, *, length=P, rows=None, shift=True):
    """An adaptation with a prefix [L P K H], or [L B P K H] with a number of rows."""
    sites = model.sites["decoder"]
    heads, size = sites.kv["self"]
    shape = (sites.layers, *(() if rows is None else (rows,)), length, heads, size)
    k, v = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
    return Adaptation(LayerHooks(kv={"self": KV(k, v)}), np.int32(length) if shift else None)


def interrupt(patch, number):
    """Lets the `number`th time that a run asks whether to stop be the moment of a SIGTERM."""
    usual, calls = loop.Stop.check, []

    def check(self):
        calls.append(self)
        if len(calls) == number:
            raise Interrupted(143)
        usual(self)

    patch.setattr(loop.Stop, "check", check)


def table_model(vocabulary, called=lambda: None):
    """A model whose next token depends on the last one alone: params [V V] are logits."""

    def prefill(params, adaptation, tokens, lengths, slots):
        none = jnp.zeros((len(tokens), 1, 0), jnp.int32)
        cache = Cache((), (), none, slot=jnp.int32(0), written=jnp.zeros_like(lengths), position=lengths, read=())
        return params[tokens[jnp.arange(len(tokens)), lengths - 1]], cache

    def step(params, adaptation, cache, tokens):
        jax.debug.callback(called)
        return params[tokens], cache

    rest = dict.fromkeys(("max_positions", "embed", "hidden", "unembed", "probe", "keys_values"))
    return Model(config={}, sites={}, specs={}, vocabulary=vocabulary, prefill=prefill, decode=step, **rest)


def packed(rows, length, targets):
    """A batch whose rows hold the given lists of (prompt, target), as training lays them out."""
    return Batch(**pipeline.collate([[pipeline.Tokens(*pair) for pair in row] for row in rows], length, targets))


def one_a_row(examples, length=None, targets=None):
    """A batch with one (prompt, target) a row, as long as the longest or as told."""
    length = length or max(len(prompt) + len(target) - 1 for prompt, target in examples)
    return packed([[pair] for pair in examples], length, targets or max(len(target) for _, target in examples))


def three_steps(model, frozen, method, objective, tx, start, batch, axis=None):
    """(what is trained after three steps on one batch, the losses); over an axis, on all eight devices."""
    own = jax.tree.map(lambda x: jnp.array(x, copy=True), start)
    state = TrainState(jnp.int32(0), own, tx.init(own), jax.random.key(0))
    body = make_train_step(model, method, objective, tx, axis=axis)
    step = parallel.train_step(body) if axis else jax.jit(body)
    place = parallel.place if axis else (lambda x: x)
    split = parallel.split_batch if axis else (lambda batch: Batch(**{k: v[None] for k, v in batch.items()}))
    losses, state, weights = [], place(state), place(frozen)
    for _ in range(3):
        state, sums = step(weights, state, split(batch))
        losses.append(float(sums["loss"] / sums["count"]))
    return jax.device_get(state.trainable), losses


@functools.lru_cache
def forward(model_hidden, model_unembed):
    return jax.jit(lambda *arguments: model_unembed(arguments[0], model_hidden(*arguments)))


def batch_logits(model, frozen, adaptation, batch):
    """Logits [B T V] of a batch."""
    return np.asarray(forward(model.hidden, model.unembed)(frozen, adaptation, batch))


def reference_logits(reference, rows, adaptation=None, *, left=False):
    """transformers' logits [T V] of each row, padded on one side, with the prefix given as past keys and values."""
    longest = max(map(len, rows))

    def padded(row, fill):
        rest = [fill] * (longest - len(row))
        return [*rest, *row] if left else [*row, *rest]

    tokens = torch.tensor([padded(row, 1) for row in rows])
    mask = torch.tensor([padded([1] * len(row), 0) for row in rows])
    positions, past, seen = (mask.cumsum(1) - 1).clamp(min=0), None, mask
    if adaptation is not None:
        kv, past = adaptation.decoder.kv["self"], transformers.DynamicCache()
        for index, layer in enumerate(zip(kv.k, kv.v, strict=True)):
            k, v = (torch.tensor(np.asarray(x)).transpose(-3, -2) for x in layer)  # [K P H] or [B K P H]
            past.update(*(x.expand(len(rows), *x.shape[-3:]).clone() for x in (k, v)), index)
        seen = torch.cat([torch.ones(len(rows), k.shape[-2], dtype=mask.dtype), mask], 1)
        positions = positions + (0 if adaptation.shift is None else int(adaptation.shift))
    with torch.no_grad():
        out = reference(tokens, attention_mask=seen, position_ids=positions, past_key_values=past).logits
    return [logits[real].numpy() for logits, real in zip(out, mask.bool(), strict=True)]


def close(ours, theirs, tolerance=1e-4):
    """Asserts that two lists of arrays agree to an absolute tolerance, and that there is something to compare."""
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)
        assert np.asarray(one).std() > 100 * tolerance
