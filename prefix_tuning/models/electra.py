"""ELECTRA's discriminator (Clark et al. 2020): BERT under another name and without a pooler."""

from typing import Any

from prefix_tuning.errors import UserError
from prefix_tuning.models import bert
from prefix_tuning.types import Compute, Model

NAMES = bert.BERT._replace(
    embeddings="electra.embeddings", layer="electra.encoder.layer.{layer}", pooler=None, masked=None
)
IGNORED = (*bert.IGNORED, r"discriminator_predictions\..*", r"generator_(predictions|lm_head)\..*")


def build(config: dict[str, Any], compute: Compute) -> Model:
    """A `Model` from the contents of config.json; raises `UserError` as BERT's does, and for narrower embeddings."""
    width, narrow = config["hidden_size"], config.get("embedding_size", config["hidden_size"])
    if narrow != width:
        raise UserError(f"electra with embedding_size={narrow} is not supported; expected hidden_size, {width}")
    return bert.build(config, compute, names=NAMES)
