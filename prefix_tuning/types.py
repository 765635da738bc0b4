"""The central types, and the letters every shape in this code base is written in.

    B  batch                 L  layers                     V  vocabulary
    T  query length          D  width of the model         M  bottleneck, or width of a small network
    S  key length            K  key/value heads            W  beams
    N  target positions      G  query heads per K          C  positions that the model knows
    P  prefix length         H  head size                  F  width of the MLP
    R  rank, virtual tokens

A model is a pure function of (params, adaptation, batch).  A method makes the adaptation from trainable parameters.
Neither knows the other, so M methods on N families cost M + N files.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

# Nested dicts of arrays, matrices perhaps `Quantised`; leaves under "layers" and "encoder_layers" lead with L.
Params = dict[str, Any]
STACKS = ("layers", "encoder_layers")


@flax.struct.dataclass
class Below:
    """The lowest layers of a stack of frozen weights, to be read where they are: XLA would copy what is cut off."""

    stack: Params  # [L ...]
    depth: int = flax.struct.field(pytree_node=False)  # how many they are


# The weights of a stack, or parts of it from below, each of which leads with its own number of layers.
Layers = Params | tuple[Params | Below, ...]


@flax.struct.dataclass
class Quantised:
    """A frozen matrix in 8 bits, values * scale: symmetric, each output channel by its largest absolute value."""

    values: Array  # int8, [L in... out...] or, of a table of embeddings, [V D]
    scale: Array  # float32, [L out...] or [V]
    axes: tuple[str | None, ...] = flax.struct.field(pytree_node=False)  # the values' logical ones, as in a `Spec`
    dtype: str = flax.struct.field(pytree_node=False, default="float32")  # of what is computed with it


@flax.struct.dataclass
class KV:
    """Keys (after rotary embedding, where the family has it) and values that attention reads before the real ones."""

    k: Array  # [L P K H], [P K H] inside the layer scan; [L B P K H] when each row has its own
    v: Array
    # bool [L P] or [L B P]: which slots exist, inside a layer also [B T P], to which query; None is all
    mask: Array | None = None
    gate: Array | None = None  # [L K G]: the slots get a softmax of their own, and what they give is multiplied by this
    share: Array | None = None  # [B T], only inside a layer: a `Gate`'s value, which scales scores and values
    # In the decoder of an encoder-decoder: slots take the first positions and so move those of its tokens, as in PEFT
    placed: bool = flax.struct.field(pytree_node=False, default=False)
    # [K G T P] or [B K G T P], only inside a layer: what relative positions add to scores of placed slots
    bias: Array | None = None


@flax.struct.dataclass
class Delta:
    """A low-rank change of a projection: x becomes x kernel + scale (x a) b."""

    a: Array  # [L in... R]
    b: Array  # [L R out...]
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)  # on the x that `a` reads
    keys: Array | None = None  # [L] random keys, one a layer; None drops nothing


@flax.struct.dataclass
class Adapter:
    """A bottleneck beside or behind a sublayer: scale up(activation(down(norm(x))))."""

    down: Array  # [L D M]
    down_bias: Array  # [L M]
    up: Array  # [L M D]
    up_bias: Array  # [L D]
    norm: dict[str, Array] | None = None  # "scale" and "bias" [L D] of a LayerNorm before it
    parallel: bool = flax.struct.field(pytree_node=False, default=False)  # reads what the sublayer reads
    activation: str = flax.struct.field(pytree_node=False, default="relu")
    scale: float = flax.struct.field(pytree_node=False, default=1.0)


@flax.struct.dataclass
class Memory:
    """Attention without softmax to a fixed memory: feature(q) m is added to what a head gives."""

    m: Array  # [L K G H H]
    feature: str = flax.struct.field(pytree_node=False, default="elu")


@flax.struct.dataclass
class Gate:
    """A sigmoid of a layer's input x, one number a token, that multiplies what hooks of one kind do."""

    w: Array  # [L D]
    b: Array  # [L]


@flax.struct.dataclass
class LayerHooks:
    """What to do differently inside one stack of layers; leaves lead with L, None is nothing."""

    kv: dict[str, KV] | None = None  # attention site -> slots to attend to
    memory: dict[str, Memory] | None = None  # attention site -> what is added to its output
    delta: dict[str, Delta] | None = None  # projection -> its low-rank change
    bias: dict[str, Array] | None = None  # projection -> [L out...], added to its output
    adapter: dict[str, Adapter] | None = None  # sublayer -> its bottleneck
    prompt: Array | None = None  # [L P D]: added to the rows of `Adaptation.prompt` before each layer
    rows: dict[str, KV] | None = None  # attention site -> [L R K H], added to the keys and values of virtual tokens
    gate: dict[str, Any] | None = None  # "kv", "delta" or "adapter" -> `Gate`; inside a layer its value [B T]


