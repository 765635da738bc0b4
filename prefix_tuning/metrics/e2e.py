"""The five scores of the E2E NLG challenge, equal to those of its official scorer (github.com/tuetschek/e2e-metrics).

That scorer is a Perl script for BLEU and NIST (`mteval-v13a-sig.pl`) and the MS-COCO caption code, partly in Java, for
METEOR, ROUGE-L and CIDEr.  Its option `-p` replaces the Perl by Python, whose NIST penalises length a little
differently when groups of references differ in size; papers report the default, and so does this file.
"""

import math
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from string import ascii_lowercase, ascii_uppercase

from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from prefix_tuning.metrics.absent import say_once
from prefix_tuning.metrics.meteor import GET_JAVA, meteor
from prefix_tuning.metrics.ptb import java_tokens, python_tokens

_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)


def e2e(predictions: list[str], references: list[list[str]], *_: list[str] | None) -> dict[str, float | None]:
    """BLEU, METEOR and ROUGE-L from 0 to 1, NIST in bits, CIDEr from 0 to 10, as the official scorer prints them.

    METEOR is None without Java; so are ROUGE-L and CIDEr where a text is too odd for the tokeniser in Python.  A
    `ValueError` where all references of a prediction are blank.
    """
    predictions, references = lines(predictions, references)
    return bleu_nist(predictions, references) | coco(predictions, references)


def lines(predictions: list[str], references: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The same texts on one line each, less empty references; a `ValueError` where all of a group are blank."""
    predictions = [_line(text) for text in predictions]
    # An empty line parts the groups in the official file format, so that no reference can be empty there.
    references = [list(filter(None, map(_line, group))) for group in references]
    for number, group in enumerate(references, start=1):
        if not any(re.search(r"\w", text) for text in group):
            raise ValueError(f"group {number} of {len(references)} has only blank references")
    return predictions, references


def bleu_nist(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """BLEU-4 (https://aclanthology.org/P02-1040) and NIST-5 (Doddington, HLT 2002), after mteval-v13a."""
    texts = [mteval_tokens(text) for text in predictions]
    groups = [[mteval_tokens(text) for text in group] for group in references]
    everything = [tokens for group in groups for tokens in group]
    seen = Counter({(): sum(map(len, everything))})
    for tokens in everything:
        seen.update(ngrams(tokens))

    matches, information, totals = [0] * 6, [0.0] * 6, [0] * 6  # by the length of the n-gram
    closest = 0  # the summed length of those references that are closest in length to their prediction
    for tokens, group in zip(texts, groups, strict=True):
        for ngram, count in matched(tokens, group).items():
            matches[len(ngram)] += count
            information[len(ngram)] += count * math.log2(seen[context(ngram)] / seen[ngram])
        for n in range(1, 6):
            totals[n] += max(len(tokens) - n + 1, 0)
        closest += nearest(tokens, group)
    ratio = totals[1] * (len(everything) / len(groups)) / seen[()]
    return from_sums(matches, information, totals, closest, ratio)


def matched(tokens: list[str], group: list[list[str]]) -> Counter:
    """How many of a prediction's n-grams are in its references, each as often as in the one that has most of it."""
    most = Counter()
    for reference in group:
        most |= ngrams(reference)
    return ngrams(tokens) & most


def context(ngram: tuple[str, ...]) -> tuple[str, ...]:
    """The n-gram whose count an n-gram's information is relative to."""
    # Perl takes the string "0" for false, and so the script for no context at all.
    return () if ngram[:-1] == ("0",) else ngram[:-1]


def nearest(tokens: list[str], group: list[list[str]]) -> int:
    """The length of the reference that is closest in length, the shorter of two."""
    return min((abs(len(reference) - len(tokens)), len(reference)) for reference in group)[1]


def from_sums(
    matches: Sequence[float], information: Sequence[float], totals: Sequence[float], closest: float, ratio: float
) -> dict[str, float]:
    """BLEU and NIST from what is summed over a corpus, [6] each and indexed by the n-gram's length.

    `ratio` is that of the predictions' length to the mean length of the references.
    """
    smoothed, logarithm = 1, 0.0
    for n in range(1, 5):
        if totals[n] and not matches[n]:
            smoothed *= 2
            logarithm -= math.log(smoothed * totals[n])
        elif totals[n]:
            logarithm += math.log(matches[n] / totals[n])
    brevity = math.exp(min(0, 1 - closest / totals[1])) if totals[1] else 0.0

    beta = math.log(0.5) / math.log(1.5) ** 2  # half the score at two thirds of the length
    penalty = math.exp(beta * math.log(ratio) ** 2) if 0 < ratio < 1 else float(ratio >= 1)
    nist = penalty * sum(information[n] / max(totals[n], 1) for n in range(1, 6))
    return {"bleu": brevity * math.exp(logarithm / 4), "nist": nist}


def mteval_tokens(text: str) -> list[str]:
    """The words of one line as mteval-v13a splits them: ASCII in lower case, punctuation apart, numbers whole."""
    for entity, character in (("<skipped>", ""), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    text = f" {text.translate(_LOWER)} "
    text = re.sub(r"([ -&(-+:-@\[-`{-~/])", r" \1 ", text)
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def ngrams(tokens: list[str], longest: int = 5) -> Counter:
    """How often each n-gram of up to `longest` words occurs."""
    return Counter(tuple(tokens[i : i + n]) for n in range(1, longest + 1) for i in range(len(tokens) - n + 1))


def coco(predictions: list[str], references: list[list[str]]) -> dict[str, float | None]:
    """METEOR, ROUGE-L (W04-1013) and CIDEr (https://arxiv.org/abs/1411.5726)."""
    scores, without, reason = dict.fromkeys(("meteor", "rouge_l", "cider")), ["METEOR"], ""
    try:
        texts, groups = tokenise(java_tokens, predictions, references)
        (scores["meteor"],) = meteor(texts, groups, [range(len(texts))])
    except (OSError, subprocess.SubprocessError) as error:
        reason = f"it needs Java ({error})"
        try:
            texts, groups = tokenise(python_tokens, predictions, references)
        except ValueError as refusal:
            texts, without = None, ["METEOR", "ROUGE-L", "CIDEr"]
            reason = f"they need Java ({error}; {refusal})"
    if reason:
        say_once(" and ".join(without), f"{reason}; {GET_JAVA}")
    if texts is not None:
        found, right = {i: [text] for i, text in enumerate(texts)}, dict(enumerate(groups))
        scores["rouge_l"] = float(Rouge().compute_score(right, found)[0])
        scores["cider"] = float(Cider().compute_score(right, found)[0])
    return scores


def tokenise(
    tokens: Callable[[list[str]], list[str]], predictions: list[str], references: list[list[str]]
) -> tuple[list[str], list[list[str]]]:
    """Predictions and references through one call of a tokeniser, which may be a program that takes long to start."""
    flat = iter(tokens([text for group in references for text in group]))
    return tokens(predictions), [list(islice(flat, len(group))) for group in references]


def _line(text: str) -> str:
    """The text on one line, because both Java programs read lines."""
    return " ".join(text.splitlines()).strip()
