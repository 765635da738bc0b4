"""Parameter counts: the papers' figures, from shapes alone, and what the command `params` makes of them."""

import pytest

import run
from configs import common
from prefix_tuning import accounting, models, setup
from prefix_tuning.errors import UserError
from prefix_tuning.methods import METHODS
from prefix_tuning.registry import named
from prefix_tuning.types import count

GPT2 = {"medium": (24, 1024, 16), "large": (36, 1280, 20)}
BART = {"layers": 12, "attention_heads": 16, "ffn_dim": 4096}  # in each stack
BART_LARGE = 406_291_456  # parameters


def gpt2(size):
    layers, width, heads = GPT2[size]
    config = {"model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": heads}
    return models.build(config | {"vocab_size": 50257, "n_positions": 1024})


def bart_large():
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in BART.items()}
    return models.build(
        {
            "model_type": "bart",
            "d_model": 1024,
            "vocab_size": 50265,
            "max_position_embeddings": 1024,
            "decoder_start_token_id": 2,
        }
        | sizes
    )


def counts(model, name, **options):
    made = setup.parameter_counts(named("method", METHODS, {"name": name} | options, None), model)
    return made["trained"], made["stored"]


@pytest.mark.parametrize(
    ("size", "name", "options", "trained"),
    [
        # Hu et al., table 3, and what Li & Liang's adapters and FT-TOP2 must have been to agree with it
        ("medium", "finetune", {}, 354_823_168),
        ("large", "finetune", {}, 774_030_080),
        ("medium", "finetune", {"top_layers": 2, "embedding": False}, 25_192_448),
        ("medium", "adapter", {"form": "lin", "bottleneck": 6}, 368_784),
        ("medium", "adapter", {"form": "lin", "bottleneck": 224}, 11_089_152),
        ("large", "adapter", {"form": "lin", "bottleneck": 8}, 880_000),
        ("large", "adapter", {"form": "lin", "bottleneck": 248}, 23_000_000),
        ("medium", "lora", {"rank": 4}, 393_216),
        ("large", "lora", {"rank": 4}, 737_280),
        ("medium", "prefix", {"length": 5}, 245_760),
        ("medium", "prefix", {"length": 10}, 491_520),
        ("large", "prefix", {"length": 10}, 921_600),
    ],
)
def test_counts_of_gpt2(size, name, options, trained):
    found, stored = counts(gpt2(size), name, **options)
    assert found == stored
    tolerance = 5000 if trained in (880_000, 23_000_000) else 0  # printed with two decimals of a million
    assert abs(found - trained) <= tolerance


@pytest.mark.parametrize(
    ("length", "stored", "trained"),
    [(1, 73_728, 61_519_000), (100, 7_372_800, 61_823_328), (200, 14_745_600, 62_130_528)],
)
def test_three_prefixes_of_bart(length, stored, trained):
    """Encoder, decoder and cross attention, each with an MLP of width 800: Li & Liang's counts for BART-large."""
    model = bart_large()
    assert counts(model, "prefix", length=length) == (stored, stored)
    found = counts(model, "prefix", length=length, reparametrisation=800)
    assert found[1] == stored
    assert abs(found[0] - trained) <= (1000 if length == 1 else 0)


@pytest.mark.parametrize(
    ("printed", "name", "options"),
    [
        (3.6, "prefix", {"length": 200}),
        (0.08, "finetune", {"biases": True}),
        (12.3, "adapter", {"form": "parallel", "bottleneck": 1024}),
        (14.4, "lora", {"rank": 400, "target_modules": ("q", "v", "cross_q", "cross_v")}),
        (
            6.7,
            "compose",
            {"parts": {"prefix": {"length": 30}, "adapter": {"form": "scaled_parallel", "bottleneck": 512}}},
        ),
    ],
)
def test_shares_of_bart(printed, name, options):
    """He et al.'s: prefix, BitFit, an adapter beside the MLP, LoRA on queries and values, MAM.

    What they divide by is not said, and is a little more than BART-large has here: a relative 1.5 % is left to it.
    """
    share = 100 * counts(bart_large(), name, **options)[1] / BART_LARGE
    assert share == pytest.approx(printed, rel=0.015 if printed > 1 else 0.05)


