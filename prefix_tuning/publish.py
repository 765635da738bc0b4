"""What a run hands on, in PEFT's layout, and what it takes up again: adapters with heads, tokenizer and template."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from prefix_tuning import parallel, setup
from prefix_tuning.checkpoint import Checkpoints
from prefix_tuning.errors import UserError
from prefix_tuning.files import guarded, replace
from prefix_tuning.interop import peft
from prefix_tuning.record import Record, check_config
from prefix_tuning.types import Adaptation, Model, Params, TrainState

TEMPLATE = "prompt_template.json"


def save_adapter(
    folder: str | Path,
    base: setup.Base,
    config: dict[str, Any],
    frozen: Params,
    adaptation: Adaptation,
    head: Params | None = None,
) -> None:
    """Writes an adaptation and its task head in PEFT's layout, the tokenizer and the prompt's template beside them.

    Raises `UserError` for what PEFT cannot express.
    """
    section, folder = config["method"], Path(folder)
    kind, slots = None, section.get("frozen_slots") or 0
    if section["name"] == "ptuning":
        kind = "P_TUNING"
    elif section["name"] == "prefix" and slots:
        kind = "CARTRIDGE"
    beside = None if head is None else (peft.head_of(config["objective"], base.model), head)
    name = config["model"]["name"]
    peft.save_adapter(folder, adaptation, base.model, name, frozen=frozen, kind=kind, frozen_slots=slots, head=beside)
    text = {name: value for name, value in config["text"].items() if value is not None}
    guarded(folder, lambda: replace(folder / TEMPLATE, json.dumps(text, indent=2, sort_keys=True) + "\n"))
    guarded(folder, lambda: base.tokenizer.save_pretrained(folder))


def start_from(
    config: dict[str, Any],
    adaptation: Callable[[Model, Params], Adaptation],
    head: Callable[[dict[str, Any], Model], Params | None],
    workdir: str | Path,
) -> None:
    """Makes a workdir whose training starts from an adaptation: a checkpoint before the first step.

    `adaptation` is a function of (model, frozen), `head` one of the objective's config section and the model, which may
    give None for a fresh one.  Raises `UserError` for a workdir that has begun, a method that cannot start from it, and
    a config that cannot work.
    """
    base = setup.make_base(config)
    if base.bare.adopt is None:
        raise UserError(
            f"method {config['method']['name']!r} cannot start from an adaptation: what made it was not kept; expected "
            "prefix or prompt without a reparametrisation, or lora"
        )
    run = setup.make_run(config, base)
    parallel.check_rows(run.train.batch_size, run.train.accumulate)
    check_config(workdir, config)
    place = Path(workdir) / "checkpoints"
    if place.is_dir() and any(place.iterdir()):
        raise UserError(f"{workdir} has checkpoints already; expected a new workdir")
    frozen = setup.load_weights(base, config)
    trainable = base.bare.adopt(base.model, frozen, adaptation(base.model, frozen))
    key, fresh = jax.random.split(jax.random.key(config["seed"]))
    if base.objective.head is not None:
        found = head(config["objective"], base.model)
        trainable = {"method": trainable, "head": base.objective.head(fresh, base.model) if found is None else found}
    record = Record(workdir, config)
    checkpoints = Checkpoints(place, run.train.keep)
    state = TrainState(jnp.int32(0), trainable, run.tx.init(trainable), key)
    checkpoints.save(state, evaluated=False, meter=None)
    checkpoints.close()
    record.close()
