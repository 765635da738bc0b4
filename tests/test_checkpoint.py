"""Checkpoints: what is restored is what was saved, bit for bit, or the one before it, or an error in one line."""

import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prefix_tuning import checkpoint
from prefix_tuning.checkpoint import Checkpoints
from prefix_tuning.errors import UserError
from prefix_tuning.optimizer import make_optimizer
from prefix_tuning.types import TrainState

TX, _ = make_optimizer(100, learning_rate=0.1, warmup_steps=3)


def make_state(step, slots=5):
    """A state with nothing round in it: weights, moments and key all drawn."""
    rng = np.random.default_rng(step)
    draw = lambda x: rng.normal(size=x.shape).astype(x.dtype) if x.dtype == np.float32 else np.full_like(x, step)  # noqa: E731
    trainable = {"k": np.zeros((3, slots, 2, 6), np.float32), "up": {"bias": np.zeros(11, np.float32)}}
    state = TrainState(jnp.int32(step), trainable, jax.device_get(TX.init(trainable)), jax.random.key(step))
    return state.replace(trainable=jax.tree.map(draw, trainable), opt_state=jax.tree.map(draw, state.opt_state))


def fresh():
    zeros = jax.tree.map(np.zeros_like, make_state(0).replace(key=None))
    return zeros.replace(key=jax.random.key(99))


def leaves(state):
    return jax.tree.leaves(state.replace(key=jax.random.key_data(state.key)))


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    pairs = list(zip(leaves(one), leaves(other), strict=True))
    assert all(np.asarray(a).dtype == np.asarray(b).dtype for a, b in pairs)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of the steps 3 and 7."""
    folder = tmp_path_factory.mktemp("checkpoints") / "made"
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 3, 7):
        checkpoints.save(make_state(step), position=step * 10, name="é")
    checkpoints.close()
    return folder


def restore(folder, like=None):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(like or fresh())
    finally:
        checkpoints.close()


def numbered(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def files_of(folder, step):
    return sorted(path for path in (folder / str(step)).rglob("*") if path.is_file())


def test_restored_is_saved_bit_for_bit(saved):
    state, notes = restore(saved)
    assert same(state, make_state(7))
    assert not same(state, make_state(3))
    assert notes["position"] == 70
    assert notes["name"] == "é"
    # the moments went back to where optax looks for them
    adam = next(part for part in state.opt_state[1] if isinstance(part, optax.ScaleByAdamState))
    assert jax.tree.structure(adam.mu) == jax.tree.structure(state.trainable)
    assert jax.random.key_data(jax.random.fold_in(state.key, 2)).tolist() == (
        jax.random.key_data(jax.random.fold_in(jax.random.key(7), 2)).tolist()
    )


def test_state_on_devices_is_saved(tmp_path):
    placed = jax.device_put(make_state(4))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(placed)
    jax.tree.map(lambda x: x.delete(), placed.trainable)  # the next step is donated it at once
    checkpoints.close()
    assert same(restore(tmp_path)[0], make_state(4))


def test_newest_few_are_kept(saved, tmp_path):
    assert numbered(saved) == [3, 7]
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in range(1, 6):
        checkpoints.save(make_state(step))
    checkpoints.close()
    assert numbered(tmp_path) == [3, 4, 5]


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert restore(tmp_path / "new") is None


def test_a_step_is_saved_once(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "again")
    checkpoints = Checkpoints(folder)
    checkpoints.save(make_state(7), position=-1)
    checkpoints.close()
    state, notes = restore(folder)
    assert same(state, make_state(7))
    assert notes["position"] == 70


# --- Damage


def flip(file):
    content = bytearray(file.read_bytes())
    for position in range(len(content) // 3, len(content), 7):
        content[position] ^= 0x55
    file.write_bytes(content)


DAMAGES = {
    "halved": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "emptied": lambda file: file.write_bytes(b""),
    "flipped": flip,
    "deleted": lambda file: file.unlink(),
}


def restore_beside_damage(folder):
    """The state, and the warnings on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state, _ = restore(folder)
    return state, [str(warning.message) for warning in caught if warning.category is UserWarning]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_leads_to_a_whole_state(saved, tmp_path, damage):
    """The newest if the damage does not matter, else the one before it and one warning: never anything else."""
    used = []
    for number, name in enumerate(file.relative_to(saved) for file in files_of(saved, 7)):
        folder = shutil.copytree(saved, tmp_path / str(number))
        DAMAGES[damage](folder / name)
        state, warned = restore_beside_damage(folder)
        used.append(int(state.step))
        assert same(state, make_state(used[-1])), name
        if used[-1] == 7:
            assert not warned, name
        else:
            assert used[-1] == 3, name
            assert len(warned) == 1, (name, warned)
            assert f"checkpoint {folder / '7'} is damaged" in warned[0]
            assert "\n" not in warned[0]
            assert numbered(folder) == [3]  # so that step 7 can be saved again
    assert 3 in used


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_replaced_by_the_one_before(saved, tmp_path, damage):
    folder = shutil.copytree(saved, tmp_path / "damaged")
    for file in files_of(folder, 7):
        if file.parent.name == "d":  # the arrays
            DAMAGES[damage](file)
    with pytest.warns(UserWarning, match="7 is damaged .*; trying the one before") as caught:
        state, notes = restore(folder)
    assert len([w for w in caught if w.category is UserWarning]) == 1
    assert same(state, make_state(3))
    assert notes["position"] == 30
    checkpoints = Checkpoints(folder)
    checkpoints.save(make_state(7), position=71)
    checkpoints.close()
    state, notes = restore(folder)
    assert same(state, make_state(7))
    assert notes["position"] == 71


