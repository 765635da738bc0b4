"""The quick start, shortened: the shipped model, two epochs, 16 records, from another folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import run

ROOT = Path(run.__file__).parent


def test_the_quick_start_tunes_the_shipped_model_from_any_folder(tmp_path):
    # One device, as on a laptop.
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    command = [sys.executable, str(ROOT / "run.py"), "train", "--config=configs/quickstart.py:quick", "--workdir=w"]
    command += ["--config.train.epochs=2", "--config.train.shapes=1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    assert summary["parameters"]["trained"] <= 0.01 * summary["parameters"]["frozen"]
    assert summary["records"] == 16
    assert summary["tuned"]["sacrebleu"] > summary["untuned"]["sacrebleu"] + 10
    assert f"{summary['tuned']['sacrebleu']:.4f}" in done.stdout
    assert "padding" in done.stderr
    assert (tmp_path / "w" / "adapter" / "adapter_model.safetensors").stat().st_size < 100_000


def test_without_arguments_it_is_the_quick_start():
    command, values, _ = run.parse(run.QUICKSTART)
    assert command is run.COMMANDS["train"]
    assert values["workdir"] == "runs/quickstart"
    assert values["config"]["model"]["name"] == "configs/quickstart_assets/model"
    assert values["config"]["train"]["examples"] is None
