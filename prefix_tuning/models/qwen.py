"""Qwen2 (Yang et al. 2024) and Qwen3 (Yang et al. 2025): Llama with biases on q, k and v, or with norms of queries and
keys; windows in the layers from `max_window_layers` on, if the config uses them."""

from typing import Any

from prefix_tuning.models import llama
from prefix_tuning.types import Compute, Model

IGNORED = llama.IGNORED


def build(config: dict[str, Any], compute: Compute) -> Model:
    """A `Model` from the contents of config.json; raises `UserError` for what Llama refuses."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    types = llama.layer_types(config, lambda layer: window is not None and layer >= first)
    third = config["model_type"] == "qwen3"
    variant = llama.Variant(
        biased=llama.attention_biases(config) if third else ("q", "k", "v"),
        head_norms=third,
        kinds=llama.windows(types, window),
    )
    return llama.build_variant(config, variant, compute)
