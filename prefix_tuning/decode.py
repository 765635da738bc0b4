"""Text generation with the whole loop under one jit: greedy, sampling and beam search over `Model.prefill`/`decode`."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prefix_tuning import nn
from prefix_tuning.errors import UserError, valid
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
                raise UserError(f"{name} is {getattr(self, name)!r}; expected {expected}")
        if self.do_sample and self.num_beams > 1:
            raise UserError(f"do_sample with num_beams {self.num_beams}; sampling needs num_beams=1")
        neutral = {field.name: field.default for field in dataclasses.fields(self)}
        for used, condition, names in (
            (self.num_beams > 1, "num_beams above 1", ("length_penalty", "normalise", "early_stopping")),
            (self.do_sample, "do_sample=True", ("temperature", "top_k", "top_p")),
        ):
            idle = [name for name in names if getattr(self, name) != neutral[name]]
            if idle and not used:
                raise UserError(f"{', '.join(idle)} would do nothing; expected {condition} beside it")


def make_generate(
    model: Model, config: DecodeConfig, *, jit: Callable[..., Callable] = jax.jit
) -> Callable[..., tuple[Array, Array]]:
    """Makes `generate(params, adaptation, tokens [B T], lengths [B], key=None) -> (new tokens [B N], lengths [B])`.

    Prompts, to an encoder-decoder its sources, are padded on the right to T and have at least one token.  A new length
    counts the end token, after which `pad_token` follows.  It is compiled by `jit`, one trace per (B, T); only sampling
    needs a key.  Weights whose layers are `nn.apart` are read fastest.  Raises `UserError` for token ids that the model
    lacks, and when traced for a prompt that leaves too few positions.
    """
    check(model, config)

    def generate(
        params: Params, adaptation: Adaptation, tokens: Array, lengths: Array, key: Array | None = None
    ) -> tuple[Array, Array]:
        if config.num_beams > 1:
            new, _ = beam_search(model, config, params, adaptation, tokens, lengths)
        else:
            new = sample(model, config, params, adaptation, tokens, lengths, key)
        ended = is_end(config, new)
        return new, jnp.where(ended.any(1), ended.argmax(1) + 1, config.max_new_tokens)

    return jit(generate, compiler_options=compiler_options())


def compiler_options() -> dict[str, str]:
    """What XLA is told for decoding: on a CPU no products by YNNPACK, which are made for more rows than a step has."""
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if jax.default_backend() == "cpu" else {}


def ready(params: Params, model: Model) -> Params:
    """The weights as `generate` reads them fastest, `nn.apart`, if memory has room for copies; else as they are.

    As much again has to stay free, for what decoding itself holds.  On CPUs nothing is copied.
    """
    leaves = jax.tree.leaves(params[model.layers("decoder")])
    if not all(isinstance(x, Array) and x.is_fully_addressable for x in leaves):
        return params  # several processes would each decide by their own memory
    if all(map(nn.on_cpu, leaves)):
        return nn.apart(params, model)
    held = max(sum(x.addressable_data(n).nbytes for x in leaves) for n in range(len(leaves[0].addressable_shards)))
    free = free_memory()
    return params if free is not None and 2 * held > free else nn.apart(params, model)


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


def sample(
    model: Model,
    config: DecodeConfig,
    params: Params,
    adaptation: Adaptation,
    tokens: Array,
    lengths: Array,
    key: Array | None,
) -> Array:
    """New tokens [B N] for prompts tokens [B T], drawn at random or, without `do_sample`, the most probable ones.

    Draws take keys folded from (key, step, row): a row's text depends on its prompt and index, not on its neighbours.
    """
    if config.do_sample and key is None:
        raise UserError("do_sample=True needs a key; expected one from jax.random.key(seed)")
    rows, N = tokens.shape[0], config.max_new_tokens
    kept = min(config.top_k, model.vocabulary) or model.vocabulary
    logits, cache = prefill(model, config, params, adaptation, tokens, lengths)
    read = starts(model, tokens, lengths)

    def choose(step, new, logits):
        logits = forbid_repeats(config, forbid(config, logits, step), *read, new, step)
        if not config.do_sample:
            return logits.argmax(1).astype(jnp.int32)
        # Sorted, so that the lower index comes first among equals: top_k=1 is greedy exactly.
        logits, ids = jax.lax.top_k(logits / config.temperature, kept)
        if config.top_p < 1:
            probability = jax.nn.softmax(logits)
            more_probable = probability.cumsum(1) - probability
            logits = jnp.where(more_probable < config.top_p, logits, -jnp.inf)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), jnp.arange(rows))
        ranks = jax.vmap(jax.random.categorical)(keys, logits)
        return jnp.take_along_axis(ids, ranks[:, None], 1)[:, 0]

    def extend(step, new, done, logits):
        token = jnp.where(done, config.pad_token, choose(step, new, logits))
        return step + 1, new.at[:, step].set(token), done | is_end(config, token)

    def unfinished(state):
        step, _, done, _ = state
        return (step < N) & ~done.all()

    def body(state):
        step, new, done, cache = state
        logits, cache = model.decode(params, adaptation, cache, new[:, step - 1][:, None])
        return *extend(step, new, done, logits[:, 0]), cache

    empty = jnp.full((rows, N), config.pad_token, jnp.int32)
    first = extend(jnp.int32(0), empty, jnp.zeros(rows, bool), logits)
    return jax.lax.while_loop(unfinished, body, (*first, cache))[1]


class Beams(NamedTuple):
    """What beam search knows after some steps; hypotheses are sorted, best first, and a score of -inf means none."""

    running: Array  # int32 [B W N] hypotheses to continue
    running_scores: Array  # [B W] their summed log-probabilities
    parents: Array  # int32 [B W] the running hypothesis of the step before that each continues
    finished: Array  # int32 [B W N]
    finished_scores: Array  # [B W] divided by length ** length_penalty
    improvable: Array  # bool [B] whether a finished hypothesis may still be replaced


def beam_search(
    model: Model, config: DecodeConfig, params: Params, adaptation: Adaptation, tokens: Array, lengths: Array
) -> tuple[Array, Array]:
    """The best hypothesis [B N] for prompts tokens [B T], and its score [B], normalised as the config says."""
    (B, T), W, N = tokens.shape, config.num_beams, config.max_new_tokens
    logits, cache = prefill(model, config, params, adaptation, tokens, lengths)
    tokens, lengths = starts(model, tokens, lengths)
    T = tokens.shape[1]
    logits, cache = jnp.repeat(logits, W, axis=0), repeat_written(cache, W)
    # Computed once, so that equal lengths divide by equal numbers: an ulp apart, ties would be decided by chance.
    powers = jnp.asarray(np.maximum(np.arange(T + N + 1), 1) ** config.length_penalty, jnp.float32)
    empty, none = jnp.full((B, W, N), config.pad_token, jnp.int32), jnp.full((B, W), -jnp.inf)
    start = Beams(
        running=empty,
        running_scores=none.at[:, 0].set(0.0),  # all hypotheses are still the same, so only one may be continued
        parents=jnp.zeros((B, W), jnp.int32),
        finished=empty,
        finished_scores=none,
        improvable=jnp.ones(B, bool),
    )

    def unfinished(state):
        step, beams, _ = state
        return (step < N) & beams.improvable.any()

    def body(state):
        step, beams, cache = state
        logits, cache = model.decode(params, adaptation, reorder(cache, beams.parents), beams.running[:, :, step - 1])
        logits = logits.reshape(B * W, -1)
        return step + 1, extend_beams(config, powers, beams, tokens, lengths, logits, step), cache

    first = extend_beams(config, powers, start, tokens, lengths, logits, jnp.int32(0))
    _, beams, _ = jax.lax.while_loop(unfinished, body, (jnp.int32(1), first, cache))
    finished, scores = beams.finished, beams.finished_scores
    if config.normalise == "full":
        # transformers 3.2 took what the maximum length cut off as hypotheses last, and only where there was hope.
        cut = jnp.where(beams.improvable[:, None], beams.running_scores / powers[lengths + N][:, None], -jnp.inf)
        finished, scores = best_of(beams, beams.running, cut)
    return finished[:, 0], scores[:, 0]


def extend_beams(
    config: DecodeConfig, powers: Array, beams: Beams, tokens: Array, lengths: Array, logits: Array, step: Array
) -> Beams:
    """One step of beam search for prompts tokens [B T] of lengths [B], from logits [B*W V] after `step` new tokens.

    A hypothesis of n tokens is worth its log-probability / powers[n].
    """
    B, W, N = beams.running.shape
    V = logits.shape[1]
    log_probabilities = forbid(config, jax.nn.log_softmax(logits), step)
    read = jnp.repeat(tokens, W, axis=0), jnp.repeat(lengths, W)
    log_probabilities = forbid_repeats(config, log_probabilities, *read, beams.running.reshape(B * W, N), step)
    log_probabilities = log_probabilities.reshape(B, W, V)
    totals = beams.running_scores[:, :, None] + log_probabilities
    # Every hypothesis may end in as many ways as there are end tokens, and W candidates that do not must remain.
    kept = W * (1 + len(config.end_tokens))
    scores, flat = jax.lax.top_k(totals.reshape(B, W * V), kept)
    parents, token = flat // V, flat % V
    hypotheses = pick(beams.running, parents).at[:, :, step].set(token)

    ended = is_end(config, token)
    running_scores, survivors = jax.lax.top_k(jnp.where(ended, -jnp.inf, scores), W)

    if config.normalise == "full":
        # As in transformers 3.2 the end token is not counted, and the best candidate sets the hope even if it ended.
        finishes, power, hope = ended, powers[lengths + step][:, None], scores[:, :1]
    else:
        finishes, power, hope = ended | (step + 1 == N), powers[step + 1], running_scores[:, :1]
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
    )


def best_of(beams: Beams, hypotheses: Array, scores: Array) -> tuple[Array, Array]:
    """The W best [B W N], and their scores [B W], of the finished hypotheses and others [B A N] with scores [B A]."""
    W = beams.finished.shape[1]
    scores, best = jax.lax.top_k(jnp.concatenate([beams.finished_scores, scores], axis=1), W)
    return pick(jnp.concatenate([beams.finished, hypotheses], axis=1), best), scores


def prefill(
    model: Model, config: DecodeConfig, params: Params, adaptation: Adaptation, tokens: Array, lengths: Array
) -> tuple[Array, Cache]:
    """Reads the prompts [B T] once; raises `UserError` if they leave too few positions for the new tokens."""
    prefix = nn.taken(adaptation, model)
    length, new = tokens.shape[1], config.max_new_tokens
    apart = model.is_encoder_decoder
    longest = max(prefix + length, new) if apart else prefix + length + new
    if model.max_positions is not None and longest > model.max_positions:
        sizes = f"virtual tokens {prefix} + source {length}, and max_new_tokens {new}, take"
        if not apart:
            sizes = f"prefix {prefix} + prompt {length} + max_new_tokens {new} ="
        raise UserError(
            f"{sizes} {longest} positions; expected at most {model.max_positions}, which is what the model knows"
        )
    return model.prefill(params, adaptation, tokens, lengths, new)


def forbid(config: DecodeConfig, scores: Array, step: Array) -> Array:
    """Scores [... V] with -inf at banned tokens and, in the first `min_new_tokens` steps, at end tokens."""
    tokens = jnp.arange(scores.shape[-1])
    early = is_end(config, tokens) & (step < config.min_new_tokens)
    return jnp.where(early | is_one_of(tokens, config.banned), -jnp.inf, scores)


def starts(model: Model, tokens: Array, lengths: Array) -> tuple[Array, Array]:
    """The tokens [B T] and lengths [B] that new ones follow: the prompts; in an encoder-decoder the start token."""
    if not model.is_encoder_decoder:
        return tokens, lengths
    return jnp.full((len(tokens), 1), model.start, jnp.int32), jnp.ones_like(lengths)


def forbid_repeats(
    config: DecodeConfig, scores: Array, tokens: Array, lengths: Array, new: Array, step: Array
) -> Array:
    """Scores [B V] with -inf at tokens that would end an n-gram which tokens [B T] and new [B N] already hold."""
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
    return (tokens[..., None] == jnp.array(choices, jnp.int32)).any(-1)


def pick(x: Array, index: Array) -> Array:
    """x[b, index[b, w]] for x [B A ...] and index [B W]: [B W ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def repeat_written(cache: Cache, beams: int) -> Cache:
    """A cache of what B rows have written as one of B*W, row b W times in succession."""
    k, v = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=x.ndim - 4), (cache.k, cache.v))
    return cache.replace(k=k, v=v)


def reorder(cache: Cache, parents: Array) -> Cache:
    """The cache after beam w of each prompt became a continuation of beam parents [B W]."""
    B, W = parents.shape
    rows = (jnp.arange(B)[:, None] * W + parents).reshape(B * W)
    k, v = jax.tree.map(lambda x: jnp.take(x, rows, axis=x.ndim - 4), (cache.k, cache.v))
    return cache.replace(k=k, v=v)
