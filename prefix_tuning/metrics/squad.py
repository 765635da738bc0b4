"""Exact match and F1 of extracted answers, 0 to 100, as the official scripts of SQuAD 1.1 and 2.0 compute them."""

import re
import string
from collections import Counter

ARTICLES = re.compile(r"\b(a|an|the)\b")


def squad(predictions: list[str], references: list[list[str]], *_: list[str] | None) -> dict[str, float]:
    """The mean over questions of the best reference's exact match and F1; the reference "" is: no answer.

    Where some questions have none, the same of those with an answer, and the exact match of those without, which is
    also their F1 (https://arxiv.org/abs/1806.03822).
    """
    exact, overlap, answerable = [], [], []
    for prediction, group in zip(predictions, references, strict=True):
        given = words(prediction)
        right = [answer for answer in map(words, group) if answer] or [[]]
        exact.append(100.0 * (given in right))
        overlap.append(100.0 * max(f1(given, answer) for answer in right))
        answerable.append(right != [[]])
    scores = {"squad_em": mean(exact), "squad_f1": mean(overlap)}
    if not all(answerable):
        some = {name: [x for x, has in zip(exact, answerable, strict=True) if has is name] for name in (True, False)}
        if some[True]:
            scores["squad_em_answerable"] = mean(some[True])
            scores["squad_f1_answerable"] = mean([x for x, has in zip(overlap, answerable, strict=True) if has])
        scores["squad_em_unanswerable"] = mean(some[False])
    return scores


def words(text: str) -> list[str]:
    """The words of a text in lower case, without ASCII punctuation and articles."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return ARTICLES.sub(" ", text).split()


def f1(given: list[str], right: list[str]) -> float:
    """The F1 of two bags of words, 0 to 1; an empty one equals only another."""
    if not given or not right:
        return float(given == right)
    return 2 * (Counter(given) & Counter(right)).total() / (len(given) + len(right))


def mean(values: list[float]) -> float:
    """The average of at least one number."""
    return sum(values) / len(values)