@flax.struct.dataclass
class Adaptation:
    """What to do differently inside a frozen model; `Adaptation()` is the pretrained model, exactly."""

    decoder: LayerHooks = LayerHooks()
    # int32 [] or [B], added to the position of every token that the model's first stack reads, at least the prompt's
    # length; None adds nothing
    shift: Array | None = None
    encoder: LayerHooks = LayerHooks()
    prompt: Array | None = None  # [P D] or [B P D]: embeddings that come before every example's first token
    rows: Array | None = None  # [R D]: embeddings of the virtual tokens, whose ids are V, V + 1, ...


@flax.struct.dataclass
class Batch:
    """Rows of one or more packed examples, padded on the right; everything int32 but `mask`, which is float32.

    Attention stays within a segment; segment 0 is padding.  `target_index[b, n]` is where in row b the hidden state
    lies whose next token is `targets[b, n]`; `mask` is 1.0 for real targets.  In an encoder-decoder `tokens` are the
    decoder's, and segment n of it reads segment n of the source.
    """

    tokens: Array  # [B T]
    positions: Array  # [B T] from 0 within each example
    segments: Array  # [B T] 1, 2, ... within each row
    target_index: Array  # [B N]
    targets: Array  # [B N]
    mask: Array  # [B N]
    examples: Array  # [B] how many examples the row holds; 0 for a row that only fills the batch
    types: Array | None = None  # [B T] which text of a pair a token is of, 0 or 1, for encoders that ask; None: all 0
    source: Array | None = None  # [B S] tokens that the encoder of an encoder-decoder reads
    source_positions: Array | None = None  # [B S]
    source_segments: Array | None = None  # [B S]


@flax.struct.dataclass
class Cache:
    """Keys and values of what decoding attends to: of each prompt once, and of what its W beams have written.

    Beams stand as queries side by side, [B W], so that what they share is never repeated.  A token stays where its beam
    wrote it: a beam that continues another sees what that one sees, and nothing is copied.
    Heads come before slots, as products over slots want them: transposed once, not at every step.  Of N slots all rows
    write the same one, around and around; what a row wrote lies in those before it, so that rows may begin at any time.
    """

    # [L B K N*W H] of the last tokens written, the beams' side by side in every slot, in the parts that the weights lie
    # in, without L where that is 1
    k: tuple[Array, ...]
    v: tuple[Array, ...]
    ancestors: Array  # int32 [B W N] which beam wrote the token in each slot that each beam continues; itself in `slot`
    slot: Array  # int32 [] the next one to write
    written: Array  # int32 [B] how many tokens each row has written, at most N
    position: Array  # int32 [B] the position of the first token that is written, before `Adaptation.shift`
    # [L B K S H], in those parts, of the prompts' tokens, of which `position` are real, or of what an encoder read
    read: tuple[KV, ...]
    prompt: KV | None = None  # [L P K H] or [L B P K H]: what `Adaptation.prompt` became in each layer
    source: Array | None = None  # bool [B S] which of what an encoder read is real


class Spec(NamedTuple):
    """One weight: its shape here, its sharding axes, its fresh initialisation, and where Hugging Face keeps it."""

    shape: tuple[int, ...]  # leads with L under "layers" and "encoder_layers"
    axes: tuple[str | None, ...]  # a logical name per axis
    init: str  # "normal", "zeros" or "ones"
    source: str  # the tensor's name there, "{layer}" standing for the layer
    inner: int | None = (
        None  # how many axes (after L) are contracted; stored there as a matrix [in, out], for 0 as [out]
    )
    transposed: bool = False  # stored [out, in] instead, as torch.nn.Linear does
    optional: bool = False  # not in every file of the family; left out of the tree where it is not
    # (n, N, blocks): the tensor holds other weights too; this one is the rows from n on of each of its blocks of N rows
    part: tuple[int, int, int] | None = None


class Projection(NamedTuple):
    """One linear map that can be changed, and where its weights are."""

    inner: tuple[int, ...]  # the axes that are contracted
    outer: tuple[int, ...]
    weight: str  # its name in the layers of its stack
    part: int | None = None  # which slice of that weight's first outer axis it is; None is all of it


class Sites(NamedTuple):
    """What one stack of layers offers to methods."""

    layers: int  # L
    width: int  # D
    kv: dict[str, tuple[int, int]]  # attention site -> (K, H)
    groups: dict[str, int]  # attention site -> G
    projections: dict[str, Projection]
    adapters: tuple[str, ...] = ("attention", "mlp", "block")  # sublayers; "block" is behind both


class Compute(NamedTuple):
    """How a model computes its layers; to rounding, none of it changes what comes out."""

    scan: bool = True  # one compiled layer for all of a stack; False unrolls them: slower to compile, all to be counted
    remat: bool = False  # keeps only a layer's input for the backward pass, which computes the rest again
    attention: str = "plain"  # of whole rows: "plain", or one of `jax.nn.dot_product_attention`, such as "cudnn"


