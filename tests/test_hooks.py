"""Every hook of an `Adaptation` against torch, PEFT or loops, alone and together, in full passes and in decoding."""

import contextlib
import copy

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import B, K, L, P, T, V, batch_logits, close, packed, random_rows, reference_logits

import prefix_tuning
from prefix_tuning import attention, fit, nn
from prefix_tuning.errors import UserError
from prefix_tuning.types import KV, Adaptation, Adapter, Delta, Gate, LayerHooks, Memory

BOTH = pytest.mark.parametrize("family", ["gpt2", "llama"])
R, M, N, W = 4, 9, 3, 3
# Ids from V on are virtual tokens: in the middle, side by side, at the start and at the end of a row.
VIRTUAL = [[1, V + 2, V, 5, 3, V + 1, 2], [4, V + 3], [V + 1, 7, 7, 2, V + 3]]
ROWS = [[token % V for token in row] for row in VIRTUAL]
SHIFTS = np.array([P + 4, P, P + 7], np.int32)


# --- Adaptations, every number in them random


class Maker:
    """Random hooks that fit a model, and the cases made of them; shapes are written out from the letters."""

    def __init__(self, model, seed=0):
        self.sites, self.rng = model.sites["decoder"], np.random.default_rng(seed)
        self.D, self.G, self.H = self.sites.width, self.sites.groups["self"], self.sites.kv["self"][1]

    def draw(self, *shape, scale=0.4):
        return (scale * self.rng.normal(size=shape)).astype(np.float32)

    def kv(self, *, per_row=False, length=P, **options):
        shape = (L, *([len(ROWS)] if per_row else []), length, K, self.H)
        return {"self": KV(self.draw(*shape, scale=1), self.draw(*shape, scale=1), **options)}

    def mask(self, *, per_row=False):
        mask = self.rng.random((L, *([len(ROWS)] if per_row else []), P)) < 0.6
        mask[1] = False  # a layer without slots
        assert len({tuple(x.ravel()) for x in mask}) == L
        return mask

    def delta(self, *names, **options):
        shapes = {name: self.sites.projections[name] for name in names or self.sites.projections}
        return {
            name: Delta(self.draw(L, *shape.inner, R), self.draw(L, R, *shape.outer), **options)
            for name, shape in shapes.items()
        }

    def bias(self):
        return {name: self.draw(L, *shape.outer) for name, shape in self.sites.projections.items()}

    def adapter(self, norm=False, **options):
        values = [self.draw(L, *shape) for shape in ((self.D, M), (M,), (M, self.D), (self.D,))]
        norm = {"scale": 1 + self.draw(L, self.D), "bias": self.draw(L, self.D)} if norm else None
        return Adapter(*values, norm=norm, **options)

    def serial(self):
        return {
            "attention": self.adapter(),
            "mlp": self.adapter(norm=True, activation="gelu", scale=0.7),
            "block": self.adapter(norm=True),
        }

    def parallel(self):
        return {
            "attention": self.adapter(norm=True, parallel=True, activation="gelu"),
            "mlp": self.adapter(parallel=True, scale=2.0),
        }

    def memory(self, feature):
        return {"self": Memory(self.draw(L, K, self.G, self.H, self.H), feature)}

    def rows(self):
        return {"self": KV(self.draw(L, R, K, self.H, scale=1), self.draw(L, R, K, self.H, scale=1))}

    def gates(self, *kinds):
        return {kind: Gate(self.draw(L, self.D), self.draw(L)) for kind in kinds}

    def prompt(self, *shape, length=P):
        return self.draw(*shape, length, self.D, scale=1)


def made(*, before=None, rows=None, shift=None, **hooks):
    """An adaptation of layer hooks, prompt rows `before` every example, virtual tokens and a shift."""
    hooks = LayerHooks(rows=hooks.pop("added", None), **hooks)
    return Adaptation(hooks, None if shift is None else np.int32(shift), prompt=before, rows=rows)


