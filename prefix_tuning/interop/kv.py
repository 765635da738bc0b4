"""A prefix as plain keys and values in one safetensors file, which any code that has a cache can read.

The tensors are STACK.SITE.LAYER.key and .value, [P K H] as attention reads them: after rotary embedding, where the
family has it.  A layer without a prefix has none; where only some slots exist, a bool .mask [P] says which.  Metadata
are strings: "format", "version"; "sites", JSON of the shape, the layers and whether there are masks, by STACK.SITE;
"dtype"; "first_position", that of the first real token; and what interop/base.py says of the base model.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from prefix_tuning.errors import UserError, valid
from prefix_tuning.interop import base
from prefix_tuning.methods import compose
from prefix_tuning.models import loading
from prefix_tuning.types import KV, Adaptation, LayerHooks, Model, Params

FILE, FORMAT, VERSION = "prefix.safetensors", "prefix_tuning.kv", "1"
STACKS = ("encoder", "decoder")
KINDS = {"key": ("F32", "BF16", "F16"), "value": ("F32", "BF16", "F16"), "mask": ("BOOL",)}


def save(folder: str | Path, adaptation: Adaptation, model: Model, params: Params) -> None:
    """Writes FOLDER/prefix.safetensors; a prompt in a decoder becomes the keys and values that it has there.

    Raises `UserError` for what plain keys and values cannot express.
    """
    folder, adaptation = Path(folder), plain(adaptation, model, params)
    kept = {f"{stack}.{site}": kv for stack in STACKS for site, kv in (getattr(adaptation, stack).kv or {}).items()}
    dtype = jnp.result_type(*(x for kv in kept.values() for x in (kv.k, kv.v)))
    tensors, sites = {}, {}
    for place, kv in kept.items():
        mask = np.ones(kv.k.shape[:2], bool) if kv.mask is None else kv.mask
        layers = [int(layer) for layer in mask.any(1).nonzero()[0]]
        masked = not mask[layers].all()
        sites[place] = {"shape": list(kv.k.shape[1:]), "layers": layers, "masked": masked}
        parts = {"key": kv.k.astype(dtype), "value": kv.v.astype(dtype)} | ({"mask": mask} if masked else {})
        tensors |= {f"{place}.{i}.{part}": np.ascontiguousarray(x[i]) for i in layers for part, x in parts.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "sites": json.dumps(sites),
        "dtype": dtype.name,
        "first_position": str(0 if adaptation.shift is None else adaptation.shift),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        loading.write(folder / FILE, tensors, metadata | base.identity(model, params))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write the prefix to {folder}: {error}") from error


def plain(adaptation: Adaptation, model: Model, params: Params) -> Adaptation:
    """The adaptation as keys and values on the host that all rows share; raises `UserError` if it is anything else."""
    shared = adaptation.prompt is None or adaptation.prompt.ndim == 2
    whole = jax.device_get(compose.fold(model, params, adaptation) if shared else adaptation)
    hooks = {stack: getattr(whole, stack).kv or {} for stack in STACKS}
    slots = [kv for kept in hooks.values() for kv in kept.values()]
    if not shared or np.ndim(whole.shift) or any(kv.k.ndim > 4 or np.ndim(kv.mask) > 2 for kv in slots):
        raise UserError("plain keys and values are the same for all rows; this adaptation has some for each row")
    if not any(kv.mask is None or kv.mask.any() for kv in slots):
        raise UserError("plain keys and values are those of a prefix or prompt; this adaptation has neither")
    alone = {
        stack: LayerHooks(kv={site: KV(kv.k, kv.v, kv.mask) for site, kv in kept.items()} or None)
        for stack, kept in hooks.items()
    }
    if jax.tree.structure(whole) != jax.tree.structure(Adaptation(**alone, shift=whole.shift)):
        raise UserError(
            "plain keys and values are read as those of tokens are; this adaptation also has gates, tokens of its own "
            "among the real ones, or what another method trained"
        )
    return whole


def recognise(path: str | Path) -> bool:
    """Whether this is such a file, or a folder with one, as far as its header tells."""
    try:
        return loading.read_metadata(located(path)).get("format") == FORMAT
    except UserError:
        return False


def located(path: str | Path) -> Path:
    """The file, of which the folder may be named instead."""
    return Path(path) / FILE if Path(path).is_dir() else Path(path)


def load(path: str | Path, model: Model, frozen: Params | None) -> Adaptation:
    """The prefix in such a file, or in a folder with one; raises `UserError` if it is damaged or of another model."""
    file = located(path)
    told = loading.read_metadata(file)
    for key, own in (("format", FORMAT), ("version", VERSION)):
        if told.get(key) != own:
            raise UserError(f"{file} has {key} {told.get(key)!r}; expected {own!r}, as 'export --format=kv' writes it")
    base.check(told, model, frozen, str(file))
    wanted, first = described(told, model, file)
    tensors = {}
    for name, tensor in loading.read(file):
        shape, kind, kinds = tensor.get_shape(), tensor.get_dtype(), KINDS.get(name.split(".")[-1], ())
        if wanted.get(name) != shape or kind not in kinds:
            expected = f"{wanted[name]} {' or '.join(kinds)}" if name in wanted else "no such tensor for this model"
            raise UserError(f"{file} holds {name} {shape} {kind}; expected {expected}")
        tensors[name] = tensor[:]
    missing = sorted(wanted.keys() - tensors)
    if missing or not tensors:
        raise UserError(f"{file} lacks {', '.join(missing[:8]) or 'keys and values'}{' ...' if missing[8:] else ''}")
    hooks = {}
    for stack, own in model.sites.items():
        kv = {site: stacked(tensors, f"{stack}.{site}", own.layers) for site in own.kv}
        hooks[stack] = LayerHooks(kv={site: found for site, found in kv.items() if found is not None} or None)
    return Adaptation(**hooks, shift=jnp.int32(first) if first else None)


def described(told: dict[str, str], model: Model, file: Path) -> tuple[dict[str, list[int]], int]:
    """(the shape of every tensor by name, the first real token's position), as metadata tell; raises `UserError`."""
    offered = {f"{stack}.{site}": own for stack, own in model.sites.items() for site in own.kv}
    try:
        sites = {
            place: (int(own["shape"][0]), set(own["layers"]), bool(own["masked"]))
            for place, own in json.loads(told["sites"]).items()
        }
        first, lengths = int(told["first_position"]), [slots for slots, _, _ in sites.values()]
        if not 0 <= first <= max(lengths) or min(lengths) < 1:
            raise ValueError(first)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} has damaged metadata; expected what 'export --format=kv' writes") from error
    wanted = {}
    for place, (slots, layers, masked) in sites.items():
        own = offered[valid(f"attention with a prefix in {file}", place, offered)]
        whole = [slots, *own.kv[place.split(".")[1]]]
        shapes = {"key": whole, "value": whole} | ({"mask": whole[:1]} if masked else {})
        numbers = [number for number in range(own.layers) if number in layers]
        wanted |= {f"{place}.{number}.{part}": shape for number in numbers for part, shape in shapes.items()}
    return wanted, first


def stacked(tensors: dict[str, np.ndarray], place: str, depth: int) -> KV | None:
    """Keys and values [L P K H] of an attention site; where a layer has none, zeros that the mask leaves out."""
    layers = [number for number in range(depth) if f"{place}.{number}.key" in tensors]
    if not layers:
        return None
    k, v = np.zeros((2, depth, *tensors[f"{place}.{layers[0]}.key"].shape), tensors[f"{place}.{layers[0]}.key"].dtype)
    mask = np.zeros(k.shape[:2], bool)
    for number in layers:
        k[number], v[number] = (tensors[f"{place}.{number}.{part}"] for part in ("key", "value"))
        mask[number] = tensors.get(f"{place}.{number}.mask", True)
    return KV(jnp.asarray(k), jnp.asarray(v), None if mask.all() else jnp.asarray(mask))
