"""What authors have published, against torch modules that make it as their papers' code does."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import K, L, P, V, close, random_rows

import prefix_tuning
from prefix_tuning.errors import UserError
from prefix_tuning.interop import released

D, M = 10, 7  # of the twins of GPT-2, BART and T5
EQUAL = {"decoder_layers": L, "decoder_attention_heads": K}  # the code for BART counts on equal stacks


class Network(torch.nn.Module):
    """One prefix: embeddings of P numbers, and an MLP with one hidden layer or two."""

    def __init__(self, *, deep=False, out=L * 2 * D):
        super().__init__()
        hidden = [torch.nn.Linear(M, M), torch.nn.Tanh()] if deep else []
        self.wte = torch.nn.Embedding(P, D)
        self.control_trans = torch.nn.Sequential(
            torch.nn.Linear(D, M), torch.nn.Tanh(), *hidden, torch.nn.Linear(M, out)
        )

    def forward(self):
        return self.control_trans(self.wte(torch.arange(P)))


def past(table):
    """Keys and values [1 K P H] of every layer, of a table [P, L*2*D]."""
    return table.view(1, P, 2 * L, K, D // K).permute(2, 0, 3, 1, 4).split(2)


def seeded(make, **options):
    torch.manual_seed(2)
    return make(**options).eval()


def renamed(network, suffix, before=""):
    """A network's state dict with what BART's code appends to the names of its embeddings and MLP."""
    return {
        f"{before}{first}{suffix}.{rest}": x.detach().clone()
        for first, rest, x in ((*key.split(".", 1), x) for key, x in network.state_dict().items())
    }


def saved(path, tensors):
    safetensors.torch.save_file({key: x.detach().clone().contiguous() for key, x in tensors.items()}, path)
    return path


def equal(kv, wanted):
    """Whether keys and values [L P K H] are the ones [1 K P H] that torch made for each layer."""
    assert kv.k.dtype == kv.v.dtype == np.float32
    for ours, theirs in ((kv.k, 0), (kv.v, 1)):
        layers = np.stack([pair[theirs][0].detach().numpy() for pair in wanted])
        np.testing.assert_allclose(ours, layers.transpose(0, 2, 1, 3), rtol=0, atol=1e-6)


def with_past(reference, row, made):
    """transformers' logits [T V] of a row behind past keys and values."""
    cache = transformers.DynamicCache()
    for layer, (k, v) in enumerate(made):
        cache.update(k, v, layer)
    with torch.no_grad():
        return reference(torch.tensor([row]), past_key_values=cache).logits[0].numpy()


# --- Li & Liang


@pytest.mark.parametrize("kind", ["mlp", "deep", "Lightning's", "flat", "real words"])
def test_a_prefix_of_gpt2_is_what_its_code_makes_of_it(twin, tmp_path, kind):
    reference, _, model, frozen = twin("gpt2")
    network = seeded(Network, deep=kind == "deep")
    with torch.no_grad():
        made = past(network())
    tensors = network.state_dict()
    if kind == "Lightning's":
        tensors = {f"model.{key}": x for key, x in tensors.items()}
    elif kind == "flat":
        tensors = {"control_trans": network().reshape(-1)}
    elif kind == "real words":
        words = torch.tensor([[3, 1, 4, 1, 5]])
        with torch.no_grad():
            cache = reference(words, use_cache=True).past_key_values
        made = [torch.stack([layer.keys, layer.values]) for layer in cache.layers]
        tensors = {"control_trans": torch.cat(made)}
    file = saved(tmp_path / "prefix.safetensors", tensors)
    assert released.recognise(file)
    adaptation = released.load(file, model, frozen)
    assert adaptation.shift == P
    equal(adaptation.decoder.kv["self"], made)
    rows = random_rows(5)
    ours = prefix_tuning.logits(model, frozen, adaptation, rows)
    close(ours, [with_past(reference, row, made) for row in rows])
    assert np.abs(ours[0] - prefix_tuning.logits(model, frozen, None, rows)[0]).max() > 0.01


def test_the_embedding_only_ablation_is_a_prompt(twin, tmp_path):
    reference, _, model, frozen = twin("gpt2")
    network = seeded(Network, out=D)
    adaptation = released.load(saved(tmp_path / "x.safetensors", network.state_dict()), model, frozen)
    assert adaptation.decoder.kv is None
    with torch.no_grad():
        cache = reference(inputs_embeds=network()[None], use_cache=True).past_key_values
    made, rows = [(layer.keys, layer.values) for layer in cache.layers], random_rows(5)
    close(
        prefix_tuning.logits(model, frozen, adaptation, rows),
        [with_past(reference, row, made) for row in rows],
    )


