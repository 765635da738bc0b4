"""What takes positions of a model, and whether it has as many."""

from typing import NamedTuple

from prefix_tuning.errors import UserError
from prefix_tuning.types import Adaptation, Model


class Taken(NamedTuple):
    """How many positions an adaptation takes before the tokens."""

    read: int  # before those that are read first
    written: int = 0  # before those of an encoder-decoder's decoder


def taken(adaptation: Adaptation, model: Model) -> Taken:
    """The positions that an adaptation takes of a model; its slots stand for its shift."""
    if model.is_encoder_decoder:  # where prefixes move nothing that is read
        return Taken(prompt_rows(adaptation), placed(adaptation))
    slots = [kv.k.shape[-3] for hooks in (adaptation.decoder, adaptation.encoder) for kv in (hooks.kv or {}).values()]
    return Taken(0 if adaptation.shift is None else max(slots, default=0) + prompt_rows(adaptation))


def prompt_rows(adaptation: Adaptation) -> int:
    """How many positions a prompt takes."""
    moves = adaptation.prompt is not None and adaptation.shift is not None
    return adaptation.prompt.shape[-2] if moves else 0


def placed(adaptation: Adaptation) -> int:
    """How many positions of an encoder-decoder's decoder are slots'."""
    kv = (adaptation.decoder.kv or {}).get("self")
    return kv.k.shape[-3] if kv is not None and kv.placed else 0


def check(model: Model, before: Taken, read: dict[str, int], written: dict[str, int], remedy: str = "") -> None:
    """Raises `UserError`, with all that takes positions and perhaps a `remedy`, if it is more than the model has.

    `read` and `written` say of what how many tokens are, `before` what an adaptation takes.  An encoder-decoder has
    positions for either, other models for both together.
    """
    first, second = {"prefix or prompt": before.read} | read, {"prefix of the decoder": before.written} | written
    for parts in (first, second) if model.is_encoder_decoder else (first | second,):
        total, counted = sum(parts.values()), {name: size for name, size in parts.items() if size}
        if model.max_positions is not None and total > model.max_positions:
            told = " + ".join(f"{name} ({size})" for name, size in counted.items())
            raise UserError(
                f"{told} {f'= {total}' if len(counted) > 1 else 'are as many'} positions, but the model has "
                f"{model.max_positions}" + (f"; {remedy}" if remedy else "")
            )
