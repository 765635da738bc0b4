"""One run, or several in one compiled step: the runs' trainable parameters are leading axes of one tree.

The weights are frozen, so that runs which differ only in what is trained share one copy of them.  A shorter prefix is
padded to the longest with slots that a mask hides: they get no attention, no gradient, and stay zero, so that each run
is the one that it would be alone.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from prefix_tuning import hosts, parallel, setup
from prefix_tuning.errors import UserError
from prefix_tuning.optimizer import make_optimizer
from prefix_tuning.train_step import Sums, make_train_step
from prefix_tuning.types import KV, Adaptation, Batch, Method, Params, TrainState

Batches = dict[str, np.ndarray]
OWN = "population"  # among the frozen weights: what is no parameter and yet each run's own
STARTS = {  # what only says where a method starts, and never what it computes
    "prefix": ("init", "text", "text_file", "scale", "fit_steps", "fit_learning_rate"),
    "prompt": ("init", "text", "labels", "scale", "population"),
    "infix": ("scale",),
    "propagation": ("scale",),
}


def varying(config: dict[str, Any]) -> set[str]:
    """The keys in which runs that train together may differ from this one.

    Dropout depends on shapes, so that neither the length nor the seed, and with it the batches, can vary beside it; the
    factors of Adafactor depend on the length.
    """
    method = config["method"]
    parts = method["parts"] if method["name"] == "compose" else {method["name"]: method}
    drawn = any(value for key, value in flat(config).items() if key.endswith(".dropout"))
    keys = {"optimizer.learning_rate"} | (set() if drawn else {"seed"})
    for name in parts:
        path = f"method.parts.{name}" if method["name"] == "compose" else "method"
        keys |= {f"{path}.{key}" for key in STARTS.get(name, ())}
        if name == "prefix" and not drawn and not config["optimizer"].get("name", "").startswith("adafactor"):
            keys.add(f"{path}.length")
    return keys


def flat(config: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by their dotted names."""
    if not isinstance(config, dict):
        return {path: config}
    return {k: v for key, value in config.items() for k, v in flat(value, f"{path}.{key}" if path else key).items()}


def shared(config: dict[str, Any]) -> dict[str, Any]:
    """The leaves of a config that all runs which train together with it have as well."""
    free = varying(config)
    return {key: value for key, value in flat(config).items() if key not in free}


