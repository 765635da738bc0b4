"""XSUM of Li & Liang (2021): tables 3 and 4 of the ACL version (2 and 3 on arXiv), with the same numbers in both."""

from experiments.tables.base import B, Column, Row, Table

FILE = "configs/xsum_bart.py"
ACL, V1 = "ACL", "arXiv v1"
ROUGE = (Column("R-1", ("rouge1",)), Column("R-2", ("rouge2",)), Column("R-L", ("rougeL",)))


def both(*numbers):
    """Numbers that the two versions share."""
    return {ACL: numbers, V1: numbers}


xsum = Table(
    "XSUM, test split, BART-large",
    "Li & Liang (2021), table 3 of the ACL version, table 2 of arXiv v1",
    B,
    ROUGE,
    (
        Row("ft", "FT", published=both(45.14, 22.27, 37.25), note="FT is copied from Lewis et al. (2020) there."),
        Row("prefix-2", "PREFIX(2%)", FILE, published=both(43.80, 20.93, 36.05)),
        Row(
            "prefix-0.1",
            "PREFIX(0.1%)",
            FILE,
            overrides={"method.length": 5},
            published=both(42.92, 20.03, 35.05),
            note="The length of PREFIX(0.1%) is not stated: 5 slots are 0.09 % of BART-large.",
        ),
    ),
    pairs=204_045,
    records=11_334,
    notes=(
        "The paper does not say how many seeds its numbers are of: one run here, with the released code's seed 101.",
        "The paper's ROUGE is a mean over batches of a bootstrap within each, ours one mean over all articles; it "
        "keeps the epoch with the best ROUGE-2 on 500 validation articles, here the last one is scored.",
        "BART's own dropout of 0.1 is on in the released code and off here.",
    ),
)
xsum_extrapolation = Table(
    "XSUM, trained on some topics and tested on others, BART-large",
    "Li & Liang (2021), table 4 of the ACL version, table 3 of arXiv v1",
    B,
    ROUGE,
    tuple(
        Row(f"{part}-{name}", f"{part} {label}", FILE, arg, published=both(*numbers))
        for part, name, label, arg, numbers in (
            ("news-to-sports", "ft", "FT", "part=news_to_sports,method=finetune", (38.15, 15.51, 30.26)),
            ("news-to-sports", "prefix", "PREFIX", "part=news_to_sports", (39.23, 16.74, 31.51)),
            ("within-news", "ft", "FT", "part=within_news,method=finetune", (39.20, 16.35, 31.15)),
            ("within-news", "prefix", "PREFIX", "part=within_news", (39.41, 16.87, 31.47)),
        )
    ),
    needs=("dataset.urls",),
    notes=(*xsum.notes, "Which articles are in these splits was never published: see prefix_tuning/data/xsum.py."),
)
lengths = tuple(
    Row(
        f"xsum-{length}",
        f"XSUM, {length}",
        FILE,
        overrides={"method.length": length},
        series="XSUM",
        x=length,
    )
    for length in (1, 10, 20, 50, 80, 100, 200, 300)
)
low_data = tuple(
    Row(
        f"xsum-{name}-{size}",
        f"{label} XSUM, {size}",
        FILE,
        f"method={method},low_data={size}",
        seeds=tuple(range(10)),
        seeds_a_subset=2,
        series=f"{label}, XSUM",
        x=size,
    )
    for name, label, method in (("prefix", "Prefix", "prefix"), ("ft", "FT", "finetune"))
    for size in (50, 100, 200, 500)
)
