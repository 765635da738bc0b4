"""Files of llama.cpp: the same model, bit for bit, as the Hugging Face folder of their dequantised weights."""

import json

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers
from conftest import LLAMA, L, V, random_reference, random_rows

import prefix_tuning
from prefix_tuning.errors import UserError
from prefix_tuning.models import loading

D, K, G, H, F = 64, 2, 4, 12, 160  # what is contracted comes in blocks of 32
SIZES = {
    "hidden_size": D,
    "num_attention_heads": K * G,
    "num_key_value_heads": K,
    "head_dim": H,
    "intermediate_size": F,
    "rms_norm_eps": 1e-5,
}
ENTRIES = {
    "block_count": L,
    "context_length": 64,
    "embedding_length": D,
    "feed_forward_length": F,
    "attention.head_count": K * G,
    "attention.head_count_kv": K,
    "attention.key_length": H,
    "attention.value_length": H,
    "rope.dimension_count": H,
    "vocab_size": V,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
KINDS = ("F32", "Q4_1", "Q8_0")
# Where in a head of a Hugging Face folder the rows of a head in the file are: 0, 6, 1, 7, ...
ORDER = [pair + half * H // 2 for pair in range(H // 2) for half in range(2)]


def written(file, reference, entries=None, extra=None, *, architecture="llama", tokenizer=None):
    """Writes the file, matrices in all three types in turn, and returns the weights as it holds them."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in (ENTRIES | (entries or {})).items():
        if isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100.0)
    writer.add_eos_token_id(V - 2)
    if tokenizer is not None:
        tokenizer(writer)
    held, matrices = {}, 0
    for name, weight in reference.state_dict().items():
        if name == "lm_head.weight" and reference.config.tie_word_embeddings:
            continue
        weight, (stem, kind) = weight.numpy(), name.rsplit(".", 1)
        where, block = stem, ""
        if stem.startswith("model.layers."):
            number, where = stem.removeprefix("model.layers.").split(".", 1)
            block = f"blk.{number}."
        heads = {"self_attn.q_proj": K * G, "self_attn.k_proj": K}.get(where)
        rows = np.arange(len(weight))
        if heads is not None:
            rows = np.concatenate([np.add(ORDER, head * H) for head in range(heads)])
        dtype = gguf.GGMLQuantizationType[KINDS[matrices % 3] if weight.ndim == 2 else "F32"]
        matrices += weight.ndim == 2
        data = gguf.quantize(np.ascontiguousarray(weight[rows]), dtype)
        writer.add_tensor(f"{block}{NAMES[where]}.{kind}", data, raw_dtype=dtype)
        held[name] = np.empty_like(weight)
        held[name][rows] = gguf.dequantize(data, dtype)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.mark.parametrize(
    ("options", "entries"),
    [
        ({}, {}),
        ({"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, {}),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}},
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4},
        ),
    ],
    ids=["plain", "biases and tied", "linear"],
)
def test_file_equals_the_folder_of_its_dequantised_weights(tmp_path, options, entries):
    reference = random_reference("llama", **SIZES, **options)
    file, folder = tmp_path / "model.gguf", tmp_path / "folder"
    reference.save_pretrained(folder)
    held = written(file, reference, entries)
    safetensors.numpy.save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    assert any(np.abs(x - reference.state_dict()[name].numpy()).max() > 1e-3 for name, x in held.items())

    model, frozen, tokenizer = prefix_tuning.load_model(file)
    other, wanted, _ = prefix_tuning.load_model(folder)
    assert tokenizer is None
    assert model.config["eos_token_id"] == V - 2
    assert jax.tree.structure(frozen) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, frozen, wanted)
    rows = random_rows(1)
    ours, theirs = (prefix_tuning.logits(*pair, None, rows) for pair in ((model, frozen), (other, wanted)))
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.fixture(scope="module")
def reference():
    return random_reference("llama", **SIZES)


def bytes_tokenizer():
    """Tokens for letters, merges, and an end token, in both formats: (what writes it into a file, the tokenizer)."""
    tokens = [*"abcdefghij", "ab", "<end>", "abc"]
    merges = [("a", "b"), ("ab", "c")]
    plain = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)

    def write(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token == "<end>" else 1 for token in tokens])
        writer.add_token_merges([" ".join(pair) for pair in merges])

    return write, transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")


def test_tokenizer_is_the_one_in_the_file(tmp_path, reference):
    write, same = bytes_tokenizer()
    written(tmp_path / "model.gguf", reference, tokenizer=write)
    tokenizer = loading.load_tokenizer(tmp_path / "model.gguf")
    for text in ("abcab", "jihabc", "a"):
        assert tokenizer(text)["input_ids"] == same(text)["input_ids"]
    assert tokenizer.eos_token_id == V - 2


def test_tokenizer_beside_a_file_that_has_none_or_an_unknown_one(tmp_path, reference):
    def unknown(writer):
        bytes_tokenizer()[0](writer)
        writer.kv_data[0]["tokenizer.ggml.merges"].value = "nothing"

    written(tmp_path / "plain.gguf", reference)
    written(tmp_path / "unknown.gguf", reference, tokenizer=unknown)
    assert loading.load_tokenizer(tmp_path / "plain.gguf") is None
    with pytest.raises(UserError, match=r"the tokenizer in .*unknown\.gguf cannot be read, and none lies beside it"):
        loading.load_tokenizer(tmp_path / "unknown.gguf")
    bytes_tokenizer()[1].save_pretrained(tmp_path)
    for name in ("plain.gguf", "unknown.gguf"):
        assert loading.load_tokenizer(tmp_path / name)("abc")["input_ids"] == [12]


@pytest.mark.parametrize("keep", [0, 3, 20, 400, 3000, -100])
def test_truncated_file(tmp_path, reference, keep):
    file = tmp_path / "model.gguf"
    written(file, reference)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.gguf is not a readable gguf file") as raised:
        prefix_tuning.load_model(file)
    assert "\n" not in str(raised.value)


def test_what_is_no_gguf_file(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_text(json.dumps(LLAMA) * 9)
    with pytest.raises(UserError, match=r"model\.gguf is not a readable gguf file: GGUF magic invalid"):
        prefix_tuning.load_model(file)
    with pytest.raises(UserError, match=r"model '.*none\.gguf' is no file"):
        prefix_tuning.load_model(str(tmp_path / "none.gguf"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"architecture": "qwen2"}, "unknown architecture of .*'qwen2'; valid: llama"),
        ({"entries": {"expert_count": 4}}, r"unknown entry llama\.\* of .* 'expert_count'; valid: attention"),
        ({"entries": {"block_count": None, "embedding_length": None}}, "lacks llama.block_count, llama.embedding_l"),
        ({"entries": {"rope.dimension_count": 8}}, "has a rotary size that is not its key length 12"),
        ({"entries": {"rope.scaling.type": "yarn"}}, "unknown rope_type 'yarn'; valid: default, linear, llama3"),
        ({"entries": {"block_count": 4}}, r"9 missing: model\.layers\.3\.input_layernorm"),
        ({"extra": {"rope_freqs.weight": np.ones(H // 2, np.float32)}}, "scales its rotary frequencies by a tensor"),
        ({"extra": {"blk.1.attn_q_norm.weight": np.ones(H, np.float32)}}, "1 unexpected: blk.1.attn_q_norm.weight"),
    ],
)
def test_files_that_are_refused(tmp_path, reference, given, message):
    written(tmp_path / "model.gguf", reference, **given)
    with pytest.raises(UserError, match=message) as raised:
        prefix_tuning.load_model(tmp_path / "model.gguf")
    assert "\n" not in str(raised.value)


def test_what_is_wrong_with_one_layer_is_raised():
    """Also where it is read beside others, in a thread of its own."""

    def read(layer):
        if layer == 2:
            raise UserError(f"layer {layer} cannot be dequantised")

    with pytest.raises(UserError, match="layer 2 cannot be dequantised"):
        loading.in_threads(read, range(4))
