"""Low-rank deltas as PEFT names and shapes them: module by module, fused projections whole, in both directions."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from prefix_tuning.errors import UserError
from prefix_tuning.models import loading
from prefix_tuning.types import Adaptation, Delta, LayerHooks, Model, Projection, Spec

PREFIX = "base_model.model."
KEY = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
# Options that change what an adapter computes, and the only values that are read.
NEUTRAL = {
    "bias": "none",
    "use_dora": False,
    "use_qalora": False,
    "use_bdlora": None,
    "lora_bias": False,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "arrow_config": None,
    "monteclora_config": None,
}
# Options that say how it was made, or for which modules, of which the tensors themselves tell.
OTHERS = (
    "r lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern rank_pattern "
    "alpha_pattern fan_in_fan_out use_rslora init_lora_weights megatron_config megatron_core loftq_config eva_config "
    "corda_config lora_ga_config qalora_group_size ensure_weight_tying runtime_config velora_config"
).split()


class Place(NamedTuple):
    """A projection in one layer, and the module of Hugging Face's model that computes it."""

    stack: str
    site: str
    layer: int
    module: str
    projection: Projection
    spec: Spec


class Half(NamedTuple):
    """A module's change, scale B A."""

    a: np.ndarray  # [R in]
    b: np.ndarray  # [out R], of the whole module
    scale: float


def places(model: Model) -> Iterator[Place]:
    """Every projection of every layer."""
    for stack, sites in model.sites.items():
        for site, projection in sites.projections.items():
            spec = model.specs[model.layers(stack)][projection.weight]["kernel"]
            for layer in range(sites.layers):
                module = spec.source.format(layer=layer).removesuffix(".weight")
                yield Place(stack, site, layer, module, projection, spec)


def own_rows(b: np.ndarray, place: Place) -> np.ndarray:
    """A view of the rows of a module's B [out R] that are this projection's; all of them where nothing is fused."""
    if place.projection.part is not None:
        return b.reshape(-1, math.prod(place.projection.outer), b.shape[-1])[place.projection.part]
    return loading.own_rows(b, place.spec)


def rows_of(place: Place) -> int:
    """How many rows the B of the place's whole module has."""
    stored = loading.stored_shape(place.spec)
    return stored[0] if place.spec.transposed else stored[1]


def encode(adaptation: Adaptation, model: Model) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The entries of PEFT's config and its tensors for the deltas of an adaptation.

    Parts of a fused projection that are changed apart become one change of the whole, of their ranks together.
    """
    halves: dict[str, Half] = {}
    for place in places(model):
        delta = (getattr(adaptation, place.stack).delta or {}).get(place.site)
        if delta is None:
            continue
        a, b = (np.asarray(x[place.layer], np.float32) for x in (delta.a, delta.b))
        rank = b.shape[0]
        whole = np.zeros((rows_of(place), rank), np.float32)
        rows = own_rows(whole, place)
        rows[...] = b.reshape(rank, -1).T.reshape(rows.shape)
        half = Half(np.ascontiguousarray(a.reshape(-1, rank).T), whole, delta.scale)
        halves[place.module] = together(halves[place.module], half) if place.module in halves else half
    ranks = {module: len(half.a) for module, half in halves.items()}
    alphas = {module: alpha_of(half) for module, half in halves.items()}
    rank, alpha = (most(values) for values in (ranks, alphas))
    config = {
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "bias": "none",
        "fan_in_fan_out": any(not place.spec.transposed for place in places(model) if place.module in halves),
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "r": rank,
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "target_modules": shortest(list(halves), {place.module for place in places(model)}),
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = {f"{PREFIX}{module}.lora_A.weight": half.a for module, half in halves.items()}
    return config, tensors | {f"{PREFIX}{module}.lora_B.weight": half.b for module, half in halves.items()}


def of_the_bare_model(
    config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The same for a model without any head, whose modules' names lack their first part."""
    rest = lambda name: name.partition(".")[2] or name  # noqa: E731
    patterns = {key: {rest(m): x for m, x in config[key].items()} for key in ("alpha_pattern", "rank_pattern")}
    named = {f"{PREFIX}{rest(key.removeprefix(PREFIX))}": x for key, x in tensors.items()}
    return config | patterns | {"target_modules": [rest(module) for module in config["target_modules"]]}, named


def together(one: Half, other: Half) -> Half:
    """The sum of two changes of one module, with the scale of the first."""
    b = other.b if other.scale == one.scale else other.b * np.float32(other.scale / one.scale)
    return Half(np.concatenate([one.a, other.a]), np.concatenate([one.b, b], axis=1), one.scale)


def alpha_of(half: Half) -> float:
    """The alpha that PEFT divides by the rank to get the scale."""
    alpha = half.scale * len(half.a)
    return int(alpha) if alpha == int(alpha) else alpha


