"""What the configs share: their argument, and the options of every method."""

from typing import Any

from ml_collections import config_dict

# What a config's method=NAME stands for where the config itself says nothing else.
METHODS = {
    "prefix": {
        "length": 10,
        "reparametrisation": None,
        "init": "text",
        "text": "Describe the record in a sentence:",
        "dropout": 0.0,
        "shift": True,
    },
}

OPTIONAL = {"text": str, "clip": float}  # the types of options that may be None, other than int


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


def method(name: str, **options: dict[str, Any]) -> config_dict.ConfigDict:
    """The section `method`: what a config says of this method over what is usual; raises ValueError if unknown."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; valid: {', '.join(METHODS)}")
    return section(name=name, **METHODS[name] | options.get(name, {}))


def section(**options: Any) -> config_dict.ConfigDict:
    """A section; what is None takes a number, or a text where it is called one, when overridden."""
    config = config_dict.ConfigDict(options)
    for key, value in options.items():
        if value is None:
            config[key] = config_dict.placeholder(OPTIONAL.get(key, int))
    return config
