"""LoRA (Hu et al. 2021): trained low-rank changes of projections."""

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning.errors import UserError
from prefix_tuning.methods import rows
from prefix_tuning.types import Adaptation, Delta, LayerHooks, Method, Model, Params


def make(
    tokenizer: Any,
    *,
    rank: int,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ("q", "v"),
) -> Method:
    """A `Method` that adds scale x A B to every projection that `target_modules` names, A [in R] and B [R out].

    A name is ours ("q"), Hugging Face's ("q_proj"), a pattern ("*_proj"), or "all-linear".  `scale` is `alpha` / rank
    (eq. 3), or `alpha` / sqrt(rank) with `rslora` (Kalajdzievski 2023); alpha is the rank unless given.  `dropout` is a
    probability on what A reads.  A starts as torch's linear layers do, B at 0: a fresh one is the base model exactly.
    Raises `UserError` for an unknown projection and a rank above what a projection has.
    """
    del tokenizer
    if rank < 1:
        raise UserError(f"method.rank must be at least 1, got {rank}")
    if alpha is not None and alpha <= 0:
        raise UserError(f"method.alpha must be above 0 or None, got {alpha}")
    rows.check_dropout(dropout)
    if not target_modules:
        raise UserError(f"method.target_modules={target_modules!r} must be a tuple of at least one name")
    scale = (rank if alpha is None else alpha) / (math.sqrt(rank) if rslora else rank)

    def init_fn(key: Array, model: Model, frozen: Params) -> Params:
        del frozen
        tree: Params = {}
        for number, (stack, site) in enumerate(targets(model, target_modules)):
            sites = model.sites[stack]
            shape = sites.projections[site]
            inner, outer = math.prod(shape.inner), math.prod(shape.outer)
            if rank > min(inner, outer):
                raise UserError(
                    f"method.rank={rank} is above what {stack}/{site} has; expected at most {min(inner, outer)}"
                )
            own = jax.random.fold_in(key, number)
            tree.setdefault(stack, {})[site] = {
                "a": rows.uniform(own, (sites.layers, *shape.inner, rank), inner),
                "b": jnp.zeros((sites.layers, rank, *shape.outer)),
            }
        return tree

    def bind(frozen: Params, trainable: Params, *, key: Array | None = None) -> tuple[Params, Adaptation]:
        hooks, number = {}, 0
        for stack, sites in trainable.items():
            delta = {}
            for site, own in sites.items():
                keys, number = None, number + 1
                if dropout and key is not None:
                    keys = jax.random.split(jax.random.fold_in(key, number), len(own["a"]))
                delta[site] = Delta(own["a"], own["b"], scale=scale, dropout=dropout, keys=keys)
            hooks[stack] = LayerHooks(delta=delta)
        return frozen, Adaptation(**hooks)

    def adopt(model: Model, frozen: Params, adaptation: Adaptation) -> Params:
        del frozen
        found = {stack: getattr(adaptation, stack).delta or {} for stack in model.sites}
        rows.only(adaptation, **{stack: LayerHooks(delta=own) for stack, own in found.items() if own})
        given = {(stack, site): delta for stack, own in found.items() for site, delta in own.items()}
        wanted = targets(model, target_modules)
        if set(given) != set(wanted):
            names, known = (", ".join(sorted(f"{k}/{v}" for k, v in own)) for own in (given, wanted))
            raise UserError(f"method.target_modules stands for {known}, but the adaptation changes {names}")
        tree: Params = {}
        for (stack, site), delta in given.items():
            if delta.a.shape[-1] != rank or not math.isclose(delta.scale, scale, rel_tol=1e-6):
                raise UserError(
                    f"method.rank={rank} with scale {scale:g} cannot start from rank {delta.a.shape[-1]} with scale "
                    f"{delta.scale:g} at {stack}/{site}"
                )
            tree.setdefault(stack, {})[site] = {"a": jnp.array(delta.a), "b": jnp.array(delta.b)}
        return tree

    return Method(init_fn, bind, adopt=adopt)


def targets(model: Model, patterns: Sequence[str]) -> list[tuple[str, str]]:
    """(stack, projection) of everything that the patterns name; raises `UserError` for one that names nothing."""
    named, names = [], set()
    for stack, sites in model.sites.items():
        for site, projection in sites.projections.items():
            theirs = model.specs[model.layers(stack)][projection.weight]["kernel"].source.split(".")[-2]
            # A part of a fused weight has no name of its own there.
            known = {site} | (set() if projection.part is not None else {theirs})
            whole = projection.part is None
            names |= known
            named.append((stack, site, known, whole))
    chosen = []
    for pattern in patterns:
        hits = [
            (stack, site)
            for stack, site, known, whole in named
            if (pattern == "all-linear" and whole)
            or (any(fnmatch.fnmatchcase(name, pattern) for name in known) and (whole or pattern == site))
        ]
        if not hits:
            listed = ", ".join(sorted(names))
            raise UserError(f"method.target_modules: {pattern!r} names nothing here; valid: {listed}, all-linear")
        chosen += [hit for hit in hits if hit not in chosen]
    return chosen
