"""Whether an `Adaptation` fits a model: its sites and shapes, and the positions that it takes from the text."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax import Array

from prefix_tuning.attention import FEATURES
from prefix_tuning.errors import UserError, valid
from prefix_tuning.nn import ACTIVATIONS
from prefix_tuning.types import KV, Adaptation, Adapter, Delta, LayerHooks, Memory, Projection, Sites


def check(adaptation: Adaptation, sites: dict[str, Sites], rows: int) -> None:
    """Raises `UserError` if the adaptation names a site, or has a shape, that this model does not offer for `rows`."""
    entry = "encoder" if "encoder" in sites else "decoder"
    width = sites[entry].width
    if adaptation.prompt is not None:
        fits("prompt", adaptation.prompt, ("P", width), (rows, "P", width))
    if adaptation.rows is not None:
        fits("rows", adaptation.rows, ("R", width))
    if adaptation.shift is not None:
        fits("shift", adaptation.shift, (), (rows,))
    for stack in ("decoder", "encoder"):
        hooks = getattr(adaptation, stack)
        if stack in sites:
            check_stack(stack, hooks, sites[stack], rows)
        elif jax.tree.leaves(hooks):
            raise UserError(f"this model has no {stack} to adapt; valid: {', '.join(sites)}")
    for name in ("prompt", "rows"):
        given, added = getattr(adaptation, name), jax.tree.leaves(getattr(getattr(adaptation, entry), name))
        if added and (given is None or any(x.shape[1] != given.shape[-2] for x in added)):
            got = "none" if given is None else str(given.shape)
            raise UserError(f"{entry}.{name} of shape {added[0].shape} adds to the rows of {name}, which has {got}")
        if entry == "encoder" and jax.tree.leaves(getattr(adaptation.decoder, name)):
            raise UserError(f"decoder.{name} has nothing to add to, as the encoder reads them; valid: encoder.{name}")


def check_stack(stack: str, hooks: LayerHooks, sites: Sites, rows: int) -> None:
    """`check` for one stack of layers."""
    L, D = sites.layers, sites.width

    def each(kind: str, offered: Iterable[str], own: dict[str, Any] | None) -> Iterator[tuple[str, str, Any]]:
        """Hooks of one kind: the site of each, what to call it in an error, and the hook; the site must be offered."""
        for site, hook in (own or {}).items():
            yield valid(f"{kind} of the {stack}", site, offered), f"{stack}/{site}", hook

    for site, where, kv in each("attention site", sites.kv, hooks.kv):
        check_prefix(kv, where, site, sites, rows)
    for site, where, memory in each("attention site", sites.kv, hooks.memory):
        check_memory(memory, where, site, sites)
    for site, where, kv in each("attention site", sites.kv, hooks.rows):
        check_rows(kv, where, site, sites)
    for site, where, delta in each("projection", sites.projections, hooks.delta):
        check_delta(delta, where, L, sites.projections[site])
    for site, where, bias in each("projection", sites.projections, hooks.bias):
        fits(f"bias at {where}", bias, (L, *sites.projections[site].outer))
    for site, where, adapter in each("sublayer", sites.adapters, hooks.adapter):
        check_adapter(adapter, where, site, L, D)
    for kind, gate in (hooks.gate or {}).items():
        if not getattr(hooks, valid("gate", kind, ("kv", "delta", "adapter"))):
            raise UserError(f"a gate for {kind} of the {stack} has nothing to gate")
        fits(f"gate {kind} of the {stack}", gate.w, (L, D))
        fits(f"gate {kind}'s bias of the {stack}", gate.b, (L,))
    if hooks.prompt is not None:
        fits(f"prompt hook of the {stack}", hooks.prompt, (L, "P", D))


def check_prefix(kv: KV, where: str, site: str, sites: Sites, rows: int) -> None:
    """`check` for the slots at an attention site."""
    L, heads = sites.layers, sites.kv[site]
    fits(f"prefix k at {where}", kv.k, (L, "P", *heads), (L, rows, "P", *heads))
    fits(f"prefix v at {where}", kv.v, kv.k.shape)
    if kv.share is not None or kv.bias is not None:
        raise UserError(f"prefix share and bias at {where} are made inside a layer; expected None")
    if kv.placed and (site != "self" or "cross" not in sites.kv):
        raise UserError(f"placed slots at {where}: they are for an encoder-decoder's decoder/self only")
    if kv.mask is not None:
        P = kv.k.shape[-3]
        fits(f"prefix mask at {where}", kv.mask, (L, P), (L, rows, P))
    if kv.gate is not None:
        fits(f"prefix gate at {where}", kv.gate, (L, heads[0], sites.groups[site]))


def check_memory(memory: Memory, where: str, site: str, sites: Sites) -> None:
    """`check` for the memory at an attention site."""
    heads, size = sites.kv[site]
    valid("feature", memory.feature, FEATURES)
    fits(f"memory at {where}", memory.m, (sites.layers, heads, sites.groups[site], size, size))


def check_rows(kv: KV, where: str, site: str, sites: Sites) -> None:
    """`check` for what is added to the keys and values of virtual tokens at an attention site."""
    for name, x in (("k", kv.k), ("v", kv.v)):
        fits(f"rows {name} at {where}", x, (sites.layers, "R", *sites.kv[site]))
    if (kv.mask, kv.gate, kv.share) != (None, None, None):
        raise UserError(f"rows at {where} have a mask, gate or share, which is for prefixes; valid: k, v")


def check_delta(delta: Delta, where: str, L: int, projection: Projection) -> None:
    """`check` for the low-rank change of a projection."""
    fits(f"delta a at {where}", delta.a, (L, *projection.inner, "R"))
    fits(f"delta b at {where}", delta.b, (L, delta.a.shape[-1], *projection.outer))
    if delta.keys is not None:
        fits(f"delta keys at {where}", delta.keys, (L,))


def check_adapter(adapter: Adapter, where: str, site: str, L: int, D: int) -> None:
    """`check` for the adapter of a sublayer."""
    valid("activation", adapter.activation, ACTIVATIONS)
    fits(f"adapter down at {where}", adapter.down, (L, D, "M"))
    M = adapter.down.shape[-1]
    fits(f"adapter up at {where}", adapter.up, (L, M, D))
    fits(f"adapter down_bias at {where}", adapter.down_bias, (L, M))
    fits(f"adapter up_bias at {where}", adapter.up_bias, (L, D))
    for name, x in (adapter.norm or {}).items():
        fits(f"adapter norm {name} at {where}", x, (L, D))
    if adapter.parallel and site == "block":
        raise UserError(f"an adapter at {where} has nothing to be parallel to; valid: attention, mlp")


def fits(name: str, x: Array, *shapes: tuple[int | str, ...]) -> None:
    """Raises `UserError` unless x has one of these shapes, in which a letter stands for any size."""
    for wanted in shapes:
        sizes = zip(wanted, x.shape, strict=False)
        if x.ndim == len(wanted) and all(isinstance(want, str) or want == size for want, size in sizes):
            return
    listed = " or ".join(f"[{' '.join(map(str, wanted))}]" for wanted in shapes)
    raise UserError(f"{name} has shape {x.shape}; expected {listed}")
