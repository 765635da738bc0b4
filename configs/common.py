"""What the configs share: their argument, and the options of every method."""

from collections.abc import Iterable
from typing import Any

from ml_collections import config_dict

# What a config's method=NAME stands for where the config itself says nothing else.
METHODS = {
    "prefix": {
        "length": 10,
        "reparametrisation": None,
        "init": "text",
        "text": "Describe the record in a sentence:",
        "text_file": None,
        "dropout": 0.0,
        "shift": None,
        "layers": None,
        "sites": None,
        "frozen_slots": 0,
        "gates": False,
    },
    "infix": {"length": 10, "reparametrisation": None, "scale": 0.1, "dropout": 0.0},
    "prompt": {
        "length": 20,
        "init": "vocabulary",
        "text": None,
        "labels": None,
        "scale": None,
        "population": None,
        "reparametrisation": None,
    },
    "ptuning": {"length": 20, "network": "lstm", "hidden": None, "template": None},
    "memory": {"feature": "elu"},
    "propagation": {"length": 10, "scale": 0.02},
    "lora": {"rank": 4, "alpha": 32.0, "rslora": False, "dropout": 0.0, "target_modules": ("q", "v")},
    "adapter": {"form": "pfeiffer", "bottleneck": 8, "activation": "relu", "scale": None, "sublayer": None},
    "finetune": {"top_layers": None, "embedding": None, "biases": False},
}
# Where each method's learning rate starts on a small model; experiments/compare.py looks around them.
RATES = {
    "prefix": 5e-3,
    "infix": 5e-3,
    "prompt": 3e-2,
    "ptuning": 1e-3,
    "memory": 5e-4,
    "propagation": 1e-2,
    "lora": 1e-3,
    "adapter": 3e-3,
    "finetune": 1e-4,
    "mam": 3e-3,
    "unipelt": 3e-3,
    "bitfit": 5e-3,
    "ft_top2": 5e-4,
}
# Compositions and variants with a name in the papers: name -> (the methods in them, what differs from the above).
PRESETS = {
    "mam": (
        ("prefix", "adapter"),
        {"prefix": {"length": 30}, "adapter": {"form": "scaled_parallel", "bottleneck": 512, "scale": 4.0}},
    ),
    "unipelt": (("prefix", "lora", "adapter"), {}),
    "bitfit": (("finetune",), {"finetune": {"biases": True}}),
    "ft_top2": (("finetune",), {"finetune": {"top_layers": 2, "embedding": False}}),
}
# The option of a method that sets how many parameters it trains, for `params --budget`.
SIZES = {
    "prefix": "length",
    "infix": "length",
    "prompt": "length",
    "ptuning": "length",
    "propagation": "length",
    "lora": "rank",
    "adapter": "bottleneck",
    "ft_top2": "top_layers",
}

# The types of options that may be None, other than int.
OPTIONAL = {
    "text": str,
    "text_file": str,
    "template": str,
    "sublayer": str,
    "part": str,
    "urls": str,
    "select": str,
    "clip": float,
    "scale": float,
    "shift": bool,
    "embedding": bool,
    "layers": tuple,
    "sites": tuple,
    "labels": tuple,
}


def parse(arg: str | None, **defaults: Any) -> dict[str, Any]:
    """The settings in 'quick,method=NAME', over the defaults; a bare word is True.  Raises ValueError for others."""
    settings = {"method": "prefix", "quick": False} | defaults
    for part in filter(None, (arg or "").split(",")):
        name, _, value = part.partition("=")
        if name not in settings:
            raise ValueError(f"unknown config argument {name!r}; valid: {', '.join(settings)}")
        wanted = type(settings[name])
        try:
            settings[name] = (
                {"": True, "true": True, "false": False}[value.lower()] if wanted is bool else wanted(value)
            )
        except (KeyError, ValueError):
            raise ValueError(f"config argument {part!r} is no {wanted.__name__}") from None
    return settings


def choose(settings: dict[str, Any], name: str, valid: Iterable) -> Any:
    """The setting `name`; raises ValueError unless it is one of `valid`."""
    if settings[name] not in valid:
        raise ValueError(f"unknown {name} {settings[name]!r}; valid: {', '.join(map(str, valid))}")
    return settings[name]


def method(name: str, **options: dict[str, Any]) -> config_dict.ConfigDict:
    """The section `method`: what a config says of this method over what is usual.

    A preset's name, or several names joined by "+", stand for a composition.  Raises ValueError for an unknown name.
    """
    parts, changes = PRESETS.get(name, (tuple(name.split("+")), {}))
    for part in parts:
        if part not in METHODS:
            raise ValueError(f"unknown method {part!r}; valid: {', '.join([*METHODS, *PRESETS])}, or several with +")
    if len(set(parts)) < len(parts):
        raise ValueError(f"method {name!r} has one method twice")
    made = {part: METHODS[part] | options.get(part, {}) | changes.get(part, {}) for part in parts}
    if len(parts) == 1:
        return section(name=parts[0], **made[parts[0]])
    sections = {part: section(**own) for part, own in made.items()}
    return section(name="compose", parts=config_dict.ConfigDict(sections), gates=name == "unipelt")


def rate(name: str, rates: dict[str, float]) -> float:
    """A method's learning rate; a composition without one of its own takes the smallest of its parts'."""
    return rates[name] if name in rates else min(rates[part] for part in PRESETS.get(name, (name.split("+"),))[0])


def config(**sections: Any) -> config_dict.ConfigDict:
    """A whole config: the sections that a file writes, and where arrays lie, which a command line may change."""
    layout = {"parallel": "replicated", "mesh": section(data=None, model=None)}  # "sharded" splits the weights, too
    return section(**layout | sections)


def model(**options: Any) -> config_dict.ConfigDict:
    """The section `model`: what a config says over what is usual."""
    return section(**{"scan": True, "remat": False, "attention": "plain", "weights": "full"} | options)


def train(**options: Any) -> config_dict.ConfigDict:
    """The section `train`: what a config says over what is usual."""
    return section(**{"population": 1, "eval_every": None, "eval_epochs": None} | options)


def evaluation(**options: Any) -> config_dict.ConfigDict:
    """The section `evaluation`: what a config says over what is usual."""
    return section(**{"pairs": None, "untuned": True, "select": None, "patience": None} | options)


def section(**options: Any) -> config_dict.ConfigDict:
    """A section; what is None takes a number, or a text where it is called one, when overridden."""
    config = config_dict.ConfigDict(options)
    for key, value in options.items():
        if value is None:
            config[key] = config_dict.placeholder(OPTIONAL.get(key, int))
    return config
