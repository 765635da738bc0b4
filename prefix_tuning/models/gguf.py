"""llama.cpp's single-file format for the Llama family: config and weights as a Hugging Face folder would have them."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from prefix_tuning.errors import UserError, valid

# What config.json calls an entry of the metadata.  Files with others are refused: they may change the arithmetic.
ENTRIES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.value_length": "value length",
    "rope.dimension_count": "rotary size",
    "rope.freq_base": "rope_theta",
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "vocab_size": "vocab_size",
}
NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps")
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Tensor(NamedTuple):
    """A tensor whose rows are read and dequantised when it is indexed, as safetensors' slices are read."""

    stored: gguf.ReaderTensor
    heads: int | None  # of whose rows the rotary pairs lie side by side; None where nothing is turned

    def get_shape(self) -> list[int]:
        """Its shape, as Hugging Face has it."""
        return [int(n) for n in self.stored.shape[::-1]]

    def __getitem__(self, index: Any) -> np.ndarray:
        rows, *columns = index if isinstance(index, tuple) else (index,)
        if self.heads is not None:
            # llama.cpp turns neighbours, (2i, 2i + 1), where Hugging Face and we turn (i, i + H/2).
            pairs = np.arange(self.get_shape()[0]).reshape(self.heads, -1, 2)
            rows = pairs.swapaxes(1, 2).ravel()[rows]
        # Blocks of quantised numbers lie within a row; of a vector they are all that there is.
        own, behind = (self.stored.data[rows], ()) if len(self.get_shape()) > 1 else (self.stored.data, (rows,))
        try:
            read = gguf.dequantize(own, self.stored.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError as error:
            kind = self.stored.tensor_type.name
            raise UserError(f"tensor {self.stored.name} is of type {kind}, which cannot be dequantised") from error
        return read[behind or (slice(None), *columns)]


def opened(file: Path) -> gguf.GGUFReader:
    """The file's metadata and, mapped into memory, its tensors; raises `UserError` if it is no whole gguf file."""
    state = file.stat()
    return parsed(file, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # a second and a half for the tokenizer of a small model, and three ask for it
def parsed(file: Path, size: int, time: int) -> gguf.GGUFReader:
    """`opened`, once for each state of the file."""
    del size, time
    try:
        return gguf.GGUFReader(file)
    except Exception as error:  # the reader raises whatever its arithmetic on bytes does
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{file} is not a readable gguf file: {reason}") from error


def metadata(file: Path) -> dict[str, Any]:
    """The entries of a file's metadata, but for the long lists of the tokenizer; raises `UserError` as `opened`."""
    fields = opened(file).fields.items()
    return {name: field.contents() for name, field in fields if field.types[0] != gguf.GGUFValueType.ARRAY}


def has_tokenizer(file: Path) -> bool:
    """Whether the file holds the tokens of a tokenizer."""
    return "tokenizer.ggml.tokens" in opened(file).fields


def read_config(file: Path) -> dict[str, Any]:
    """The config.json that the metadata stands for; raises `UserError` for other architectures than Llama's."""
    entries = metadata(file)
    architecture = valid(f"architecture of {file}:", entries.get("general.architecture"), ("llama",))
    shapes = {tensor.name: tensor.shape for tensor in opened(file).tensors}
    given = {}
    for name, value in entries.items():
        section, _, key = name.partition(".")
        if section == architecture:
            given[ENTRIES[valid(f"entry llama.* of {file}:", key, ENTRIES)]] = value
    lacking = [f"llama.{key}" for key, name in ENTRIES.items() if name in NEEDED and name not in given]
    lacking += [name for name in ("token_embd.weight",) if name not in shapes]
    if lacking:
        raise UserError(f"{file} lacks {', '.join(lacking)}; expected a Llama model as llama.cpp converts it")
    if "rope_freqs.weight" in shapes:
        raise UserError(
            f"{file} scales its rotary frequencies by a tensor (rope_freqs.weight, of Llama 3.1 and later), which is "
            "not supported; expected a model without, or the folder in Hugging Face layout"
        )
    head_size = given.setdefault("head_dim", given["hidden_size"] // given["num_attention_heads"])
    for name in ("value length", "rotary size"):
        if given.pop(name, head_size) != head_size:
            raise UserError(f"{file} has a {name} that is not its key length {head_size}, which is not supported")
    rope = {"rope_theta": given.pop("rope_theta", 10000.0), "rope_type": given.pop("rope_type", "none")}
    rope |= {"factor": given.pop("factor")} if "factor" in given else {}
    if rope["rope_type"] == "none":
        rope["rope_type"] = "default"
    tokens = {kind: entries.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
    return given | {
        "model_type": "llama",
        "vocab_size": int(shapes["token_embd.weight"][1]),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_parameters": rope,
        **{f"{kind}_token_id": token for kind, token in tokens.items() if token is not None},
    }


def read(file: Path) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face's name, tensor) of every tensor; one that has none keeps its own."""
    config = read_config(file)
    heads = config["num_attention_heads"]
    turned = {"attn_q": heads, "attn_k": config.get("num_key_value_heads", heads)}
    for tensor in opened(file).tensors:
        stem, _, kind = tensor.name.rpartition(".")
        block, _, site = stem.rpartition(".")
        name = tensor.name
        if stem in OUTSIDE:
            name = f"{OUTSIDE[stem]}.{kind}"
        elif block.startswith("blk.") and site in INSIDE:
            name = f"model.layers.{block.removeprefix('blk.')}.{INSIDE[site]}.{kind}"
        yield name, Tensor(tensor, turned.get(site))
