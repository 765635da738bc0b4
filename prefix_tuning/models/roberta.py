"""RoBERTa (Liu et al. 2019): BERT whose positions begin behind the padding token's id."""

from typing import Any

from prefix_tuning.models import bert
from prefix_tuning.types import Compute, Model

NAMES = bert.BERT._replace(
    embeddings="roberta.embeddings",
    layer="roberta.encoder.layer.{layer}",
    pooler="roberta.pooler.dense",
    masked=("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
)
IGNORED = (*bert.IGNORED, r"lm_head\.decoder\.(weight|bias)")


def build(config: dict[str, Any], compute: Compute) -> Model:
    """A `Model` from the contents of config.json; raises `UserError` as BERT's does."""
    return bert.build(config, compute, names=NAMES, first_position=config.get("pad_token_id", 1) + 1)
