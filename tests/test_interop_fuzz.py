"""Whatever a file holds, reading it ends in an adaptation or in one clear line, and never in a large allocation."""

import json
import resource
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_prefix
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prefix_tuning
from prefix_tuning.errors import UserError
from prefix_tuning.interop import kv
from prefix_tuning.methods import METHODS
from prefix_tuning.types import Adaptation

OFTEN = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def kept(twin, tmp_path_factory):
    """kind -> (the folder or file of an adaptation that is whole, the file in it to damage)."""
    _, _, model, frozen = twin("llama")
    root = tmp_path_factory.mktemp("whole")
    prefix = random_prefix(model, 1)
    lora = METHODS["lora"](None, rank=2)
    made = {
        "prefix": prefix,
        "prompt": Adaptation(prompt=jnp.ones((3, 16)), shift=jnp.int32(3)),
        "lora": lora.bind(frozen, lora.init(jax.random.key(0), model, frozen))[1],
    }
    for name, adaptation in made.items():
        prefix_tuning.save_adapter(root / name, adaptation, model, frozen)
    kv.save(root / "kv", prefix, model, frozen)
    (root / "npy").mkdir()
    np.save(root / "npy" / "prompt.npy", np.ones((3, 16), np.float32))
    files = dict.fromkeys(made, "adapter_model.safetensors") | {"kv": kv.FILE, "npy": "prompt.npy"}
    return {name: (root / name, file) for name, file in files.items()}


def attempt(twin, folder, file):
    """Reads it; anything but an adaptation and a `UserError` of one line fails."""
    _, _, model, frozen = twin("llama")
    said = found = None
    try:
        found = prefix_tuning.load_adapter(folder / file if file.endswith("npy") else folder, model, frozen)
    except UserError as error:
        said = str(error)
    assert isinstance(found, Adaptation) if said is None else "\n" not in said
    return found


KINDS = pytest.mark.parametrize("kind", ["prefix", "prompt", "lora", "kv", "npy"])


@KINDS
def test_whole_files_are_read(twin, kept, kind):
    assert attempt(twin, *kept[kind]) is not None


@KINDS
@pytest.mark.filterwarnings("ignore:.*not known and not used")
def test_damaged_bytes(twin, kept, tmp_path, kind):
    """Cut anywhere, and with any byte of the header changed."""
    source, file = kept[kind]
    folder = tmp_path / "damaged"
    shutil.copytree(source, folder)
    whole = (source / file).read_bytes()
    header = 128 if kind == "npy" else 8 + struct.unpack("<Q", whole[:8])[0]

    @OFTEN
    @given(st.integers(0, len(whole)), st.integers(0, header - 1), st.integers(0, 255), st.booleans())
    def damage(end, place, byte, cut):
        content = whole[:end] if cut else whole[:place] + bytes([byte]) + whole[place + 1 :]
        (folder / file).write_bytes(content)
        attempt(twin, folder, file)

    damage()


@pytest.mark.parametrize("kind", ["prefix", "prompt", "lora"])
@pytest.mark.filterwarnings("ignore:.*not known and not used")
def test_any_value_of_any_entry(twin, kept, tmp_path, kind):
    source, file = kept[kind]
    folder = tmp_path / "odd"
    shutil.copytree(source, folder)
    config = json.loads((source / "adapter_config.json").read_text())

    @OFTEN
    @given(st.sampled_from(sorted(config)) | st.text(max_size=5), JSON)
    def change(key, value):
        (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        attempt(twin, folder, file)

    change()
    (folder / "adapter_config.json").write_text("[" * 100_000)
    assert attempt(twin, folder, file) is None


@pytest.mark.parametrize("kind", ["prefix", "lora", "kv"])
def test_absurd_sizes_are_never_allocated(twin, kept, tmp_path, kind):
    """A header that claims a petabyte, in a file of some hundred bytes."""
    source, file = kept[kind]
    folder = tmp_path / "absurd"
    shutil.copytree(source, folder)
    whole = (source / file).read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for shape in ([2**40, 72], [2**20, 2**30], [1, 2**50], [2**63, 2]):
        for name in [key for key in header if key != "__metadata__"]:
            count = int(np.prod([float(n) for n in shape]))
            told = {"dtype": "F32", "shape": shape, "data_offsets": [0, min(4 * count, 2**62)]}
            text = json.dumps(header | {name: told}).encode()
            (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])
            assert attempt(twin, folder, file) is None
    for length in (2**63 - 1, 2**40, 0):
        (folder / file).write_bytes(struct.pack("<Q", length) + whole[8:])
        assert attempt(twin, folder, file) is None
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 200_000  # KiB


def test_absurd_arrays_are_never_allocated(twin, tmp_path):
    file = tmp_path / "prompt.npy"
    np.save(file, np.ones((3, 16), np.float32))
    content = file.read_bytes()
    for shape in (b"(999999999999, 16)", b"(3, 16, 99999999999)"):
        file.write_bytes(content.replace(b"(3, 16)", shape))
        assert attempt(twin, tmp_path, "prompt.npy") is None
