"""Metrics whose published implementation is a Python package, and exact match."""

from itertools import zip_longest

import sacrebleu


def bleu(predictions: list[str], references: list[list[str]], *_: list[str] | None) -> dict[str, float]:
    """Corpus BLEU, 0 to 100, with sacreBLEU's own tokeniser (https://arxiv.org/abs/1804.08771)."""
    # `force` only silences a warning that the text looks tokenised, which E2E's is.
    return {"sacrebleu": sacrebleu.corpus_bleu(predictions, columns(references), force=True).score}


def chrf(predictions: list[str], references: list[list[str]], *_: list[str] | None) -> dict[str, float]:
    """Corpus chrF2, 0 to 100: the F-score of character n-grams (https://aclanthology.org/W15-3049)."""
    return {"chrf": sacrebleu.corpus_chrf(predictions, columns(references)).score}


def ter(predictions: list[str], references: list[list[str]], *_: list[str] | None) -> dict[str, float]:
    """Corpus TER, edits per 100 words of reference, so lower is better (https://aclanthology.org/2006.amta-papers.25)."""
    return {"ter": sacrebleu.corpus_ter(predictions, columns(references)).score}


def rouge(predictions: list[str], references: list[list[str]], *_: list[str] | None) -> dict[str, float]:
    """Mean F1 of stemmed ROUGE, 0 to 100, with the best reference for each kind (https://aclanthology.org/W04-1013)."""
    from rouge_score.rouge_scorer import RougeScorer  # it imports NLTK, which every command would wait for

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    best = [scorer.score_multi(group, text) for text, group in zip(predictions, references, strict=True)]
    return {kind: 100 * sum(scores[kind].fmeasure for scores in best) / len(best) for kind in kinds}


def exact_match(predictions: list[str], references: list[list[str]], *_: list[str] | None) -> dict[str, float]:
    """The share of predictions, 0 to 100, that equal one of their references but for white space."""
    pairs = zip(predictions, references, strict=True)
    hits = sum(text.split() in [reference.split() for reference in group] for text, group in pairs)
    return {"exact_match": 100 * hits / len(predictions)}


def columns(references: list[list[str]]) -> list[list[str | None]]:
    """Groups of references as sacreBLEU wants them: the first of each, the second of each, None where there is none."""
    return [list(column) for column in zip_longest(*references)]
