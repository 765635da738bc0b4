"""DistilBERT (Sanh et al. 2019): BERT without token types and pooler, under names of its own."""

from typing import Any

from prefix_tuning.models import bert
from prefix_tuning.types import Compute, Model

NAMES = bert.Names(
    embeddings="distilbert.embeddings",
    layer="distilbert.transformer.layer.{layer}",
    q="attention.q_lin",
    k="attention.k_lin",
    v="attention.v_lin",
    o="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    mlp_norm="output_layer_norm",
    types=False,
    masked=("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
)
IGNORED = (*bert.IGNORED, r"vocab_projector\.weight", r"pre_classifier\..*")
# What config.json calls BERT's sizes here.
CALLED = {
    "num_hidden_layers": "n_layers",
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_attention_heads": "n_heads",
    "hidden_act": "activation",
}


def build(config: dict[str, Any], compute: Compute) -> Model:
    """A `Model` from the contents of config.json; raises `UserError` as BERT's does."""
    sizes = {ours: config[theirs] for ours, theirs in CALLED.items()}
    return bert.build(config | sizes, compute, names=NAMES)._replace(config=config)
