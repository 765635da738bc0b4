"""Imports point downwards only; the rule is a list, and the checker is tested on modules that break it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEVELS = (
    ("errors",),
    ("bootstrap", "compiled", "files", "hosts", "page", "registry", "template", "torchless"),
    ("types",),
    ("sharding", "stacks"),
    ("nn", "caching"),
    ("attention",),
    ("fit",),
    ("positions",),
    ("models", "methods", "objectives", "data", "metrics"),
    ("train_step", "parallel", "decode", "checkpoint", "record", "interop", "optimizer", "heads", "state"),
    ("setup", "stream", "progress", "launch"),
    ("population",),
    ("evaluate", "accounting", "publish"),
    ("train",),
    ("api", "compare", "sweep", "variants"),
    ("inspection", "report", "tables"),
    ("run",),
    ("experiments",),
)
HEIGHT = {name: level for level, names in enumerate(LEVELS) for name in names}
WITHOUT_JAX = ("data", "metrics")
THEIRS = ("jax", "jaxlib", "flax", "optax", "orbax")
OURS = ("types", "sharding", "stacks", "nn", "caching", "attention", "fit", "positions")  # that need them


def part(module):
    """Which name of `LEVELS` a dotted module belongs to; None for one that is not ours."""
    if module in ("experiments.table", "experiments.tables") or module.startswith("experiments.tables."):
        return "tables"  # what run.py runs, unlike other experiments, which run it
    first, *rest = module.split(".")
    if first == "prefix_tuning":
        return rest[0] if rest else "api"  # the package itself stands for its Python interface
    return first if first in ("run", "experiments", "configs") else None


def imported(source, module, is_package=False):
    """Every dotted module that a source imports, wherever in it; `from a import b` may mean a.b, so both are told."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, (alias.name,)) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, (base, f"{base}.{alias.name}")


def violations(source, module, is_package=False):
    """What a module's imports break, one line each."""
    mine, found = part(module), []
    if mine not in HEIGHT and mine != "configs":
        return [f"{module} has no level; valid: {', '.join(HEIGHT)}"]
    for line, names in imported(source, module, is_package):
        top = names[0].split(".")[0]
        where = f"{module}:{line} imports {names[-1]}"
        if names[0] == "prefix_tuning" and len(names) == 2 and part(names[1]) in HEIGHT:
            names = names[1:]  # from prefix_tuning import nn
        if names[0] == "experiments" and len(names) == 2:
            names = names[1:]
        theirs = part(names[0])
        if module.startswith("prefix_tuning") and top in ("torch", "peft"):
            found.append(f"{where}: the package needs neither torch nor peft")
        if mine in WITHOUT_JAX and (top in THEIRS or theirs in OURS):
            found.append(f"{where}: {mine} does not know JAX")
        if theirs is None or theirs == mine or (mine, theirs) == ("run", "configs"):
            continue
        if theirs == "configs" or mine == "configs":
            found.append(f"{where}: configs are data, only run.py reads them and they import nobody")
        elif theirs not in HEIGHT:
            found.append(f"{where}: it has no level")
        elif HEIGHT[theirs] >= HEIGHT[mine]:
            found.append(f"{where}: {theirs} is not below {mine}")
    return found