def most(values: dict[str, Any]) -> Any:
    """The most frequent value."""
    own = list(values.values())
    return max(sorted(set(own)), key=own.count)


def shortest(chosen: list[str], known: set[str]) -> list[str]:
    """What PEFT finds exactly these modules by: the ends of their names, or whole names where ends name others too."""
    ends = sorted({module.rsplit(".", 1)[-1] for module in chosen})
    found = {module for module in known if module.rsplit(".", 1)[-1] in ends}
    return ends if found == set(chosen) else sorted(chosen)


def decode(
    config: dict[str, Any], shapes: dict[str, list[int]], read: Callable[[str], np.ndarray], model: Model, where: str
) -> Adaptation:
    """The deltas in PEFT's tensors, of which `read` gives one by name once all shapes are known to fit.

    Layers and ranks that a file leaves out are zeros.  Raises `UserError` naming what does not fit.
    """
    for key, neutral in NEUTRAL.items():
        if config.get(key) not in (neutral, None):
            raise UserError(f"{where}: {key}={config[key]!r} is not supported; expected {neutral!r}")
    known: dict[str, list[Place]] = {}
    for place in places(model):
        if place.projection.part is None:
            known.setdefault(place.module, []).append(place)
    firsts = loading.first_names(model)
    modules: dict[str, dict[str, str]] = {}
    for key, shape in shapes.items():
        match = KEY.fullmatch(key)
        named = match and next(
            (n for n in (match["module"], *(f"{f}.{match['module']}" for f in firsts)) if n in known), None
        )
        if not named:
            raise UserError(f"{where} holds {key}; expected low-rank changes of this model's {listed(known)}")
        modules.setdefault(named, {})[match["half"]] = key
        if len(shape) != 2 or 0 in shape:
            raise UserError(f"{where} holds {key} {shape}; expected a matrix")
    if not modules:
        raise UserError(f"{where} holds no tensor; expected low-rank changes of this model's {listed(known)}")
    for module, halves in modules.items():
        place = known[module][0]
        inner, outer = math.prod(place.projection.inner), rows_of(place)
        for half in "AB":
            if half not in halves:
                raise UserError(f"{where} lacks {PREFIX}{module}.lora_{half}.weight")
        (rank, read_width), (made_width, other) = shapes[halves["A"]], shapes[halves["B"]]
        if (read_width, made_width, other) != (inner, outer, rank):
            raise UserError(
                f"{where}: {module} has A {shapes[halves['A']]} and B {shapes[halves['B']]}; expected [R {inner}] and "
                f"[{outer} R] for this model"
            )
    found: dict[str, dict[str, list]] = {}
    for module, halves in modules.items():
        scale = scale_of(config, module, shapes[halves["A"]][0], where)
        for place in known[module]:
            own = found.setdefault(place.stack, {}).setdefault(place.site, [])
            own.append((place, halves, scale))
    return Adaptation(
        **{
            stack: LayerHooks(delta={site: delta_of(own, shapes, read, model) for site, own in sites.items()})
            for stack, sites in found.items()
        }
    )


def delta_of(own: list, shapes: dict[str, list[int]], read: Callable[[str], np.ndarray], model: Model) -> Delta:
    """The delta of one projection from its tensors in each layer."""
    place, _, scale = own[0]
    rank, layers = max(shapes[halves["A"]][0] for _, halves, _ in own), model.sites[place.stack].layers
    inner, outer = math.prod(place.projection.inner), math.prod(place.projection.outer)
    a, b = np.zeros((layers, inner, rank), np.float32), np.zeros((layers, rank, outer), np.float32)
    for here, halves, told in own:
        low, high = (read(halves[half]) for half in "AB")
        rows = np.asarray(own_rows(high, here)).reshape(outer, -1)
        a[here.layer, :, : len(low)] = low.T
        b[here.layer, : len(low)] = rows.T if told == scale else rows.T * np.float32(told / scale)
    shape = place.projection
    return Delta(
        jnp.asarray(a.reshape(layers, *shape.inner, rank)), jnp.asarray(b.reshape(layers, rank, *shape.outer)), scale
    )


def scale_of(config: dict[str, Any], module: str, rank: int, where: str) -> float:
    """What PEFT multiplies a module's B A by, as its patterns match names: at their ends."""
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        try:
            hit = re.fullmatch(rf"(.*\.)?({pattern})", module)
        except re.error as error:
            raise UserError(f"{where}: alpha_pattern {pattern!r} is no regular expression: {error}") from error
        if hit:
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{where}: lora_alpha is {alpha!r}; expected a number")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def listed(known: dict[str, Any]) -> str:
    """The last parts of modules' names."""
    return ", ".join(sorted({module.rsplit(".", 1)[-1] for module in known}))
