"""Phi-3 (Abdin et al. 2024): Llama whose files fuse projections, with a window and, in some sizes, partial rotation."""

from typing import Any

from prefix_tuning.models import llama
from prefix_tuning.types import Compute, Model

IGNORED = llama.IGNORED


def build(config: dict[str, Any], compute: Compute) -> Model:
    """A `Model` from the contents of config.json; raises `UserError` for what Llama refuses, so for longrope."""
    config = {"rms_norm_eps": 1e-5} | config  # Llama's is smaller where config.json says nothing
    window = config.get("sliding_window")
    rope = config.get("rope_parameters") or {}
    variant = llama.Variant(
        fused=True,
        rotary_share=rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)),
        kinds=llama.windows([llama.FULL if window is None else llama.SLIDING] * config["num_hidden_layers"], window),
    )
    return llama.build_variant(config, variant, compute)
