"""Several methods at once, and several trained adaptations as one."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prefix_tuning.errors import UserError, valid
from prefix_tuning.registry import named
from prefix_tuning.types import KV, Adaptation, Gate, LayerHooks, Method, Model, Params

GATED = ("kv", "delta", "adapter")


def make(
    registry: dict[str, Callable], tokenizer: Any, *, parts: dict[str, dict[str, Any]], gates: bool = False
) -> Method:
    """A `Method` of several: `parts` is name -> options of that method, each initialised and bound on its own.

    Prefix and scaled parallel adapter are the MAM adapter (He et al. 2021).  `gates` multiply what prefix, LoRA and
    adapter do by sigmoids of each layer's input (UniPELT, Mao et al. 2022; per token here rather than averaged over the
    input, of which a causal model knows only the past).  Raises `UserError` for fewer than two parts, and when bound
    for two parts that change the same thing.
    """
    if len(parts) < 2:
        raise UserError(f"method.parts has {len(parts)} methods; expected at least two of {', '.join(registry)}")
    made = {
        name: named(f"method.parts.{name}", registry, {"name": name, **options}, tokenizer)
        for name, options in parts.items()
    }
    templates = [method.template for method in made.values() if method.template != "{prompt}"]
    if len(templates) > 1:
        raise UserError(f"method.parts: at most one of them may have a template; got {', '.join(templates)}")

    def keys(key: Array | None) -> dict[str, Array | None]:
        return {n: key if key is None else jax.random.fold_in(key, i) for i, n in enumerate(made)}

    def prepare(key: Array, model: Model, frozen: Params) -> Params:
        for name, own in keys(key).items():
            frozen = made[name].prepare(own, model, frozen)
        return frozen

    def init_fn(key: Array, model: Model, frozen: Params) -> Params:
        trainable = {name: made[name].init(own, model, frozen) for name, own in keys(key).items()}
        if gates:
            _, adaptation = jax.eval_shape(lambda f, t: joined(f, t, keys(None)), frozen, trainable)
            trainable["gates"] = fresh_gates(jax.random.fold_in(key, len(made)), model, adaptation)
        return trainable

    def joined(frozen: Params, trainable: Params, own: dict[str, Array | None]) -> tuple[Params, Adaptation]:
        adaptations = []
        for name, method in made.items():
            frozen, adaptation = method.bind(frozen, trainable[name], key=own[name])
            adaptations.append(adaptation)
        return frozen, join(adaptations)

    def bind(frozen: Params, trainable: Params, *, key: Array | None = None) -> tuple[Params, Adaptation]:
        params, adaptation = joined(frozen, trainable, keys(key))
        for stack, values in trainable.get("gates", {}).items():
            hooks = getattr(adaptation, stack).replace(gate={kind: Gate(**g) for kind, g in values.items()})
            adaptation = adaptation.replace(**{stack: hooks})
        return params, adaptation

    def stored(frozen: Params, trainable: Params) -> Params:
        kept = {name: method.stored(frozen, trainable[name]) for name, method in made.items()}
        return kept | ({"gates": trainable["gates"]} if gates else {})

    template = templates[0] if templates else "{prompt}"
    return Method(init_fn, bind, prepare=prepare, stored=stored, template=template)


def fresh_gates(key: Array, model: Model, adaptation: Adaptation) -> Params:
    """A gate for every kind of hook that is there, by stack; raises `UserError` if there is none to gate."""
    tree: Params = {}
    for stack, sites in model.sites.items():
        for number, kind in enumerate(GATED):
            if getattr(getattr(adaptation, stack), kind):
                own = jax.random.fold_in(key, number + len(GATED) * len(tree))
                w = 0.02 * jax.random.normal(own, (sites.layers, sites.width))
                tree.setdefault(stack, {})[kind] = {"w": w, "b": jnp.zeros(sites.layers)}
    if not tree:
        raise UserError("method.gates has nothing to gate; expected a prefix, lora or adapter among method.parts")
    return tree


def join(adaptations: Sequence[Adaptation]) -> Adaptation:
    """All of them at once, prefixes and prompts one behind the other; raises `UserError` where two change one thing."""
    whole = adaptations[0]
    for other in adaptations[1:]:
        fields = {}
        for field in ("decoder", "encoder"):
            fields[field] = join_hooks(getattr(whole, field), getattr(other, field))
        fields["prompt"] = behind(whole.prompt, other.prompt)
        if whole.rows is not None and other.rows is not None:
            raise UserError("two adaptations have virtual tokens; expected at most one")
        fields["rows"] = whole.rows if other.rows is None else other.rows
        if whole.shift is None or other.shift is None:
            fields["shift"] = whole.shift if other.shift is None else other.shift
        else:
            fields["shift"] = whole.shift + other.shift
        whole = Adaptation(**fields)
    return whole


def join_hooks(one: LayerHooks, other: LayerHooks) -> LayerHooks:
    """The hooks of both for one stack."""
    fields = {}
    for field in LayerHooks.__dataclass_fields__:
        first, second = getattr(one, field), getattr(other, field)
        if first is None or second is None:
            fields[field] = second if first is None else first
        elif field == "prompt":
            fields[field] = behind(first, second)
        else:
            fields[field] = dict(first)
            for site, value in second.items():
                if site in first and field != "kv":
                    raise UserError(f"two adaptations change {field} at {site}; expected at most one")
                fields[field][site] = concatenate(first[site], value) if site in first else value
    return LayerHooks(**fields)


def behind(one: Array | None, other: Array | None) -> Array | None:
    """Rows [... P D] of one and then of the other."""
    if one is None or other is None:
        return other if one is None else one
    return jnp.concatenate([one, other], axis=-2)


def concatenate(one: KV, other: KV) -> KV:
    """The slots of both; raises `UserError` if only one has a gate, or their gates differ in kind."""
    if one.gate is not None or other.gate is not None:
        raise UserError("a prefix with gates has a softmax of its own and cannot be concatenated with another")
    if one.placed or other.placed:
        raise UserError("a prefix that takes the decoder's first positions cannot be concatenated with another")
    masks = [jnp.ones(kv.k.shape[:-2], bool) if kv.mask is None else kv.mask for kv in (one, other)]
    plain = one.mask is None and other.mask is None
    return KV(
        k=jnp.concatenate([one.k, other.k], axis=-3),
        v=jnp.concatenate([one.v, other.v], axis=-3),
        mask=None if plain else jnp.concatenate(masks, axis=-1),
    )


def fold(model: Model, params: Params, adaptation: Adaptation) -> Adaptation:
    """The same adaptation with its prompt as keys and values, behind those that it has.

    Raises `UserError` for a prompt in an encoder, whose rows see the text and so are no fixed keys and values.
    """
    if adaptation.prompt is None:
        return adaptation
    if model.entry == "encoder":
        raise UserError("the rows of a prompt in an encoder change with the text and are no fixed keys and values")
    hooks = adaptation.decoder
    if "kv" in (hooks.gate or {}):
        raise UserError("a prompt beside a prefix with method.gates cannot be part of it: only the prefix is gated")
    _, cache = jax.jit(model.prefill, static_argnums=4)(
        params, adaptation, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), 1
    )
    kv = concatenate(hooks.kv["self"], cache.prompt) if hooks.kv else cache.prompt
    return adaptation.replace(prompt=None, decoder=hooks.replace(kv={"self": kv}, prompt=None))


def interpolate(adaptations: Sequence[Adaptation], weights: Sequence[float] | None = None) -> Adaptation:
    """The weighted mean of adaptations of one shape, weights 1/n unless given.

    Raises `UserError` if shapes, masks or shifts differ, and for deltas and adapters: the mean of two factors is not
    the factor of a mean.
    """
    weights = [1 / len(adaptations)] * len(adaptations) if weights is None else list(weights)
    if len(weights) != len(adaptations):
        raise UserError(f"{len(weights)} weights for {len(adaptations)} adaptations; expected one each")
    shapes = [
        (jax.tree.structure(adaptation), [jnp.shape(leaf) for leaf in jax.tree.leaves(adaptation)])
        for adaptation in adaptations
    ]
    if any(shape != shapes[0] for shape in shapes):
        raise UserError("the adaptations have different shapes; only equal ones can be averaged, others concatenated")

    if any(hooks.delta or hooks.adapter for one in adaptations for hooks in (one.decoder, one.encoder)):
        raise UserError("low-rank deltas and adapters cannot be averaged, being products; valid: prefixes and prompts")

    def mean(*leaves: Array) -> Array:
        if not jnp.issubdtype(jnp.result_type(leaves[0]), jnp.floating):
            if any(not np.array_equal(leaf, leaves[0]) for leaf in leaves):
                raise UserError("the adaptations have different masks or shifts; only equal ones can be averaged")
            return leaves[0]
        return sum(weight * leaf for weight, leaf in zip(weights, leaves, strict=True))

    return jax.tree.map(mean, *adaptations)


def combine(adaptations: Sequence[Adaptation], how: str, weights: Sequence[float] | None = None) -> Adaptation:
    """Trained adaptations as one, without training: "concatenate", or "average" with weights that need not be equal."""
    valid("way to combine", how, ("average", "concatenate"))
    if not adaptations:
        raise UserError("there is no adaptation to combine; expected at least one")
    if how == "average":
        return interpolate(adaptations, weights)
    if weights is not None:
        raise UserError("weights go with 'average'; prefixes one behind the other have none")
    return join(adaptations)
