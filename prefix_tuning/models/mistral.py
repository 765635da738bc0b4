"""Mistral (Jiang et al. 2023): Llama, each token of which sees a window of the tokens before it."""

from typing import Any

from prefix_tuning.errors import UserError
from prefix_tuning.models import llama
from prefix_tuning.types import Compute, Model

IGNORED = llama.IGNORED


def build(config: dict[str, Any], compute: Compute) -> Model:
    """A `Model` from the contents of config.json; raises `UserError` for what Llama refuses, and layer types."""
    if config.get("layer_types"):
        raise UserError("mistral with layer_types is not supported; expected one sliding_window for all layers")
    window = config.get("sliding_window")
    kinds = llama.windows([llama.FULL if window is None else llama.SLIDING] * config["num_hidden_layers"], window)
    return llama.build_variant(config, llama.Variant(kinds=kinds), compute)
