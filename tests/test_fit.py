"""Adaptations that do not fit a model are refused by every pass, with what was wrong and what would fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adaptations import ROWS, SHIFTS, M, Maker, R, made
from conftest import B, K, L, P, T, one_a_row, packed, random_prefix, random_rows

import prefix_tuning
from prefix_tuning import fit
from prefix_tuning.errors import UserError
from prefix_tuning.types import KV, Adaptation, Delta, Gate, LayerHooks, Memory

BOTH = pytest.mark.parametrize("family", ["gpt2", "llama"])


def kv_with(m, **changes):
    return made(kv={"self": m.kv()["self"].replace(**changes)})


def rows_with(m, **changes):
    return made(added={"self": m.rows()["self"].replace(**changes)})


def delta_with(m, **changes):
    return made(delta={"k": m.delta("k")["k"].replace(**changes)})


def adapter_with(m, **changes):
    return made(adapter={"mlp": m.adapter().replace(**changes)})


SITE = "unknown attention site of the decoder 'cross'; valid: self"
NAME = "unknown projection of the decoder 'qkv'; valid: down, gate, k, o, q, up, v"
ADDED = "of shape (3, {} adds to the rows of"
# For llama: L=3, D=16, K=2, G=4, H=6, B=8.
REFUSED = [
    (lambda m: made(before=m.prompt()[:, 1:]), "prompt has shape (5, 15); expected [P 16] or [8 P 16]"),
    (lambda m: made(before=m.prompt(3)), "prompt has shape (3, 5, 16); expected [P 16] or [8 P 16]"),
    (lambda m: made(rows=m.prompt(8)), "rows has shape (8, 5, 16); expected [R 16]"),
    (lambda m: made(kv=m.kv(), shift=SHIFTS), "shift has shape (3,); expected [] or [8]"),
    (lambda m: Adaptation(encoder=LayerHooks(bias=m.bias())), "this model has no encoder to adapt; valid: decoder"),
    (lambda m: made(prompt=m.prompt(L)), f"decoder.prompt {ADDED.format('5, 16)')} prompt, which has none"),
    (
        lambda m: made(prompt=m.prompt(L), before=m.prompt(8, length=R)),
        f"decoder.prompt {ADDED.format('5, 16)')} prompt, which has (8, 4, 16)",
    ),
    (lambda m: made(added=m.rows()), f"decoder.rows {ADDED.format('4, 2, 6)')} rows, which has none"),
    (
        lambda m: made(added=m.rows(), rows=m.prompt()),
        f"decoder.rows {ADDED.format('4, 2, 6)')} rows, which has (5, 16)",
    ),
    (lambda m: made(prompt=m.prompt(4)), "prompt hook of the decoder has shape (4, 5, 16); expected [3 P 16]"),
    (lambda m: made(kv={"cross": m.kv()["self"]}), SITE),
    (
        lambda m: kv_with(m, k=m.draw(L, P, m.H, K)),
        "prefix k at decoder/self has shape (3, 5, 6, 2); expected [3 P 2 6] or [3 8 P 2 6]",
    ),
    (
        lambda m: kv_with(m, k=m.draw(L, 7, P, K, m.H)),
        "prefix k at decoder/self has shape (3, 7, 5, 2, 6); expected [3 P 2 6] or [3 8 P 2 6]",
    ),
    (
        lambda m: kv_with(m, v=m.draw(L, 4, K, m.H)),
        "prefix v at decoder/self has shape (3, 4, 2, 6); expected [3 5 2 6]",
    ),
    (
        lambda m: kv_with(m, mask=np.ones((L, 4), bool)),
        "prefix mask at decoder/self has shape (3, 4); expected [3 5] or [3 8 5]",
    ),
    (
        lambda m: kv_with(m, gate=m.draw(L, m.G, K)),
        "prefix gate at decoder/self has shape (3, 4, 2); expected [3 2 4]",
    ),
    (lambda m: made(memory={"cross": m.memory("elu")["self"]}), SITE),
    (lambda m: made(memory=m.memory("relu")), "unknown feature 'relu'; valid: elu, gelu"),
    (
        lambda m: made(memory={"self": Memory(m.draw(L, m.G, K, m.H, m.H))}),
        "memory at decoder/self has shape (3, 4, 2, 6, 6); expected [3 2 4 6 6]",
    ),
    (lambda m: made(added={"cross": m.rows()["self"]}), SITE),
    (
        lambda m: rows_with(m, k=m.draw(L, R, m.H, K)),
        "rows k at decoder/self has shape (3, 4, 6, 2); expected [3 R 2 6]",
    ),
    (lambda m: rows_with(m, v=m.draw(R, K, m.H)), "rows v at decoder/self has shape (4, 2, 6); expected [3 R 2 6]"),
    (lambda m: made(delta={"qkv": m.delta("k")["k"]}), NAME),
    (lambda m: delta_with(m, a=m.draw(L, R, 16)), "delta a at decoder/k has shape (3, 4, 16); expected [3 16 R]"),
    (lambda m: delta_with(m, b=m.draw(L, 5, K, 6)), "delta b at decoder/k has shape (3, 5, 2, 6); expected [3 4 2 6]"),
    (lambda m: made(bias={"qkv": m.bias()["k"]}), NAME),
    (lambda m: made(bias={"q": m.bias()["k"]}), "bias at decoder/q has shape (3, 2, 6); expected [3 2 4 6]"),
    (
        lambda m: made(adapter={"self": m.adapter()}),
        "unknown sublayer of the decoder 'self'; valid: attention, block, mlp",
    ),
    (
        lambda m: adapter_with(m, activation="tanh"),
        "unknown activation 'tanh'; valid: gelu, gelu_new, gelu_pytorch_tanh, relu, silu",
    ),
    (
        lambda m: adapter_with(m, down=m.draw(L, M, 16)),
        "adapter down at decoder/mlp has shape (3, 9, 16); expected [3 16 M]",
    ),
    (
        lambda m: adapter_with(m, up=m.draw(L, 16, M)),
        "adapter up at decoder/mlp has shape (3, 16, 9); expected [3 9 16]",
    ),
    (
        lambda m: adapter_with(m, down_bias=m.draw(L, 1)),
        "adapter down_bias at decoder/mlp has shape (3, 1); expected [3 9]",
    ),
    (
        lambda m: adapter_with(m, up_bias=m.draw(L, 1)),
        "adapter up_bias at decoder/mlp has shape (3, 1); expected [3 16]",
    ),
    (
        lambda m: adapter_with(m, norm={"scale": m.draw(L, 1), "bias": m.draw(L, 16)}),
        "adapter norm scale at decoder/mlp has shape (3, 1); expected [3 16]",
    ),
    (
        lambda m: made(adapter={"block": m.adapter(parallel=True)}),
        "an adapter at decoder/block has nothing to be parallel to; valid: attention, mlp",
    ),
    (lambda m: made(gate=m.gates("bias"), bias=m.bias()), "unknown gate 'bias'; valid: adapter, delta, kv"),
    (lambda m: made(gate=m.gates("delta"), kv=m.kv()), "a gate for delta of the decoder has nothing to gate"),
    (
        lambda m: made(gate={"kv": Gate(m.draw(L, M), m.draw(L))}, kv=m.kv()),
        "gate kv of the decoder has shape (3, 9); expected [3 16]",
    ),
    (
        lambda m: made(gate={"kv": Gate(m.draw(L, 16), m.draw(L, T))}, kv=m.kv()),
        "gate kv's bias of the decoder has shape (3, 7); expected [3]",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message.split(";")[0] for _, message in REFUSED])
def test_what_does_not_fit_raises(twin, make, message):
    model = twin("llama").model
    adaptation = make(Maker(model))
    with pytest.raises(UserError) as error:
        fit.check(adaptation, model.sites, rows=B)
    assert str(error.value) == message
    if "of the decoder" in message or "at decoder" in message:  # it is for every stack
        sites = model.sites | {"encoder": model.sites["decoder"]}
        with pytest.raises(UserError) as error:
            fit.check(Adaptation(encoder=adaptation.decoder), sites, rows=B)
        assert str(error.value) == message.replace("decoder", "encoder")


@BOTH
def test_every_pass_refuses_what_does_not_fit(twin, family):
    _, _, model, frozen = twin(family)
    rows, batch = len(ROWS), packed([[(row, [1])] for row in ROWS], T, 1)

    def prefill(adaptation):
        return model.prefill(frozen, adaptation, batch.tokens, np.full(rows, 2), T + 1)

    cache = jax.eval_shape(prefill, Adaptation())[1]
    for run in (
        prefill,
        lambda x: jax.eval_shape(model.decode, frozen, x, cache, batch.tokens[:, :1]),
        lambda x: model.hidden(frozen, x, batch),
        lambda x: model.probe(frozen, x, batch),
    ):
        with pytest.raises(UserError, match=r"prompt has shape \(4, 5, .*\); expected \[P .*\] or \[3 P .*\]"):
            jax.eval_shape(run, made(before=Maker(model).prompt(rows + 1)))


def changed(adaptation, change):
    return adaptation.replace(decoder=LayerHooks(kv={"self": jax.tree.map(change, adaptation.decoder.kv["self"])}))


@BOTH
@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda x: x[:-1], r"\(2, 5, 2, H\)"),
        (lambda x: np.repeat(x, 2, axis=2), r"\(3, 5, 4, H\)"),
        (lambda x: x[..., :-1], r"\(3, 5, 2, h\)"),
        (lambda x: np.swapaxes(x, 1, 2), r"\(3, 2, 5, H\)"),
        (lambda x: x[:, :, 0], r"\(3, 5, H\)"),
        (lambda x: np.stack([x] * 3, axis=1), r"\(3, 3, 5, 2, H\)"),
    ],
    ids=["layers", "heads", "head size", "axes", "rank", "rows"],
)
def test_shapes_that_do_not_fit_raise(twin, family, change, got):
    model = twin(family).model
    H = model.sites["decoder"].kv["self"][1]
    batch = one_a_row([(row, [1]) for row in random_rows(5)])
    got = got.replace("H", str(H)).replace("h", str(H - 1))
    wanted = rf"expected \[3 P 2 {H}\] or \[3 8 P 2 {H}\]"
    with pytest.raises(UserError, match=rf"prefix k at decoder/self has shape {got}; {wanted}"):
        jax.eval_shape(model.hidden, twin(family).frozen, changed(random_prefix(model, 0), change), batch)


@BOTH
def test_unknown_sites_and_unequal_pairs_raise(twin, family):
    _, _, model, frozen = twin(family)
    kv, tokens = random_prefix(model, 0).decoder.kv["self"], np.ones((2, 3), int)
    prefill = (np.array([3, 2]), 4)
    for given, message in (
        ({"cross": kv}, "unknown attention site of the decoder 'cross'; valid: self"),
        ({"self": kv, "encoder": kv}, "unknown attention site of the decoder 'encoder'; valid: self"),
        ({"self": KV(kv.k, kv.v[:, 1:])}, r"prefix v at decoder/self has shape \(3, 4, 2, .\); expected \[3 5 2 .\]"),
    ):
        adaptation = Adaptation(LayerHooks(kv=given))
        with pytest.raises(UserError, match=message):
            prefix_tuning.logits(model, frozen, adaptation, [[1, 2]])
        with pytest.raises(UserError, match=message):
            jax.eval_shape(lambda a: model.prefill(frozen, a, tokens, *prefill), adaptation)
        cache = jax.eval_shape(lambda: model.prefill(frozen, Adaptation(), tokens, *prefill))[1]
        with pytest.raises(UserError, match=message):
            jax.eval_shape(model.decode, frozen, adaptation, cache, np.ones((2, 1), int))


def test_parts_that_would_do_nothing_raise(twin):
    _, _, model, frozen = twin("llama")
    kv = random_prefix(model, 0).decoder.kv["self"]
    row = {"self": KV(kv.k[:, :1], kv.v[:, :1], mask=jnp.ones((len(kv.k), 1), bool))}
    width = model.sites["decoder"].width
    a, b = jnp.ones((len(kv.k), width, 2)), jnp.ones((len(kv.k), 2, *kv.k.shape[2:]))
    for hooks, message in (
        (
            LayerHooks(kv={"self": kv.replace(share=jnp.ones((1, 2)))}),
            "share and bias at decoder/self are made inside",
        ),
        (LayerHooks(rows=row), "rows at decoder/self have a mask, gate or share"),
        (LayerHooks(delta={"k": Delta(a, b, keys=jnp.ones(2))}), r"delta keys at decoder/k has shape \(2,\); .* \[3\]"),
    ):
        with pytest.raises(UserError, match=message):
            prefix_tuning.logits(model, frozen, Adaptation(hooks, rows=jnp.ones((1, width))), [[1, 2]])