class Model(NamedTuple):
    """A family at one size: pure functions over a tree of frozen weights."""

    config: dict[str, Any]  # the contents of config.json
    sites: dict[str, Sites]  # stack -> what it offers
    specs: Params  # a Spec per weight
    vocabulary: int  # V
    max_positions: int | None  # C; None where nothing bounds it
    embed: Callable[[Params, Array], Array]  # (params, tokens [...]) -> [... D], without positions
    hidden: Callable[[Params, Adaptation, Batch], Array]  # -> [B T D], normalised, ready for `unembed`
    unembed: Callable[[Params, Array], Array]  # (params, hidden [... D]) -> float32 logits [... V]
    # (params, adaptation, tokens [B T], lengths [B], N) -> [B V], cache with room for N tokens that are written; to an
    # encoder-decoder the tokens are the source, and its start token is the first of the N, at least one
    prefill: Callable[..., tuple[Array, Cache]]
    decode: Callable[..., tuple[Array, Cache]]  # (params, adaptation, cache, tokens [B W]) -> [B W V], cache
    # -> stack -> site -> what attention does there; see models/decoder.py
    probe: Callable[[Params, Adaptation, Batch], dict[str, dict[str, dict[str, Array]]]]
    # (params, tokens [P]) -> stack -> site -> the `KV` [L P K H] that each layer computes for them
    keys_values: Callable[[Params, Array], dict[str, dict[str, KV]]]
    pool: Callable[[Params, Array], Array] | None = None  # (params, hidden [... D] of the first token); None: as it is
    start: int | None = None  # the token that the decoder of an encoder-decoder begins with

    @property
    def entry(self) -> str:
        """The stack that reads the input: where a prompt goes."""
        return "encoder" if "encoder" in self.sites else "decoder"

    @property
    def writes(self) -> bool:
        """Whether the model generates text."""
        return "decoder" in self.sites

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether one stack reads and another, which starts from a token of its own, writes."""
        return len(self.sites) > 1

    def layers(self, stack: str) -> str:
        """The name of a stack's layers among the weights."""
        return "encoder_layers" if self.is_encoder_decoder and stack == "encoder" else "layers"


def unchanged(key: Array, model: Model, frozen: Params) -> Params:
    """The frozen weights as they are."""
    del key, model
    return frozen


def whole(frozen: Params, trainable: Params) -> Params:
    """The trainable parameters as they are."""
    del frozen
    return trainable


class Method(NamedTuple):
    """A way to adapt a frozen model, as pure functions."""

    init: Callable[..., Params]  # (key, model, frozen) -> trainable, float32
    bind: Callable[..., tuple[Params, Adaptation]]  # (frozen, trainable, *, key=None); key=None is evaluation
    # (key, model, frozen) -> frozen, and beside it what the method computes once and never trains
    prepare: Callable[..., Params] = unchanged
    stored: Callable[..., Params] = whole  # (frozen, trainable) -> what is kept once trained, without its networks
    # (model, frozen, adaptation) -> the trainable parameters that bind to it; None: a network made it, or it is none
    adopt: Callable[[Model, Params, Adaptation], Params] | None = None
    template: str = "{prompt}"  # where `{rows:N}` stand for N virtual tokens, "{prompt}" being text.prompt


class Objective(NamedTuple):
    """What is minimised, as pure functions."""

    # (model, params, adaptation, batch, key=None) -> (loss summed, what to divide by, further metrics as sums); without
    # a key nothing is drawn
    loss: Callable[..., tuple[Array, Array, dict[str, Array]]]
    head: Callable[[Array, Model], Params] | None = None  # (key, model) -> params["head"], float32, fresh
    # (model, params, adaptation, batch, key=None) -> scores [B ...] that answers are read off; None: they are generated
    predict: Callable[..., Array] | None = None


@flax.struct.dataclass
class TrainState:
    """All that training changes; the frozen weights are not in it."""

    step: Array  # int32 []
    trainable: Params
    opt_state: Any
    key: Array  # never advanced: every step folds its own number in


def parts(layers: Layers) -> tuple[Params | Below, ...]:
    """The parts of a stack of weights, from below; one, if it lies in one piece."""
    return layers if isinstance(layers, tuple) else (layers,)


def depth(part: Params | Below) -> int:
    """How many layers a stack, or a part of one, has."""
    return part.depth if isinstance(part, Below) else len(jax.tree.leaves(part)[0])


def cut(part: Params | Below) -> Params:
    """The weights of a part, led by its own number of layers."""
    return jax.tree.map(lambda x: x[: part.depth], part.stack) if isinstance(part, Below) else part


def joined(layers: Layers) -> Params:
    """The weights of a stack [L ...], whose parts may lie apart."""
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *map(cut, layers)) if isinstance(layers, tuple) else layers


def count(tree: Any) -> int:
    """The number of scalars in a tree of arrays, shapes or `Spec`s."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Spec))
    return sum(math.prod(leaf.shape) for leaf in leaves)