@pytest.mark.parametrize("whole", [False, True], ids=["prefix alone", "Lightning's, with the model"])
def test_three_prefixes_of_bart_lie_where_its_code_puts_them(twin, tmp_path, torch_prefixes, whole):
    reference, _, model, frozen = twin("bart", **EQUAL)
    torch.manual_seed(3)
    networks = {"decoder.self": (Network(), ""), "decoder.cross": (Network(), "2"), "encoder.self": (Network(), "_enc")}
    tensors = {k: x for network, name in networks.values() for k, x in renamed(network, name, "model." * whole).items()}
    if whole:
        tensors |= {f"seq2seq_model.{key}": x for key, x in reference.state_dict().items()}
    adaptation = released.load(saved(tmp_path / "x.safetensors", tensors), model, frozen)
    assert adaptation.shift is None
    for place, (network, _) in networks.items():
        stack, site = place.split(".")
        equal(getattr(adaptation, stack).kv[site], past(network()))
    torch_prefixes(reference, adaptation)
    source, target = [3, 4, 5, 6, 2, 7, 9], [model.start, 4, 5, 8]
    with torch.no_grad():
        theirs = reference(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target])).logits[0]
    close(prefix_tuning.logits(model, frozen, adaptation, [target], sources=[source]), [theirs.numpy()])


def test_bfloat16_is_read(twin, tmp_path):
    _, _, model, frozen = twin("gpt2")
    network = seeded(Network).to(torch.bfloat16)
    file = saved(tmp_path / "x.safetensors", network.state_dict())
    equal(released.load(file, model, frozen).decoder.kv["self"], past(network.float()()))


def changed(**tensors):
    """The state dict of a prefix with tensors added, replaced, or taken away by None; '_' stands for '.'."""
    own = renamed(seeded(Network), "")
    own |= {
        key.replace("control_trans", "control-trans").replace("_", ".").replace("-", "_"): x
        for key, x in tensors.items()
    }
    return {key: x for key, x in own.items() if x is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed(wte_weight=None), "lacks wte.weight"),
        (changed(control_trans_2_bias=None), "lacks control_trans.2.bias"),
        (changed(control_trans_0_weight=None), "lacks control_trans.0.weight"),
        (changed(wte_weight=torch.zeros(P, 9)), r"holds wte.weight \[5, 9\]; expected \[P, 10\]"),
        (changed(wte_weight=torch.zeros(0, D)), r"holds wte.weight \[0, 10\] F32, which is neither"),
        (changed(control_trans_0_bias=torch.tensor(1.0)), r"holds control_trans.0.bias \[\] F32, which is neither"),
        (changed(wte_weight=torch.zeros(32, D)), "has 32 rows in wte.weight; expected 1 to 31 slots"),
        (changed(wte_weight=torch.zeros(D)), r"holds wte.weight \[10\]; expected \[P, 10\]"),
        (changed(wte_weight=torch.zeros(P, D, dtype=torch.int32)), "holds wte.weight .* I32, which is neither"),
        (changed(control_trans_2_weight=torch.zeros(60, 8)), r"holds control_trans.2.weight \[60, 8\]; .* \[M, 7\]"),
        (changed(control_trans_2_bias=torch.zeros(59)), r"holds control_trans.2.bias \[59\]; expected \[60\]"),
        (
            changed(control_trans_2_weight=torch.zeros(40, M), control_trans_2_bias=torch.zeros(40)),
            "makes 40 numbers a slot for decoder.self; expected 60, this model's 3 layers of 2 x 2 heads x 5",
        ),
        (changed(wte2_weight=torch.zeros(P, D)), "also holds wte2.weight; .*neither an infix nor another family's"),
        (changed(control_trans2_0_weight=torch.zeros(M, D)), "also holds control_trans2.0.weight"),
        (changed(other=torch.zeros(2)), r"holds other \[2\] F32, which is neither the frozen model's nor a prefix's"),
        (changed() | {"model.wte.weight": torch.zeros(P, D)}, "which is neither"),
        ({"control_trans": torch.zeros(61)}, r"holds control_trans \[61\]; expected \[P\*60\] or \[6, 1, 2, P, 5\]"),
        ({"control_trans": torch.zeros(0)}, r"holds control_trans \[0\] F32, which is neither"),
        ({"control_trans": torch.zeros(6, 2, 2, P, 5)}, "expected"),
        ({"control_trans": torch.zeros(6, 1, 2, 5, P + 1)}, "expected"),
        ({"transformer.wpe.weight": torch.zeros(32, D)}, "lacks wte.weight"),
    ],
)
def test_what_is_no_such_state_dict_is_refused(twin, tmp_path, tensors, message):
    _, _, model, frozen = twin("gpt2")
    file = saved(tmp_path / "x.safetensors", tensors)
    with pytest.raises(UserError, match=message) as caught:
        released.load(file, model, frozen)
    assert str(file) in str(caught.value)


def test_prefixes_of_another_family_are_refused(twin, tmp_path):
    file = saved(tmp_path / "x.safetensors", renamed(seeded(Network), ""))
    _, _, bart, weights = twin("bart", **EQUAL)
    with pytest.raises(UserError, match=r"lacks wte2\.weight"):
        released.load(file, bart, weights)
    _, _, bert, weights = twin("bert")
    with pytest.raises(UserError, match="a bert writes nothing"):
        released.load(file, bert, weights)
    _, _, uneven, weights = twin("bart")
    three = {k: x for name in ("", "2", "_enc") for k, x in renamed(seeded(Network, out=40), name).items()}
    with pytest.raises(UserError, match=r"makes 40 numbers a slot for encoder\.self; expected 60"):
        released.load(saved(tmp_path / "y.safetensors", three), uneven, weights)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "checkpoint.ckpt"])
