"""PEFT's folders in both directions: its own code reads what we write, and we read what it writes."""

import json
import shutil

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from conftest import K, L, P, V, close, random_prefix, random_reference, random_rows

import prefix_tuning
from prefix_tuning.errors import UserError
from prefix_tuning.types import Adaptation

# gpt2's heads have 5 entries; llama's 6 beside a width of 16 in 8 heads, of which 2 are stored.
BOTH = pytest.mark.parametrize("family", ["gpt2", "llama"])
SEED = 11


@pytest.fixture(scope="module")
def saved(twin, tmp_path_factory):
    """family -> (adaptation, the folder that we saved it in)."""
    made = {}

    def save(family):
        if family not in made:
            model = twin(family).model
            adaptation, folder = random_prefix(model, SEED), tmp_path_factory.mktemp(family) / "adapter"
            prefix_tuning.save_adapter(folder, adaptation, model)
            made[family] = adaptation, folder
        return made[family]

    return save


def their_logits(tuned, rows):
    """PEFT's logits [T V], a row at a time: it ignores left padding when it numbers positions."""
    with torch.no_grad():
        return [tuned(torch.tensor([row])).logits[0].numpy() for row in rows]


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# --- What we write


@BOTH
@pytest.mark.filterwarnings("error:.*(missing|unexpected|not found|unknown).*")
def test_peft_loads_what_we_save(twin, saved, tmp_path, family):
    _, _, model, frozen = twin(family)
    adaptation, folder = saved(family)
    tuned = peft.PeftModel.from_pretrained(random_reference(family), folder).eval()
    # PEFT calls its own tensor unexpected, then loads it strictly: the report is compared with that on its own file
    tuned.save_pretrained(tmp_path)
    reports = [tuned.load_adapter(path, name) for path, name in ((folder, "ours"), (tmp_path, "theirs"))]
    assert reports[0] == reports[1]
    assert reports[0].missing_keys == []
    assert reports[0].unexpected_keys == ["prompt_embeddings"]
    files = [safetensors.numpy.load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path)]
    assert files[0].keys() == files[1].keys()
    np.testing.assert_array_equal(files[0]["prompt_embeddings"], files[1]["prompt_embeddings"])
    rows = random_rows(5)
    ours = prefix_tuning.logits(model, frozen, adaptation, rows)
    close(ours, their_logits(tuned, rows))
    bare = prefix_tuning.logits(model, frozen, None, rows)
    assert np.abs(ours[0] - bare[0]).max() > 0.01


@BOTH
def test_greedy_text_equals_pefts(twin, saved, family):
    _, _, model, frozen = twin(family)
    adaptation, folder = saved(family)
    tuned = peft.PeftModel.from_pretrained(random_reference(family), folder).eval()
    rows = random_rows(6, lengths=(4, 1, 7))
    ours = prefix_tuning.generate(
        model, frozen, adaptation, rows, max_new_tokens=9, end_tokens=(V - 1,), min_new_tokens=9
    )
    theirs = []
    for row in rows:  # one at a time: no padding, no question where it goes
        tokens = torch.tensor([row])
        out = tuned.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=9,
            min_new_tokens=9,
            eos_token_id=V - 1,
            pad_token_id=0,
        )
        theirs.append(out[0, len(row) :].tolist())
    assert ours == theirs
    assert len({tuple(row) for row in ours}) > 1
    assert {len(row) for row in ours} == {9}


@BOTH
def test_config_and_layout_are_pefts(twin, saved, family):
    H = twin(family).model.sites["decoder"].kv["self"][1]
    adaptation, folder = saved(family)
    config = json.loads((folder / "adapter_config.json").read_text())
    wanted = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": P,
        "num_layers": L,
        "num_attention_heads": K,
        "token_dim": K * H,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "inference_mode": True,
    }
    assert wanted.items() <= config.items()
    known = peft.PrefixTuningConfig(task_type="CAUSAL_LM").to_dict().keys()
    assert config.keys() <= known, "PEFT drops unknown keys with a warning"
    table = safetensors.numpy.load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    assert table.shape == (P, L * 2 * K * H)
    assert table.dtype == np.float32
    kv = adaptation.decoder.kv["self"]
    slot, layer, head, entry = 3, 2, 1, 4
    for number, x in enumerate((kv.k, kv.v)):
        assert table[slot, ((2 * layer + number) * K + head) * H + entry] == x[layer, slot, head, entry]


@BOTH
def test_round_trip_is_bit_identical(twin, saved, tmp_path, family):
    _, _, model, frozen = twin(family)
    adaptation, folder = saved(family)
    loaded = prefix_tuning.load_adapter(folder, model, frozen)
    same(loaded, adaptation)
    assert loaded.shift == P
    prefix_tuning.save_adapter(tmp_path / "again", loaded, model)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


# --- What PEFT writes