CASES = {
    "delta": lambda m: made(delta=m.delta(scale=0.7)),
    "bias": lambda m: made(bias=m.bias()),
    "serial": lambda m: made(adapter=m.serial()),
    "parallel": lambda m: made(adapter=m.parallel()),
    "memory": lambda m: made(memory=m.memory("elu")),
    "gelu": lambda m: made(memory=m.memory("gelu")),
    "gate of slots beside a prompt": lambda m: made(
        kv=m.kv(), gate=m.gates("kv"), before=m.prompt(length=R), shift=P + R
    ),
    "mask of shared slots by row beside a prompt": lambda m: made(
        kv=m.kv(mask=m.mask(per_row=True)), before=m.prompt(length=R), shift=P + R
    ),
    "mask": lambda m: made(kv=m.kv(mask=m.mask()), shift=P),
    "mask of shared slots by row": lambda m: made(kv=m.kv(mask=m.mask(per_row=True))),
    "mask of slots by row": lambda m: made(kv=m.kv(per_row=True, mask=m.mask(per_row=True)), shift=P),
    "gate": lambda m: made(kv=m.kv(gate=m.draw(L, K, m.G))),
    "gates": lambda m: made(
        kv=m.kv(), delta=m.delta(scale=1.5), adapter=m.serial(), gate=m.gates("kv", "delta", "adapter"), shift=P
    ),
    "prompt": lambda m: made(before=m.prompt(), shift=P),
    "prompt without shift": lambda m: made(before=m.prompt()),
    "prompt by row": lambda m: made(before=m.prompt(len(ROWS)), shift=P),
    "prompt and prefix": lambda m: made(kv=m.kv(), before=m.prompt(length=R), shift=P + R),
    "shift by row": lambda m: made(kv=m.kv(), before=m.prompt(), shift=SHIFTS),
    "propagation": lambda m: made(prompt=m.prompt(L), before=m.prompt(), shift=P),
    "rows": lambda m: made(added=m.rows(), rows=m.prompt(length=R)),
    "everything": lambda m: made(
        kv=m.kv(per_row=True, mask=m.mask(per_row=True)),
        memory=m.memory("elu"),
        delta=m.delta(scale=0.3),
        bias=m.bias(),
        adapter={"attention": m.adapter(norm=True), "mlp": m.adapter(parallel=True)},
        gate=m.gates("delta", "adapter"),
        prompt=m.prompt(L, length=R),
        before=m.prompt(len(ROWS), length=R),
        added=m.rows(),
        rows=m.prompt(length=R),
        shift=SHIFTS,
    ),
}


def rows_for(adaptation):
    return ROWS if adaptation.rows is None else VIRTUAL


# --- The same in torch: transformers' modules with hooks, one row at a time, and attention written out


def modules(reference):
    """Each layer's modules, by the names that they have as sites here."""
    if hasattr(reference, "transformer"):
        return [
            {"attention": h.attn, "mlp": h.mlp, "block": h}
            | {"qkv": h.attn.c_attn, "o": h.attn.c_proj, "up": h.mlp.c_fc, "down": h.mlp.c_proj}
            for h in reference.transformer.h
        ]
    return [
        {"attention": h.self_attn, "mlp": h.mlp, "block": h}
        | {name: getattr(h.self_attn, f"{name}_proj") for name in "qkvo"}
        | {name: getattr(h.mlp, f"{name}_proj") for name in ("gate", "up", "down")}
        for h in reference.model.layers
    ]


def row_of(adaptation, b):
    """The adaptation of row b alone."""

    def kv(x):
        k, v = (y[:, b] if y.ndim == 5 else y for y in (x.k, x.v))
        return KV(k, v, x.mask[:, b] if np.ndim(x.mask) == 3 else x.mask, x.gate)

    hooks = adaptation.decoder
    prompt, shift = adaptation.prompt, adaptation.shift
    return adaptation.replace(
        decoder=hooks if hooks.kv is None else hooks.replace(kv={"self": kv(hooks.kv["self"])}),
        prompt=prompt[b] if np.ndim(prompt) == 3 else prompt,
        shift=shift[b] if np.ndim(shift) == 1 else shift,
    )


def theirs(reference, adaptation, rows):
    """torch's logits [T V] of each row."""
    with torch.no_grad():
        return [hooked(reference, row_of(adaptation, b), row) for b, row in enumerate(rows)]


