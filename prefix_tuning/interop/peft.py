"""PEFT's folders in both directions: adapter_config.json and adapter_model.safetensors beside it."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from prefix_tuning import hosts
from prefix_tuning.errors import UserError, valid
from prefix_tuning.files import read_json, replace
from prefix_tuning.interop import base, lora
from prefix_tuning.models import loading
from prefix_tuning.types import KV, Adaptation, LayerHooks, Model, Params

CONFIG, WEIGHTS, CARD, KEY = "adapter_config.json", "adapter_model.safetensors", "README.md", "prompt_embeddings"
# Entries of any folder; what is not here, among those of its kind or among the neutral ones, is warned about.
COMMON = (
    "auto_mapping base_model_name_or_path inference_mode modules_to_save peft_type peft_version revision task_type"
).split()
PROMPTS = (
    "num_attention_heads num_layers num_transformer_submodules num_virtual_tokens token_dim encoder_hidden_size "
    "init_weights"
).split()


class Head(NamedTuple):
    """A task head as PEFT keeps it beside an adapter."""

    task_type: str
    module: str  # of the model's class for that task
    bias: bool = True


# (objective, family) -> the head that transformers' class computes as ours does; "*" is any other family
HEADS = {
    ("classify", "bert"): Head("SEQ_CLS", "classifier"),
    ("tag", "encoder"): Head("TOKEN_CLS", "classifier"),
    ("span", "encoder"): Head("QUESTION_ANS", "qa_outputs"),
    ("tag", "gpt2"): Head("TOKEN_CLS", "classifier"),
    ("tag", "gpt_neox"): Head("TOKEN_CLS", "classifier"),
    ("tag", "decoder"): Head("TOKEN_CLS", "score"),
    ("classify", "decoder"): Head("SEQ_CLS", "score", bias=False),
}
SAVED = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


def save_adapter(
    folder: str | Path,
    adaptation: Adaptation,
    model: Model,
    name: str = "",
    *,
    frozen: Params | None = None,
    kind: str | None = None,
    frozen_slots: int = 0,
    head: tuple[Head, Params] | None = None,
) -> None:
    """Writes an adaptation as PEFT stores it, in float32, with a model card.

    `name` is the frozen model's; with its weights the file also carries their fingerprint.  `kind` may say
    "P_TUNING" of a prompt or "CARTRIDGE" of a prefix with `frozen_slots`.  Of several hosts all must call it, and the
    first one writes.  Raises `UserError` for what PEFT cannot express, saying which format can.
    """
    folder, shape = Path(folder), adaptation_kind(adaptation)
    kind = shape if kind is None else kind
    own, tensors = WRITERS[shape](adaptation, model)
    task = task_of(model) if head is None else head[0].task_type
    if shape == "LORA" and task == "FEATURE_EXTRACTION":
        own, tensors = lora.of_the_bare_model(own, tensors)
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": name,
        "inference_mode": True,
        "modules_to_save": None if head is None else SAVED[head[0].task_type],
        "peft_type": kind,
        "revision": None,
        "task_type": task,
        **own,
        **{
            "PREFIX_TUNING": {"encoder_hidden_size": own.get("token_dim"), "prefix_projection": False},
            "CARTRIDGE": {"num_frozen_tokens": frozen_slots},
            # RANDOM, since TEXT asks for a tokenizer when it is loaded, and draws nothing then.
            "PROMPT_TUNING": {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None},
            "P_TUNING": {"encoder_hidden_size": own.get("token_dim"), "encoder_reparameterization_type": "MLP"},
            "LORA": {},
        }[valid("kind", kind, KINDS)],
    }
    if head is not None:
        first = lora.PREFIX if kind == "LORA" else "base_model."
        tensors |= {f"{first}{head[0].module}.{part}": x for part, x in head_tensors(*head).items()}
    metadata = {"format": "pt"} | ({} if frozen is None else base.identity(model, frozen))

    def write() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            contiguous = {key: np.ascontiguousarray(x, np.float32) for key, x in tensors.items()}
            loading.write(folder / WEIGHTS, contiguous, metadata)
            replace(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
            replace(folder / CARD, card(config, sum(x.size for x in contiguous.values())))
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"cannot write the adapter to {folder}: {error}") from error

    hosts.agreed(write)


def adaptation_kind(adaptation: Adaptation) -> str:
    """The kind of PEFT's that an adaptation is; raises `UserError` if it is none, or several."""
    hooks = {stack: getattr(adaptation, stack) for stack in ("decoder", "encoder")}
    parts = {
        "PREFIX_TUNING": any(own.kv for own in hooks.values()),
        "PROMPT_TUNING": adaptation.prompt is not None,
        "LORA": any(own.delta for own in hooks.values()),
    }
    found = [kind for kind, present in parts.items() if present]
    others = adaptation.rows is not None or any(
        jax.tree.leaves(own.replace(kv=None, delta=None)) for own in hooks.values()
    )
    if len(found) != 1 or others:
        raise UserError(
            "PEFT's folder holds a prefix, a prompt before the input, or low-rank changes, one of them and nothing "
            f"else; this adaptation has {', '.join(found) if found else 'none of them'}"
            f"{' and what another method trained' if others else ''}"
        )
    return found[0]


