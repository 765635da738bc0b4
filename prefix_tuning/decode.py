"""Text generation with the whole loop under one jit: greedy, sampling and beam search over `Model.prefill`/`decode`."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prefix_tuning import positions, stacks
from prefix_tuning.errors import OptionError, UserError, valid
from prefix_tuning.types import Adaptation, Cache, Model, Params

NORMALISERS = ("generated", "full")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How to turn logits into text; raises `UserError` for impossible values and for options that would do nothing.

    Options mean what they do in transformers 5's `generate`, except `normalise="full"`: beam search then scores as
    transformers 3.2 did for Li & Liang 2021, by log-probability / (prompt + generated tokens, end token not counted).
    """

    max_new_tokens: int  # N
    end_tokens: tuple[int, ...]
    pad_token: int  # what follows an end token
    min_new_tokens: int = 0  # before the end token
    banned: tuple[int, ...] = ()
    no_repeat_ngram: int = 0  # so many tokens in a row come once only, in a decoder's prompt and text; 0 allows any
    num_beams: int = 1  # W
    length_penalty: float = 1.0  # the exponent of the length that beam search divides by
    normalise: str = "generated"
    early_stopping: bool = False  # stop at W finished hypotheses, even if a running one may become better
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0 keeps every token
    top_p: float = 1.0

    def __post_init__(self):
        valid("normalise", self.normalise, NORMALISERS)
        for name, holds, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "0 to max_new_tokens"),
            ("no_repeat_ngram", self.no_repeat_ngram >= 0, "at least 0, which allows any"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("length_penalty", math.isfinite(self.length_penalty), "a finite number"),
            ("early_stopping", isinstance(self.early_stopping, bool), "True or False"),
            ("temperature", 0 < self.temperature < math.inf, "above 0; for greedy decoding do_sample=False"),
            ("top_k", self.top_k >= 0, "at least 0, which keeps every token"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("banned", not set(self.banned) & set(self.end_tokens), "no end token; min_new_tokens delays those"),
        ):
            if not holds:
                raise OptionError(f"{name} is {getattr(self, name)!r}; expected {expected}")
        if self.do_sample and self.num_beams > 1:
            raise OptionError(f"do_sample with num_beams {self.num_beams}; sampling needs num_beams=1")
        neutral = {field.name: field.default for field in dataclasses.fields(self)}
        for used, condition, names in (
            (self.num_beams > 1, "num_beams above 1", ("length_penalty", "normalise", "early_stopping")),
            (self.do_sample, "do_sample=True", ("temperature", "top_k", "top_p")),
        ):
            idle = [name for name in names if getattr(self, name) != neutral[name]]
            if idle and not used:
                raise OptionError(f"{', '.join(idle)} would do nothing; expected {condition} beside it")


def make_generate(model: Model, config: DecodeConfig) -> Callable[..., tuple[Array, Array]]:
    """Makes `generate(params, adaptation, tokens [B T], lengths [B], key=None) -> (new tokens [B N], lengths [B])`.

    Prompts, to an encoder-decoder its sources, are padded on the right to T and have at least one token.  A new length
    counts the end token, after which `pad_token` follows.  It is compiled once per (B, T); only sampling needs a key.
    Weights whose layers are `stacks.apart` are read fastest.  Raises `UserError` for token ids that the model lacks,
    and when traced for a prompt that leaves too few positions.
    """
    check(model, config)

    def generate(
        params: Params, adaptation: Adaptation, tokens: Array, lengths: Array, key: Array | None = None
    ) -> tuple[Array, Array]:
        new, _ = search(model, config, params, adaptation, tokens, lengths, key)
        return new, new_lengths(config, new)

    return jax.jit(generate, compiler_options=compiler_options())


def compiler_options() -> dict[str, str]:
    """What XLA is told for decoding: on a CPU no products by YNNPACK, which are made for more rows than a step has."""
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if jax.default_backend() == "cpu" else {}


def ready(params: Params, model: Model) -> Params:
    """The weights as `generate` reads them fastest, `stacks.apart`, if memory has room for copies; else as they are.

    As much again has to stay free, for what decoding itself holds.  On CPUs nothing is copied.
    """
    leaves = jax.tree.leaves(params[model.layers("decoder")])
    if not all(isinstance(x, Array) and x.is_fully_addressable for x in leaves):
        return params  # several processes would each decide by their own memory
    if all(map(stacks.on_cpu, leaves)):
        return stacks.apart(params, model)
    held = max(sum(x.addressable_data(n).nbytes for x in leaves) for n in range(len(leaves[0].addressable_shards)))
    free = free_memory()
    return params if free is not None and 2 * held > free else stacks.apart(params, model)


def free_memory() -> int | None:
    """The bytes that every local device still has; None where one does not say so."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return min(each["bytes_limit"] - each["bytes_in_use"] for each in stats) if all(stats) else None


def check(model: Model, config: DecodeConfig) -> None:
    """Raises `UserError` if the configuration names tokens that the model lacks, or leaves it none to continue with."""
    special = {*config.banned, *config.end_tokens}
    unknown = sorted(token for token in {*special, config.pad_token} if not 0 <= token < model.vocabulary)
    if unknown:
        raise UserError(f"no such token: {', '.join(map(str, unknown))}; expected 0 to {model.vocabulary - 1}")
    if len(special) == model.vocabulary:
        raise UserError(f"all {model.vocabulary} tokens are banned or end tokens; expected one to continue with")


class Text(NamedTuple):
    """What sampling knows of each row after some steps."""

    new: Array  # int32 [B N]
    step: Array  # int32 [B] how many of those are chosen
    ended: Array  # bool [B]


class Beams(NamedTuple):
    """What beam search knows after some steps; hypotheses are sorted, best first, and a score of -inf means none."""

    running: Array  # int32 [B W N] hypotheses to continue
    running_scores: Array  # [B W] their summed log-probabilities
    parents: Array  # int32 [B W] the running hypothesis of the step before that each continues
    finished: Array  # int32 [B W N]
    finished_scores: Array  # [B W] divided by length ** length_penalty
    improvable: Array  # bool [B] whether a finished hypothesis may still be replaced
    step: Array  # int32 [B] how many tokens the running ones have


class Running(NamedTuple):
    """Rows that are being continued, each at a step of its own."""

    text: Text | Beams
    cache: Cache
    tokens: Array  # int32 [B T] what is continued
    lengths: Array  # int32 [B]
    ids: Array  # int32 [B] the number of each row's prompt; -1 is a row that only fills the batch


def search(
    model: Model,
    config: DecodeConfig,
    params: Params,
    adaptation: Adaptation,
    tokens: Array,
    lengths: Array,
    key: Array | None = None,
) -> tuple[Array, Array | None]:
    """The new tokens [B N] for prompts tokens [B T] and, of beam search, their normalised scores [B]."""
    ids = jnp.arange(len(tokens))
    rows = opened(config, read(model, config, params, adaptation, tokens, lengths, ids, key))
    return result(config, until_done(model, config, params, adaptation, rows, key, len(ids)))


def read(
    model: Model,
    config: DecodeConfig,
    params: Params,
    adaptation: Adaptation,
    tokens: Array,
    lengths: Array,
    ids: Array,
    key: Array | None,
) -> Running:
    """Prompts [B T] after their first new token, in a cache that has no room for more: see `opened`."""
    if config.do_sample and key is None:
        raise UserError("do_sample=True needs a key; expected one from jax.random.key(seed)")
    B, W, N = len(tokens), config.num_beams, config.max_new_tokens
    logits, cache = prefill(model, config, params, adaptation, tokens, lengths)
    tokens, lengths = starts(model, tokens, lengths)
    none = jnp.zeros(B, jnp.int32)
    if W == 1:
        text = Text(jnp.full((B, N), config.pad_token, jnp.int32), none, jnp.zeros(B, bool))
    else:
        logits = jnp.repeat(logits, W, axis=0)
        empty, worst = jnp.full((B, W, N), config.pad_token, jnp.int32), jnp.full((B, W), -jnp.inf)
        text = Beams(
            running=empty,
            running_scores=worst.at[:, 0].set(0.0),  # all hypotheses are still the same, so only one may be continued
            parents=jnp.zeros((B, W), jnp.int32),
            finished=empty,
            finished_scores=worst,
            improvable=jnp.ones(B, bool),
            step=none,
        )
    return extended(config, Running(text, cache, tokens, lengths, ids), logits, key)


def opened(config: DecodeConfig, rows: Running) -> Running:
    """What `read` gave, with room for all that every beam will write; what is written, they all continue."""
    W, N, cache = config.num_beams, config.max_new_tokens, rows.cache
    B, _, written = cache.ancestors.shape  # no more than the token that a decoder starts with

    def room(x: Array) -> Array:
        return jnp.zeros((*x.shape[:-2], N * W, x.shape[-1]), x.dtype).at[..., :written, :].set(x)

    k, v = jax.tree.map(room, (cache.k, cache.v))
    ancestors, slot = jnp.zeros((B, W, N), jnp.int32), jnp.int32(written % N)
    return rows._replace(cache=cache.replace(k=k, v=v, ancestors=ancestors, slot=slot))


def until_done(
    model: Model,
    config: DecodeConfig,
    params: Params,
    adaptation: Adaptation,
    rows: Running,
    key: Array | None,
    enough: Array | int,
) -> Running:
    """The rows after as many steps as it takes until `enough` of them are done."""

    def body(rows: Running) -> Running:
        cache, text = rows.cache, rows.text
        last = text.step - 1
        if isinstance(text, Text):
            fed = jnp.take_along_axis(text.new, last[:, None], axis=1)
        else:
            cache = continuing(cache, text.parents)
            fed = jnp.take_along_axis(text.running, last[:, None, None], axis=2)[:, :, 0]
        logits, cache = model.decode(params, adaptation, cache, fed)
        return extended(config, rows._replace(cache=cache), logits.reshape(fed.size, -1), key)

    return jax.lax.while_loop(lambda rows: done(config, rows).sum() < enough, body, rows)


def done(config: DecodeConfig, rows: Running) -> Array:
    """Which rows need no further token, bool [B]."""
    text = rows.text
    ended = text.ended if isinstance(text, Text) else ~text.improvable
    return ended | (text.step == config.max_new_tokens) | (rows.ids < 0)


def result(config: DecodeConfig, rows: Running) -> tuple[Array, Array | None]:
    """What was written [B N] where a row is done, and its score [B], which only beam search has."""
    text = rows.text
    if isinstance(text, Text):
        return text.new, None
    finished, scores = text.finished, text.finished_scores
    if config.normalise == "full":
        # transformers 3.2 took what the maximum length cut off as hypotheses last, and only where there was hope.
        power = powers(config, rows)[rows.lengths + config.max_new_tokens][:, None]
        cut = jnp.where(text.improvable[:, None], text.running_scores / power, -jnp.inf)
        finished, scores = best_of(text, text.running, cut)
    return finished[:, 0], scores[:, 0]


def new_lengths(config: DecodeConfig, new: Array) -> Array:
    """How many of the new tokens [B N] count, the end token included, [B]."""
    ended = is_end(config, new)
    return jnp.where(ended.any(1), ended.argmax(1) + 1, config.max_new_tokens)


def extended(config: DecodeConfig, rows: Running, logits: Array, key: Array | None) -> Running:
    """The rows with one token more, or W hypotheses that have one more, by logits [B*W V]; who is done stays so."""
    before, waits = rows.text, done(config, rows)
    text = sampled(config, rows, logits, key) if isinstance(before, Text) else searched(config, rows, logits)
    keep = lambda old, new: jnp.where(waits.reshape(-1, *[1] * (old.ndim - 1)), old, new)  # noqa: E731
    return rows._replace(text=jax.tree.map(keep, before, text))


def sampled(config: DecodeConfig, rows: Running, logits: Array, key: Array | None) -> Text:
    """One token more, drawn at random or, without `do_sample`, the most probable one.

    Draws take keys folded from (key, step, id): a row's text depends on its prompt and number, not on its neighbours.
    """
    new, step, _ = rows.text
    logits = forbid_repeats(config, forbid(config, logits, step), rows.tokens, rows.lengths, new, step)
    if config.do_sample:
        # Sorted, so that the lower index comes first among equals: top_k=1 is greedy exactly.
        kept = min(config.top_k, logits.shape[1]) or logits.shape[1]
        logits, tokens = jax.lax.top_k(logits / config.temperature, kept)
        if config.top_p < 1:
            probability = jax.nn.softmax(logits)
            more_probable = probability.cumsum(1) - probability
            logits = jnp.where(more_probable < config.top_p, logits, -jnp.inf)
        keys = jax.vmap(lambda step, number: jax.random.fold_in(jax.random.fold_in(key, step), number))(step, rows.ids)
        ranks = jax.vmap(jax.random.categorical)(keys, logits)
        token = jnp.take_along_axis(tokens, ranks[:, None], 1)[:, 0]
    else:
        token = logits.argmax(1).astype(jnp.int32)
    return Text(placed_at(new, step, token), step + 1, is_end(config, token))


def searched(config: DecodeConfig, rows: Running, logits: Array) -> Beams:
    """One step of beam search.  A hypothesis of n tokens is worth its log-probability / n ** length_penalty."""
    beams, power = rows.text, powers(config, rows)
    B, W, N = beams.running.shape
    V, step = logits.shape[1], beams.step
    steps = jnp.repeat(step, W)
    log_probabilities = forbid(config, jax.nn.log_softmax(logits), steps)
    said = jnp.repeat(rows.tokens, W, axis=0), jnp.repeat(rows.lengths, W), beams.running.reshape(B * W, N)
    log_probabilities = forbid_repeats(config, log_probabilities, *said, steps).reshape(B, W, V)
    totals = beams.running_scores[:, :, None] + log_probabilities
    # Every hypothesis may end in as many ways as there are end tokens, and W candidates that do not must remain.
    kept = W * (1 + len(config.end_tokens))
    scores, flat = jax.lax.top_k(totals.reshape(B, W * V), kept)
    parents, token = flat // V, flat % V
    hypotheses = placed_at(pick(beams.running, parents), step[:, None], token)

    ended = is_end(config, token)
    running_scores, survivors = jax.lax.top_k(jnp.where(ended, -jnp.inf, scores), W)

    if config.normalise == "full":
        # As in transformers 3.2 the end token is not counted, and the best candidate sets the hope even if it ended.
        finishes, power, hope = ended, power[rows.lengths + step][:, None], scores[:, :1]
    else:
        finishes, power, hope = ended | (step + 1 == N)[:, None], power[step + 1][:, None], running_scores[:, :1]
    # Candidates ranked after W are there to be continued; one that ends is no hypothesis.
    finishes &= (jnp.arange(kept) < W) & beams.improvable[:, None]
    finished, finished_scores = best_of(beams, hypotheses, jnp.where(finishes, scores / power, -jnp.inf))
    worst = finished_scores[:, -1]
    missing = worst == -jnp.inf
    better = (hope / power)[:, 0] > worst
    return Beams(
        running=pick(hypotheses, survivors),
        running_scores=running_scores,
        parents=pick(parents, survivors),
        finished=finished,
        finished_scores=finished_scores,
        improvable=beams.improvable & (missing if config.early_stopping else missing | better),
        step=step + 1,
    )


def powers(config: DecodeConfig, rows: Running) -> Array:
    """n ** length_penalty for every length n that can be.

    Computed once, so that equal lengths divide by equal numbers: an ulp apart, ties would be decided by chance.
    """
    lengths = np.arange(rows.tokens.shape[1] + config.max_new_tokens + 1)
    return jnp.asarray(np.maximum(lengths, 1) ** config.length_penalty, jnp.float32)


def placed_at(x: Array, step: Array, token: Array) -> Array:
    """x [... N] with token [...] at index step [...]."""
    return jnp.where(jnp.arange(x.shape[-1]) == step[..., None], token[..., None], x)


def best_of(beams: Beams, hypotheses: Array, scores: Array) -> tuple[Array, Array]:
    """The W best [B W N], and their scores [B W], of the finished hypotheses and others [B A N] with scores [B A]."""
    W = beams.finished.shape[1]
    scores, best = jax.lax.top_k(jnp.concatenate([beams.finished_scores, scores], axis=1), W)
    return pick(jnp.concatenate([beams.finished, hypotheses], axis=1), best), scores


def prefill(
    model: Model, config: DecodeConfig, params: Params, adaptation: Adaptation, tokens: Array, lengths: Array
) -> tuple[Array, Cache]:
    """Reads prompts [B T], without room to write yet; raises `UserError` if they leave too few positions for that."""
    longest = {"longest source": tokens.shape[1]}
    positions.check(model, positions.taken(adaptation, model), longest, {"max_new_tokens": config.max_new_tokens})
    return model.prefill(params, adaptation, tokens, lengths, int(model.is_encoder_decoder))


def forbid(config: DecodeConfig, scores: Array, step: Array) -> Array:
    """Scores [R V] with -inf at banned tokens and, in the first `min_new_tokens` of steps [R], at end tokens."""
    tokens = jnp.arange(scores.shape[-1])
    early = is_end(config, tokens) & (step < config.min_new_tokens)[:, None]
    return jnp.where(early | is_one_of(tokens, config.banned), -jnp.inf, scores)


def starts(model: Model, tokens: Array, lengths: Array) -> tuple[Array, Array]:
    """The tokens [B T] and lengths [B] that new ones follow: the prompts; in an encoder-decoder the start token."""
    if not model.is_encoder_decoder:
        return tokens, lengths
    return jnp.full((len(tokens), 1), model.start, jnp.int32), jnp.ones_like(lengths)


def forbid_repeats(
    config: DecodeConfig, scores: Array, tokens: Array, lengths: Array, new: Array, step: Array
) -> Array:
    """Scores [R V] with -inf at tokens that would end an n-gram which tokens [R T] and new [R N] hold at steps [R]."""
    n = config.no_repeat_ngram
    if not n:
        return scores
    B, T = tokens.shape
    place = jnp.arange(T + new.shape[1]) - lengths[:, None]  # of what is read before what is written, without a gap
    read = jnp.take_along_axis(tokens, jnp.clip(place + lengths[:, None], 0, T - 1), axis=1)
    text = jnp.where(place < 0, read, jnp.take_along_axis(new, jnp.clip(place, 0, new.shape[1] - 1), axis=1))
    count = lengths + step
    # The last n - 1 tokens, against those before every position; where a text is shorter, nothing can be repeated.
    last = jnp.take_along_axis(text, jnp.maximum(count[:, None] - (n - 1) + jnp.arange(n - 1), 0), axis=1)
    starts_at = jnp.arange(max(text.shape[1] - n + 1, 0))
    same = jnp.stack([text[:, starts_at + i] == last[:, i, None] for i in range(n - 1)]).all(0) if n > 1 else True
    again = same & (starts_at + n <= count[:, None])
    ends = text[:, starts_at + n - 1]
    banned = jnp.zeros(scores.shape, bool).at[jnp.arange(B)[:, None], ends].max(again)
    return jnp.where(banned, -jnp.inf, scores)


def is_end(config: DecodeConfig, tokens: Array) -> Array:
    """Which of tokens [...] are end tokens, bool [...]."""
    return is_one_of(tokens, config.end_tokens)


def is_one_of(tokens: Array, choices: tuple[int, ...]) -> Array:
    """Which of tokens [...] are among the choices, bool [...]."""
    # One by one: over several devices JAX 0.11 crashes at a constant without elements, which no choices would be.
    return functools.reduce(jnp.logical_or, (tokens == choice for choice in choices), jnp.zeros(tokens.shape, bool))


def pick(x: Array, index: Array) -> Array:
    """x[b, index[b, w]] for x [B A ...] and index [B W]: [B W ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def continuing(cache: Cache, parents: Array) -> Cache:
    """The cache for beams of which beam w of each prompt continues beam parents [B W], and then itself."""
    ancestors, own = pick(cache.ancestors, parents), jnp.arange(parents.shape[1])
    return cache.replace(ancestors=ancestors.at[:, :, cache.slot].set(own))
