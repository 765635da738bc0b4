"""BLEU, METEOR and TER of WebNLG 2017, as papers on prefix tuning report them: for seen, unseen and all categories.

They come from `run_eval_on_webnlg.sh` of github.com/Yale-LILY/dart, after the challenge's own evaluation: texts in
lower case and ASCII with all punctuation apart, the first three references, Moses' `multi-bleu.perl -lc`, METEOR 1.5
with `-norm`, and TERcom 0.7.25 without options.  LoRA's code scores with another toolkit and six references.
"""

import re

from sacrebleu.metrics import BLEU, TER
from text_unidecode import unidecode

from prefix_tuning.metrics.absent import say_once
from prefix_tuning.metrics.meteor import meteor_if_java

# The scripts take Unidecode, which is under the GPL.  text-unidecode agrees on all of WebNLG's train and dev.
REFERENCES = 3  # which the scripts read, in the order of the data
GROUPS = ("seen", "unseen")


def webnlg(
    predictions: list[str],
    references: list[list[str]],
    sources: list[str] | None = None,
    groups: list[str] | None = None,
) -> dict[str, float | None]:
    """BLEU from 0 to 100, METEOR and TER from 0 to 1 (TER perhaps above; lower is better), of "seen", "unseen" and all.

    What needs Java, the groups, or a record of a group is None without.  TER, in pure Python, is the slow one.  A
    `ValueError` for another group, and where all references of a prediction are blank.
    """
    del sources
    texts = [spaced(unidecode(text.strip()).lower()) for text in predictions]
    # In this order, as there: "£20" is "ps 20" in a reference, and "ps20" in a prediction.
    right = [[unidecode(spaced(text).lower()) for text in group[:REFERENCES]] for group in written(references)]
    parts = {name: [] for name in GROUPS} | {"all": list(range(len(texts)))}
    if groups is None:
        say_once("what is for seen and unseen categories", "no groups say which record is of which; give --groups=FILE")
    for number, group in enumerate(groups or ()):
        if group not in GROUPS:
            raise ValueError(f"group {group!r} of record {number + 1}; valid: {', '.join(GROUPS)}")
        parts[group].append(number)
    for name in GROUPS if groups else ():
        if not parts[name]:
            say_once(f"what is for {name} categories", f"none of the {len(texts)} records is of one")

    scores: dict[str, dict[str, float | None]] = {metric: dict.fromkeys(parts) for metric in ("bleu", "meteor", "ter")}
    present = {name: part for name, part in parts.items() if part}
    scores["meteor"] |= zip(present, meteor_if_java(texts, right, list(present.values())), strict=True)
    edits = [count_edits(text, group) for text, group in zip(texts, right, strict=True)]
    for name, part in present.items():
        scores["bleu"][name] = multi_bleu([texts[i] for i in part], [right[i] for i in part])
        scores["ter"][name] = ter([edits[i] for i in part])
    return {f"{metric}_{name}": value for metric, values in scores.items() for name, value in values.items()}


def written(references: list[list[str]]) -> list[list[str]]:
    """The references that are not blank; a `ValueError` naming the first group without any."""
    kept = [[text for text in group if text.strip()] for group in references]
    if [] in kept:
        raise ValueError(f"group {kept.index([]) + 1} of {len(kept)} has only blank references")
    return kept


def spaced(text: str) -> str:
    """The text with one space around everything but letters, digits and underscores."""
    return " ".join(" ".join(re.split(r"(\W)", text)).split())


def multi_bleu(texts: list[str], groups: list[list[str]]) -> float:
    """BLEU-4, 0 to 100, of words between spaces as Moses' `multi-bleu.perl -lc` prints it for three reference files.

    Where a group has fewer references, a file has an empty line: it is no missing reference to the script but one of
    length 0, and so the closest in length to a text less than half as long as the others.
    """
    columns = [[group[i] if i < len(group) else "" for group in groups] for i in range(REFERENCES)]
    scorer = BLEU(lowercase=True, tokenize="none", smooth_method="none", force=True)
    return scorer.corpus_score(texts, columns).score


def count_edits(text: str, group: list[str]) -> tuple[float, float]:
    """(the edits that turn a text into the closest reference, the mean length of the references), after TERcom.

    TERcom without options is: words between spaces, no normalisation, punctuation counts, case does not.
    """
    scorer = TER(normalized=False, no_punct=False, asian_support=False, case_sensitive=False)
    score = scorer.sentence_score(text, group)
    return score.num_edits, score.ref_length


def ter(counts: list[tuple[float, float]]) -> float:
    """Corpus TER from 0, edits per word of reference (https://aclanthology.org/2006.amta-papers.25)."""
    edits, lengths = map(sum, zip(*counts, strict=True))
    return edits / lengths
