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
from adaptations import CASES, ROWS, Maker, R, made, rows_for
from conftest import K, L, P, T, V, batch_logits, close, packed, random_rows, reference_logits

import prefix_tuning
from prefix_tuning.types import KV, Adaptation, Delta, Gate, Memory

BOTH = pytest.mark.parametrize("family", ["gpt2", "llama"])
N, W = 3, 3


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


# --- Slots and memories


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


@BOTH
def test_everything_in_half_precision(twin, family):
    _, _, model, frozen = twin(family)
    frozen = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
    batch = packed([[(row, [1])] for row in ROWS], T, 1)
    adaptation = CASES["everything"](Maker(model))
    assert jax.eval_shape(model.hidden, frozen, adaptation, batch).dtype == jnp.bfloat16


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
