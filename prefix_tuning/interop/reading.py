"""Whatever an adaptation is kept in: PEFT's folders, plain keys and values, what authors have published."""

from pathlib import Path

from prefix_tuning.errors import UserError
from prefix_tuning.interop import kv, peft, released
from prefix_tuning.models import loading
from prefix_tuning.types import Adaptation, Model, Params

FILES = (peft.CONFIG, peft.WEIGHTS, kv.FILE, "*.npy")  # what a name on the hub is fetched for
EXPECTED = (
    f"a folder in PEFT's layout ({peft.CONFIG}), what 'export --format=kv' writes ({kv.FILE}), a state dict of Li & "
    "Liang's code as safetensors, or a prompt as .npy"
)


def find(name: str | Path) -> Path:
    """Where an adaptation is: the file or folder `name`, or the hub's snapshot of it; raises `UserError` without."""
    if Path(name).exists():
        return Path(name)
    return loading.fetch(str(name), FILES, "adapter")


def load_adapter(name: str | Path, model: Model, frozen: Params | None, *, headed: bool = False) -> Adaptation:
    """The adaptation in a file or folder, whichever kind it is; `headed` is `peft.load_adapter`'s.

    Raises `UserError` for what is none of them, is damaged, or does not fit the model.
    """
    path = find(name)
    if (path / peft.CONFIG).is_file():
        return peft.load_adapter(path, model, frozen, headed=headed)
    for reader in (kv, released):
        if reader.recognise(path):
            return reader.load(path, model, frozen)
    if (path / "adapter" / peft.CONFIG).is_file():
        raise UserError(f"{path} is a workdir; expected its {path / 'adapter'}")
    if path.is_dir():  # as PEFT names what is missing
        raise UserError(f"{path} has no {peft.CONFIG}; expected {EXPECTED}")
    raise UserError(f"{path} is not read as an adaptation; expected {EXPECTED}")


def read_head(name: str | Path, objective: dict, model: Model) -> Params | None:
    """The task head beside an adaptation, None where there is none; raises `UserError` if it does not fit."""
    path = find(name)
    return peft.read_head(path, objective, model) if (path / peft.CONFIG).is_file() else None
