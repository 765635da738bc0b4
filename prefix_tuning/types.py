"""The central types, and the letters every shape in this code base is written in.

    B  batch                 L  layers                     V  vocabulary
    T  query length          D  width of the model         M  reparametrisation width
    S  key length            K  key/value heads            W  beams
    N  target positions      G  query heads per K          C  positions that the model knows
    P  prefix length         H  head size                  F  width of the MLP

A model is a pure function of (params, adaptation, batch).  A method makes the adaptation from trainable parameters.
Neither knows the other, so M methods on N families cost M + N files.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
from jax import Array

Params = dict[str, Any]  # nested dicts of arrays; leaves under "layers" lead with L


@flax.struct.dataclass
class KV:
    """Keys (after rotary embedding, where the family has it) and values that attention reads before the real ones."""

    k: Array  # [L P K H], [P K H] inside the layer scan; [L B P K H] when each row has its own
    v: Array


@flax.struct.dataclass
class LayerHooks:
    """What to do differently inside one stack of layers, by attention site; leaves lead with L."""

    kv: dict[str, KV] | None = None


@flax.struct.dataclass
class Adaptation:
    """What to do differently inside a frozen model; `Adaptation()` is the pretrained model, exactly."""

    decoder: LayerHooks = LayerHooks()
    shift: Array | None = None  # int32 [] or [B]: added to the position of every real token; None adds nothing


@flax.struct.dataclass
class Batch:
    """Rows of one or more packed examples, padded on the right; everything int32 but `mask`, which is float32.

    Attention stays within a segment; segment 0 is padding.  `target_index[b, n]` is where in row b the hidden state
    lies whose next token is `targets[b, n]`; `mask` is 1.0 for real targets.
    """

    tokens: Array  # [B T]
    positions: Array  # [B T] from 0 within each example
    segments: Array  # [B T] 1, 2, ... within each row
    target_index: Array  # [B N]
    targets: Array  # [B N]
    mask: Array  # [B N]
    examples: Array  # [B] how many examples the row holds; 0 for a row that only fills the batch


@flax.struct.dataclass
class Cache:
    """Keys and values of the real tokens so far; the prefix is kept beside it, once, however many rows there are."""

    k: Array  # [L B S K H]
    v: Array  # [L B S K H]
    valid: Array  # bool [B S] slots that hold a real token
    slot: Array  # int32 [] the next slot to write, the same in every row
    position: Array  # int32 [B] the position of the next token, before `Adaptation.shift`


class Spec(NamedTuple):
    """One weight: its shape here, its sharding axes, its fresh initialisation, and where Hugging Face keeps it."""

    shape: tuple[int, ...]  # leads with L under "layers"
    axes: tuple[str | None, ...]  # a logical name per axis
    init: str  # "normal", "zeros" or "ones"
    source: str  # the tensor's name there, "{layer}" standing for the layer
    inner: int | None = (
        None  # how many axes (after L) are contracted; stored there as a matrix [in, out], for 0 as [out]
    )
    transposed: bool = False  # stored [out, in] instead, as torch.nn.Linear does


class Sites(NamedTuple):
    """What one stack of layers offers to methods."""

    layers: int  # L
    width: int  # D
    kv: dict[str, tuple[int, int]]  # attention site -> (K, H)


class Model(NamedTuple):
    """A family at one size: pure functions over a tree of frozen weights."""

    config: dict[str, Any]  # the contents of config.json
    sites: dict[str, Sites]  # stack -> what it offers
    specs: Params  # a Spec per weight
    vocabulary: int  # V
    max_positions: int | None  # C; None where nothing bounds it
    hidden: Callable[[Params, Adaptation, Batch], Array]  # -> [B T D], normalised, ready for `unembed`
    unembed: Callable[[Params, Array], Array]  # (params, hidden [... D]) -> float32 logits [... V]
    prefill: Callable[
        ..., tuple[Array, Cache]
    ]  # (params, adaptation, tokens [B T], lengths [B], slots) -> [B V], cache
    decode: Callable[..., tuple[Array, Cache]]  # (params, adaptation, cache, tokens [B]) -> [B V], cache


class Method(NamedTuple):
    """A way to adapt a frozen model, as a pair of pure functions."""

    init: Callable[..., Params]  # (key, model, frozen) -> trainable, float32
    bind: Callable[..., tuple[Params, Adaptation]]  # (frozen, trainable, *, key=None); key=None is evaluation


# (model, params, adaptation, batch) -> (loss summed, what to divide by, further metrics as sums)
Objective = Callable[[Model, Params, Adaptation, Batch], tuple[Array, Array, dict[str, Array]]]


@flax.struct.dataclass
class TrainState:
    """All that training changes; the frozen weights are not in it."""

    step: Array  # int32 []
    trainable: Params
    opt_state: Any
    key: Array  # never advanced: every step folds its own number in


def count(tree: Any) -> int:
    """The number of scalars in a tree of arrays, shapes or `Spec`s."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Spec))
    return sum(math.prod(leaf.shape) for leaf in leaves)
