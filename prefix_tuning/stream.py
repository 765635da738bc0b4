"""Decoding of more prompts than are written at once: a row that is done gives its place to the next prompt."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prefix_tuning import decode
from prefix_tuning.attention import per_row
from prefix_tuning.decode import DecodeConfig, Running
from prefix_tuning.errors import UserError
from prefix_tuning.parallel import Layout
from prefix_tuning.types import Adaptation, Cache, Model, Params

# The numbers of prompts [B], where -1 is a row that only fills and comes last, their tokens [B T] and lengths [B]
Chunk = tuple[np.ndarray, np.ndarray, np.ndarray]


class Written(NamedTuple):
    """Texts of rows that are done."""

    ids: Array  # int32 [B] the numbers of their prompts, -1 for none
    new: Array  # int32 [B N]
    lengths: Array  # int32 [B]


def make_stream(model: Model, config: DecodeConfig, layout: Layout) -> Callable[..., Iterator[Written]]:
    """Makes `stream(params, adaptation, chunks, key)`, which yields what became of all prompts, B by B as they end.

    Chunks of B prompts, as `pipeline.prompt_batches` makes them, come longest first.  While B rows are written, the B
    prompts of the next chunk have been read and wait.  Each device of a `Replicated` layout does so by itself; shards
    of a model write a chunk to its end before the next.  Raises `UserError` as `decode.make_generate` does, and for an
    adaptation of which each row has its own.
    """
    decode.check(model, config)
    options = {"compiler_options": decode.compiler_options()}
    readers: dict[int, Callable] = {}  # by the room for a prompt
    opened = layout.each(lambda params, adaptation, key, rows: decode.opened(config, rows), **options)
    nobody = layout.each(lambda params, adaptation, key, ids: jnp.full_like(ids, -1), **options)
    goes_on = layout.each(partial(go_on, model, config, layout.refills), donate_argnums=3, **options)

    def stream(params: Params, adaptation: Adaptation, chunks: Iterable[Chunk], key: Array) -> Iterator[Written]:
        if has_own_rows(adaptation):
            raise UserError("an adaptation of which each row has its own; expected one that all rows share")
        running, waiting, last, room = None, None, None, 0
        for ids, tokens, lengths in chunks:
            room = room or tokens.shape[1]
            if tokens.shape[1] > room:
                raise UserError(
                    f"a chunk of {tokens.shape[1]} tokens follows one of {room}; expected the longest first"
                )
            if room not in readers:
                readers[room] = layout.each(partial(read, model, config, room), **options)
            waiting = readers[room](params, adaptation, key, *map(layout.rows, (tokens, lengths, ids)))
            if running is None:
                running = opened(params, adaptation, key, waiting)
                continue
            running, written = goes_on(params, adaptation, key, running, waiting)
            if last is not None:
                yield layout.read(last)  # while the device works on what comes next
            last = written
        if last is not None:
            yield layout.read(last)
        if running is not None:
            none = waiting._replace(ids=nobody(params, adaptation, key, waiting.ids))
            yield layout.read(goes_on(params, adaptation, key, running, none)[1])

    return stream


def has_own_rows(adaptation: Adaptation) -> bool:
    """Whether a part of an adaptation differs from row to row."""
    slots = [kv for hooks in (adaptation.encoder, adaptation.decoder) for kv in (hooks.kv or {}).values()]
    inputs = ((adaptation.shift, 1), (adaptation.prompt, 3))
    return any(map(per_row, slots)) or any(x is not None and x.ndim == rank for x, rank in inputs)


def read(
    model: Model,
    config: DecodeConfig,
    room: int,
    params: Params,
    adaptation: Adaptation,
    key: Array,
    tokens: Array,
    lengths: Array,
    ids: Array,
) -> Running:
    """`decode.read`, laid out as if the prompts [B T] were as long as `room`."""
    rows = decode.read(model, config, params, adaptation, tokens, lengths, ids, key)
    more = room - tokens.shape[1]

    def longer(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, more if number == x.ndim + axis else 0) for number in range(x.ndim)])

    cache = rows.cache
    cache = cache.replace(read=jax.tree.map(partial(longer, axis=-2), cache.read))
    if cache.source is not None:
        return rows._replace(cache=cache.replace(source=longer(cache.source, -1)))
    return rows._replace(cache=cache, tokens=longer(rows.tokens, -1))


def go_on(
    model: Model,
    config: DecodeConfig,
    refills: bool,
    params: Params,
    adaptation: Adaptation,
    key: Array,
    running: Running,
    waiting: Running,
) -> tuple[Running, Written]:
    """Writes until all that wait have places, and gives what those wrote who had them; if nobody waits, until the end.

    Without `refills` places are free only once all rows are done.
    """
    B, count = len(running.ids), (waiting.ids >= 0).sum()
    enough = jnp.where(refills & (count > 0), 1, B)

    def body(state: tuple[Running, Written, Array]) -> tuple[Running, Written, Array]:
        running, written, placed = state
        running = decode.until_done(model, config, params, adaptation, running, key, enough)
        return place(config, running, waiting, written, placed, count)

    def unfinished(state: tuple[Running, Written, Array]) -> Array:
        running, _, placed = state
        return jnp.where(count > 0, placed < count, ~decode.done(config, running).all())

    empty = texts(config, running)._replace(ids=jnp.full_like(running.ids, -1))
    start = running, empty, jnp.int32(0)
    running, written, _ = jax.lax.while_loop(unfinished, body, start)
    written = jax.tree.map(lambda some, rest: jnp.where(count > 0, some, rest), written, texts(config, running))
    return running._replace(ids=jnp.where(count > 0, running.ids, -1)), written


def texts(config: DecodeConfig, rows: Running) -> Written:
    """What all rows have written."""
    new, _ = decode.result(config, rows)
    return Written(rows.ids, new, decode.new_lengths(config, new))


def place(
    config: DecodeConfig, running: Running, waiting: Running, written: Written, placed: Array, count: Array
) -> tuple[Running, Written, Array]:
    """Gives the rows that are done to prompts that wait, of which so many of `count` are placed already."""
    B, free = len(running.ids), decode.done(config, running)
    order = placed + jnp.cumsum(free) - 1
    taken = free & (order < count)
    index = jnp.where(taken, order, B)  # B is nowhere
    written = jax.tree.map(lambda out, own: out.at[index].set(own, mode="drop"), written, texts(config, running))
    source = jnp.minimum(index, B - 1)

    def put(old: Array, new: Array, axis: int = 0) -> Array:
        where = taken.reshape(-1, *[1] * (old.ndim - axis - 1))
        return jnp.where(where, jnp.take(new, source, axis), old)

    rows = jax.tree.map(put, running._replace(cache=None), waiting._replace(cache=None))
    cache = place_cache(running.cache, waiting.cache, put)
    return rows._replace(cache=cache), written, placed + taken.sum()


def place_cache(old: Cache, new: Cache, put: Callable[..., Array]) -> Cache:
    """The cache of rows of which some were taken, which `put` puts in their places."""
    _, beams, slots = old.ancestors.shape
    first = (old.slot - 1) % slots * beams  # the first beam's place, which all beams of a new row continue

    def put_read(x: Array, y: Array) -> Array:  # [L B K S H]
        return put(x, y, x.ndim - 4)

    def put_written(x: Array, y: Array) -> Array:  # [L B K N*W H], of which new rows have written one token or none
        there = jax.lax.dynamic_slice_in_dim(x, first, y.shape[-2], x.ndim - 2)
        return jax.lax.dynamic_update_slice_in_dim(x, put_read(there, y), first, x.ndim - 2)

    k, v = (jax.tree.map(put_written, getattr(old, name), getattr(new, name)) for name in "kv")
    position, written, source = (
        jax.tree.map(put, getattr(old, name), getattr(new, name)) for name in ("position", "written", "source")
    )
    read = jax.tree.map(put_read, old.read, new.read)
    return old.replace(k=k, v=v, position=position, written=written, source=source, read=read)
