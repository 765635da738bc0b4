"""Weights between Hugging Face folders and our trees of layer-stacked arrays; safetensors only, strict both ways.

A file of llama.cpp may stand where a folder does.
"""

import concurrent.futures
import functools
import json
import math
import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import transformers
from jax import Array
from jax.sharding import Sharding

from prefix_tuning import models
from prefix_tuning.errors import UserError, valid
from prefix_tuning.files import read_json
from prefix_tuning.models import gguf
from prefix_tuning.torchless import without_torch
from prefix_tuning.types import Model, Params, Quantised, Spec

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
# What safetensors calls them, and what else a file may hold.
STORED = {"F32": np.float32, "BF16": jnp.bfloat16, "F16": np.float16, "F64": np.float64, "BOOL": np.bool_}
STORED |= {
    f"{kind[0].upper()}{bits}": np.dtype(f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)
}
WEIGHTS = ("full", "int8")  # how matrices are held: in the weights' dtype, or `Quantised`
TABLES = ("embedding", "unembedding")
ROWS = 4096  # of a table that are read at once to be quantised
# That read a weight at a time, a layer each.  Of a gguf file, or for 8 bits, each holds what it reads as floats.
THREADS = min(os.cpu_count() or 1, 8)
ALIGNED = 64  # bytes: an array that begins at a multiple of them is a CPU device's own without being copied
Index = tuple[slice, ...]  # one slice per axis
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # what a folder of the hub is fetched for


def find_folder(name: str) -> Path:
    """Where a model is: the folder or gguf file `name`, or the hub's snapshot of it; raises `UserError` without any."""
    if Path(name).is_dir() or is_gguf(Path(name)):
        return Path(name)
    if name.endswith(".gguf"):
        raise UserError(f"model {name!r} is no file")
    return fetch(name, FILES, "model")


def fetch(name: str, files: Sequence[str], what: str) -> Path:
    """The hub's snapshot of these files; raises `UserError` for what is no name there, and where it cannot be got."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{what} {name!r} is no folder, and no name on the hub (OWNER/NAME) either")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the hub's client raises a dozen unrelated types
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{what} {name!r} is no folder here and could not be fetched from the hub: {reason}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of config.json; raises `UserError` if it is missing, malformed or asks for remote code."""
    if is_gguf(folder):
        return gguf.read_config(folder)
    config = read_json(folder / "config.json", "a folder in Hugging Face layout")
    if "auto_map" in config:
        supported = ", ".join(models.MODELS)
        raise UserError(
            f"{folder}/config.json asks for remote code (auto_map), which is refused; supported: {supported}"
        )
    return config


def read_model(folder: Path, **options: Any) -> Model:
    """The model that a folder holds, its `specs` without the optional weights that its files lack; reads no weight.

    Options are those of `Compute`.  Raises `UserError` as `read_config` and `models.build` do.
    """
    model = models.build(read_config(folder), **options)
    optional = {path: spec for path, spec in paths(model.specs) if spec.optional}
    if not optional:
        return model
    files = sorted(folder.glob("*.safetensors"))
    keys = {key for file in files for key, _ in read(file)}
    firsts = first_names(model)
    keys |= {f"{first}.{key}" for first in firsts for key in keys}
    lacking = {path[0] for path, spec in optional.items() if not all(name in keys for name, _ in names(spec))}
    return model._replace(specs={name: specs for name, specs in model.specs.items() if name not in lacking})


def first_names(model: Model) -> set[str]:
    """What the names of weights begin with; files saved from inside a task model lack it (gpt2's, on the hub)."""
    return {name.split(".")[0] for _, spec in paths(model.specs) for name, _ in names(spec)} - {"lm_head"}


def load_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside the weights, None if there is none; raises `UserError` if it cannot be read."""
    if is_gguf(folder):
        return load_gguf_tokenizer(folder)
    if not any(
        (folder / name).exists()
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    ):
        return None
    hide_torch()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the file's parser does
        raise UserError(f"the tokenizer in {folder} cannot be read: {str(error).strip().splitlines()[0]}") from error


def hide_torch() -> None:
    """Lets transformers take torch for absent, where `without_torch` does, for as long as this process lives.

    What is used of transformers here needs no torch, which a tokenizer's configuration would import.
    """
    available = transformers.utils.is_torch_available
    available.cache_clear()
    with without_torch():
        available()


def is_gguf(path: Path) -> bool:
    """Whether this is a file that is read as llama.cpp's."""
    return path.suffix == ".gguf" and path.is_file()