def task_of(model: Model) -> str:
    """PEFT's name for what a model without a head does."""
    if model.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if model.writes else "FEATURE_EXTRACTION"


def sizes(model: Model, slots: int, heads: int, width: int) -> dict[str, Any]:
    """What the config of a prefix or prompt says of the model."""
    return {
        "num_attention_heads": heads,
        "num_layers": model.sites[model.entry].layers,
        "num_transformer_submodules": len(model.sites),
        "num_virtual_tokens": slots,
        "token_dim": width,
    }


# --- Prefixes


def write_prefix(adaptation: Adaptation, model: Model) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """[P, L*2*K*H] with keys before values in each layer."""
    if model.is_encoder_decoder:
        return write_tied(adaptation, model)
    kv = (getattr(adaptation, model.entry).kv or {}).get("self")
    if kv is None or kv.k.ndim != 4:
        raise UserError("PEFT's prefix tuning holds one shared prefix of keys and values; this adaptation has none")
    if kv.mask is not None or kv.gate is not None:
        raise UserError(
            "PEFT's prefix tuning holds keys and values in every layer and nothing else; this adaptation also has "
            "gates, or layers without a prefix"
        )
    if adaptation.shift is None:
        raise UserError(
            "PEFT counts a prefix into the positions of real tokens; one trained with shift=False would differ"
        )
    heads, size = model.sites[model.entry].kv["self"]
    table = np.stack([np.asarray(kv.k, np.float32), np.asarray(kv.v, np.float32)], axis=1)  # [L 2 P K H]
    table = table.transpose(2, 0, 1, 3, 4).reshape(table.shape[2], -1)
    return sizes(model, len(table), heads, heads * size), {KEY: table}


def read_prefix(
    config: dict[str, Any], shapes: dict[str, list[int]], read: Callable, model: Model, where: str
) -> Adaptation:
    """The inverse of `write_prefix`."""
    if model.is_encoder_decoder:
        return read_tied(config, shapes, read, model, where)
    sites = model.sites[model.entry]
    shape = (sites.layers, 2, *sites.kv["self"])
    said = f"for this model's {shape[0]} layers of 2 x {shape[2]} heads x {shape[3]}"
    table = read_table(config, shapes, read, math.prod(shape), said, where)
    k, v = jnp.asarray(table.reshape(len(table), *shape).transpose(2, 1, 0, 3, 4))
    hooks = LayerHooks(kv={"self": KV(k, v)})
    return Adaptation(**{model.entry: hooks}, shift=jnp.int32(len(table)))


def tied(model: Model) -> list[tuple[int, int]]:
    """Which of PEFT's 2 L entries the decoder's own attention reads as keys and values of each layer.

    PEFT repeats the entries, deals them out by fours, and throws the last two of each away; L is the encoder's depth.
    """
    entries = 2 * model.sites["encoder"].layers
    return [(4 * i % entries, (4 * i + 1) % entries) for i in range(model.sites["decoder"].layers)]


def read_tied(
    config: dict[str, Any], shapes: dict[str, list[int]], read: Callable, model: Model, where: str
) -> Adaptation:
    """The prefix of an encoder-decoder as PEFT computes with it: in the decoder's own attention, layers tied."""
    entries, depth = 2 * model.sites["encoder"].layers, model.sites["decoder"].layers
    if depth > entries // 2:
        raise UserError(f"{where}: PEFT has slots for {entries // 2} layers, fewer than the decoder's {depth}")
    heads, size = model.sites["decoder"].kv["self"]
    said = f"for this model's {entries // 2} layers of 2 x {heads} heads x {size}"
    table = read_table(config, shapes, read, entries * heads * size, said, where)
    table = table.reshape(len(table), entries, heads, size).transpose(1, 0, 2, 3)
    k, v = (jnp.asarray(table[np.array(own)]) for own in zip(*tied(model), strict=True))
    return Adaptation(decoder=LayerHooks(kv={"self": KV(k, v, placed=True)}))


