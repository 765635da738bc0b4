"""What authors have published: state dicts of Li & Liang's code (2021), arrays of prompts of Lester et al.'s (2021)."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from prefix_tuning import models
from prefix_tuning.errors import UserError
from prefix_tuning.methods import prefix
from prefix_tuning.models import loading
from prefix_tuning.types import KV, Adaptation, LayerHooks, Model, Params

PICKLED = (".bin", ".ckpt", ".pt", ".pth")
MAGIC = b"\x93NUMPY"
# In the code for BART every attention has embeddings and a network of its own, whose names end so; GPT-2 has the first.
SUFFIXES = {"decoder.self": "", "decoder.cross": "2", "encoder.self": "_enc"}
# A prefix's own tensors, behind "model." in Lightning's checkpoints.
OWN = re.compile(r"(?:model\.)?(wte(?:2|_enc)?\.weight|control_trans(?:2|_enc)?(?:\.[024]\.(?:weight|bias))?)")
KINDS = ("F64", "F32", "BF16", "F16")


def recognise(path: str | Path) -> bool:
    """Whether this looks like such a file, as far as its first bytes or its header tell; also one that is pickled."""
    file = located(path)
    if not file.is_file() or file.suffix in PICKLED or is_array(file):
        return file.is_file()
    try:
        return any(OWN.fullmatch(key) and "control_trans" in key for key, _ in loading.read(file))
    except UserError:
        return False


def load(path: str | Path, model: Model, frozen: Params | None) -> Adaptation:
    """What `load_npy_prompt` or `load_prefix_tuning` reads; raises `UserError`."""
    file = located(path)
    return (load_npy_prompt if file.is_file() and is_array(file) else load_prefix_tuning)(file, model, frozen)


def located(path: str | Path) -> Path:
    """The file, of which the folder may be named instead as transformers writes one."""
    path = Path(path)
    found = [path / name for name in ("model.safetensors", "pytorch_model.bin")] if path.is_dir() else [path]
    return next((file for file in found if file.exists()), found[0])


def is_array(file: Path) -> bool:
    """Whether a file begins as numpy's do."""
    with file.open("rb") as opened:
        return opened.read(len(MAGIC)) == MAGIC


# --- Li & Liang (2021)


def load_prefix_tuning(path: str | Path, model: Model, frozen: Params | None) -> Adaptation:
    """The prefix of a state dict of the code for GPT-2 or BART, saved as safetensors, as plain keys and values.

    What comes out of an MLP is [P, L*2*K*H], keys before values in each layer; without an MLP (`init_shallow`) it lies
    there flat, or as past keys and values [L*2 1 K P H].  An MLP that makes rows [P D] is the embedding-only ablation,
    a prompt.  Raises `UserError`, also for an infix.
    """
    del frozen  # which the file says nothing of
    file = located(path)
    if not model.writes:
        raise UserError(f"{file} is read into GPT-2, BART and their kin; a {model.config['model_type']} writes nothing")
    tensors = read_own(file, model)
    if model.is_encoder_decoder:
        hooks = {stack: {} for stack in model.sites}
        for place, suffix in SUFFIXES.items():
            stack, site = place.split(".")
            hooks[stack][site] = slots(network(file, tensors, suffix, model), model, place, file)
        found = Adaptation(**{stack: LayerHooks(kv=kv) for stack, kv in hooks.items()})  # no position moves
    else:
        flat = "control_trans" in tensors
        table = shallow(file, tensors, model) if flat else network(file, tensors, "", model)
        shift = jnp.int32(len(table))
        if not flat and table.shape[1] == model.sites["decoder"].width:
            found = Adaptation(prompt=jnp.asarray(table), shift=shift)
        else:
            found = Adaptation(LayerHooks(kv={"self": slots(table, model, "decoder.self", file)}), shift)
    if tensors:
        raise UserError(
            f"{file} also holds {', '.join(sorted(tensors))}; expected the prefix of a {model.config['model_type']} "
            "model alone, neither an infix nor another family's"
        )
    return found


def read_own(file: Path, model: Model) -> dict[str, np.ndarray]:
    """A state dict's tensors, float32, without the frozen model's around them; raises `UserError` for any other."""
    if file.suffix in PICKLED:
        raise UserError(
            f"{file} is pickled, and reading it may run any code; where you trust it, convert it by "
            "safetensors.torch.save_file({k: v.clone() for k, v in torch.load(FILE, map_location='cpu', "
            "weights_only=True).items()}, 'prefix.safetensors'), for a .ckpt with ['state_dict'] before .items()"
        )
    frozen = {name for _, spec in loading.paths(model.specs) for name, _ in loading.names(spec)}
    ignored = re.compile("|".join(models.MODELS[model.config["model_type"]].IGNORED))
    tensors = {}
    for key, tensor in loading.read(file):
        own, base, shape = OWN.fullmatch(key), key.removeprefix("seq2seq_model."), tensor.get_shape()
        if own and own[1] not in tensors and tensor.get_dtype() in KINDS and shape and min(shape):
            tensors[own[1]] = np.asarray(tensor[:], np.float32)
        elif base not in frozen and not ignored.fullmatch(base):
            raise UserError(
                f"{file} holds {key} {shape} {tensor.get_dtype()}, which is neither the frozen model's "
                f"nor a prefix's; expected wte.weight and control_trans.* of {', '.join(KINDS)}"
            )
    return tensors


