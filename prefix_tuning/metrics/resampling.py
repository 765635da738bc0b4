"""Metrics on many resamples of the same records, without scoring the texts again for each.

A resample is a row of counts: how often each record is drawn, 0 included.  Most metrics are functions of sums over the
records, or means over them, and a resample's sums are one product of matrices.  The statistics of NIST and CIDEr depend
on how common an n-gram is in the references that were drawn, which is such a sum as well.  So nothing here is an
approximation: it is what the metric's plain function gives for the drawn records, and tests/test_compare_runs.py
holds every metric to that.
"""

import subprocess
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import sacrebleu
from pycocoevalcap.rouge.rouge import Rouge
from sacrebleu.metrics.base import Metric
from scipy import sparse

from prefix_tuning.metrics import METRICS, classes, e2e, entities, meteor, slots, squad, text
from prefix_tuning.metrics.ptb import java_tokens, python_tokens

# counts [S N] of N records in S resamples -> S values of each score; not a number where a resample has none
Resampled = Callable[[np.ndarray], dict[str, np.ndarray]]

PLAIN_SAMPLES = 100  # resamples of a metric that only its plain function can score
CHUNK = 16  # resamples whose n-gram weights are held at once
SIGMA = 6.0  # of CIDEr's penalty for a difference in length
# What resampling rows would get wrong.
LEFT_OUT = {
    "multirc": "its rows belong together in questions, which a resample of rows parts",
    "webnlg": "predictions do not keep which categories are seen; bleu, chrf and ter are tested",
    "dart": "most of its scorers are programs, too slow for resamples; bleu, chrf and ter are tested",
}


def resampled(
    name: str, predictions: list[str], references: list[list[str]], sources: list[str] | None = None
) -> tuple[Resampled, int | None]:
    """(counts -> scores of a metric, the most resamples that are affordable or None for any number).

    For texts that the metric's plain function has scored, which refuses what is wrong with them.
    """
    if name in PREPARED:
        return PREPARED[name](predictions, references, sources), None
    return plainly(name, predictions, references, sources), PLAIN_SAMPLES


def plainly(name: str, predictions: list[str], references: list[list[str]], sources: list[str] | None) -> Resampled:
    """Scores each resample's texts anew."""

    def scores(counts: np.ndarray) -> dict[str, np.ndarray]:
        rows = []
        for row in counts:
            drawn = np.repeat(np.arange(len(row)), row.astype(int)).tolist()
            given = None if sources is None else [sources[i] for i in drawn]
            rows.append(METRICS[name]([predictions[i] for i in drawn], [references[i] for i in drawn], given))
        keys = [key for key in rows[0] if all(row.get(key) is not None for row in rows)]
        return {key: np.array([row[key] for row in rows], float) for key in keys}

    return scores


def ratio(numerator: np.ndarray, denominator: np.ndarray, empty: float) -> np.ndarray:
    """The quotients, `empty` where there is nothing to divide by."""
    return np.divide(numerator, denominator, out=np.full(len(numerator), empty), where=denominator > 0)


def means(values: dict[str, np.ndarray]) -> Resampled:
    """Metrics that are means over the records, of values [N]."""
    return lambda counts: {key: counts @ value / counts.sum(1) for key, value in values.items()}


def each(name: str) -> Callable[..., Resampled]:
    """A metric that is the mean of what its plain function gives for each record alone."""

    def prepare(predictions: list[str], references: list[list[str]], sources: list[str] | None) -> Resampled:
        alone = [METRICS[name]([p], [r], None) for p, r in zip(predictions, references, strict=True)]
        return means({key: np.array([scores[key] for scores in alone]) for key in alone[0]})

    return prepare


def by_sacrebleu(name: str, metric: Metric) -> Callable[..., Resampled]:
    """A metric of sacreBLEU, by the two methods with which its own `PairedTest` resamples."""

    def prepare(predictions: list[str], references: list[list[str]], sources: list[str] | None) -> Resampled:
        statistics = np.array(metric._extract_corpus_statistics(predictions, text.columns(references)), float)
        return lambda counts: {
            name: np.array([metric._compute_score_from_stats(sums.tolist()).score for sums in counts @ statistics])
        }

    return prepare


def of_classes(name: str) -> Callable[..., Resampled]:
    """F1 or the correlation, from how often each class is predicted, is right, and both."""

    def prepare(predictions: list[str], references: list[list[str]], sources: list[str] | None) -> Resampled:
        right = classes.only(references)
        names = sorted({*right, *predictions})
        place = {label: k for k, label in enumerate(names)}
        told, true = (np.array([place[label] for label in labels]) for labels in (predictions, right))
        n = np.arange(len(right))
        shape = len(n), len(names)
        found, gold = (sparse.csr_array((np.ones(len(n)), (n, labels)), shape) for labels in (told, true))
        both = sparse.csr_array((1.0 * (told == true), (n, true)), shape)

        def scores(counts: np.ndarray) -> dict[str, np.ndarray]:
            f, g, b = counts @ found, counts @ gold, counts @ both  # [S classes]
            if name == "mcc":
                size = counts.sum(1)
                spread = (size**2 - (f * f).sum(1)) * (size**2 - (g * g).sum(1))
                return {"mcc": ratio(b.sum(1) * size - (f * g).sum(1), np.sqrt(spread), 0.0)}
            f1 = np.divide(2 * b, f + g, out=np.zeros_like(b), where=f + g > 0)
            own = {f"f1_{label}": f1[:, k] for k, label in enumerate(names)} if len(names) <= 2 else {}
            return {"f1_macro": f1.sum(1) / (f + g > 0).sum(1), **own}

        return scores

    return prepare