def hooked(reference, adaptation, row):
    """torch's logits [T V] of one row under an adaptation that has no rows of its own."""
    hooks = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), adaptation.decoder)
    virtual = [token - V for token in row]
    embedded = reference.get_input_embeddings()(torch.tensor([min(token, V - 1) for token in row]))
    for t, r in enumerate(virtual):
        if r >= 0:
            embedded[t] = torch.tensor(adaptation.rows[r])
    before = 0 if adaptation.prompt is None else len(adaptation.prompt)
    start = 0 if adaptation.shift is None else int(adaptation.shift)
    positions = [*range(start, start + len(row))]
    if before:
        embedded = torch.cat([torch.tensor(adaptation.prompt), embedded])
        first = 0 if adaptation.shift is None else start - before
        positions = [*range(first, first + before), *positions]
    values = {}  # of the gates in the layer that is running, [T]

    def enter(i):
        def hook(module, args):
            x = args[0].clone()
            if hooks.prompt is not None:
                x[0, :before] += hooks.prompt[i]
            for kind, gate in (hooks.gate or {}).items():
                values[kind] = torch.sigmoid(x[0] @ gate.w[i] + gate.b[i])
            return x, *args[1:]

        return hook

    def scaled(kind, x):
        return x * values[kind][:, None] if kind in values else x

    def linear(i, site, part):
        def hook(module, args, y):
            y = y.clone()
            out = y[0].unflatten(-1, (-1, y.shape[-1] // (1 if part is None else 3)))[:, part or 0]
            if site in (hooks.delta or {}):
                delta = hooks.delta[site]
                a, b = delta.a[i].reshape(-1, R), delta.b[i].reshape(R, -1)
                out += scaled("delta", delta.scale * (args[0][0] @ a @ b))
            if site in (hooks.bias or {}):
                out += hooks.bias[site][i].flatten()
            return y

        return hook

    def sublayer(i, adapter):
        def hook(module, args, kwargs, given):
            y = given[0] if isinstance(given, tuple) else given
            x = (args or [kwargs.get("hidden_states")])[0] if adapter.parallel else y
            if adapter.norm is not None:
                x = torch.layer_norm(x, x.shape[-1:], adapter.norm["scale"][i], adapter.norm["bias"][i])
            x = getattr(torch.nn.functional, adapter.activation)(x @ adapter.down[i] + adapter.down_bias[i])
            y = y + scaled("adapter", adapter.scale * (x @ adapter.up[i] + adapter.up_bias[i])[0])
            return (y, *given[1:]) if isinstance(given, tuple) else y

        return hook

    def attention(module, q, k, v, mask, **_):
        i, (heads, length, size) = module.layer_idx, q.shape[1:]
        q, k, v = q.reshape(K, -1, length, size), k[0].clone(), v[0].clone()
        for t, r in enumerate(virtual):
            if r >= 0 and hooks.rows:
                k[:, before + t] += hooks.rows["self"].k[i, r]
                v[:, before + t] += hooks.rows["self"].v[i, r]
        scores = torch.einsum("kgth,ksh->kgts", q, k) / size**0.5
        scores = scores.masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)
        out = scores.softmax(-1) @ v[:, None]
        if hooks.kv:
            kv = hooks.kv["self"]
            exist = torch.ones(kv.k.shape[1]).bool() if kv.mask is None else kv.mask[i]
            slots_k, slots_v = kv.k[i][exist].transpose(0, 1), kv.v[i][exist].transpose(0, 1)
            share = values.get("kv", torch.ones(length))[:, None]
            beside = torch.einsum("kgth,kph->kgtp", q, slots_k) / size**0.5 * share
            if kv.gate is None:
                weights = torch.cat([beside, scores], -1).softmax(-1).split([beside.shape[-1], length], -1)
                out = weights[0] @ slots_v[:, None] * share + weights[1] @ v[:, None]
            else:
                out = out + kv.gate[i][:, :, None, None] * share * (beside.softmax(-1) @ slots_v[:, None])
        if hooks.memory:
            memory = hooks.memory["self"]
            out = out + getattr(torch.nn.functional, memory.feature)(q) @ memory.m[i]
        return out.reshape(1, heads, length, size).transpose(1, 2), None

    with contextlib.ExitStack() as stack:
        for i, layer in enumerate(modules(reference)):
            handles = [layer["block"].register_forward_pre_hook(enter(i))]
            for site in {**(hooks.delta or {}), **(hooks.bias or {})}:
                name, part = (site, None) if site in layer else ("qkv", "qkv".index(site))
                handles.append(layer[name].register_forward_hook(linear(i, site, part)))
            for site, adapter in (hooks.adapter or {}).items():
                handles.append(layer[site].register_forward_hook(sublayer(i, adapter), with_kwargs=True))
            for handle in handles:
                stack.callback(handle.remove)
        stack.callback(setattr, reference.config, "_attn_implementation", reference.config._attn_implementation)
        transformers.AttentionInterface.register("written out", attention)
        reference.config._attn_implementation = "written out"
        out = reference(inputs_embeds=embedded[None], position_ids=torch.tensor([positions]))
    return out.logits[0, before:].numpy()


@BOTH
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_logits_are_those_of_torch_with_hooks(twin, family, make):
    reference, _, model, frozen = twin(family)
    adaptation = make(Maker(model))
    ours = prefix_tuning.logits(model, frozen, adaptation, rows_for(adaptation))
    close(ours, theirs(reference, adaptation, rows_for(adaptation)))


def searched(model, frozen, adaptation, prompts, beams):
    """The best continuations by beam search over full passes, and nothing cached."""
    kept = [[(0.0, row)] for row in prompts]
    for _ in range(N):
        found = [[] for _ in prompts]
        for w in range(beams):
            rows = [row[min(w, len(row) - 1)][1] for row in kept]
            filled = [row + [0] * (T - len(row)) for row in rows]
            for b, logits in enumerate(prefix_tuning.logits(model, frozen, adaptation, filled)):
                if w < len(kept[b]):
                    scores = kept[b][w][0] + np.asarray(jax.nn.log_softmax(logits[len(rows[b]) - 1]))
                    found[b] += [(score, [*rows[b], token]) for token, score in enumerate(scores)]
        kept = [sorted(candidates, reverse=True)[:beams] for candidates in found]
    return [best[0][1][len(row) :] for best, row in zip(kept, prompts, strict=True)]


@pytest.mark.parametrize(
    ("case", "family", "beams"),
    # With beams in one family or the other, as compiling takes long; everything at once in all four ways.
    [(case, ("gpt2", "llama")[number % 2], W) for number, case in enumerate(CASES) if case != "everything"]
    + [
        pytest.param("everything", family, beams, marks=pytest.mark.apart)
        for family in ("gpt2", "llama")
        for beams in (1, W)
    ],
)
def test_decoding_is_a_search_over_full_passes(twin, family, case, beams):
    _, _, model, frozen = twin(family)
    adaptation = CASES[case](Maker(model))
    prompts = [row[: T - N] for row in rows_for(adaptation)]
    ours = prefix_tuning.generate(model, frozen, adaptation, prompts, max_new_tokens=N, end_tokens=(), num_beams=beams)
    assert ours == searched(model, frozen, adaptation, prompts, beams)


# --- Low-rank changes and biases


def changed_kernels(model, frozen, hooks):
    """The frozen weights with what the hooks' low-rank changes add to each kernel."""
    layers = {name: dict(tree) if isinstance(tree, dict) else tree for name, tree in frozen["layers"].items()}
    for name, delta in hooks.delta.items():
        site = model.sites["decoder"].projections[name]
        change = delta.scale * np.einsum("lir,lro->lio", delta.a.reshape(L, -1, R), delta.b.reshape(L, R, -1))
        change = change.reshape(L, *site.inner, *site.outer)
        kernel = np.array(layers[site.weight]["kernel"])
        kernel[(slice(None),) * (1 + len(site.inner)) + (... if site.part is None else site.part,)] += change
        layers[site.weight]["kernel"] = kernel
    return frozen | {"layers": layers}


@BOTH
def test_delta_is_a_changed_kernel(twin, family):
    _, _, model, frozen = twin(family)
    adaptation = CASES["delta"](Maker(model))
    ours = prefix_tuning.logits(model, frozen, adaptation, ROWS)
    close(ours, prefix_tuning.logits(model, changed_kernels(model, frozen, adaptation.decoder), None, ROWS))


@pytest.mark.parametrize(
    ("family", "names", "rslora"),
    [
        ("gpt2", {"c_attn": "qkv", "attn.c_proj": "o", "mlp.c_proj": "down"}, True),
        ("llama", {"q_proj": "q", "v_proj": "v", "o_proj": "o", "down_proj": "down"}, False),
    ],
)
def test_delta_is_lora_of_peft(twin, family, names, rslora):
    reference, _, model, frozen = twin(family)
    config = peft.LoraConfig(
        r=R,
        lora_alpha=6,
        target_modules=list(names),
        use_rslora=rslora,
        fan_in_fan_out=family == "gpt2",
        init_lora_weights=False,  # random
    )
    torch.manual_seed(0)
    tuned = peft.get_peft_model(copy.deepcopy(reference), config).eval()
    weights, delta = {name: x.detach().numpy().T for name, x in tuned.named_parameters()}, {}
    for module, site in names.items():
        shape = model.sites["decoder"].projections[site]
        a, b = (np.stack([x for name, x in weights.items() if f"{module}.lora_{half}" in name]) for half in ("A", "B"))
        scale = 6 / R**0.5 if rslora else 6 / R
        delta[site] = Delta(a.reshape(L, *shape.inner, R), b.reshape(L, R, *shape.outer), scale=scale)
    ours = prefix_tuning.logits(model, frozen, made(delta=delta), ROWS)
    close(ours, reference_logits(tuned, ROWS))
    assert np.abs(ours[0] - reference_logits(reference, ROWS)[0]).max() > 0.01


def test_parts_of_a_fused_projection(twin):
    _, _, model, frozen = twin("gpt2")
    parts = Maker(model).delta("q", "k", "v", scale=0.7)
    fused = np.zeros((L, 3, R, 3, K, Maker(model).H), np.float32)
    for part, name in enumerate("qkv"):
        fused[:, part, :, part] = parts[name].b
    a = np.concatenate([parts[name].a for name in "qkv"], axis=-1)
    whole = {"qkv": Delta(a, fused.reshape(L, 3 * R, *fused.shape[3:]), scale=0.7)}
    ours = [prefix_tuning.logits(model, frozen, made(delta=x), ROWS) for x in (parts, whole)]
    close(*ours, 1e-5)


def test_dropout_is_on_what_the_low_rank_change_reads():
    rng, rate, size = np.random.default_rng(0), 0.25, 6
    x = rng.uniform(1, 2, (len(ROWS), T, 2, size)).astype(np.float32)  # two axes are contracted
    y = rng.normal(size=(len(ROWS), T, 2 * size)).astype(np.float32)
    eye = np.eye(2 * size, dtype=np.float32)
    delta = Delta(eye.reshape(2, size, -1), 3 * eye, scale=0.5, dropout=rate)

    @jax.jit
    def dropped(keys):
        return nn.change(y, x, LayerHooks(delta={"o": delta.replace(keys=keys)}), "o", axes=2) - y

    whole = 1.5 * x.reshape(y.shape)
    np.testing.assert_allclose(dropped(None), whole, atol=1e-5)
    one, other = (dropped(jax.random.key(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(one, dropped(jax.random.key(0)))
    assert (np.abs(one - other) > 0.1).any((0, 1)).all()
    # each number is gone, or larger by what the others lack
    kept = np.abs(one) > 0.1
    np.testing.assert_allclose(one, np.where(kept, whole / (1 - rate), 0), atol=1e-5)
    many = jax.vmap(dropped)(jax.random.split(jax.random.key(2), 4000))
    np.testing.assert_allclose(many.mean(0), whole, atol=0.15)
    assert abs((np.abs(many) > 0.1).mean() - (1 - rate)) < 2e-3


def test_every_layer_drops_by_its_own_key(twin):
    _, _, model, frozen = twin("llama")
    delta = Maker(model).delta("q", scale=0.7, dropout=0.5)["q"]
    keys = jax.random.split(jax.random.key(0), L)

    def logits(keys):
        return prefix_tuning.logits(model, frozen, made(delta={"q": delta.replace(keys=keys)}), ROWS)[0]

    first = logits(keys)
    np.testing.assert_array_equal(first, logits(keys))
    for layer in range(L):
        assert np.abs(first - logits(keys.at[layer].set(jax.random.key(9)))).max() > 1e-3


# --- Attention


def written_out(q, k, v, mask, prefixes, share):
    """Every query head by itself; masked slots are taken out, and a gated prefix has a softmax of its own."""
    out = np.zeros(q.shape)
    for b, t, j, g in np.ndindex(*q.shape[:4]):
        query, scale = torch.tensor(q[b, t, j, g]), 1.0 if share is None else share[b, t]

        def slots(prefix, b=b, j=j, query=query, scale=scale):
            keys, values = (torch.tensor((x[b] if x.ndim == 4 else x)[:, j]) for x in (prefix.k, prefix.v))
            if prefix.mask is not None:
                there = torch.tensor(prefix.mask[b] if prefix.mask.ndim == 2 else prefix.mask)
                keys, values = keys[there], values[there]
            return scale * keys @ query / len(query) ** 0.5, scale * values

        parts = [(torch.tensor(k[b, mask[b, t], j]) @ query / len(query) ** 0.5, torch.tensor(v[b, mask[b, t], j]))]
        parts += [slots(prefix) for prefix in prefixes if prefix.gate is None]
        scores, values = (torch.cat(x) for x in zip(*parts, strict=True))
        out[b, t, j, g] = torch.softmax(scores, 0) @ values
        for prefix in prefixes:
            if prefix.gate is not None:
                scores, values = slots(prefix)
                out[b, t, j, g] += prefix.gate[j, g] * (torch.softmax(scores, 0) @ values).numpy()
    return out


def attention_inputs(seed, heads=3, size=6, rows=4):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    k, v = draw(2, rows, 8, K, size)
    mask = rng.random((rows, T, 8)) < 0.6
    mask[:, :, 0] = True
    there = rng.random((5, rows, P)) < 0.6
    there[:, :, 1], there[0, 0] = True, False  # no slot at all in one row
    prefixes = (
        KV(*draw(2, rows, P, K, size), mask=there[0]),
        KV(*draw(2, P, K, size), mask=there[1, 0]),
        KV(*draw(2, P, K, size), gate=draw(K, heads)),
        KV(*draw(2, P + 1, K, size)),
        KV(*draw(2, P, K, size), mask=there[2]),
        KV(*draw(2, rows, P, K, size), mask=there[3], gate=draw(K, heads)),
    )
    return draw(rows, T, K, heads, size), k, v, mask, prefixes, rng.uniform(size=(rows, T)).astype(np.float32)


@jax.jit
def attend(q, k, v, mask, prefixes=(), share=None):
    return attention.attend(q, k, v, mask, [prefix.replace(share=share) for prefix in prefixes])


@pytest.mark.parametrize("shared", [True, False], ids=["share", "no share"])
def test_attention_to_slots_with_masks_and_gates_is_what_the_loops_say(shared):
    *inputs, share = attention_inputs(0)
    share = share if shared else None
    np.testing.assert_allclose(attend(*inputs, share), written_out(*inputs, share), atol=3e-6)


def test_share_of_one_is_no_share_and_of_zero_counts_slots():
    q, k, v, mask, prefixes, share = attention_inputs(1)
    ours = attend(q, k, v, mask, prefixes, np.ones_like(share))
    np.testing.assert_allclose(ours, attend(q, k, v, mask, prefixes), atol=1e-6)
    # At 0 a slot still takes the softmax mass of a score of 0, and gives nothing.
    nothing = jax.tree.map(np.zeros_like, prefixes[3])
    ours = attend(q, k, v, mask, prefixes[3:4], np.zeros_like(share))
    np.testing.assert_allclose(ours, attend(q, k, v, mask, (nothing,)), atol=1e-6)


def test_gated_prefix_is_added_to_attention_without_it():
    q, k, v, mask, prefixes, _ = attention_inputs(2)
    prefix = prefixes[2]
    ours = attend(q, k, v, mask, (prefix,))
    repeated = [np.repeat(x[None], len(q), axis=0) for x in (prefix.k, prefix.v)]
    alone = attend(q, *repeated, np.ones((*q.shape[:2], P), bool))
    np.testing.assert_allclose(ours, attend(q, k, v, mask) + prefix.gate[..., None] * alone, atol=3e-6)
    np.testing.assert_array_equal(
        attend(q, k, v, mask, (prefix.replace(gate=0 * prefix.gate),)), attend(q, k, v, mask, ())
    )


def test_gated_prefix_of_masked_slots_adds_nothing():
    q, k, v, mask, prefixes, _ = attention_inputs(2)
    none = prefixes[2].replace(mask=np.zeros(P, bool))
    np.testing.assert_allclose(attend(q, k, v, mask, (none,)), attend(q, k, v, mask), atol=1e-6)


def test_masked_slots_have_no_slope():
    q, k, v, mask, prefixes, share = attention_inputs(3)
    prefix = prefixes[0]

    @jax.jit
    @jax.grad
    def slopes(kv):
        return jnp.square(attention.attend(q, k, v, mask, [KV(*kv, mask=prefix.mask, share=share)])).sum()

    for slope in slopes((prefix.k, prefix.v)):
        assert np.isfinite(slope).all()
        np.testing.assert_array_equal((np.abs(slope) > 0).all((2, 3)), prefix.mask)


def test_queries_in_parts_attend_as_all_at_once(monkeypatch):
    """Values and slopes; with masks, shares and biases of each query, and gates."""
    q, k, v, mask, prefixes, share = attention_inputs(4)
    rng = np.random.default_rng(5)
    k, v, mask = k[:, :T], v[:, :T], np.tril(mask[:, :, :T]) | np.eye(T, dtype=bool)
    heads = q.shape[2:4]
    each = prefixes[1].replace(mask=rng.random((len(q), T, P)) < 0.6, bias=rng.normal(size=(*heads, T, P)))
    prefixes = [prefix.replace(share=share) for prefix in (*prefixes, each)]
    bias, weights = rng.normal(size=(*heads, T, T)), rng.normal(size=q.shape)
    floats, rest = with_slopes(prefixes)

    def found(queries, causal):
        monkeypatch.setattr(attention, "QUERIES", queries)
        monkeypatch.setattr(attention, "SCORES", 0 if queries < T else attention.SCORES)

        def weighed(q, k, v, floats, bias):
            prefixes = jax.tree.map(lambda x, y: y if x is None else x, floats, rest, is_leaf=lambda x: x is None)
            return (weights * attention.attend(q, k, v, mask, prefixes, bias=bias, causal=causal)).sum()

        compiled = jax.jit(jax.value_and_grad(weighed, range(5))).lower(q, k, v, floats, bias).compile()
        return compiled(q, k, v, floats, bias), compiled.cost_analysis()["flops"]

    (at_once, _), (parts, all_keys), (causal, some_keys) = found(T, False), found(3, False), found(3, True)
    for other in (parts, causal):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), other, at_once)
    assert some_keys < all_keys


def test_parts_hold_all_queries_and_are_not_too_many():
    assert attention.query_parts(attention.QUERIES) == [(0, attention.QUERIES)]
    for queries in (attention.QUERIES + 1, 10 * attention.QUERIES, 1000 * attention.QUERIES):
        parts = attention.query_parts(queries)
        assert [t for part in parts for t in range(*part)] == list(range(queries))
        assert len(parts) == min(-(-queries // attention.QUERIES), attention.PARTS)


def test_causal_attention_has_a_key_for_each_query():
    q, k, v, mask, *_ = attention_inputs(0)
    with pytest.raises(UserError, match=f"causal attention of {T} queries over {k.shape[1]} keys; expected as many"):
        attention.attend(q, k, v, mask, causal=True)


def with_slopes(tree):
    """The leaves of a tree that have slopes, and the others, each with None in place of the rest."""
    real = jax.tree.map(lambda x: np.issubdtype(x.dtype, np.floating), tree)
    floats = jax.tree.map(lambda x, own: x if own else None, tree, real)
    return floats, jax.tree.map(lambda x, own: None if own else x, tree, real)


@pytest.mark.parametrize("feature", ["elu", "gelu"])
def test_memory_is_what_the_loops_say(feature):
    rng = np.random.default_rng(0)
    attended, q = rng.normal(size=(2, 2, T, K, 4, 6)).astype(np.float32)
    m = rng.normal(size=(K, 4, 6, 6)).astype(np.float32)
    expected = attended.copy()
    features = getattr(torch.nn.functional, feature)(torch.tensor(q)).numpy()
    for b, t, j, g in np.ndindex(*q.shape[:4]):
        expected[b, t, j, g] += features[b, t, j, g] @ m[j, g]
    ours = attention.recall(attended, q, LayerHooks(memory={"self": Memory(m, feature)}), "self")
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    np.testing.assert_array_equal(attention.recall(attended, q, LayerHooks(), "self"), attended)


@BOTH
def test_masked_slots_are_no_slots(twin, family):
    _, _, model, frozen = twin(family)
    masked = CASES["mask"](Maker(model))
    kv = masked.decoder.kv["self"]
    none = made(kv={"self": kv.replace(mask=np.zeros_like(kv.mask))}, shift=0)
    bare = prefix_tuning.logits(model, frozen, None, ROWS)
    close(prefix_tuning.logits(model, frozen, none, ROWS), bare, 2e-6)
    junk = [np.where(kv.mask[..., None, None], x, 1e3) for x in (kv.k, kv.v)]
    junk = made(kv={"self": KV(*junk, mask=kv.mask)}, shift=P)
    ours, wanted = (prefix_tuning.logits(model, frozen, x, ROWS) for x in (junk, masked))
    close(ours, wanted, 2e-6)
    assert np.abs(wanted[0] - bare[0]).max() > 0.01


@BOTH
def test_hooks_of_nothing_are_the_model_bit_for_bit(twin, family):
    """A memory and gates of 0, and low-rank changes, adapters and biases that start at 0."""
    _, _, model, frozen = twin(family)
    m = Maker(model)
    gated = m.kv(gate=np.zeros((L, K, m.G), np.float32))
    memory = {"self": Memory(0 * m.memory("elu")["self"].m)}
    fresh = {name: x.replace(b=0 * x.b) for name, x in m.delta().items()}
    adapters = {name: x.replace(up=0 * x.up, up_bias=0 * x.up_bias) for name, x in m.serial().items()}
    biases = jax.tree.map(np.zeros_like, m.bias())
    ours = made(kv=gated, memory=memory, delta=fresh, adapter=adapters, bias=biases)
    ours = prefix_tuning.logits(model, frozen, ours, ROWS)
    for one, other in zip(ours, prefix_tuning.logits(model, frozen, None, ROWS), strict=True):
        np.testing.assert_array_equal(one, other)


# --- Prompts and virtual tokens


@BOTH
def test_prompt_of_real_tokens_is_those_tokens(twin, family):
    reference, _, model, frozen = twin(family)
    text = [3, 1, 4, 1, 5]
    assert len(text) == P
    prompt = model.embed(frozen, np.array(text))
    ours = prefix_tuning.logits(model, frozen, made(before=prompt, shift=P), ROWS)
    close(ours, [logits[P:] for logits in reference_logits(reference, [text + row for row in ROWS])])


@BOTH
def test_packed_segments_see_the_prompt_and_not_each_other(twin, family):
    _, _, model, frozen = twin(family)
    adaptation = CASES["prompt and prefix"](Maker(model))
    one, two, three = random_rows(7, lengths=(4, 2, 7))

    def run(first):
        logits = batch_logits(model, frozen, adaptation, packed([[(first, [1]), (two, [2])], [(three, [1])]], 8, 2))
        return [logits[0, :4], logits[0, 4:6], logits[1, :7]]

    before, after = run(one), run([(token + 1) % V for token in one])
    close(before, prefix_tuning.logits(model, frozen, adaptation, [one, two, three]), 1e-5)
    np.testing.assert_array_equal(before[1], after[1])
    assert np.abs(before[0] - after[0]).max() > 0.01


@BOTH
def test_virtual_tokens_change_only_what_comes_after(twin, family):
    _, _, model, frozen = twin(family)
    adaptation = CASES["rows"](Maker(model))
    other = jax.tree.map(lambda x: x + 1, adaptation)
    rows = [[1, 2, V + 3, 4, 5, 6, 7], [1, 2, 3]]
    one, two = (prefix_tuning.logits(model, frozen, x, [*rows, rows[1]]) for x in (adaptation, other))
    np.testing.assert_array_equal(one[0][:2], two[0][:2])
    assert (np.abs(one[0][2:] - two[0][2:]).max(1) > 1e-3).all()
    np.testing.assert_array_equal(one[1], two[1])
    np.testing.assert_allclose(
        one[1], prefix_tuning.logits(model, frozen, None, ROWS[:1] + [rows[1]] * 2)[1], atol=1e-5
    )


def test_rows_are_added_where_an_index_names_them():
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 3, T, K, 6)).astype(np.float32)
    rows = KV(*rng.normal(size=(2, R, K, 6)).astype(np.float32))
    index = rng.integers(-1, R, (3, T))
    wanted = [x.copy() for x in (k, v)]
    for b, t in np.ndindex(*index.shape):
        if index[b, t] >= 0:
            wanted[0][b, t] += rows.k[index[b, t]]
            wanted[1][b, t] += rows.v[index[b, t]]
    close(nn.add_rows(k, v, jax.tree.map(jnp.asarray, rows), index), wanted, 1e-6)
    for given in ((None, index), (rows, None)):
        assert nn.add_rows(k, v, *given) == (k, v)


@BOTH
def test_everything_in_half_precision(twin, family):
    _, _, model, frozen = twin(family)
    frozen = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
    batch = packed([[(row, [1])] for row in ROWS], T, 1)
    adaptation = CASES["everything"](Maker(model))
    assert jax.eval_shape(model.hidden, frozen, adaptation, batch).dtype == jnp.bfloat16


# --- What does not fit


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


# --- What attention does


def eager(reference, kv, prompt, row):
    """transformers' (logits, attention, keys, values) [L ...] for one row after past keys and values and a prompt."""
    past = transformers.DynamicCache()
    for i in range(L):
        past.update(*(torch.tensor(x[i]).transpose(0, 1)[None] for x in (kv.k, kv.v)), i)
    embedded = torch.cat([torch.tensor(prompt), reference.get_input_embeddings()(torch.tensor(row))])
    before = reference.config._attn_implementation
    reference.config._attn_implementation = "eager"
    with torch.no_grad():
        out = reference(
            inputs_embeds=embedded[None],
            past_key_values=past,
            position_ids=torch.arange(len(embedded))[None] + kv.k.shape[1],
            output_attentions=True,
        )
    reference.config._attn_implementation = before
    stacked = [
        np.stack([x[0].numpy() for x in layers])
        for layers in (
            out.attentions,
            [layer.keys for layer in past.layers],
            [layer.values for layer in past.layers],
        )
    ]
    return out.logits[0, len(prompt) :].numpy(), *stacked


def probed(model, frozen, adaptation):
    batch = packed([[(row, [1])] for row in ROWS], T, 1)
    found = jax.jit(model.probe)(frozen, adaptation, batch)["decoder"]["self"]
    return {name: np.asarray(x) for name, x in found.items()}


@BOTH
def test_probe_is_the_attention_of_transformers(twin, family):
    reference, _, model, frozen = twin(family)
    adaptation = CASES["prompt and prefix"](Maker(model))
    kv, prompt, before = adaptation.decoder.kv["self"], adaptation.prompt, P + R
    logits, attention, k, v = zip(*(eager(reference, kv, prompt, row) for row in ROWS), strict=True)
    close(prefix_tuning.logits(model, frozen, adaptation, ROWS), logits)
    ours = probed(model, frozen, adaptation)
    # the mean over all real tokens [L heads slots], first the slots of the prefix and then those of the prompt
    mass = np.concatenate([x[:, :, R:, :before] for x in attention], axis=2).mean(2)
    close([ours["mass"].reshape(mass.shape)], [mass], 1e-5)
    assert ours["mass"].shape == (L, K, mass.shape[1] // K, before)
    share = 1 - np.concatenate([x[:, :, R:, before:].sum(-1) for x in attention], axis=2).mean(2)
    close([ours["mass"].sum(-1).reshape(share.shape)], [share], 1e-5)
    for name, own, x in (("key", kv.k, k), ("value", kv.v, v)):
        norms = np.linalg.norm(np.concatenate([own, x[0][:, :, P:before].swapaxes(1, 2)], 1), axis=-1).swapaxes(1, 2)
        close([ours[f"{name}_norm"]], [norms], 1e-4)
        tokens = np.concatenate([np.linalg.norm(y[:, :, before:], axis=-1) for y in x], axis=2).mean(2)
        close([ours[f"token_{name}_norm"]], [tokens], 1e-4)


def test_probe_of_masks_gates_and_rows(twin):
    _, _, model, frozen = twin("llama")
    m = Maker(model)
    masked = CASES["mask of slots by row"](m)
    ours, kv = probed(model, frozen, masked), masked.decoder.kv["self"]
    np.testing.assert_array_equal((ours["mass"] > 0).all((1, 2)), kv.mask.any(1))
    np.testing.assert_array_equal((ours["mass"] == 0).all((1, 2)), ~kv.mask.any(1))
    for name, x in (("key_norm", kv.k), ("value_norm", kv.v)):
        close([ours[name]], [np.linalg.norm(x, axis=-1).mean(1).swapaxes(1, 2)], 1e-5)
    gated = CASES["gate"](m)
    close([probed(model, frozen, gated)["mass"].sum(-1)], [gated.decoder.kv["self"].gate], 1e-6)


def test_probe_of_a_gate_that_is_shut(twin):
    _, _, model, frozen = twin("llama")
    m = Maker(model)
    shut, kv = {"kv": Gate(m.draw(L, m.D), np.full(L, -1e4, np.float32))}, m.kv()
    ours = probed(model, frozen, made(kv=kv, gate=shut))["mass"]
    nothing = made(kv=jax.tree.map(np.zeros_like, kv))
    close([ours], [probed(model, frozen, nothing)["mass"]], 1e-5)


def test_probe_of_a_gated_prefix_comes_before_the_prompt(twin):
    _, _, model, frozen = twin("llama")
    m = Maker(model)
    gate = m.draw(L, K, m.G)
    ours = probed(model, frozen, made(kv=m.kv(gate=gate), before=m.prompt(length=R)))["mass"]
    close([ours[..., :P].sum(-1)], [gate], 1e-5)


def test_probe_without_slots(twin):
    _, _, model, frozen = twin("llama")
    ours = probed(model, frozen, Adaptation())
    assert ours["mass"].shape == (L, K, 4, 0)
    assert ours["key_norm"].shape == ours["value_norm"].shape == (L, K, 0)
    assert ours["token_key_norm"].shape == (L, K)