def load_gguf_tokenizer(file: Path) -> transformers.PreTrainedTokenizerBase | None:
    """The tokenizer inside a gguf file, or else the one that lies beside it; raises `UserError` if it has one that
    transformers cannot make of its metadata, and none lies beside it."""
    reason = None
    if gguf.has_tokenizer(file):
        try:
            return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except Exception as error:  # transformers raises whatever is wrong with its parts, torch being missing too
            reason = error
    beside = load_tokenizer(file.parent)
    if beside is None and reason is not None:
        said = str(reason).strip().splitlines()[0]
        raise UserError(f"the tokenizer in {file} cannot be read, and none lies beside it: {said}") from reason
    return beside


class Tensor(NamedTuple):
    """A tensor of a safetensors file that is mapped into memory; nothing is read of it but what is indexed."""

    file: mmap.mmap
    kind: str  # of its numbers, as safetensors has it
    shape: tuple[int, ...]
    start: int  # its first byte in the file

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """The kind of its numbers, such as "F32"."""
        return self.kind

    def __getitem__(self, index: Any) -> np.ndarray:
        """What an index selects, as a view of the file; what was read before leaves memory until it is read again."""
        if hasattr(mmap, "MADV_DONTNEED"):  # else pages of the file would count beside the arrays made of them
            self.file.madvise(mmap.MADV_DONTNEED)
        dtype = np.dtype(STORED[valid("type of a tensor", self.kind, STORED)])
        flat = np.frombuffer(self.file, dtype, math.prod(self.shape), self.start)
        return flat.reshape(self.shape)[index]


def load_weights(
    folder: Path,
    model: Model,
    dtype: str,
    where: Callable[[Spec], Sharding | None] | None = None,
    *,
    weights: str = "full",
) -> Params:
    """The tree of `model.specs` [L ...] from the folder's *.safetensors, cast to dtype, on the host or where `where`
    says of each weight (None: the first device), one after the other, so that no second copy of all is ever held.

    Shards are read one by one: a weight in several is never whole in one place.  With weights="int8" matrices are
    `Quantised` as they are read, a layer at a time, each whole on the host in 8 bits before its shards are placed: a
    channel's scale is over all of it.  Optional weights that the files lack are left out.  Raises `UserError` listing
    every missing, unexpected and misshapen tensor, before any is read.
    """
    numpy_dtype = np.dtype(DTYPES[valid("dtype", dtype, DTYPES)])
    found = stored(folder, model)
    tree: dict[tuple[str, ...], Any] = {}

    def put(spec: Spec, shape: tuple[int, ...], read: Callable[[Index], np.ndarray]) -> Any:
        return read((slice(None),) * len(shape)) if where is None else placed(shape, where(spec), read)

    for path, spec in paths(model.specs):
        tensors = [found[name] for name, _ in names(spec) if name in found]
        if not tensors:
            continue
        shared = contracted(path, spec) if valid("weights", weights, WEIGHTS) == "int8" else None
        if shared is None:
            tree[path] = put(spec, spec.shape, functools.partial(read_shard, spec, tensors, numpy_dtype))
        else:
            values, scale = read_quantised(spec, tensors, shared)
            small = spec._replace(axes=(None,) * scale.ndim)  # on every device
            whole = put(spec, values.shape, values.__getitem__), put(small, scale.shape, scale.__getitem__)
            tree[path] = Quantised(*whole, spec.axes, dtype)
    return unflatten(tree)


def contracted(path: tuple[str, ...], spec: Spec) -> tuple[int, ...] | None:
    """The axes of a matrix that a product sums over, which share a scale in 8 bits; None for what is not quantised."""
    if path[-1] in TABLES:
        return (1,)
    if not spec.inner:
        return None
    first = int("{layer}" in spec.source)
    return tuple(range(first, first + spec.inner))