def test_pickled_files_are_refused_with_the_way_out(twin, tmp_path, name):
    _, folder, model, frozen = twin("gpt2")
    torch.save(seeded(Network).state_dict(), tmp_path / name)
    for path in (tmp_path / name, tmp_path)[: 1 + name.endswith(".bin")]:
        assert released.recognise(path)
        with pytest.raises(UserError, match=r"is pickled.* convert it by safetensors\.torch\.save_file\("):
            released.load(path, model, frozen)
    assert not released.recognise(folder)
    assert not released.recognise(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    assert not released.recognise(tmp_path / "text")


def test_the_way_out_works(twin, tmp_path):
    _, _, model, frozen = twin("gpt2")
    network, file = seeded(Network), tmp_path / "model.safetensors"
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    state = torch.load(tmp_path / "pytorch_model.bin", map_location="cpu", weights_only=True)
    safetensors.torch.save_file({k: v.clone() for k, v in state.items()}, file)
    equal(released.load(tmp_path, model, frozen).decoder.kv["self"], past(network()))


# --- Lester et al.


@pytest.mark.parametrize("family", ["t5", "gpt2"])
@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16", "a row of its own", "Fortran", "big-endian"])
def test_a_prompt_is_its_array(twin, tmp_path, family, kind):
    _, _, model, frozen = twin(family)
    rows = np.random.default_rng(1).normal(size=(P, D)).astype(np.float32)
    written = {
        "float64": lambda: rows.astype(np.float64),
        "bfloat16": lambda: rows.astype(jnp.bfloat16),
        "a row of its own": lambda: rows[None],
        "Fortran": lambda: np.asfortranarray(rows),
        "big-endian": lambda: rows.astype(">f4"),
    }.get(kind, lambda: rows)()
    with (tmp_path / "encoder.prompt.prompt.prompt").open("wb") as file:  # as the code names it: no .npy
        np.save(file, written)
    path = tmp_path / "encoder.prompt.prompt.prompt"
    assert released.recognise(path)
    adaptation = released.load(path, model, frozen)
    assert adaptation.shift == P
    assert adaptation.prompt.dtype == np.float32
    np.testing.assert_array_equal(adaptation.prompt, written.astype(np.float32).reshape(P, D))


def test_a_prompt_of_t5_stands_before_what_the_encoder_reads(twin, tmp_path):
    reference, _, model, frozen = twin("t5")
    rows = np.random.default_rng(1).normal(size=(P, D)).astype(np.float32)
    np.save(tmp_path / "prompt.npy", rows)
    adaptation = released.load(tmp_path / "prompt.npy", model, frozen)
    source, target = [3, 4, 5, 6, 2, 7, 9], [model.start, 4, 5, 8]
    with torch.no_grad():
        read = torch.cat([torch.tensor(rows), reference.get_input_embeddings()(torch.tensor(source))])
        theirs = reference(inputs_embeds=read[None], decoder_input_ids=torch.tensor([target])).logits[0]
    close(prefix_tuning.logits(model, frozen, adaptation, [target], sources=[source]), [theirs.numpy()])
    assert theirs.shape == (4, V)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((P, 9), np.float32), r"holds \[5, 9\] float32; expected floating-point numbers \[P, 10\]"),
        (np.zeros((0, D), np.float32), r"holds \[0, 10\]"),
        (np.zeros((2, P, D), np.float32), r"holds \[2, 5, 10\]"),
        (np.zeros(D, np.float32), r"holds \[10\]"),
        (np.zeros((P, D), np.int32), r"holds \[5, 10\] int32"),
        (np.array([[{}] * D], object), r"pickled objects are refused"),
    ],
)
def test_other_arrays_are_refused(twin, tmp_path, array, message):
    _, _, model, frozen = twin("t5")
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(UserError, match=message):
        released.load(tmp_path / "x.npy", model, frozen)


def test_damaged_arrays_are_refused_by_their_header(twin, tmp_path):
    _, _, model, frozen = twin("t5")
    np.save(tmp_path / "x.npy", np.zeros((P, D), np.float32))
    np.savez(tmp_path / "z.npz", np.zeros((P, D), np.float32))
    content = (tmp_path / "x.npy").read_bytes()
    absurd = content.replace(b"(5, 10), }           ", b"(99999999999999, 10),}")
    assert len(absurd) == len(content) + 1
    for given in (content[:-4], content[:40], absurd[:10] + absurd[11:], b"", (tmp_path / "z.npz").read_bytes()):
        (tmp_path / "damaged.npy").write_bytes(given)
        with pytest.raises(UserError, match="is not a readable array of numpy"):
            released.load_npy_prompt(tmp_path / "damaged.npy", model, frozen)
