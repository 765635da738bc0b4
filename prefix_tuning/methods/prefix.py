"""Prefix tuning (Li & Liang 2021): every layer attends to P trained keys and values before the real ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from prefix_tuning.errors import UserError, valid
from prefix_tuning.files import read_text
from prefix_tuning.methods import rows
from prefix_tuning.methods.rows import Reparametrisation, Tree
from prefix_tuning.types import KV, Adaptation, LayerHooks, Method, Model, Params

INITS = ("random", "vocabulary", "text")
SITES = ("encoder.self", "decoder.self", "decoder.cross")


def make(
    tokenizer: Any,
    *,
    length: int | None,
    reparametrisation: int | None = None,
    init: str = "random",
    text: str | None = None,
    text_file: str | None = None,
    scale: float | None = None,
    fit_steps: int | None = None,
    fit_learning_rate: float | None = None,
    dropout: float = 0.0,
    shift: bool | None = None,
    layers: Sequence[int] | None = None,
    sites: Sequence[str] | None = None,
    frozen_slots: int = 0,
    gates: bool = False,
) -> Method:
    """A `Method` that trains a prefix of `length` slots; length=None takes as many as `text` has tokens.

    `reparametrisation` is the MLP's width M, None for free keys and values.  `init` is "random" (normal with deviation
    `scale`, 1 unless given; with the MLP its own fresh weights), "vocabulary" (the keys and values that the frozen
    model computes for random tokens) or "text" (for the first P tokens of `text`, or of the file `text_file`, repeated
    as often as needed); the MLP is fitted to them by `fit_steps` of Adam at `fit_learning_rate`, 500 and 1e-4 unless
    given, as in the released code's low-data recipe.  `dropout` is a probability on keys and values.  `shift` counts
    the prefix into the positions of real tokens; None does unless there are gates or the model is an encoder-decoder,
    whose positions never move.  `layers` are those with a prefix, in every stack.  `sites` are the attentions with one,
    independent of each other, of "encoder.self", "decoder.self" and "decoder.cross"; None is all that the model has.
    `frozen_slots` of the text's first slots stay as they are (Eyuboglu et al. 2025).  `gates` give the prefix a softmax
    of its own times a gate per head that starts at 0 (Zhang et al. 2023): without a shift that is the base model, bit
    for bit.  Raises `UserError`, also for an option that would do nothing.
    """
    valid("init", init, INITS)
    if (text is not None) + (text_file is not None) != (init == "text"):
        raise UserError(
            "method.text or method.text_file goes with method.init='text' and nothing else; "
            f"got init={init!r}, text={text!r}, text_file={text_file!r}"
        )
    if scale is not None and (init != "random" or reparametrisation is not None):
        raise UserError("method.scale goes with method.init='random' and method.reparametrisation=None; drop it")
    if (fit_steps, fit_learning_rate) != (None, None) and (init == "random" or reparametrisation is None):
        raise UserError(
            "method.fit_steps and method.fit_learning_rate go with method.reparametrisation and an init of 'text' or "
            "'vocabulary'; drop them"
        )
    scale = 1.0 if scale is None else scale
    fit_steps = 500 if fit_steps is None else fit_steps
    fit_learning_rate = 1e-4 if fit_learning_rate is None else fit_learning_rate
    if scale <= 0 or fit_steps < 0 or fit_learning_rate <= 0:
        raise UserError(
            "method needs scale > 0, fit_steps >= 0 and fit_learning_rate > 0; "
            f"got {scale}, {fit_steps}, {fit_learning_rate}"
        )
    rows.check_dropout(dropout)
    given = text if text_file is None else read_text(Path(text_file))
    ids = None if given is None else rows.words(tokenizer, given)
    length = rows.as_long_as(length, ids)
    rows.check_width(reparametrisation)
    if frozen_slots and init != "text":
        raise UserError("method.frozen_slots are slots of a text; expected method.init='text'")
    if not 0 <= frozen_slots < length:
        raise UserError(f"method.frozen_slots must be at least 0 and below method.length={length}, got {frozen_slots}")
    if sites is not None:
        if isinstance(sites, str) or not sites or len(set(sites)) < len(sites):
            raise UserError(f"method.sites={sites!r} must be a tuple of at least one of {', '.join(SITES)}, each once")
        for site in sites:
            valid("method.sites", site, SITES)

    def places(model: Model) -> Tree:
        """The stacks and attention sites with a prefix, as a tree of their heads (K, H)."""
        if shift and model.is_encoder_decoder:
            raise UserError("method.shift=True: the positions of an encoder-decoder never move; expected None or False")
        offered = {f"{stack}.{site}" for stack, own in model.sites.items() for site in own.kv}
        wanted = offered if sites is None else set(sites)
        if not wanted <= offered:
            raise UserError(f"method.sites={tuple(sites)}: this model has {', '.join(sorted(offered))}")
        tree: Tree = {}
        for stack, own in model.sites.items():
            for site, heads in own.kv.items():
                if f"{stack}.{site}" in wanted:
                    tree.setdefault(stack, {})[site] = heads
        return tree

    def chosen(model: Model, stack: str) -> list[int]:
        """The layers of a stack that have a prefix."""
        depth = model.sites[stack].layers
        numbers = list(range(depth)) if layers is None else list(layers)
        if not numbers or len(set(numbers)) < len(numbers) or not set(numbers) <= set(range(depth)):
            raise UserError(f"method.layers={tuple(numbers)} must be different layers among 0 to {depth - 1} ({stack})")
        return sorted(numbers)

    def prepare(key: Array, model: Model, frozen: Params) -> Params:
        del key
        if layers is None and not frozen_slots:
            return frozen
        kept: Tree = {}
        text = rows.computed(model, frozen, jnp.resize(jnp.asarray(ids), length)) if frozen_slots else {}
        for stack, own_sites in places(model).items():
            own = chosen(model, stack)
            mask = jnp.zeros((model.sites[stack].layers, length), bool).at[jnp.asarray(own)].set(True)
            for site in own_sites:
                kept.setdefault(stack, {})[site] = {"mask": mask}
                if frozen_slots:
                    kept[stack][site] |= split(text[stack][site][:frozen_slots, jnp.asarray(own)])
        return frozen | {"prefix": kept}

    def init_fn(key: Array, model: Model, frozen: Params) -> Params:
        start, _ = jax.random.split(key)
        targets: Tree | None = None
        if ids is not None:
            targets = rows.computed(model, frozen, jnp.resize(jnp.asarray(ids), length))
        elif init == "vocabulary":
            targets = rows.computed(model, frozen, jax.random.randint(start, (length,), 0, model.vocabulary))

        def one(key: Array, stack: str, site: str) -> Params:
            start, fresh = jax.random.split(key)
            offered, own = model.sites[stack], chosen(model, stack)
            out = (len(own), 2, *offered.kv[site])
            target = None if targets is None else targets[stack][site][frozen_slots:, jnp.asarray(own)]
            if reparametrisation is not None:
                module = Reparametrisation(length - frozen_slots, offered.width, reparametrisation, out)
                trainable = module.init(fresh)["params"]
                if target is not None:
                    trainable = fit(module, trainable, target, fit_steps, fit_learning_rate)
            else:
                trainable = split(scale * jax.random.normal(start, (length, *out)) if target is None else target)
            if gates:
                heads, groups = offered.kv[site][0], offered.groups[site]
                trainable = trainable | {"gate": jnp.zeros((len(own), heads, groups))}
            return trainable

        return rows.at_sites(places(model), key, one)

    def slots(frozen: Params, trainable: Params) -> Tree:
        """Keys and values [l P K H] of the layers that have them, by stack and site, and their gates [l K G]."""

        def one(stack: str, site: str, own: Params) -> dict[str, Array]:
            if reparametrisation is None:
                made = {"k": own["k"], "v": own["v"]}
            else:
                network = {name: leaf for name, leaf in own.items() if name != "gate"}
                made = split(Reparametrisation.of(network).apply({"params": network}))
            if frozen_slots:
                sink = frozen["prefix"][stack][site]
                made = {name: jnp.concatenate([sink[name], x], axis=1) for name, x in made.items()}
            return made | ({"gate": jnp.tanh(own["gate"])} if gates else {})

        return {k: {site: one(k, site, own) for site, own in sites.items()} for k, sites in trainable.items()}

    def bind(frozen: Params, trainable: Params, *, key: Array | None = None) -> tuple[Params, Adaptation]:
        hooks = {}
        for stack, sites in slots(frozen, trainable).items():
            kv = {}
            for number, (site, made) in enumerate(sites.items()):
                own = key if key is None else jax.random.fold_in(key, number + 8 * len(hooks))
                made |= dict(zip("kv", rows.dropped(own, dropout, made["k"], made["v"]), strict=True))
                mask = None
                if layers is not None:
                    mask = frozen["prefix"][stack][site]["mask"]
                    where = jnp.asarray(sorted(layers))
                    made = {n: jnp.zeros((len(mask), *x.shape[1:])).at[where].set(x) for n, x in made.items()}
                kv[site] = KV(made["k"], made["v"], mask, made.get("gate"))
            hooks[stack] = LayerHooks(kv=kv)
        # A prefix of an encoder-decoder lies in several attentions and takes no positions from any of their tokens.
        moves = (not gates and "encoder_layers" not in frozen) if shift is None else shift
        return frozen, Adaptation(**hooks, shift=jnp.int32(length) if moves else None)

    def adopt(model: Model, frozen: Params, adaptation: Adaptation) -> Params:
        del frozen
        tree: Params = {}
        for stack, own in places(model).items():
            found = getattr(adaptation, stack).kv or {}
            if set(found) != set(own):
                raise UserError(
                    f"the adaptation has slots at {', '.join(found) or 'none'} of the {stack}, not {', '.join(own)}"
                )
            for site, kv in found.items():
                wanted = (model.sites[stack].layers, length, *model.sites[stack].kv[site])
                if kv.k.shape != wanted:
                    raise UserError(
                        f"method.length={length} cannot start from slots of shape {kv.k.shape} at {stack}/{site}; "
                        f"expected {wanted}"
                    )
                tree.setdefault(stack, {})[site] = {
                    "k": jnp.array(kv.k, jnp.float32),
                    "v": jnp.array(kv.v, jnp.float32),
                }
        _, bound = bind({}, tree) if not model.is_encoder_decoder else bind({"encoder_layers": {}}, tree)
        rows.only(adaptation, decoder=bound.decoder, encoder=bound.encoder, shift=bound.shift)
        return tree

    plain = reparametrisation is None and layers is None and not frozen_slots and not gates
    return Method(init_fn, bind, prepare=prepare, stored=slots, adopt=adopt if plain else None)


def split(table: Array) -> dict[str, Array]:
    """Keys and values [l P K H], each a buffer of its own so that a step may donate them, of a table [P l 2 K H]."""
    return {"k": jnp.moveaxis(table[:, :, 0], 0, 1), "v": jnp.moveaxis(table[:, :, 1], 0, 1)}


def fit(module: Reparametrisation, trainable: Params, target: Array, steps: int, learning_rate: float) -> Params:
    """The MLP after `steps` of Adam on the squared error to target [P L 2 K H]; the embeddings stay as drawn."""
    slots = {"slots": trainable["slots"]}
    network = {name: leaf for name, leaf in trainable.items() if name != "slots"}
    tx = optax.adam(learning_rate)

    def loss(network: Params) -> Array:
        return jnp.square(module.apply({"params": network | slots}) - target).mean()

    def step(_, carry):
        network, state = carry
        updates, state = tx.update(jax.grad(loss)(network), state)
        return optax.apply_updates(network, updates), state

    run = jax.jit(lambda network: jax.lax.fori_loop(0, steps, step, (network, tx.init(network)))[0])
    return run(network) | slots