def groups(configs: Sequence[dict[str, Any]], size: int) -> list[list[int]]:
    """The numbers of the configs that can train together, at most `size` of them, in the order of their first ones.

    Those with one seed, which read the same batches, come together first.
    """
    found: dict[str, list[int]] = {}
    for number, config in enumerate(configs):
        found.setdefault(json.dumps(shared(config), sort_keys=True), []).append(number)
    parts = []
    for alike in found.values():
        seeds = list(dict.fromkeys(configs[number]["seed"] for number in alike))
        ordered = sorted(alike, key=lambda number: seeds.index(configs[number]["seed"]))
        parts += [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return sorted(parts, key=lambda group: group[0])


def check(configs: Sequence[dict[str, Any]], bases: Sequence[setup.Base], runs: Sequence[setup.Run]) -> None:
    """Raises `UserError` unless the runs differ only in where they start, their lengths, rates and seeds."""
    first = flat(configs[0])
    if len(configs) > 1 and configs[0]["model"].get("attention") == "cudnn":
        raise UserError("runs that train together cannot attend by cuDNN's kernel; expected model.attention='plain'")
    for config in configs[1:]:
        own, free = flat(config), varying(configs[0]) & varying(config)
        differing = sorted(k for k in first.keys() | own.keys() if first.get(k) != own.get(k) and k not in free)
        if differing:
            raise UserError(
                f"runs that train together differ in {', '.join(differing)}; valid: "
                f"{', '.join(sorted(varying(configs[0])))}, or train.population=1"
            )
    steps = {run.data.total_steps for run in runs}
    if len(steps) > 1:
        raise UserError(f"runs that train together take {sorted(steps)} steps; drop train.packing, or train.population")
    forms = [form(base) for base in bases]
    if any(one != forms[0] for one in forms):
        raise UserError("runs that train together have parameters of other shapes; only prefixes may, in length")


def form(base: setup.Base) -> Any:
    """The shapes of what a method makes, whatever the length of its prefix."""
    adaptation = setup.abstract_adaptation(base.method, base.model)
    leaves = jax.tree.leaves(adaptation, is_leaf=lambda x: isinstance(x, KV))
    shapes = [(x.k.shape[:-3], x.k.shape[-2:]) if isinstance(x, KV) else x.shape for x in leaves]
    return shapes, jax.tree.structure(adaptation)


def slots(base: setup.Base) -> int:
    """How long a method's prefix is; 0 where it has none."""
    adaptation = setup.abstract_adaptation(base.method, base.model)
    lengths = {kv.k.shape[-3] for hooks in (adaptation.decoder, adaptation.encoder) for kv in (hooks.kv or {}).values()}
    return max(lengths, default=0)


class Single:
    """One run, its batches spread over the devices."""

    def __init__(self, config: dict[str, Any], base: setup.Base, run: setup.Run, weights: Params):
        """Places the frozen weights."""
        self.config, self.base, self.run, self.method = config, base, run, base.method
        self.layout = base.layout
        self.frozen = self.layout.place(setup.prepare(base, config, weights))
        self.body = make_train_step(base.model, base.method, base.objective, run.tx, axis=self.layout.axis)
        self.like = [self.layout.like(setup.abstract_state(base, run))]  # each run's state, and where it is read to
        self.state: TrainState | None = None

    def fresh(self) -> list[TrainState]:
        """The state of each run before its first step."""
        return [setup.fresh_state(self.config, self.base, self.run, self.frozen)]

    def start(self, states: Sequence[TrainState]) -> None:
        """Goes on from these."""
        self.state = self.layout.place(states[0])
        self.step = self.layout.train_step(self.body, self.state)

    def batches(self, first: int) -> Iterator[Any]:
        """What `advance` takes, from the step after `first`."""
        for batch in self.run.data.batches(first):
            yield self.layout.split_batch(batch, self.run.train.accumulate)

    def advance(self, batch: Any) -> Sums:
        """Takes a step; returns its sums, which may still be computed."""
        self.state, sums = self.step(self.frozen, self.state, batch)
        return sums

    def read(self, sums: Sums) -> list[dict[str, Any]]:
        """The sums of each run."""
        return [jax.device_get(sums)]

    def states(self) -> list[TrainState]:
        """The state of each run, as it would be alone."""
        return [self.state]

    def own(self, number: int) -> Params:
        """The frozen weights as a run's method prepared them."""
        return self.frozen

    def bound(self, number: int, trainable: Params) -> tuple[Params, Params]:
        """(frozen, trainable) as `self.method` binds them, for a run's trainable parameters."""
        return self.frozen, self.layout.place(trainable)


class Population:
    """K runs in one step.  Of each host's devices, their K parameters are spread over them where K is a multiple of
    those, and else its rows of each batch are; beside weights in shards they are whole on every device."""

    def __init__(
        self,
        configs: Sequence[dict[str, Any]],
        bases: Sequence[setup.Base],
        runs: Sequence[setup.Run],
        weights: Params,
    ):
        """Places one copy of the frozen weights, for runs that `check` has let through."""
        self.configs, self.bases, self.runs = configs, bases, runs
        self.prepared = [setup.prepare(base, config, weights) for base, config in zip(bases, configs, strict=True)]
        self.like = [setup.abstract_state(base, run) for base, run in zip(bases, runs, strict=True)]  # on the host
        self.begun: list[TrainState] | None = None
        self.begun = self.fresh()  # until it starts
        lengths = [slots(base) for base in bases]
        widest = int(np.argmax(lengths))
        self.shapes = self.like[widest]
        self.method = bases[widest].method
        extras = [{name: x for name, x in frozen.items() if name not in weights} for frozen in self.prepared]
        if len(set(lengths)) > 1:
            self.method = hidden_slots(self.method)
            for number, (extra, length) in enumerate(zip(extras, lengths, strict=True)):
                own = {"mask": jnp.arange(max(lengths)) < length}
                adaptation = bases[number].method.bind(self.prepared[number], self.begun[number].trainable)[1]
                extra[OWN] = own if adaptation.shift is None else own | {"shift": adaptation.shift}
        self.layout = bases[0].layout
        self.sharded = isinstance(self.layout, parallel.Sharded)
        self.mesh = self.layout.mesh if self.sharded else parallel.everywhere()
        local = self.mesh.shape[parallel.AXIS]
        by_member = self.layout.by_run(len(configs))
        # Mesh axes that runs are spread over, and those of a batch [parts A B/A ...], or [A B/A ...] without parts.
        self.over_runs = parallel.AXIS if by_member else None
        self.parts = () if self.sharded else (1 if by_member else local,)  # of a host's share of a batch
        self.over_rows: tuple = (None, parallel.AXIS)
        if not self.sharded:
            self.over_rows = (parallel.HOSTS if by_member else (parallel.HOSTS, parallel.AXIS),)
        over, whole = (NamedSharding(self.mesh, PartitionSpec(axis)) for axis in (self.over_runs, None))
        self.sharding = over
        self.weights = self.layout.place(weights)
        self.extras = [jax.tree.map(padded, extra, extras[widest]) for extra in extras]
        stacked = hosts.spread(jax.tree.map(lambda *xs: jnp.stack(xs), *self.extras), over)
        self.frozen = (self.weights if self.sharded else parallel.joined(self.weights, self.mesh)) | stacked
        self.rates = hosts.spread(np.array([c["optimizer"]["learning_rate"] for c in configs], np.float32), over)
        self.alike = len({config["seed"] for config in configs}) == 1  # and so the batches
        axes = dict.fromkeys(weights) | dict.fromkeys(stacked, 0)
        step = jax.vmap(self.one, in_axes=(axes, 0, None if self.alike else 0, 0))
        self.step = jax.jit(
            self.layout.told(step) if self.sharded else step, donate_argnums=1, out_shardings=(over, whole)
        )
        self.state: TrainState | None = None

    def one(self, frozen: Params, state: TrainState, batch: Any, rate: Array) -> tuple[TrainState, Sums]:
        """A step of one run, at the learning rate `rate`: the body of `Single`, over the parts of its batch."""
        base, run = self.bases[0], self.runs[0]
        section = self.configs[0]["optimizer"] | {"learning_rate": rate}
        tx, _ = make_optimizer(run.data.total_steps, **section)
        body = make_train_step(base.model, self.method, base.objective, tx, axis=self.layout.axis)
        if self.sharded:
            return body(frozen, state, batch)
        return jax.vmap(body, in_axes=(None, None, 0), out_axes=None, axis_name=parallel.AXIS)(frozen, state, batch)

    def fresh(self) -> list[TrainState]:
        """As in `Single`."""
        made = zip(self.configs, self.bases, self.runs, self.prepared, strict=True)
        return self.begun or [setup.fresh_state(*one) for one in made]

    def start(self, states: Sequence[TrainState]) -> None:
        """As in `Single`."""
        whole = [jax.tree.map(padded, state, self.shapes) for state in states]
        self.state = hosts.spread(jax.tree.map(lambda *xs: jnp.stack(xs), *whole), self.sharding)
        self.begun = None

    def batches(self, first: int) -> Iterator[Any]:
        """As in `Single`; runs with one seed share their batches, those of others are padded to one shape."""
        part, rows = self.layout.part(), len(self.over_rows) - 1
        shape = (*self.parts, self.runs[0].train.accumulate, -1)
        if self.alike:
            where = NamedSharding(self.mesh, PartitionSpec(*self.over_rows))
            for batch in self.runs[0].data.batches(first):
                split = {name: x.reshape(*shape, *x.shape[1:]) for name, x in batch.items()}
                yield Batch(**{name: parallel.assembled(x, where, rows, part) for name, x in split.items()})
            return
        where = NamedSharding(self.mesh, PartitionSpec(self.over_runs, *self.over_rows))
        seeds = [config["seed"] for config in self.configs]
        streams = {seed: run.data for seed, run in zip(seeds, self.runs, strict=True)}
        for found in zip(*(data.batches(first) for data in streams.values()), strict=True):
            batch = dict(zip(streams, found, strict=True))
            widest = self.widest(found)
            whole = {n: np.stack([padded(batch[seed][n], like) for seed in seeds]) for n, like in widest.items()}
            split = {name: x.reshape(len(seeds), *shape, *x.shape[2:]) for name, x in whole.items()}
            yield Batch(**{name: parallel.assembled(x, where, rows + 1, part) for name, x in split.items()})

    def widest(self, found: Sequence[Batches]) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes that several batches are padded to: few, since N is a function of T alone."""
        shapes = {name: max(batch[name].shape for batch in found) for name in found[0]}
        sourced = "source" in shapes
        length = shapes["source" if sourced else "tokens"][1]
        targets = max(s.targets for run in self.runs for s in run.data.shapes if s.length <= length)
        written = ("tokens", "positions", "segments") if sourced else ()
        shapes |= {name: (shapes[name][0], targets) for name in ("target_index", "targets", "mask", *written)}
        return {name: jax.ShapeDtypeStruct(shape, found[0][name].dtype) for name, shape in shapes.items()}

    def advance(self, batch: Any) -> Sums:
        """As in `Single`."""
        self.state, sums = self.step(self.frozen, self.state, batch, self.rates)
        return sums

    def read(self, sums: Sums) -> list[dict[str, Any]]:
        """As in `Single`."""
        sums = jax.device_get(sums)
        return [{name: value[i] for name, value in sums.items()} for i in range(len(self.configs))]

    def states(self) -> list[TrainState]:
        """As in `Single`, without the padding."""
        state = hosts.fetch(self.state) if hosts.count() > 1 else self.state
        cut = lambda number: lambda x, like: x[number][tuple(map(slice, like.shape))]  # noqa: E731
        return [jax.tree.map(cut(i), state, like) for i, like in enumerate(self.like)]

    def own(self, number: int) -> Params:
        """As in `Single`."""
        return self.weights | {name: x for name, x in self.prepared[number].items() if name not in self.weights}

    def bound(self, number: int, trainable: Params) -> tuple[Params, Params]:
        """As in `Single`; padded, so that all runs are evaluated by what is compiled once."""
        whole = jax.tree.map(padded, trainable, self.shapes.trainable)
        extra, whole = self.layout.place((self.extras[number], whole))
        return self.weights | extra, whole


def hidden_slots(method: Method) -> Method:
    """The method with the slots hidden that a shorter prefix does not have, and with each run's own positions."""

    def bind(frozen: Params, trainable: Params, *, key: Array | None = None) -> tuple[Params, Adaptation]:
        params, adaptation = method.bind(frozen, trainable, key=key)
        own = frozen[OWN]

        def hide(kv: KV) -> KV:
            mask = jnp.broadcast_to(own["mask"], kv.k.shape[:-2])
            return kv.replace(mask=mask if kv.mask is None else kv.mask & mask)

        hooks = {
            stack: value.replace(kv={site: hide(kv) for site, kv in value.kv.items()})
            for stack in ("decoder", "encoder")
            if (value := getattr(adaptation, stack)).kv
        }
        return params, adaptation.replace(**hooks, shift=own.get("shift"))

    return method._replace(bind=bind)


def padded(x: Any, like: Any) -> Any:
    """The array, with zeros behind it on every axis to the shape of another."""
    if x.shape == like.shape:
        return x
    ends = [(0, wanted - size) for size, wanted in zip(x.shape, like.shape, strict=True)]
    return (np if isinstance(x, np.ndarray) else jnp).pad(x, ends)