def modules():
    files = [*ROOT.glob("prefix_tuning/**/*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("experiments/**/*.py")]
    for file in sorted([*files, ROOT / "run.py"]):
        relative = file.relative_to(ROOT).with_suffix("")
        if relative.as_posix() != "prefix_tuning/__init__":  # which is lazy
            names = relative.parts[:-1] if relative.name == "__init__" else relative.parts
            yield pytest.param(file, ".".join(names), id=relative.as_posix())


@pytest.mark.parametrize(("file", "module"), list(modules()))
def test_imports_point_downwards(file, module):
    assert violations(file.read_text(), module, file.name == "__init__.py") == []


def test_every_level_exists():
    for name in HEIGHT:
        folder = ROOT if name in ("run", "experiments") else ROOT / "prefix_tuning"
        folder = ROOT / "experiments" if name == "tables" else folder
        assert (folder / name).is_dir() or (folder / f"{name}.py").is_file(), name


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("prefix_tuning.types", "from prefix_tuning import nn", "nn is not below types"),
        ("prefix_tuning.nn", "from prefix_tuning.attention import recall", "attention is not below nn"),
        ("prefix_tuning.nn", "from prefix_tuning import caching", "caching is not below nn"),
        ("prefix_tuning.stacks", "from prefix_tuning import sharding", "sharding is not below stacks"),
        ("prefix_tuning.attention", "from prefix_tuning import fit, nn", "fit is not below attention"),
        ("prefix_tuning.errors", "import prefix_tuning.types", "types is not below errors"),
        (
            "prefix_tuning.nn",
            "def f():\n    from prefix_tuning.setup import make_run",
            ":2 imports prefix_tuning.setup",
        ),
        ("prefix_tuning.methods.prefix", "from prefix_tuning.models import gpt2", "models is not below methods"),
        ("prefix_tuning.models.gpt2", "from ..methods import prefix", "methods is not below models"),
        ("prefix_tuning.models.gpt2", "from .. import objectives", "objectives is not below models"),
        ("prefix_tuning.models.gpt2", "import prefix_tuning.data.e2e as e", "data is not below models"),
        ("prefix_tuning.decode", "import prefix_tuning.parallel", "parallel is not below decode"),
        ("prefix_tuning.optimizer", "if True:\n    from prefix_tuning import record, types", "record is not below"),
        ("prefix_tuning.evaluate", "import prefix_tuning.train", "train is not below evaluate"),
        ("prefix_tuning.train", "from prefix_tuning import load_model", "api is not below train"),
        ("prefix_tuning.api", "import run", "run is not below api"),
        ("prefix_tuning.setup", "from configs import common", "configs are data"),
        ("configs.common", "from prefix_tuning import api", "configs are data"),
        ("run", "from experiments import compare", "experiments is not below run"),
        ("experiments.table", "import run", "run is not below tables"),
        ("experiments.tables.lora", "from experiments import compare", "experiments is not below tables"),
        ("prefix_tuning.data.pipeline", "import jax.numpy as jnp", "data does not know JAX"),
        ("prefix_tuning.data.pipeline", "from prefix_tuning.types import Batch", "data does not know JAX"),
        ("prefix_tuning.metrics.e2e", "from jax import Array", "metrics does not know JAX"),
        ("prefix_tuning.metrics.e2e", "from prefix_tuning import nn", "metrics does not know JAX"),
        ("prefix_tuning.data.pipeline", "from prefix_tuning import fit", "data does not know JAX"),
        ("prefix_tuning.metrics.e2e", "import flax.struct", "metrics does not know JAX"),
        ("prefix_tuning.interop.peft", "import peft", "needs neither torch nor peft"),
        ("prefix_tuning.models.loading", "def f():\n    from torch import nn", "needs neither torch nor peft"),
        ("prefix_tuning.newcomer", "", "has no level"),
        ("prefix_tuning.train", "from prefix_tuning.newcomer import x", "it has no level"),
    ],
)
def test_planted_violation_is_found(module, source, message):
    found = violations(source, module)
    assert found
    assert message in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("prefix_tuning.models.gpt2", "from prefix_tuning.models import decoder\nfrom prefix_tuning import nn"),
        ("prefix_tuning.fit", "from prefix_tuning import nn\nfrom prefix_tuning.attention import FEATURES"),
        ("prefix_tuning.models.gpt2", "from . import decoder\nfrom .decoder import Layer\nfrom ..types import KV"),
        ("prefix_tuning.interop.peft", "from prefix_tuning.models import loading\nimport numpy"),
        ("prefix_tuning.train_step", "import jax\nfrom prefix_tuning.types import Batch"),
        ("run", "from prefix_tuning import api, train\nfrom prefix_tuning.errors import UserError"),
        ("experiments.compare", "import prefix_tuning\nimport run\nimport torch\nfrom experiments import other"),
        ("run", "def f():\n    from experiments import table"),
        ("experiments.table", "from experiments.tables import TABLES\nfrom prefix_tuning import sweep"),
        ("run", "def f():\n    from configs import common"),
        ("configs.e2e", "from configs import common"),
    ],
)
def test_permitted_import_is_permitted(module, source):
    assert violations(source, module) == []


@pytest.mark.parametrize("name", ["prefix_tuning", "prefix_tuning.metrics", "prefix_tuning.errors", "configs.common"])
def test_import_does_without_jax(name):
    code = f"import sys, {name}; print([m for m in ('jax', 'torch', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