def write_tied(adaptation: Adaptation, model: Model) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The inverse of `read_tied`; entries that no layer reads are zeros."""
    kv = (adaptation.decoder.kv or {}).get("self")
    alone = kv and Adaptation(decoder=LayerHooks(kv={"self": KV(kv.k, kv.v, placed=True)}))
    entries, (heads, size) = 2 * model.sites["encoder"].layers, model.sites["decoder"].kv["self"]
    fits = alone and jax.tree.structure(alone) == jax.tree.structure(adaptation) and kv.k.ndim == 4
    table: dict[int, np.ndarray] = {}
    for layer, places in enumerate(tied(model) if fits else ()):
        for entry, x in zip(places, (kv.k, kv.v), strict=True):
            own = np.asarray(x[layer], np.float32)
            fits &= bool(np.array_equal(table.setdefault(entry, own), own))
    if not fits:
        raise UserError(
            "PEFT gives an encoder-decoder one prefix, in the decoder's own attention, with layers tied and positions "
            "moved, and so cannot hold this one; valid formats for it: kv"
        )
    slots = kv.k.shape[1]
    whole = np.stack([table.get(i, np.zeros((slots, heads, size), np.float32)) for i in range(entries)], axis=1)
    return sizes(model, slots, heads, heads * size), {KEY: whole.reshape(slots, -1)}


# --- Prompts


def write_prompt(adaptation: Adaptation, model: Model) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """[P, D]; for an encoder-decoder [2 P, D], of which PEFT reads the first half."""
    prompt = np.asarray(adaptation.prompt, np.float32)
    if prompt.ndim != 2:
        raise UserError("PEFT's prompt tuning holds one shared prompt; this adaptation has one a row")
    if adaptation.shift is None or adaptation.shift.ndim or int(adaptation.shift) != len(prompt):
        raise UserError("PEFT counts a prompt, and nothing else, into the positions of real tokens; this shift differs")
    table = np.concatenate([prompt, *[np.zeros_like(prompt)] * (len(model.sites) - 1)])
    return sizes(model, len(prompt), model.sites[model.entry].kv["self"][0], prompt.shape[1]), {KEY: table}


def read_prompt(
    config: dict[str, Any], shapes: dict[str, list[int]], read: Callable, model: Model, where: str
) -> Adaptation:
    """The inverse of `write_prompt`."""
    width = model.sites[model.entry].width
    table = read_table(config, shapes, read, width, f"for this model's width of {width}", where)
    halves = len(model.sites)
    if len(table) % halves:
        raise UserError(
            f"{where} holds {KEY} {list(table.shape)}; expected an even number of rows for an encoder-decoder"
        )
    prompt = table[: len(table) // halves]
    return Adaptation(prompt=jnp.asarray(prompt), shift=jnp.int32(len(prompt)))


def read_table(
    config: dict[str, Any], shapes: dict[str, list[int]], read: Callable, width: int, said: str, where: str
) -> np.ndarray:
    """The one table of a prefix or prompt, float32 [rows, width]; raises `UserError` if it is another or not alone."""
    for key, shape in shapes.items():
        if key != KEY or len(shape) != 2 or shape[1] != width or not shape[0]:
            raise UserError(f"{where} holds {key} {shape}; expected {KEY} [P, {width}] {said}")
    if not shapes:
        raise UserError(f"{where} holds no tensor; expected {KEY}")
    rows, told = shapes[KEY][0], config.get("num_virtual_tokens")
    parts = config.get("num_transformer_submodules") or 1
    if not isinstance(parts, int) or parts < 1:
        raise UserError(f"{where}: num_transformer_submodules is {parts!r}; expected a number of at least 1")
    expected = (rows,) if config["peft_type"] not in ("PROMPT_TUNING", "P_TUNING") else (rows, rows // parts)
    if told is not None and told not in expected:
        raise UserError(f"{where} holds {rows} virtual tokens, and its config says {told!r}")
    return np.asarray(read(KEY), np.float32)


# --- Task heads


def head_of(objective: dict[str, Any], model: Model) -> Head:
    """Where PEFT keeps the head of an objective's config section; raises `UserError` if transformers' class differs."""
    kind, family = objective["name"], model.config["model_type"]
    found = HEADS.get((kind, family)) or HEADS.get((kind, model.entry))
    if found is None or objective.get("pooling", "token") != "token":
        how = f"{kind!r}" + (f" with pooling {objective['pooling']!r}" if "pooling" in objective else "")
        raise UserError(
            f"transformers' {family} classes compute no head as the objective {how} does, so PEFT cannot hold it"
        )
    return found


def head_tensors(head: Head, params: Params) -> dict[str, np.ndarray]:
    """A head's weight [C, D] and bias [C] as torch keeps them; raises `UserError` for a bias without a place there."""
    kernel, bias = (np.asarray(params.get(name, 0.0), np.float32) for name in ("kernel", "bias"))
    if not head.bias:
        if bias.any():
            raise UserError("transformers' head for texts that a decoder reads has no bias; this one has been trained")
        return {"weight": kernel.T}
    return {"weight": kernel.T, "bias": bias}


