"""What several methods start from: texts as tokens, the model's own keys and values, and the paper's small MLP."""

from collections.abc import Callable
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning.errors import UserError
from prefix_tuning.types import KV, Adaptation, Model, Params

Tree = dict[str, dict[str, Any]]  # stack -> site -> ...


class Reparametrisation(flax.linen.Module):
    """P embeddings and a tanh MLP that make what is trained of every slot (Li & Liang eq. 3; their code's shapes).

    The paper's footnote has embeddings of the MLP's width; its code has them of the model's width, and so has this.
    """

    length: int  # P
    embedding: int  # D
    width: int  # M
    out: tuple[int, ...]  # (L, 2, K, H), layer-major as in the released code; (D,) for rows of a prompt

    @flax.linen.compact
    def __call__(self) -> Array:
        """[P *out]."""
        slots = self.param("slots", flax.linen.initializers.normal(1.0), (self.length, self.embedding))
        hidden = jnp.tanh(dense(self.width, self.embedding, "down")(slots))
        return dense(self.out, self.width, "up")(hidden)

    @classmethod
    def of(cls, trainable: Params) -> "Reparametrisation":
        """The module whose parameters these are."""
        bias = trainable["down"]["bias"]
        return cls(*trainable["slots"].shape, len(bias), trainable["up"]["bias"].shape)


def dense(features: int | tuple[int, ...], fan_in: int, name: str) -> flax.linen.Module:
    """A layer with torch.nn.Linear's defaults, which the released codes train from: U(+-1/sqrt(fan_in)) twice."""
    return flax.linen.DenseGeneral(
        features,
        kernel_init=flax.linen.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        bias_init=lambda key, shape, dtype: uniform(key, shape, fan_in).astype(dtype),
        name=name,
    )


def uniform(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    """U(+-1/sqrt(fan_in)), torch's default for the weights and biases of a linear layer."""
    return jax.random.uniform(key, shape, jnp.float32, -(fan_in**-0.5), fan_in**-0.5)


def check_width(reparametrisation: int | None) -> None:
    """Raises `UserError` for an MLP that cannot be."""
    if reparametrisation is not None and reparametrisation < 1:
        raise UserError(f"method.reparametrisation must be a width of at least 1 or None, got {reparametrisation}")


def check_dropout(dropout: float) -> None:
    """Raises `UserError` for a probability that would drop everything, or is none."""
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"method.dropout must be in [0, 1), got {dropout}")


def dropped(key: Array | None, dropout: float, k: Array, v: Array) -> tuple[Array, Array]:
    """Keys and values with some of their entries dropped, each drawn apart, and the others scaled up."""
    if key is None or not dropout:
        return k, v
    keep = jax.random.bernoulli(key, 1 - dropout, (2, *k.shape)) / (1 - dropout)
    return k * keep[0], v * keep[1]


def only(adaptation: Adaptation, **own: Any) -> None:
    """Raises `UserError` if an adaptation is more than the fields that a method is about to take from it."""
    if jax.tree.structure(adaptation) != jax.tree.structure(Adaptation(**own)):
        raise UserError(
            "the adaptation holds more than, or other than, what this method trains; expected the same method"
        )


def as_long_as(length: int | None, ids: list[int] | None) -> int:
    """The number of slots: `length`, or that of the text's tokens; raises `UserError` for none."""
    if length is None:
        if ids is None:
            raise UserError("method.length=None takes the length of method.text, which is not given")
        length = len(ids)
    if length < 1:
        raise UserError(f"method.length must be at least 1, got {length}")
    return length


def words(tokenizer: Any, text: str, option: str = "method.text") -> list[int]:
    """The token ids of an initial text; raises `UserError` without a tokenizer or tokens."""
    if tokenizer is None:
        raise UserError(f"{option} needs a tokenizer, and the model's folder has none")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"{option}={text!r} has no tokens")
    return ids


def frequent(tokenizer: Any, model: Model, population: int) -> Array:
    """The ids of the `population` most frequent tokens, special ones left out.

    Subword vocabularies are built most frequent first, so these are the lowest ids, as in Lester et al.'s code.
    """
    special = set(getattr(tokenizer, "all_special_ids", ()))
    ids = [i for i in range(model.vocabulary) if i not in special][:population]
    return jnp.asarray(ids, jnp.int32)


def computed(model: Model, frozen: Params, tokens: Array) -> Tree:
    """Keys and values [P L 2 K H], by stack and site, that the frozen model computes for tokens [P], in float32."""
    found = jax.jit(model.keys_values)(frozen, tokens)

    def table(kv: KV) -> Array:
        return jnp.stack([kv.k, kv.v], axis=1).transpose(2, 0, 1, 3, 4).astype(jnp.float32)

    return jax.tree.map(table, found, is_leaf=lambda x: isinstance(x, KV))


def at_sites(places: Tree, key: Array, make: Callable[..., Any]) -> Tree:
    """make(key, stack, site) at every attention site of a tree, each with a key of its own."""
    tree: Tree = {}
    for number, (stack, site) in enumerate((stack, site) for stack, own in places.items() for site in own):
        # The first key is the given one, so that a model with one site draws what it drew before there were several.
        own = jax.random.fold_in(key, number) if number else key
        tree.setdefault(stack, {})[site] = make(own, stack, site)
    return tree
