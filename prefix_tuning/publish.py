"""What a run hands on, in PEFT's layout, and what it takes up again: adapters with heads, tokenizer and template."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from prefix_tuning import hosts, setup
from prefix_tuning.checkpoint import Checkpoints
from prefix_tuning.errors import UserError
from prefix_tuning.files import guarded, replace
from prefix_tuning.interop import peft, reading
from prefix_tuning.interop.base import fingerprint
from prefix_tuning.record import Record, check_config
from prefix_tuning.types import Adaptation, Params, TrainState

TEMPLATE = "prompt_template.json"


def save_adapter(
    folder: str | Path,
    base: setup.Base,
    config: dict[str, Any],
    frozen: Params,
    params: Params,
    adaptation: Adaptation,
) -> None:
    """Writes an adaptation and its task head in PEFT's layout, the tokenizer and the prompt's template beside them.

    `params` are what the method's `bind` gave beside it.  All hosts must call it, and the first one writes.  Raises
    `UserError` for what PEFT cannot express.
    """
    if new_weights(frozen, params):
        raise UserError("PEFT's folder holds no fine-tuned weights; valid formats for them: merged")
    section, folder, head = config["method"], Path(folder), params.get("head")
    kind, slots = None, section.get("frozen_slots") or 0
    if section["name"] == "ptuning":
        kind = "P_TUNING"
    elif section["name"] == "prefix" and slots:
        kind = "CARTRIDGE"
    beside = None if head is None else (peft.head_of(config["objective"], base.model), hosts.fetch(head))
    name = config["model"]["name"]
    own = hosts.fetch(adaptation)
    peft.save_adapter(folder, own, base.model, name, frozen=frozen, kind=kind, frozen_slots=slots, head=beside)
    text = {name: value for name, value in config["text"].items() if value is not None}

    def write() -> None:
        replace(folder / TEMPLATE, json.dumps(text, indent=2, sort_keys=True) + "\n")
        base.tokenizer.save_pretrained(folder)

    hosts.agreed(lambda: guarded(folder, write))


def new_weights(frozen: Params, params: Params) -> bool:
    """Whether a method's `bind` made weights of its own rather than handing on the frozen ones."""
    own = {name: params[name] for name in frozen}
    if jax.tree.structure(own) != jax.tree.structure(frozen):
        return True
    return any(a is not b for a, b in zip(*map(jax.tree.leaves, (own, frozen)), strict=True))


# (frozen, key) -> trainable
Begin = Callable[[Params, Array], Params]


def start_from(config: dict[str, Any], begin: Callable[[setup.Base], Begin], workdir: str | Path) -> None:
    """Makes a workdir whose training starts from what `begin` makes: a checkpoint before the first step.

    Raises `UserError` for a workdir that has begun and a config that cannot work, and what `begin` raises, before any
    weight is read.
    """
    base = setup.make_base(config)
    make = begin(base)
    run = setup.make_run(config, base)
    setup.check_rows(base, run)
    check_config(workdir, config, setup.usual(config))
    place = Path(workdir) / "checkpoints"
    if place.is_dir() and any(place.iterdir()):
        raise UserError(f"{workdir} has checkpoints already; expected a new workdir")
    key, fresh = jax.random.split(jax.random.key(config["seed"]))
    trainable = make(setup.load_weights(base, config), fresh)
    record = Record(workdir, config)
    checkpoints = Checkpoints(place, run.train.keep)
    state = TrainState(jnp.int32(0), trainable, run.tx.init(trainable), key)
    checkpoints.save(state, evaluated=False, meter=None)
    checkpoints.close()
    record.close()


def adopted(source: str, config: dict[str, Any], base: setup.Base) -> Begin:
    """For `start_from`: what binds to an adapter made elsewhere, and the task head beside it or else a fresh one.

    Raises `UserError` for a method that cannot start from an adapter, and for one that does not fit.
    """
    if base.bare.adopt is None:
        raise UserError(
            f"method {config['method']['name']!r} cannot start from an adapter: what made it was not kept; expected "
            "prefix or prompt without a reparametrisation, or lora, or as input a workdir, which keeps it"
        )

    def make(frozen: Params, key: Array) -> Params:
        adaptation = reading.load_adapter(source, base.model, frozen, headed=base.objective.head is not None)
        trainable = base.bare.adopt(base.model, frozen, adaptation)
        if base.objective.head is None:
            return trainable
        head = reading.read_head(source, config["objective"], base.model)
        return {"method": trainable, "head": base.objective.head(key, base.model) if head is None else head}

    return make


def continued(trainable: Params, number: str | None, base: setup.Base) -> Begin:
    """For `start_from`: another run's trainable parameters, networks included, made on a base with this fingerprint.

    Raises `UserError` where the config trains something else, or on another base.
    """
    wanted = setup.abstract_trainable(base.method, base.model)
    shapes = [
        {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (trainable, wanted)
    ]
    differing = [name for name in sorted(set(shapes[0]) | set(shapes[1])) if shapes[0].get(name) != shapes[1].get(name)]
    if differing:
        told = "; ".join(f"{name} {shapes[0].get(name)} instead of {shapes[1].get(name)}" for name in differing[:4])
        raise UserError(f"what the run has trained is not what this config trains: {told}")

    def make(frozen: Params, key: Array) -> Params:
        del key  # nothing is drawn
        own = fingerprint(base.model, frozen)
        if None not in (own, number) and own != number:
            raise UserError(f"the run's base model has fingerprint {number}; this config's has {own}")
        return trainable

    return make
