"""Scores of answers that name one of a few classes, 0 to 1 (the correlation -1 to 1).

scikit-learn is imported where it is used: every command would wait for it.
"""


def accuracy(predictions: list[str], references: list[list[str]], *_: list[str] | None) -> dict[str, float]:
    """The share of predictions that equal one of their references."""
    hits = sum(answer in group for answer, group in zip(predictions, references, strict=True))
    return {"accuracy": hits / len(predictions)}


def f1(predictions: list[str], references: list[list[str]], *_: list[str] | None) -> dict[str, float]:
    """The mean F1 over all classes that are predicted or right; of at most two classes, also the F1 of each.

    Papers on two classes report one of these (MRPC: `f1_equivalent`); which is the positive one, no name tells.
    A `ValueError` where a prediction has several references.
    """
    from sklearn.metrics import f1_score

    right = only(references)
    classes = sorted({*right, *predictions})
    each = f1_score(right, predictions, labels=classes, average=None, zero_division=0.0).tolist()
    own = {f"f1_{name}": value for name, value in zip(classes, each, strict=True)} if len(classes) <= 2 else {}
    return {"f1_macro": sum(each) / len(each), **own}


def mcc(predictions: list[str], references: list[list[str]], *_: list[str] | None) -> dict[str, float]:
    """Matthews correlation, as CoLA is scored; 0 where all predictions, or all references, are one class.

    A `ValueError` where a prediction has several references.
    """
    from sklearn.metrics import matthews_corrcoef

    return {"mcc": float(matthews_corrcoef(only(references), predictions))}


def multirc(
    predictions: list[str], references: list[list[str]], sources: list[str] | None = None, *_: list[str] | None
) -> dict[str, float]:
    """MultiRC's F1 of the answers that are "True", and the share of questions with all answers right (N18-1023).

    A question is what its answers' sources have before their last tab, as the data set `superglue` writes them; drawing
    a part of the rows may part a question's.  A `ValueError` without sources, or for another class than True and False.
    """
    from sklearn.metrics import f1_score

    if sources is None:
        raise ValueError("the metric 'multirc' needs the sources, which say which answers are to one question")
    right = only(references)
    if odd := {*right, *predictions} - {"False", "True"}:
        raise ValueError(f"the metric 'multirc' is about True and False, not {min(odd)!r}")
    questions: dict[str, bool] = {}
    for source, prediction, answer in zip(sources, predictions, right, strict=True):
        question = source.rpartition("\t")[0]
        questions[question] = questions.get(question, True) and prediction == answer
    return {
        "multirc_f1a": float(f1_score(right, predictions, pos_label="True", zero_division=0.0)),
        "multirc_em": sum(questions.values()) / len(questions),
    }


def only(references: list[list[str]]) -> list[str]:
    """The one reference of every group; a `ValueError` naming the first group with more."""
    for number, group in enumerate(references, 1):
        if len(group) != 1:
            raise ValueError(f"group {number} of {len(references)} has {len(group)} references; expected one class")
    return [group[0] for group in references]