def test_contents_that_differ_from_their_checksum_are_damage(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "swapped")
    (folder / "7" / "trainable").rename(folder / "spare")
    (folder / "3" / "trainable").rename(folder / "7" / "trainable")  # well-formed, but another step's
    (folder / "spare").rename(folder / "3" / "trainable")
    with (
        pytest.warns(UserWarning, match="the contents of trainable do not match their checksum"),
        pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(steps \[7, 3\]\)"),
    ):
        restore(folder)


def test_what_another_host_cannot_read_is_damaged_for_all(saved, tmp_path, monkeypatch):
    told = [[None, "it is torn"]]
    monkeypatch.setattr(checkpoint.hosts, "gather", lambda own: told.pop() if told else [own, None])
    folder = shutil.copytree(saved, tmp_path / "torn")
    with pytest.warns(UserWarning, match=r"7 is damaged \(it is torn\); trying the one before"):
        state, _ = restore(folder)
    assert same(state, make_state(3))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_a_checksum_sees_every_change(monkeypatch, dtype):
    """Of any bit and of any two words' places, on the host as in shards."""
    monkeypatch.setattr(checkpoint, "AT_ONCE", 7)
    rng = np.random.default_rng(0)
    array = np.asarray((100 * rng.normal(size=(8, 3, 5))).astype(dtype))
    where = jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data"))

    def both(changed):
        on_host, in_shards = checkpoint.checksum([changed]), checkpoint.checksum([jax.device_put(changed, where)])
        assert on_host == in_shards
        return on_host

    seen = [both(array)]
    words = array.view(f"u{array.dtype.itemsize}")
    for bit in range(8 * array.dtype.itemsize):
        changed = words.copy()
        changed.flat[rng.integers(words.size)] ^= 1 << bit
        seen.append(both(changed.view(array.dtype)))
    for start in (0, 1, 50):
        changed = words.copy()
        changed.flat[[start, start + 64]] = changed.flat[[start + 64, start]]
        seen.append(both(changed.view(array.dtype)))
    assert len(set(seen)) == len(seen)
    wide = np.array([1, 2])  # of 8 bytes, as no device has them
    changes = [(1 << bit) * np.array(which) for bit in range(63) for which in ([1, 0], [0, 1], [1, 1])]
    assert len({checkpoint.checksum([wide ^ change]) for change in changes}) == len(changes)
    assert checkpoint.checksum([array, array[0]]) != checkpoint.checksum([array[0], array])


def test_what_an_older_version_saved_is_read(saved, tmp_path):
    """It summed up otherwise, under another name."""
    folder = shutil.copytree(saved, tmp_path / "older")
    for file in folder.rglob("notes/*"):
        file.write_text(file.read_text().replace('"sums"', '"checksums"'))
    state, notes = restore(folder)
    assert same(state, make_state(7))
    assert "sums" not in notes


def test_all_damaged_raises(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "damaged")
    for step in (3, 7):
        for file in files_of(folder, step):
            DAMAGES["halved"](file)
    with (
        pytest.warns(UserWarning, match="is damaged") as caught,
        pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(steps \[7, 3\]\); use another workdir"),
    ):
        restore(folder)
    told = [str(one.message) for one in caught if "is damaged" in str(one.message)]
    assert [text.endswith("; trying the one before") for text in told] == [True, False]  # there is none before 3
    assert numbered(folder) == [3, 7]  # nothing is thrown away


def test_another_shape_is_not_restored(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "other")
    for slots in (4, 6):
        with pytest.warns(UserWarning, match="is damaged"), pytest.raises(UserError, match="use another workdir"):
            restore(folder, like=make_state(0, slots=slots))
    assert same(restore(folder)[0], make_state(7))


# --- Folders that cannot be used


def test_unwritable_folder_raises(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"cannot write checkpoints to {folder}"):
            Checkpoints(folder)


def test_folder_that_vanishes_raises(tmp_path):
    folder = tmp_path / "gone"
    checkpoints = Checkpoints(folder)
    shutil.rmtree(folder)
    folder.write_text("")
    with pytest.raises(UserError, match=f"cannot write a checkpoint to {folder}: .*") as raised:  # noqa: PT012
        checkpoints.save(make_state(1))
        checkpoints.wait()
    assert "\n" not in str(raised.value)


def test_keeping_none_raises(tmp_path):
    with pytest.raises(UserError, match=r"train\.keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)