def of_entities(predictions: list[str], references: list[list[str]], sources: list[str] | None) -> Resampled:
    """Precision, recall and F1 of entities."""
    pairs = [
        (entities.entities(ours.split()), entities.entities(theirs.split()))
        for ours, theirs in zip(predictions, classes.only(references), strict=True)
    ]
    statistics = np.array([(len(ours & theirs), len(ours), len(theirs)) for ours, theirs in pairs], float)

    def scores(counts: np.ndarray) -> dict[str, np.ndarray]:
        hits, found, right = (counts @ statistics).T
        return {
            "entity_precision": ratio(hits, found, 0.0),
            "entity_recall": ratio(hits, right, 0.0),
            "entity_f1": ratio(2 * hits, found + right, 0.0),
        }

    return scores


def of_slots(predictions: list[str], references: list[list[str]], sources: list[str] | None) -> Resampled:
    """The share of slot values that are repeated."""
    hits = [slots.hits(prediction, source) for prediction, source in zip(predictions, sources, strict=True)]
    statistics = np.array([(sum(repeated), len(repeated)) for repeated in hits], float)

    def scores(counts: np.ndarray) -> dict[str, np.ndarray]:
        repeated, values = (counts @ statistics).T
        return {"slot_accuracy": 100 * ratio(repeated, values, np.nan)}

    return scores


def of_squad(predictions: list[str], references: list[list[str]], sources: list[str] | None) -> Resampled:
    """Exact match and F1 of all questions, of those with an answer and of those without."""
    alone = [squad.squad([p], [r]) for p, r in zip(predictions, references, strict=True)]
    exact, overlap = (np.array([one[key] for one in alone]) for key in ("squad_em", "squad_f1"))
    without = np.array(["squad_em_unanswerable" in one for one in alone], float)
    parts = {
        "squad_em_answerable": (exact, 1 - without),
        "squad_f1_answerable": (overlap, 1 - without),
        "squad_em_unanswerable": (exact, without),
    }
    whole = means({"squad_em": exact, "squad_f1": overlap})

    def scores(counts: np.ndarray) -> dict[str, np.ndarray]:
        some = {key: ratio(counts @ (values * of), counts @ of, np.nan) for key, (values, of) in parts.items()}
        return whole(counts) | (some if without.any() else {})

    return scores


def of_e2e(predictions: list[str], references: list[list[str]], sources: list[str] | None) -> Resampled:
    """The E2E challenge's five scores, less those that the plain function leaves null on this machine."""
    predictions, references = e2e.lines(predictions, references)
    parts = [bleu_nist(predictions, references)]
    try:
        texts, groups = e2e.tokenise(java_tokens, predictions, references)
        statistics = meteor.meteor_statistics(texts, groups)
        parts.append(lambda counts: {"meteor": meteor.meteor_scores(counts @ statistics)})
    except (OSError, subprocess.SubprocessError):
        try:
            texts, groups = e2e.tokenise(python_tokens, predictions, references)
        except ValueError:
            texts = None
    if texts is not None:
        overlap = Rouge().compute_score(dict(enumerate(groups)), {i: [one] for i, one in enumerate(texts)})[1]
        parts += [means({"rouge_l": overlap}), cider(texts, groups)]
    return lambda counts: {key: values for part in parts for key, values in part(counts).items()}


