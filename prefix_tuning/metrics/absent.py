"""What is said of a score that this machine cannot compute: it is null, never another one under the same name."""

import warnings

_SAID: set[str] = set()


def say_once(scores: str, reason: str) -> None:
    """Warns once per process and set of scores: the metrics run after every evaluation, and the reason stays."""
    if scores not in _SAID:
        _SAID.add(scores)
        warnings.warn(f"{scores} will be null: {reason}", stacklevel=2)