def read_head(folder: str | Path, objective: dict[str, Any], model: Model) -> Params | None:
    """The head [D C] beside an adapter, None without any; raises `UserError` if it does not fit the objective."""
    head, folder = head_of(objective, model), Path(folder)
    if not any(head_key(key) for key, _ in loading.read(folder / WEIGHTS)):
        return None
    wanted = [f"{first}{head.module}." for first in (lora.PREFIX, "base_model.")]
    found = {}
    for key, tensor in loading.read(folder / WEIGHTS):
        part = next((key.removeprefix(first) for first in wanted if key.startswith(first)), None)
        if part is not None:
            found[part] = tensor
    outputs = len(objective["labels"]) if "labels" in objective else 2
    shapes = {"weight": [outputs, model.sites[model.entry].width]} | ({"bias": [outputs]} if head.bias else {})
    told = {part: tensor.get_shape() for part, tensor in found.items()}
    if told != shapes:
        raise UserError(f"{folder / WEIGHTS} holds {told} of the head {head.module}; expected {shapes}")
    read = {part: np.asarray(tensor[:], np.float32) for part, tensor in found.items()}
    return {"kernel": jnp.asarray(read["weight"].T)} | ({"bias": jnp.asarray(read["bias"])} if head.bias else {})


# --- Reading any of them

WRITERS = {"PREFIX_TUNING": write_prefix, "PROMPT_TUNING": write_prompt, "LORA": lora.encode}
READERS = {
    "PREFIX_TUNING": read_prefix,
    "CARTRIDGE": read_prefix,
    "PROMPT_TUNING": read_prompt,
    "P_TUNING": read_prompt,
    "LORA": lora.decode,
}
KINDS = tuple(READERS)
KNOWN = {
    "PREFIX_TUNING": [*PROMPTS, "prefix_projection"],
    "CARTRIDGE": [*PROMPTS, "num_frozen_tokens"],
    "PROMPT_TUNING": [
        *PROMPTS,
        *"prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs".split(),
    ],
    "P_TUNING": [*PROMPTS, *"encoder_reparameterization_type encoder_num_layers encoder_dropout".split()],
    "LORA": [*lora.NEUTRAL, *lora.OTHERS],
}


def load_adapter(folder: str | Path, model: Model, frozen: Params | None = None, *, headed: bool = False) -> Adaptation:
    """The adaptation in a PEFT folder; `headed` says that the caller also takes the task head, if there is one.

    Raises `UserError` if it is another kind's, belongs to another base or does not fit the model, naming the tensor;
    nothing is read before all shapes are known to fit.  Warns of entries of its config that nobody knows, and of a task
    head beside it, which is no part of an adaptation.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG, "a folder in PEFT's layout")
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in READERS:
        raise UserError(f"{folder / CONFIG} holds peft_type {kind!r}; expected {' or '.join(map(repr, READERS))}")
    # What an entry that came later says by being off, its absence says here.
    unknown = sorted(key for key, value in config.items() if value and key not in (*COMMON, *KNOWN[kind]))
    if unknown:
        warnings.warn(
            f"{folder / CONFIG} has entries that are not known and not used: {', '.join(unknown)}", stacklevel=2
        )
    base.check(loading.read_metadata(folder / WEIGHTS), model, frozen, str(folder))
    slices = dict(loading.read(folder / WEIGHTS))
    heads = [key for key in slices if head_key(key)]
    if heads and not headed:
        warnings.warn(
            f"{folder / WEIGHTS} also holds a task head, {', '.join(heads)}, which is left there", stacklevel=2
        )
    shapes = {key: x.get_shape() for key, x in slices.items() if key not in heads}
    return READERS[kind](
        config, shapes, lambda key: np.asarray(slices[key][:], np.float32), model, str(folder / WEIGHTS)
    )


def head_key(key: str) -> bool:
    """Whether a tensor is a task head's."""
    modules = {head.module for head in HEADS.values()}
    return any(key.startswith(f"{first}{module}.") for first in (lora.PREFIX, "base_model.") for module in modules)


def card(config: dict[str, Any], count: int) -> str:
    """The model card: what this is, of which model, and how it is loaded."""
    name, kind = config["base_model_name_or_path"], config["peft_type"].replace("_", " ").lower()
    front = ["---", *([f"base_model: {name}"] if name else []), "library_name: peft", "---"]
    slots = f", {config['num_virtual_tokens']} virtual tokens" if "num_virtual_tokens" in config else ""
    use = ["```python", "import peft, transformers", ""]
    use += [f'model = transformers.{CLASSES[config["task_type"]]}.from_pretrained("{name or "BASE"}")']
    use += ['model = peft.PeftModel.from_pretrained(model, "THIS FOLDER")', "```"]
    title = f"# {kind.capitalize()}{slots}"
    text = f"{count:,} trained parameters beside the frozen weights of {name or 'its base'}."
    return "\n".join([*front, "", title, "", text, "", *use, ""])


CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
