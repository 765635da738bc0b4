"""How many parameters each method trains and stores, from shapes alone: no weight is read or allocated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from prefix_tuning import setup
from prefix_tuning.errors import UserError
from prefix_tuning.methods import METHODS
from prefix_tuning.registry import named
from prefix_tuning.types import Adaptation, Model, count, joined

LARGEST = 1 << 20  # no option of a method is searched beyond this


class Account(NamedTuple):
    """The parameters of one method at one size."""

    size: str  # the option that sets it, and its value; empty where there is none
    trained: int
    stored: int  # once trained, without the networks that made them
    total: int  # of the model while it is trained


def account(options: dict[str, Any], model: Model, tokenizer: Any, size: str | None = None) -> Account:
    """The account of a config's section `method`; `size` names the option that sets how much it trains."""
    method = named("method", METHODS, options, tokenizer)
    counts = setup.parameter_counts(method, model)
    replaces = []

    def bind(frozen: Any, trainable: Any) -> Adaptation:
        params, adaptation = method.bind(frozen, trainable)
        params = {name: joined(weights) for name, weights in params.items()}
        replaces.append(any(a is not b for a, b in zip(*map(jax.tree.leaves, (params, frozen)), strict=True)))
        return adaptation

    adaptation = jax.eval_shape(bind, setup.abstract_frozen(method, model), setup.abstract_trainable(method, model))
    added = counts["trained"]
    if replaces[0]:  # what is trained takes the place of frozen weights; a hook beside it is new
        added = count(jax.tree.leaves(adaptation.replace(shift=None)))
    shown = "" if size is None else f"{size}={options[size]}"
    return Account(shown, counts["trained"], counts["stored"], counts["frozen"] + added)


def within(budget: int, options: dict[str, Any], model: Model, tokenizer: Any, size: str) -> Account | None:
    """The account at the largest value of option `size` that stores at most `budget` parameters; None for none."""

    def fits(value: int) -> bool:
        try:
            method = named("method", METHODS, options | {size: value}, tokenizer)
            return setup.parameter_counts(method, model)["stored"] <= budget
        except UserError:
            return False  # beyond what the model has

    return account(options | {size: largest(fits)}, model, tokenizer, size) if fits(1) else None


def largest(fits: Callable[[int], bool]) -> int:
    """The largest value up to `LARGEST` that fits, given that 1 does and that none above one that does not."""
    low, high = 1, 2
    while high <= LARGEST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def read_budget(budget: str, frozen: int) -> int:
    """A number of parameters from "115200" or a share of the frozen ones, "0.1%"; raises `UserError`."""
    try:
        share = budget.endswith("%")
        value = float(budget.removesuffix("%").replace(",", "").replace("_", ""))
        if not value > 0 or value == float("inf"):
            raise ValueError(budget)
    except ValueError:
        raise UserError(
            f"--budget={budget!r} is no number of parameters; expected one such as 115200 or 0.1%"
        ) from None
    return int(value * frozen / 100) if share else int(value)


def table(
    config: dict[str, Any], sections: dict[str, dict[str, Any]], sizes: dict[str, str], budget: str | None
) -> str:
    """A Markdown table of every method in `sections`, as configured or as large as `budget` stored parameters allow.

    `sizes` names the option that sets a method's size.  Raises `UserError` for a budget that is no number.
    """
    base = setup.make_base(config)
    frozen = count(base.model.specs)
    limit = None if budget is None else read_budget(budget, frozen)
    rows = [["method", "size", "trained", "share", "stored", "share", "float32 kB", "total"]]
    for name, options in sections.items():
        size = sizes.get(name)
        if size in options and options[size] is None:
            size = None  # another option sets it, as a text sets the length
        if limit is None or size is None:
            found = account(options, base.model, base.tokenizer, size)
        else:
            found = within(limit, options, base.model, base.tokenizer, size)
        if found is None or (limit is not None and found.stored > limit):
            rows.append([name, "", *["above the budget" if i == 0 else "" for i in range(6)]])
            continue
        shares = [f"{found.trained / frozen:.4%}", f"{found.stored / frozen:.4%}"]
        cells = [f"{found.trained:,}", shares[0], f"{found.stored:,}", shares[1], f"{found.stored * 4 / 1000:,.1f}"]
        rows.append([name, found.size, *cells, f"{found.total:,}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    title = f"{frozen:,} frozen parameters" + ("" if limit is None else f", at most {limit:,} stored")
    return "\n".join([title, "", lines[0], rule, *lines[1:]])