@BOTH
def test_we_load_what_peft_saves(twin, tmp_path, family):
    _, _, model, frozen = twin(family)
    torch.manual_seed(3)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tuned = peft.get_peft_model(random_reference(family), config).eval()
    with torch.no_grad():
        tuned.prompt_encoder["default"].embedding.weight.normal_()
    tuned.save_pretrained(tmp_path)
    adaptation = prefix_tuning.load_adapter(tmp_path, model, frozen)
    assert adaptation.shift == 4
    assert adaptation.decoder.kv["self"].k.shape[:3] == (L, 4, K)
    rows = random_rows(5)
    close(prefix_tuning.logits(model, frozen, adaptation, rows), their_logits(tuned, rows))
    prefix_tuning.save_adapter(tmp_path / "ours", adaptation, model)
    theirs, ours = (
        safetensors.numpy.load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "ours")
    )
    assert theirs.keys() == ours.keys()
    np.testing.assert_array_equal(theirs["prompt_embeddings"], ours["prompt_embeddings"])


def test_we_load_bfloat16(twin, tmp_path):
    model = twin("llama").model
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tuned = peft.get_peft_model(random_reference("llama"), config)
    tuned.prompt_encoder.to(torch.bfloat16)
    tuned.save_pretrained(tmp_path)
    k = prefix_tuning.load_adapter(tmp_path, model, None).decoder.kv["self"].k
    weight = tuned.prompt_encoder["default"].embedding.weight.detach().float().numpy().reshape(4, L, 2, K, 6)
    assert k.dtype == np.float32
    np.testing.assert_array_equal(k, weight[:, :, 0].transpose(1, 0, 2, 3))


# --- What is refused


def damaged(folder, target, tensors=None, **entries):
    shutil.copytree(folder, target)
    config = json.loads((folder / "adapter_config.json").read_text()) | entries
    (target / "adapter_config.json").write_text(json.dumps(config))
    if tensors is not None:
        safetensors.numpy.save_file(tensors, target / "adapter_model.safetensors")
    return target


def test_another_method_is_refused(twin, saved, tmp_path):
    folder = damaged(saved("llama")[1], tmp_path / "ia3", peft_type="IA3")
    with pytest.raises(UserError, match="holds peft_type 'IA3'; expected 'PREFIX_TUNING' or 'CARTRIDGE' or"):
        prefix_tuning.load_adapter(folder, twin("llama").model, None)


@pytest.mark.parametrize(
    "tensors",
    [
        {"prompt_embeddings": np.zeros((P, 71), np.float32)},
        {"prompt_embeddings": np.zeros((0, 72), np.float32)},
        {"prompt_embeddings": np.zeros((P, 2, 36), np.float32)},
        {"prompt_embeddings": np.zeros(72, np.float32)},
        {"base_model.lora_A.weight": np.zeros((P, 72), np.float32)},
        {},
    ],
    ids=["width", "empty", "rank 3", "rank 1", "name", "nothing"],
)
def test_other_tensors_are_refused(twin, saved, tmp_path, tensors):
    folder = damaged(saved("llama")[1], tmp_path / "tensors", tensors)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors holds .*expected prompt_embeddings"):
        prefix_tuning.load_adapter(folder, twin("llama").model, None)


def test_prefix_of_another_model_is_refused(twin, saved):
    with pytest.raises(UserError, match=r"\[5, 72\]; expected prompt_embeddings \[P, 60\] for this model's 3 layers"):
        prefix_tuning.load_adapter(saved("llama")[1], twin("gpt2").model, None)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["halved", "emptied", "deleted"])
def test_damaged_files_are_refused(twin, saved, tmp_path, name, damage):
    folder = shutil.copytree(saved("llama")[1], tmp_path / "damaged")
    content = (folder / name).read_bytes()
    if damage == "deleted":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content[: len(content) // 2] if damage == "halved" else b"")
    with pytest.raises(UserError, match=name):
        prefix_tuning.load_adapter(folder, twin("llama").model, None)


@pytest.mark.parametrize("text", ["[]", "null", '"PREFIX_TUNING"'])
def test_config_that_is_no_json_object_is_refused(twin, saved, tmp_path, text):
    folder = shutil.copytree(saved("llama")[1], tmp_path / "odd")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        prefix_tuning.load_adapter(folder, twin("llama").model, None)


def test_pickled_adapter_is_refused(twin, saved, tmp_path):
    folder = shutil.copytree(saved("llama")[1], tmp_path / "pickled")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        prefix_tuning.load_adapter(folder, twin("llama").model, None)


def test_what_peft_cannot_express_is_refused(twin, tmp_path):
    model = twin("llama").model
    for adaptation, message in (
        (random_prefix(model, 0, shift=False), "one trained with shift=False would differ"),
        (random_prefix(model, 0, rows=2), "PEFT's prefix tuning holds one shared prefix"),
        (Adaptation(), "one of them and nothing else; this adaptation has none of them"),
    ):
        with pytest.raises(UserError, match=message):
            prefix_tuning.save_adapter(tmp_path / "refused", adaptation, model)
    assert not (tmp_path / "refused").exists()


def test_unwritable_folder_raises(twin, tmp_path):
    (tmp_path / "file").write_text("")
    model = twin("llama").model
    with pytest.raises(UserError, match=f"cannot write the adapter to {tmp_path}/file"):
        prefix_tuning.save_adapter(tmp_path / "file", random_prefix(model, 0), model)
