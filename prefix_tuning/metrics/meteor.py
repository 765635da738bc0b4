"""METEOR 1.5 (W14-3348 in the ACL anthology): its authors' Java program, which comes with pycocoevalcap."""

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from pycocoevalcap.meteor import meteor as coco_meteor

from prefix_tuning.metrics.absent import say_once

METEOR_JAR = Path(coco_meteor.__file__).with_name(coco_meteor.METEOR_JAR)
GET_JAVA = "install Java 8 or newer (`apt install default-jre-headless`, or adoptium.net) so that `java` runs"


def meteor(texts: list[str], groups: list[list[str]], parts: Sequence[Sequence[int]]) -> list[float]:
    """Corpus METEOR, 0 to 1, of some parts of tokenised texts, each given by the indices of at least one.

    An `OSError` or a `SubprocessError` where Java does not run.
    """
    with meteor_program() as (ask, answer):

        def corpus(part: Sequence[int]) -> float:
            ask("EVAL", *(statistics[i] for i in part))
            return [float(answer()) for _ in part][-1]  # a score for each text came first, the corpus's comes last

        statistics = [ask("SCORE", *group, text) for text, group in zip(texts, groups, strict=True)]
        return [corpus(part) for part in parts]


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


def meteor_if_java(texts: list[str], groups: list[list[str]], parts: Sequence[Sequence[int]]) -> list[float | None]:
    """The same, but None for every part where Java does not run, and a warning that says so."""
    try:
        return meteor(texts, groups, parts)
    except (OSError, subprocess.SubprocessError) as error:
        say_once("METEOR", f"it needs Java ({error}); {GET_JAVA}")
        return [None] * len(parts)
