"""What a run leaves in its workdir: config, environment, metrics, predictions, TensorBoard."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from prefix_tuning import hosts
from prefix_tuning.errors import UserError
from prefix_tuning.files import guarded, read_json, read_lines, replace, write_json
from prefix_tuning.torchless import without_torch

with without_torch():
    import tensorboardX

WORKDIR = "a workdir made by 'run.py train'"
LAYOUT = ("parallel", "mesh")
MISSING = object()
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "grain", "numpy")


class Record:
    """One workdir, opened for a run; every file is JSON that stays readable while the run goes on.

    Of several hosts the first one writes.
    """

    def __init__(self, workdir: str | os.PathLike, config: dict[str, Any]):
        """Makes the folder; raises `UserError` if it cannot be written."""
        self.workdir = Path(workdir)
        self.lines = None
        self.board = None
        if not hosts.primary():
            return
        try:
            (self.workdir / "predictions").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to workdir {self.workdir}: {error.strerror}") from error
        write_json(self.workdir / "config.json", config)
        write_json(self.workdir / "environment.json", environment())

    def start(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Opens the metrics; lines that a killed run wrote after its last checkpoint are those not to `keep`."""
        if not hosts.primary():
            return
        path = self.workdir / "metrics.jsonl"
        kept = [line for line in read_lines(path) if keep(line)] if path.exists() else []
        replace(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.lines = path.open("a")
        self.board = tensorboardX.SummaryWriter(
            str(self.workdir / "tensorboard"), purge_step=kept[-1]["step"] + 1 if kept else 0
        )

    def metrics(self, step: int, values: dict[str, float | None]) -> None:
        """Appends one line of named floats to metrics.jsonl, and to TensorBoard."""
        if self.lines is None:
            return
        line = json.dumps({"step": step, **values}) + "\n"
        guarded(self.workdir, lambda: (self.lines.write(line), self.lines.flush()))
        for name, value in values.items():
            if value is not None:
                self.board.add_scalar(name, value, step)

    def predictions(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Writes predictions/NAME.jsonl, one object a line."""
        path = self.workdir / "predictions" / f"{name}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if hosts.primary():
            guarded(self.workdir, lambda: replace(path, text))

    def close(self) -> None:
        """Flushes and closes the files."""
        if self.lines is not None:
            self.lines.close()
            self.board.close()


def check_config(workdir: str | os.PathLike, config: dict[str, Any], usual: dict[str, Any]) -> None:
    """Raises `UserError`, naming the keys that differ, if the workdir was made with another config.

    Where its arrays lie may differ: a run goes on in another layout, and older workdirs name none.  A key that only one
    of them has is the other's `usual` value: an option that came later changes nothing unless it is set.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        return
    made, own, usual = read_json(path, WORKDIR), *(json.loads(json.dumps(one)) for one in (config, usual))
    first, second = ({key: part for key, part in one.items() if key not in LAYOUT} for one in (made, own))
    differing = differences(first, second, usual)
    if differing:
        raise UserError(
            f"workdir {workdir} was made with another config: {'; '.join(differing)}; "
            "use the same config or another workdir"
        )


def environment() -> dict[str, Any]:
    """Where, when and with what this command runs."""
    here = Path(__file__).resolve().parent
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return {
        "command": sys.argv,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": [device.device_kind for device in jax.local_devices()],
        "hosts": hosts.count(),
        "commit": git.stdout.strip() or None,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def differences(old: Any, new: Any, usual: Any = None, path: str = "") -> list[str]:
    """The leaves at which two nested dicts differ, as 'a.b: old -> new'; what one lacks is as `usual`."""
    if isinstance(old, dict) and isinstance(new, dict):
        known = usual if isinstance(usual, dict) else {}
        return [
            row
            for key in sorted(old.keys() | new.keys())
            for row in differences(
                *(one.get(key, known.get(key, MISSING)) for one in (old, new, known)), f"{path}.{key}" if path else key
            )
        ]
    told = ["not there" if one is MISSING else repr(one) for one in (old, new)]
    return [] if old == new or all(one in (None, MISSING) for one in (old, new)) else [f"{path}: {' -> '.join(told)}"]