def bleu_nist(predictions: list[str], references: list[list[str]]) -> Resampled:
    """BLEU and NIST as `e2e.bleu_nist` computes them; n-grams are as informative as they are rare in what was drawn."""
    texts = [e2e.mteval_tokens(one) for one in predictions]
    groups = [[e2e.mteval_tokens(one) for one in group] for group in references]
    matched = [e2e.matched(tokens, group) for tokens, group in zip(texts, groups, strict=True)]
    needed = list(dict.fromkeys(ngram for one in matched for ngram in one))
    columns = index([*needed, *map(e2e.context, needed)])
    matches = table(matched, columns)[:, : len(needed)]  # [N needed]
    seen = table([sum(map(e2e.ngrams, group), Counter()) for group in groups], columns)  # [N columns]
    contexts = np.array([columns.get(e2e.context(ngram), -1) for ngram in needed], int)
    lengths = np.array([len(ngram) for ngram in needed], int)
    of_length = [np.flatnonzero(lengths == n) for n in range(6)]
    totals = np.array([[0, *(max(len(tokens) - n + 1, 0) for n in range(1, 6))] for tokens in texts])
    closest = np.array([e2e.nearest(tokens, group) for tokens, group in zip(texts, groups, strict=True)])
    words = np.array([sum(map(len, group)) for group in groups])
    sizes = np.array([len(group) for group in groups])

    def score(row: np.ndarray) -> dict[str, float]:
        hits, common, length = row @ matches, row @ seen, row @ words
        above = np.where(contexts < 0, length, common[contexts])  # () comes before every word
        drawn = hits > 0  # so that their references were drawn as well
        rare = np.zeros(len(needed))
        rare[drawn] = np.log2(above[drawn] / common[: len(needed)][drawn])
        told = row @ totals
        sums = [[value[at].sum() for at in of_length] for value in (hits, hits * rare)]
        return e2e.from_sums(*sums, told, row @ closest, told[1] * (row @ sizes / row.sum()) / length)

    def scores(counts: np.ndarray) -> dict[str, np.ndarray]:
        rows = [score(row) for row in counts.astype(float)]
        return {key: np.array([row[key] for row in rows]) for key in ("bleu", "nist")}

    return scores


def cider(texts: list[str], groups: list[list[str]]) -> Resampled:
    """CIDEr-D as pycocoevalcap computes it; each resample has its own inverse document frequencies.

    An n-gram's weight in a text is its count times its inverse document frequency, so that products and norms of two
    texts are linear in the squares of those.
    """
    owners = np.repeat(np.arange(len(texts)), [len(group) for group in groups])  # of every reference [P]
    ours, theirs = ([e2e.ngrams(one.split(), 4) for one in many] for many in (texts, [r for g in groups for r in g]))
    columns = index([ngram for one in [*ours, *theirs] for ngram in one])
    told, right = table(ours, columns), table(theirs, columns)
    clipped = told[owners].minimum(right) * right
    squares = [told.power(2), right.power(2)]
    lengths = np.array([len(ngram) for ngram in columns])
    belongs = sparse.csr_array((np.ones(len(owners)), (owners, np.arange(len(owners)))), (len(texts), len(owners)))
    present = (belongs @ right > 0).astype(float)  # [N columns]
    # pycocoevalcap calls the number of pairs of words a text's length.
    pairs = [one[:, np.flatnonzero(lengths == 2)].sum(1) for one in (told, right)]
    penalty = np.exp(-((pairs[0][owners] - pairs[1]) ** 2) / (2 * SIGMA**2))
    sizes = np.bincount(owners, minlength=len(texts))

    def scores(counts: np.ndarray) -> dict[str, np.ndarray]:
        found = []
        for start in range(0, len(counts), CHUNK):
            rows = counts[start : start + CHUNK].astype(float)
            # [columns S]
            weight = (np.log(rows.sum(1)) - np.log(np.maximum((rows @ present), 1.0)).T) ** 2
            value = 0.0
            for n in range(1, 5):
                part = weight * (lengths == n)[:, None]
                dot, ours, theirs = clipped @ part, (squares[0] @ part)[owners], squares[1] @ part  # [P S]
                norm = np.sqrt(ours * theirs)
                value = value + np.divide(dot, norm, out=np.zeros_like(dot), where=norm > 0) / 4
            alone = 10 * (belongs @ (penalty[:, None] * value)) / sizes[:, None]  # [N S]
            found.append((rows.T * alone).sum(0) / rows.sum(1))
        return {"cider": np.concatenate(found)}

    return scores


def index(ngrams: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], int]:
    """A column for each n-gram, in order of appearance; the empty one has none."""
    return {ngram: column for column, ngram in enumerate(filter(None, dict.fromkeys(ngrams)))}


def table(counted: Sequence[Counter], columns: dict[tuple[str, ...], int]) -> sparse.csr_array:
    """The counts [len(counted) len(columns)] of those n-grams that have a column."""
    entries = [
        (row, columns[ngram], n) for row, one in enumerate(counted) for ngram, n in one.items() if ngram in columns
    ]
    rows, at, values = np.array(entries, int).reshape(-1, 3).T
    return sparse.csr_array((values.astype(float), (rows, at)), (len(counted), len(columns)))


PREPARED: dict[str, Callable[[list[str], list[list[str]], list[str] | None], Resampled]] = {
    "accuracy": each("accuracy"),
    "bleu": by_sacrebleu("sacrebleu", sacrebleu.BLEU(force=True)),
    "chrf": by_sacrebleu("chrf", sacrebleu.CHRF()),
    "e2e": of_e2e,
    "exact_match": each("exact_match"),
    "f1": of_classes("f1"),
    "mcc": of_classes("mcc"),
    "rouge": each("rouge"),
    "seqeval": of_entities,
    "slots": of_slots,
    "squad": of_squad,
    "ter": by_sacrebleu("ter", sacrebleu.TER()),
}
