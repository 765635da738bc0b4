"""LoRA (Hu et al. 2021): tables 3 and 18."""

from experiments.tables import table_to_text
from experiments.tables.base import A, B, Row, Table

FILE = "configs/lora_gpt2.py"
PAPER = "LoRA"
SEEDS = (110, 111, 112)
COPIED = "Rows with a star are Li & Liang's of arXiv v1 there; ours are run with their hyperparameters and decoding."
SETTINGS = (
    "LoRA's numbers are of each run's best epoch, and end a text at two line breaks; here the last epoch is scored and "
    "GPT-2's own end token ends it.",
    "Three seeds there, of which the released code names one, 110.",
)


def own(name, label, arg, numbers, **options):
    """A row that LoRA's authors ran, with three seeds."""
    return Row(name, label, FILE, arg, published={PAPER: numbers}, seeds=SEEDS, **options)


def copied(name, label, of):
    """A row that they copied."""
    return Row(name, label, table_to_text.FILE, table_to_text.BEST[of][1], published={PAPER: table_to_text.E2E_V1[of]})


def lin(width):
    """The adapter of Lin et al. (2020), whose bottleneck follows from the number of parameters that is printed."""
    return {"method.form": "lin", "method.bottleneck": width}


lora_e2e = Table(
    "LoRA beside other methods, E2E, GPT-2 medium and large",
    "Hu et al. (2021), table 3",
    B,
    table_to_text.E2E,
    (
        copied("ft", "medium FT*, 354.92M", "ft-full"),
        copied("adapter-l-0.37m", "medium Adapter-L*, 0.37M", "adapter-0.1"),
        copied("adapter-l-11.09m", "medium Adapter-L*, 11.09M", "adapter-3"),
        own(
            "adapter-h-11.09m",
            "medium Adapter-H, 11.09M",
            "method=adapter",
            (67.3, 8.50, 46.0, 70.7, 2.44),
            overrides={"method.form": "houlsby", "method.bottleneck": 112},
            note="Adapter-H's bottleneck is not printed: 112 comes closest to its number of parameters.",
        ),
        copied("ft-top2", "medium FT-Top2*, 25.19M", "ft-top2"),
        copied("prelayer", "medium PreLayer*, 0.35M", "prefix"),
        own("lora", "medium LoRA, 0.35M", "", (70.4, 8.85, 46.8, 71.8, 2.53)),
        copied("large-ft", "large FT*, 774.03M", "large-ft-full"),
        own(
            "large-adapter-l-0.88m",
            "large Adapter-L, 0.88M",
            "model=large,method=adapter",
            (69.1, 8.68, 46.3, 71.4, 2.49),
            overrides=lin(8),
        ),
        own(
            "large-adapter-l-23m",
            "large Adapter-L, 23.00M",
            "model=large,method=adapter",
            (68.9, 8.70, 46.1, 71.3, 2.45),
            overrides=lin(248),
        ),
        copied("large-prelayer", "large PreLayer*, 0.77M", "large-prefix"),
        own("large-lora", "large LoRA, 0.77M", "model=large", (70.4, 8.89, 46.8, 72.0, 2.47)),
    ),
    pairs=42_061,
    records=630,
    notes=(COPIED, *SETTINGS, "What adapters were trained with is not listed: LoRA's own hyperparameters are taken."),
)

RANKS = {
    1: 68.72,
    2: 69.17,
    4: 70.38,
    8: 69.57,
    16: 69.61,
    32: 69.33,
    64: 69.24,
    128: 68.73,
    256: 68.92,
    512: 68.78,
    1024: 69.37,
}
lora_rank = Table(
    "LoRA's rank, E2E, GPT-2 medium, after 26,000 steps",
    "Hu et al. (2021), table 18",
    A,
    (table_to_text.E2E[0]._replace(digits=2),),
    tuple(
        Row(f"r-{rank}", f"r = {rank}", FILE, "", {"method.rank": rank}, {PAPER: (bleu,)}, series="LoRA", x=rank)
        for rank, bleu in RANKS.items()
    ),
    pairs=42_061,
    records=630,
    axis="rank",
    log=True,
    notes=(SETTINGS[0], "Seeds are not stated: one run here."),
)