def network(file: Path, tensors: dict[str, np.ndarray], suffix: str, model: Model) -> np.ndarray:
    """What one network, which it takes from the tensors, makes of its embeddings: [P, L*2*K*H].

    It is two linear maps with a tanh between them, or three with two (`deep_param`).
    """

    def take(name: str, *shape: int | str) -> np.ndarray:
        if name not in tensors:
            raise UserError(f"{file} lacks {name}")
        x, listed = tensors.pop(name), ", ".join(map(str, shape))
        if x.ndim != len(shape) or any(x.shape[i] != size for i, size in enumerate(shape) if size not in ("P", "M")):
            raise UserError(f"{file} holds {name} {list(x.shape)}; expected [{listed}]")
        return x

    x = take(f"wte{suffix}.weight", "P", model.sites["decoder"].width)
    most = model.vocabulary if model.max_positions is None else model.max_positions
    if len(x) >= most:
        raise UserError(f"{file} has {len(x)} rows in wte{suffix}.weight; expected 1 to {most - 1} slots")
    deep = f"control_trans{suffix}.4.weight" in tensors
    for number in (0, 2, 4)[: 2 + deep]:
        weight = take(f"control_trans{suffix}.{number}.weight", "M", x.shape[1])
        x = (np.tanh(x) if number else x) @ weight.T
        x = x + take(f"control_trans{suffix}.{number}.bias", len(weight))
    return x


def shallow(file: Path, tensors: dict[str, np.ndarray], model: Model) -> np.ndarray:
    """The prefix [P, L*2*K*H] that was trained without a network, and which it takes from the tensors."""
    x, own = tensors.pop("control_trans"), model.sites["decoder"]
    K, H = own.kv["self"]
    width = own.layers * 2 * K * H
    if x.ndim == 1 and x.size % width == 0:
        return x.reshape(-1, width)
    if x.ndim == 5 and (*x.shape[:3], x.shape[4]) == (own.layers * 2, 1, K, H):
        return x[:, 0].transpose(2, 0, 1, 3).reshape(-1, width)
    raise UserError(
        f"{file} holds control_trans {list(x.shape)}; expected [P*{width}] or [{own.layers * 2}, 1, {K}, P, {H}]"
    )


def slots(table: np.ndarray, model: Model, place: str, file: Path) -> KV:
    """Keys and values [L P K H] at an attention site of a table [P, L*2*K*H]."""
    stack, site = place.split(".")
    own = model.sites[stack]
    K, H = own.kv[site]
    if table.shape[1] != own.layers * 2 * K * H:
        raise UserError(
            f"{file} makes {table.shape[1]} numbers a slot for {place}; expected {own.layers * 2 * K * H}, this "
            f"model's {own.layers} layers of 2 x {K} heads x {H}"
        )
    return KV(**prefix.split(jnp.asarray(table.reshape(len(table), own.layers, 2, K, H))))


# --- Lester et al. (2021)


def load_npy_prompt(path: str | Path, model: Model, frozen: Params | None) -> Adaptation:
    """The prompt in a numpy file [P D] or [1 P D], in which bfloat16 is two bytes without a type.

    Raises `UserError`, before more than the header is read, for anything else.
    """
    del frozen  # which the file says nothing of
    width = model.sites[model.entry].width
    try:
        if not is_array(Path(path)):
            raise ValueError("it does not begin as one")
        x = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises whatever its parser of headers does
        raise UserError(f"{path} is not a readable array of numpy (pickled objects are refused): {error}") from error
    kind = jnp.dtype(jnp.bfloat16) if x.dtype == np.dtype("V2") else x.dtype
    shape = x.shape[1:] if x.ndim == 3 and len(x) == 1 else x.shape
    if len(shape) != 2 or not shape[0] or shape[1] != width or not jnp.issubdtype(kind, jnp.floating):
        raise UserError(f"{path} holds {list(x.shape)} {kind}; expected floating-point numbers [P, {width}]")
    rows = np.asarray(x).view(kind).reshape(shape).astype(np.float32)
    return Adaptation(prompt=jnp.asarray(rows), shift=jnp.int32(len(rows)))
