"""The families: `model_type` of config.json -> the module that knows it."""

from typing import Any

from prefix_tuning.errors import UserError, valid
from prefix_tuning.models import (
    bart,
    bert,
    distilbert,
    electra,
    gemma,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    phi3,
    qwen,
    roberta,
    t5,
)
from prefix_tuning.types import Compute, Model

MODELS = {
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen,
    "qwen3": qwen,
    "phi3": phi3,
    "gemma2": gemma,
    "gemma3_text": gemma,
    "bert": bert,
    "roberta": roberta,
    "distilbert": distilbert,
    "electra": electra,
    "bart": bart,
    "t5": t5,
    "mt5": t5,
}


def build(config: dict[str, Any], **options: Any) -> Model:
    """A `Model` from the contents of config.json; options are those of `Compute`.

    Raises `UserError` for an unsupported family or variant.
    """
    kind = valid("model_type", config.get("model_type"), MODELS)
    try:
        return MODELS[kind].build(config, Compute(**options))
    except KeyError as missing:
        raise UserError(f"config.json of a {kind} model lacks {missing}") from missing
