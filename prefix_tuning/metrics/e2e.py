"""The five scores of the E2E NLG challenge, equal to those of its official scorer (github.com/tuetschek/e2e-metrics).

That scorer is a Perl script for BLEU and NIST (`mteval-v13a-sig.pl`) and the MS-COCO caption code, partly in Java, for
METEOR, ROUGE-L and CIDEr.  Its option `-p` replaces the Perl by Python, whose NIST penalises length a little
differently when groups of references differ in size; papers report the default, and so does this file.
"""

import contextlib
import math
import re
import subprocess
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase

import numpy as np
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor as coco_meteor
from pycocoevalcap.rouge.rouge import Rouge

from prefix_tuning.metrics.ptb import java_tokens, python_tokens

METEOR_JAR = Path(coco_meteor.__file__).with_name(coco_meteor.METEOR_JAR)
GET_JAVA = "install Java 8 or newer (`apt install default-jre-headless`, or adoptium.net) so that `java` runs"
_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)
_WARNED: set[str] = set()


def e2e(
    predictions: list[str], references: list[list[str]], sources: list[str] | None = None
) -> dict[str, float | None]:
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
    """METEOR (W14-3348 in the ACL anthology), ROUGE-L (W04-1013) and CIDEr (https://arxiv.org/abs/1411.5726)."""
    scores, without, reason = dict.fromkeys(("meteor", "rouge_l", "cider")), ["METEOR"], ""
    try:
        texts, groups = tokenise(java_tokens, predictions, references)
        scores["meteor"] = meteor(texts, groups)
    except (OSError, subprocess.SubprocessError) as error:
        reason = f"it needs Java ({error})"
        try:
            texts, groups = tokenise(python_tokens, predictions, references)
        except ValueError as refusal:
            texts, without = None, ["METEOR", "ROUGE-L", "CIDEr"]
            reason = f"they need Java ({error}; {refusal})"
    if reason:
        _warn_once(" and ".join(without), reason)
    if texts is not None:
        found, right = {i: [text] for i, text in enumerate(texts)}, dict(enumerate(groups))
        scores["rouge_l"] = float(Rouge().compute_score(right, found)[0])
        scores["cider"] = float(Cider().compute_score(right, found)[0])
    return scores


def meteor(texts: list[str], groups: list[list[str]]) -> float:
    """Corpus METEOR 1.5, 0 to 1, of tokenised texts; an `OSError` or a `SubprocessError` where Java does not run."""
    with meteor_program() as (ask, answer):
        statistics = [ask("SCORE", *group, text) for text, group in zip(texts, groups, strict=True)]
        ask("EVAL", *statistics)
        return [float(answer()) for _ in texts][-1]  # a score for each text came first, the corpus's comes last


def meteor_statistics(texts: list[str], groups: list[list[str]]) -> np.ndarray:
    """What METEOR counts in each text, [N 23]; `meteor_scores` turns sums over a corpus into the corpus's score."""
    with meteor_program() as (ask, _):
        lines = [ask("SCORE", *group, text) for text, group in zip(texts, groups, strict=True)]
    statistics = np.array([line.split() for line in lines], float)
    whole = (statistics[:, 20:] == np.stack([np.ones(len(texts)), *statistics[:, :2].T], axis=1)).all(1)
    statistics[whole, 20] = 0  # a text that is its reference has no chunk when the program adds it to others
    return statistics


def meteor_scores(sums: np.ndarray) -> np.ndarray:
    """METEOR 1.5 for English of every row of sums [S 23] (https://aclanthology.org/W14-3348, equations 1 to 5).

    A row holds, of the prediction and then of the reference: words, function words, and for each matcher (same word,
    stem, synonym, paraphrase) matched content and function words; then chunks and all matched words.
    """
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
    kinds = np.array([1.0, 0.6, 0.8, 0.6])
    matches = sums[:, 4:20].reshape(-1, 4, 2, 2)  # [S matcher content/function prediction/reference]
    found = np.einsum("sktp,k,t->sp", matches, kinds, [delta, 1 - delta])
    weight = delta * (sums[:, :2] - sums[:, 2:4]) + (1 - delta) * sums[:, 2:4]
    precision, recall = np.divide(found, weight, out=np.zeros_like(found), where=weight > 0).T
    both = alpha * precision + (1 - alpha) * recall
    mean = np.divide(precision * recall, both, out=np.zeros_like(both), where=both > 0)
    matched = sums[:, 21:].mean(1)
    chunks = np.divide(sums[:, 20], matched, out=np.zeros_like(matched), where=matched > 0)
    return mean * (1 - gamma * chunks**beta)


@contextlib.contextmanager
def meteor_program() -> Iterator[tuple[Callable[..., str], Callable[[], str]]]:
    """(ask, answer) of the running program: a request's first line of answer, and the lines that follow.

    The package's own class is not used: it leaves a full pipe of warnings unread, and a lock held after a failure.
    """
    command = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "encoding": "utf-8"}
    with subprocess.Popen(command, **pipe) as process:

        def ask(*fields: str) -> str:
            # "|||" parts the fields of a request, and nothing in a text may look like it.
            line = " ||| ".join(re.sub(r"\|{3,}", " ", field) for field in fields)
            print(line, file=process.stdin, flush=True)
            return answer()

        def answer() -> str:
            if line := process.stdout.readline():
                return line.strip()
            raise subprocess.SubprocessError("METEOR stopped without an answer")

        yield ask, answer


def tokenise(
    tokens: Callable[[list[str]], list[str]], predictions: list[str], references: list[list[str]]
) -> tuple[list[str], list[list[str]]]:
    """Predictions and references through one call of a tokeniser, which may be a program that takes long to start."""
    flat = iter(tokens([text for group in references for text in group]))
    return tokens(predictions), [list(islice(flat, len(group))) for group in references]


def _line(text: str) -> str:
    """The text on one line, because both Java programs read lines."""
    return " ".join(text.splitlines()).strip()


def _warn_once(scores: str, reason: str) -> None:
    """Once per process and set of scores: the metrics run after every evaluation, and the reason stays."""
    if scores not in _WARNED:
        _WARNED.add(scores)
        warnings.warn(f"{scores} will be null: {reason}; {GET_JAVA}", stacklevel=2)
