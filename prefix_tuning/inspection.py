"""What a trained prefix or prompt does: who attends to its slots, how large they are, what each is worth."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import matplotlib.ticker
import numpy as np
from jax import Array

from prefix_tuning import api, setup
from prefix_tuning.data import pipeline
from prefix_tuning.errors import UserError
from prefix_tuning.files import guarded, replace
from prefix_tuning.methods import compose
from prefix_tuning.registry import call
from prefix_tuning.types import Adaptation, Batch, Model, Params

WORDS = 5  # nearest vocabulary words of a row
IDLE = 1e-3  # a slot whose removal changes the loss by less than this share of it does nothing that matters


def inspect_workdir(workdir: str, split: str | None, examples: int) -> str:
    """Inspects a workdir's newest checkpoint on `examples` pairs of a split (the one that training evaluates on).

    Writes inspect.md, inspect.json and a picture of each attention with slots there and returns the Markdown.  Raises
    `UserError` for a method without slots, rows or virtual tokens.
    """
    config, base, frozen, trainable, step = api.open_workdir(workdir)
    model, section = base.model, call("evaluation", setup.Evaluation, config["evaluation"])
    params, adaptation = base.method.bind(frozen, trainable)
    name = section.split if split is None else split
    pairs = setup.make_split(config, base, name, section._replace(pairs=None)).pairs[:examples]

    folded = compose.fold(model, params, adaptation)
    virtual = 0 if adaptation.rows is None else len(adaptation.rows)
    places = slotted(folded)
    if not places and not virtual:
        kind = config["method"]["name"]
        raise UserError(f"{workdir} holds {kind!r}, which has no slots to inspect; valid: prefixes, prompts, their kin")
    batches = [
        Batch(**batch)
        for _, batch in pipeline.eval_batches(pairs, batch_size=min(section.batch_size, len(pairs)), shapes=2)
    ]

    @jax.jit
    def loss_of(params: Params, adaptation: Adaptation, batch: Batch) -> tuple[Array, Array]:
        loss, count, _ = base.objective.loss(model, params, adaptation, batch)
        return loss, count

    def mean_loss(adaptation: Adaptation, batches: list[Batch] = batches) -> float:
        sums = [jax.device_get(loss_of(params, adaptation, batch)) for batch in batches]
        return float(sum(loss for loss, _ in sums) / sum(count for _, count in sums))

    found: dict[str, Any] = {"step": step, "split": name, "pairs": len(pairs), "loss": mean_loss(folded)}
    if places:
        found["attention"] = attention(model, params, folded, batches)
    for place in places:
        own = found["attention"][".".join(place)]
        own["without"] = [mean_loss(remove(folded, *place, slot)) for slot in range(len(own["mass"][0][0]))]
    if virtual:
        ids = range(model.vocabulary, model.vocabulary + virtual)
        found["without_virtual"] = [
            None if predicts(batches, token) else mean_loss(folded, without(batches, token)) for token in ids
        ]
    rows = [x for x in (adaptation.prompt, adaptation.rows) if x is not None]
    if rows:
        near = nearest(model, params, jnp.concatenate(rows))
        found["words"] = [[base.tokenizer.decode([i]) for i in row] for row in near.tolist()]
    text, folder = markdown(found), Path(workdir)
    guarded(folder, lambda: replace(folder / "inspect.json", json.dumps(found) + "\n"))
    guarded(folder, lambda: replace(folder / "inspect.md", text))
    for place, own in found.get("attention", {}).items():
        picture = folder / ("inspect.png" if len(places) == 1 else f"inspect_{place}.png")
        guarded(folder, lambda own=own, file=picture: draw(own, found["loss"]).savefig(file, dpi=120))
        text += f"\nThe picture is {picture}.\n"
    return text


def slotted(adaptation: Adaptation) -> list[tuple[str, str]]:
    """(stack, site) of every attention with slots."""
    return [(stack, site) for stack in ("encoder", "decoder") for site in getattr(adaptation, stack).kv or {}]


def attention(model: Model, params: Params, adaptation: Adaptation, batches: list[Batch]) -> dict[str, Any]:
    """The share of attention by layer, head and slot [L K*G P], and norms [L P] beside those of real tokens [L], by
    "stack.site" that has slots."""
    probe = jax.jit(model.probe)
    sums, total = None, 0.0
    for batch in batches:
        tokens = float((np.asarray(batch.segments) > 0).sum())
        read = jax.tree.map(lambda x, n=tokens: n * np.asarray(x, np.float64), probe(params, adaptation, batch))
        sums, total = read if sums is None else jax.tree.map(np.add, sums, read), total + tokens
    means = jax.tree.map(lambda x: x / total, sums)
    found = {}
    for stack, site in slotted(adaptation):
        own = means[stack][site]
        mass = own["mass"]
        found[f"{stack}.{site}"] = {
            "mass": mass.reshape(len(mass), -1, mass.shape[-1]).tolist(),
            **{name: own[name].mean(1).tolist() for name in own if name != "mass"},  # over heads
        }
    return found


def remove(adaptation: Adaptation, stack: str, site: str, slot: int) -> Adaptation:
    """The adaptation without one slot of an attention, in every layer; positions stay as they are."""
    hooks = getattr(adaptation, stack)
    kv = hooks.kv[site]
    mask = jnp.ones(kv.k.shape[:-2], bool) if kv.mask is None else kv.mask
    left = hooks.replace(kv=hooks.kv | {site: kv.replace(mask=mask.at[..., slot].set(False))})
    return adaptation.replace(**{stack: left})


def without(batches: list[Batch], token: int) -> list[Batch]:
    """The batches with no position attending to one virtual token, nor to anything from it."""

    def one(batch: Batch) -> Batch:
        if batch.source is None:
            return batch.replace(segments=np.where(batch.tokens == token, 0, batch.segments))
        return batch.replace(source_segments=np.where(batch.source == token, 0, batch.source_segments))

    return [one(batch) for batch in batches]


def predicts(batches: list[Batch], token: int) -> bool:
    """Whether a target is read off at this virtual token, as the first one behind an infix is."""
    return batches[0].source is None and any(
        ((np.take_along_axis(batch.tokens, batch.target_index, 1) == token) & (batch.mask > 0)).any()
        for batch in batches
    )


def nearest(model: Model, params: Params, rows: Array) -> Array:
    """The ids [R WORDS] of the vocabulary whose embeddings have the largest cosine with rows [R D]."""
    table = model.embed(params, jnp.arange(model.vocabulary)).astype(jnp.float32)
    table = table / jnp.linalg.norm(table, axis=1, keepdims=True)
    return jax.lax.top_k((rows / jnp.linalg.norm(rows, axis=1, keepdims=True)) @ table.T, WORDS)[1]


def verdict(loss: float, without: float) -> str:
    """What removing a slot says of it."""
    change = (without - loss) / loss
    return "idle" if abs(change) < IDLE else "works" if change > 0 else "harms"


def markdown(found: dict[str, Any]) -> str:
    """The findings as tables: a line per slot, a line per layer."""
    loss = found["loss"]
    lines = [f"loss {loss:.4f} on {found['pairs']} pairs of the {found['split']} split, step {found['step']}", ""]
    words, places = found.get("words", []), found.get("attention", {})
    for place, seen in places.items():
        if len(places) > 1:
            lines += [f"## {place}", ""]
        mass = np.asarray(seen["mass"])  # [L heads P]
        keys, values = np.asarray(seen["key_norm"]), np.asarray(seen["value_norm"])
        lines += ["| slot | attention | key norm | value norm | loss without | change | | nearest words |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        first = mass.shape[-1] - (len(words) - len(found.get("without_virtual", [])))  # a prompt's rows come last
        for slot in range(mass.shape[-1]):
            removed = seen["without"][slot]
            said = ", ".join(map(repr, words[slot - first])) if words and slot >= first else ""
            lines.append(
                f"| {slot} | {mass[..., slot].mean():.2%} | {keys[:, slot].mean():.2f} | {values[:, slot].mean():.2f} "
                f"| {removed:.4f} | {removed - loss:+.4f} | {verdict(loss, removed)} | {said} |"
            )
        lines += ["", "Share of attention that the slots receive together, by head; mean norms, slots / real tokens:"]
        heads = mass.shape[1]
        lines += ["", f"| layer | {' | '.join(f'head {h}' for h in range(heads))} | keys | values |"]
        lines += ["|---" * (heads + 3) + "|"]
        for layer, shares in enumerate(mass.sum(-1)):
            norms = [
                f"{own[layer].mean():.2f} / {seen[f'token_{name}'][layer]:.2f}"
                for name, own in (("key_norm", keys), ("value_norm", values))
            ]
            lines.append(f"| {layer} | {' | '.join(f'{share:.1%}' for share in shares)} | {' | '.join(norms)} |")
        lines += [""] if len(places) > 1 else []
    if "without_virtual" in found:
        lines += ["", "| virtual token | loss without | change | | nearest words |", "|---|---|---|---|---|"]
        own = words[len(words) - len(found["without_virtual"]) :]
        for number, (removed, near) in enumerate(zip(found["without_virtual"], own, strict=True)):
            said = ", ".join(map(repr, near))
            change = "- | - | the first target is read off here"
            if removed is not None:
                change = f"{removed:.4f} | {removed - loss:+.4f} | {verdict(loss, removed)}"
            lines.append(f"| {number} | {change} | {said} |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], loss: float) -> matplotlib.figure.Figure:
    """Of one attention: by layer and head, and by layer and slot; norms by layer; what each slot is worth."""
    mass = np.asarray(found["mass"])
    figure = matplotlib.figure.Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, values, label in ((axes[0, 0], mass.sum(-1), "head"), (axes[0, 1], mass.mean(1), "slot")):
        image = axis.imshow(values, aspect="auto", vmin=0, cmap="viridis", interpolation="nearest")
        figure.colorbar(image, ax=axis)
        axis.set(xlabel=label, ylabel="layer", title=f"share of attention by {label}")
    layers = range(len(mass))
    for name, style in (("key", "C0"), ("value", "C1")):
        axes[1, 0].plot(layers, np.asarray(found[f"{name}_norm"]).mean(1), style, label=f"{name}s of slots")
        axes[1, 0].plot(layers, found[f"token_{name}_norm"], style, linestyle="--", label=f"{name}s of tokens")
    axes[1, 0].set(xlabel="layer", ylabel="mean norm", ylim=(0, None), title="norms")
    axes[1, 0].legend()
    changes = np.asarray(found["without"]) - loss
    colours = [{"works": "C2", "idle": "C7", "harms": "C3"}[verdict(loss, x)] for x in found["without"]]
    axes[1, 1].bar(range(len(changes)), changes, color=colours)
    axes[1, 1].set(
        xlabel="slot", ylabel="change of the loss", title="loss with the slot removed (grey: idle, red: harms)"
    )
    for axis in axes.flat:
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    for axis in axes[0]:
        axis.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    return figure