def quantise(x: np.ndarray, shared: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """x as int8, and the float32 scales of its channels, one for all numbers along the axes `shared`."""
    scale = np.abs(x).max(shared, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1
    return np.rint(x / scale).astype(np.int8), scale.squeeze(shared)


def read_quantised(spec: Spec, tensors: Sequence[Any], shared: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """`quantise` of a weight [L ...], which is read a layer, or some rows of a table, at a time."""
    values = aligned(spec.shape, np.dtype(np.int8))
    outer = [size for axis, size in enumerate(spec.shape) if axis not in shared]
    scale = aligned(outer, np.dtype(np.float32))
    rest = (slice(None),) * (len(spec.shape) - 1)
    step = 1 if "{layer}" in spec.source else len(values) if 0 in shared else ROWS

    def fill(start: int) -> None:
        rows = slice(start, min(start + step, len(values)))
        read = read_shard(spec, tensors, np.dtype(np.float32), (rows, *rest))
        values[rows], scale[... if 0 in shared else rows] = quantise(read, shared)

    in_threads(fill, range(0, len(values), step))
    return values, scale


def stored(folder: Path, model: Model) -> dict[str, Any]:
    """The tensors of a folder, unread, by the names that `model.specs` gives them; strict, as `load_weights` says."""
    ignored = re.compile("|".join(models.MODELS[model.config["model_type"]].IGNORED))
    wanted: dict[str, list[Spec]] = {}
    for _, spec in paths(model.specs):
        for name, _ in names(spec):
            wanted.setdefault(name, []).append(spec)
    firsts = first_names(model)
    found, unexpected, misshapen = {}, [], []
    for key, tensor in gguf.read(folder) if is_gguf(folder) else read_folder(folder):
        name = next((n for n in (key, *(f"{first}.{key}" for first in firsts)) if n in wanted), None)
        if name is None:
            if not ignored.fullmatch(key):
                unexpected.append(key)
            continue
        found[name] = tensor
        expected = list(stored_shape(wanted[name][0]))
        if tensor.get_shape() != expected:
            misshapen.append(f"{key} {tensor.get_shape()} instead of {expected}")
    needed = {name for name, own in wanted.items() if not all(spec.optional for spec in own)}
    problems = (("missing", sorted(needed - found.keys())), ("unexpected", unexpected), ("misshapen", misshapen))
    if any(rows for _, rows in problems):
        listed = "; ".join(
            f"{len(rows)} {kind}: {', '.join(rows[:8])}{' ...' if len(rows) > 8 else ''}"
            for kind, rows in problems
            if rows
        )
        raise UserError(f"{folder} does not hold the weights its config.json asks for: {listed}")
    return found


def placed(shape: tuple[int, ...], sharding: Sharding | None, read: Callable[[Index], np.ndarray]) -> Array:
    """An array whose shards are read one after the other, each once, and copied to all devices that hold it.

    CPU devices hold what was read itself, all the same one, as long as nobody writes into it.
    """
    if sharding is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    holders: dict[tuple, tuple[Index, list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        key = tuple((part.start, part.stop) for part in index)
        holders.setdefault(key, (index, []))[1].append(device)
    shards = []
    for index, devices in holders.values():
        shard = read(index)
        shards += [jax.device_put(shard, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def read_shard(spec: Spec, tensors: Sequence[Any], dtype: np.dtype, index: Index) -> np.ndarray:
    """What an index into a weight [L ...] selects of it, from its tensors in the file, of which no more is read."""
    sizes = [len(range(*part.indices(size))) for part, size in zip(index, spec.shape, strict=True)]
    shard = aligned(sizes, dtype)
    if "{layer}" not in spec.source:
        shard[...] = read_part(spec, tensors[0], index).reshape(sizes)
        return shard

    def fill(row: np.ndarray, tensor: Any) -> None:
        row[...] = read_part(spec, tensor, index[1:]).reshape(sizes[1:])

    in_threads(fill, shard, tensors[index[0]])
    return shard


def in_threads(function: Callable[..., None], *arguments: Sequence[Any]) -> None:
    """Calls a function, which spends its time in NumPy's copies, with each of some arguments, several at a time."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(function, *arguments))  # raises what the function did


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that begins at a multiple of `ALIGNED` bytes."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + ALIGNED, np.uint8)
    first = -room.ctypes.data % ALIGNED
    return room[first : first + size].view(dtype).reshape(shape)


def read_part(spec: Spec, tensor: Any, index: Index) -> np.ndarray:
    """What an index (behind L) selects of a weight in one of its tensors; its axes in order, as many as are stored."""
    shape = spec.shape[-len(index) :]
    ranges = []
    for number, axes in enumerate(stored_axes(spec)):
        rows = np.arange(math.prod(shape[axis] for axis in axes))
        if number == 0:
            rows = own_rows(np.arange(stored_shape(spec)[0]), spec)
        rows = rows.reshape([shape[axis] for axis in axes])[tuple(index[axis] for axis in axes)].ravel()
        ranges.append([slice(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, breaks(rows))])
    part = slices(tensor, ranges)
    return part.T if spec.transposed else part


def breaks(rows: np.ndarray) -> np.ndarray:
    """Where a list of numbers does not count on by one."""
    return np.flatnonzero(np.diff(rows) != 1) + 1


def slices(tensor: Any, ranges: Sequence[Sequence[slice]], before: tuple[slice, ...] = ()) -> np.ndarray:
    """What several ranges of each axis select of a tensor in a file, read range by range."""
    if not ranges:
        return tensor[before]
    parts = [slices(tensor, ranges[1:], (*before, part)) for part in ranges[0]]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=len(before))


def save_pretrained(
    folder: str | Path,
    model: Model,
    params: Params,
    dtype: str = "float32",
    beside: dict[str, np.ndarray] | None = None,
) -> None:
    """Writes config.json and model.safetensors in Hugging Face layout, with further tensors `beside` the model's."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = flatten(params)
    tensors: dict[str, np.ndarray] = {}
    for path, spec in paths(model.specs):
        if path not in flat and spec.optional:
            continue
        whole = np.asarray(flat[path]).astype(DTYPES[valid("dtype", dtype, DTYPES)])
        for name, layer in names(spec):
            value = whole if layer is None else whole[layer]
            own = own_shape(spec)
            matrix = value.reshape(own[::-1] if spec.transposed else own)
            tensor = tensors.setdefault(name, np.empty(stored_shape(spec), whole.dtype))
            rows = own_rows(tensor, spec)
            rows[...] = (matrix.T if spec.transposed else matrix).reshape(rows.shape)
    for name, tensor in (beside or {}).items():
        tensors[name] = np.ascontiguousarray(tensor).astype(DTYPES[dtype])
    write(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config | {"dtype": dtype}, indent=2, sort_keys=True) + "\n")


def initialise(key: Array, model: Model, dtype: str = "float32") -> Params:
    """Fresh weights as `model.specs` describes them, normal ones with the config's initializer_range (default 0.02)."""
    scale = model.config.get("initializer_range", 0.02)
    tree = {}
    for i, (path, spec) in enumerate(paths(model.specs)):
        draw = {
            "normal": lambda key, shape: scale * jax.random.normal(key, shape),
            "zeros": lambda _, shape: jnp.zeros(shape),
            "ones": lambda _, shape: jnp.ones(shape),
        }[spec.init]
        tree[path] = draw(jax.random.fold_in(key, i), spec.shape).astype(DTYPES[valid("dtype", dtype, DTYPES)])
    return unflatten(tree)


def abstract(model: Model, dtype: str = "float32", weights: str = "full") -> Params:
    """The shapes of the weights, for planning and counting without allocating them."""
    numpy_dtype = DTYPES[valid("dtype", dtype, DTYPES)]
    tree: dict[tuple[str, ...], Any] = {}
    for path, spec in paths(model.specs):
        shared = contracted(path, spec) if weights == "int8" else None
        if shared is None:
            tree[path] = jax.ShapeDtypeStruct(spec.shape, numpy_dtype)
            continue
        outer = tuple(size for axis, size in enumerate(spec.shape) if axis not in shared)
        held = jax.ShapeDtypeStruct(spec.shape, jnp.int8), jax.ShapeDtypeStruct(outer, jnp.float32)
        tree[path] = Quantised(*held, spec.axes, dtype)
    return unflatten(tree)


def read_folder(folder: Path) -> Iterator[tuple[str, Any]]:
    """`read` of every safetensors file in a folder; raises `UserError` if there is none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = [f.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in folder.glob(pattern)]
        refused = f"; pickled weights ({', '.join(pickled)}) are refused" if pickled else ""
        raise UserError(f"{folder} has no *.safetensors{refused}")
    for file in files:
        yield from read(file)


def read(file: str | os.PathLike) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in a safetensors file; one is read only when indexed."""
    try:
        with safetensors.safe_open(file, framework="numpy"):
            pass  # it has checked that every tensor is where the header says
        with open(file, "rb") as opened:
            header, start = read_header(opened)
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file: {error}") from error
    for key, stored in header.items():
        if key != "__metadata__":
            yield key, Tensor(mapped, stored["dtype"], tuple(stored["shape"]), start + stored["data_offsets"][0])


def read_header(opened: IO[bytes]) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, which lies open at its first byte, and where the tensors begin."""
    size = int.from_bytes(opened.read(8), "little")
    return json.loads(opened.read(size)), 8 + size


def write(file: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all, for all to read that may read what this process writes."""
    scratch = file.with_name(file.name + ".tmp")
    safetensors.numpy.save_file(tensors, scratch, metadata=metadata)
    # Its metadata come in any order; sorted, the same run writes the same bytes.
    with scratch.open("r+b") as opened:
        header, start = read_header(opened)
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        opened.seek(8)
        opened.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(start - 8))
    own = os.umask(0)
    os.umask(own)
    scratch.chmod(0o666 & ~own)  # safetensors lets the owner alone read it
    scratch.replace(file)


def read_metadata(file: str | os.PathLike) -> dict[str, str]:
    """What a safetensors file says of itself; reads no tensor, and raises `UserError` as `read` does."""
    try:
        with safetensors.safe_open(file, framework="numpy") as tensors:
            return tensors.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file: {error}") from error


def names(spec: Spec) -> list[tuple[str, int | None]]:
    """(name in the file, layer) of each tensor that this weight is stored as."""
    if "{layer}" not in spec.source:
        return [(spec.source, None)]
    return [(spec.source.format(layer=i), i) for i in range(spec.shape[0])]


def stored_shape(spec: Spec) -> tuple[int, ...]:
    """The shape of one of this weight's tensors in the file."""
    own = own_shape(spec)
    return own if spec.part is None else (spec.part[1] * spec.part[2], *own[1:])


def own_rows(tensor: np.ndarray, spec: Spec) -> np.ndarray:
    """A view of the rows of a tensor in the file that are this weight's, by blocks where it is only part of them."""
    if spec.part is None:
        return tensor
    first, size, blocks = spec.part
    return tensor.reshape(blocks, size, *tensor.shape[1:])[:, first : first + own_shape(spec)[0] // blocks]


def own_shape(spec: Spec) -> tuple[int, ...]:
    """The shape of what one of this weight's tensors in the file has of it."""
    shape = spec.shape[1:] if "{layer}" in spec.source else spec.shape
    if spec.inner is None:
        return shape
    inner, outer = math.prod(shape[: spec.inner]), math.prod(shape[spec.inner :])
    matrix = (inner, outer) if spec.inner else (outer,)
    return matrix[::-1] if spec.transposed else matrix


def stored_axes(spec: Spec) -> list[tuple[int, ...]]:
    """Which axes of a weight (behind L) each axis of one of its tensors in the file is made of."""
    axes = tuple(range(len(spec.shape) - ("{layer}" in spec.source)))
    if spec.inner is None:
        return [(axis,) for axis in axes]
    both = [axes[: spec.inner], axes[spec.inner :]] if spec.inner else [axes]
    return both[::-1] if spec.transposed else both


def paths(specs: Params) -> list[tuple[tuple[str, ...], Spec]]:
    """(path, spec) of every weight."""
    return list(flatten(specs).items())


def flatten(tree: Params) -> dict[tuple[str, ...], Any]:
    """Nested dicts as one dict keyed by the path of each leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Spec | Quantised))
    return {tuple(entry.key for entry in path): leaf for path, leaf in leaves}


def unflatten(flat: dict[tuple[str, ...], Any]) -> Params:
    """The inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree
