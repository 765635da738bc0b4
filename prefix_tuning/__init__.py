"""Prefix tuning and its relatives for frozen language models, as pure functions over separate trees."""

from typing import Any

__all__ = ["combine_adapters", "generate", "load_adapter", "load_model", "logits", "save_adapter"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # Imported when first used, so that configs, metrics and --help need not wait for JAX.
    if name not in __all__:
        raise AttributeError(f"module 'prefix_tuning' has no attribute {name!r}; valid: {', '.join(__all__)}")
    from prefix_tuning import api

    return getattr(api, name)
