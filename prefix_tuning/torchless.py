"""Libraries that import torch where it is installed, and that are used here without it."""

import contextlib
import os
import sys
from collections.abc import Iterator

WITHOUT_TORCH = "PREFIX_TUNING_WITHOUT_TORCH"  # in the environment, not empty: this process has no use for torch


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """What is imported inside takes torch for absent, if the environment says so and nothing has imported it before.

    Importing it takes longer than all else that is imported, and memory that stays taken.  Afterwards it can be.
    """
    if "torch" in sys.modules or not os.environ.get(WITHOUT_TORCH):
        yield
        return
    sys.modules["torch"] = None
    try:
        yield
    finally:
        del sys.modules["torch"]