def test_share_of_li_and_liang():
    assert round(100 * counts(bart_large(), "prefix", length=100)[1] / BART_LARGE, 1) == 1.8  # which they call 2 %


@pytest.fixture(scope="module")
def small():
    return run.load_config("configs/quickstart.py").to_dict()


def sections():
    names = [*common.METHODS, *common.PRESETS]
    return {name: run.load_config(f"configs/quickstart.py:method={name}").method.to_dict() for name in names}


def test_every_method_fits_the_budget_as_tightly_as_it_can(small):
    base = setup.make_base(small)
    made = sections()
    for name, size in common.SIZES.items():
        options = made[name]
        found = accounting.within(20_000, options, base.model, base.tokenizer, size)
        if found is None:
            assert accounting.account(options | {size: 1}, base.model, base.tokenizer).stored > 20_000
            continue
        value = int(found.size.removeprefix(f"{size}="))
        assert found.stored <= 20_000
        bigger = accounting.account(options | {size: value + 1}, base.model, base.tokenizer)
        assert bigger.stored > 20_000, name
    rank = accounting.within(10**9, made["lora"], base.model, base.tokenizer, "rank")
    assert rank.size == "rank=64"  # all that v has, not the budget


@pytest.mark.parametrize("guess", [1, 2, 99, 100, 101, 5000, 10**9])
@pytest.mark.parametrize("right", [1, 2, 100, accounting.LARGEST])
def test_the_largest_is_found_whatever_is_guessed(right, guess):
    asked = []

    def fits(value):
        asked.append(value)
        return value <= right

    assert accounting.largest(fits, guess) == right
    if guess == right:
        assert len(asked) <= 2
    assert max(asked, default=1) <= accounting.LARGEST


def test_totals_are_what_is_in_memory(small):
    base = setup.make_base(small)
    frozen = count(base.model.specs)
    made = {name: accounting.account(options, base.model, base.tokenizer) for name, options in sections().items()}
    assert made["prefix"].total == frozen + made["prefix"].trained
    assert made["ptuning"].total == frozen + made["ptuning"].trained > frozen + made["ptuning"].stored
    assert made["finetune"].total == made["ft_top2"].total == frozen
    assert made["bitfit"].total == frozen + made["bitfit"].trained  # this model has no biases: they are new


def test_table_has_a_line_for_every_method(small):
    text = accounting.table(small, sections(), common.SIZES, "0.5%")
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert set(lines) >= {*common.METHODS, *common.PRESETS}
    assert text.splitlines()[0] == "697,472 frozen parameters, at most 3,487 stored"
    assert "length=6" in lines["prefix"]
    assert "0.4404%" in lines["prefix"]
    assert "above the budget" in lines["finetune"]
    assert "100.0000%" in accounting.table(small, sections(), common.SIZES, None)


@pytest.mark.parametrize("budget", ["none", "-3", "0", "inf", "%", "nan"])
def test_budgets_that_are_no_number(budget):
    with pytest.raises(UserError, match=r"is no number of parameters; expected one such as 115200 or 0\.1%"):
        accounting.read_budget(budget, 1000)


def test_budgets():
    assert accounting.read_budget("115,200", 1000) == 115_200
    assert accounting.read_budget("0.1%", 134_515_008) == 134_515


def test_command_prints_the_table(capsys):
    arguments = ["params", "--config=configs/quickstart.py:quick,method=lora", "--config.method.rank=3"]
    assert run.main(arguments) == 0
    out = capsys.readouterr().out
    assert "rank=3" in out
    assert "length=10" in out
    assert run.main([*arguments, "--budget=lots"]) == 1
    assert "--budget='lots' is no number" in capsys.readouterr().err


def test_one_method_is_counted_on_each_model():
    """What it trains is traced once on each, and is not the last one's."""
    method = METHODS["prefix"](None, length=3)
    sizes = ((2, 8), (3, 8), (2, 4))
    shapes = {"model_type": "gpt2", "vocab_size": 11, "n_positions": 16, "n_head": 2}
    counts = [
        count(setup.abstract_trainable(method, models.build(shapes | {"n_layer": layers, "n_embd": width})))
        for layers, width in sizes
    ]
    assert counts == [2 * layers * 3 * width for layers, width in sizes]
