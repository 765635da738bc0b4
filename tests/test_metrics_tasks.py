"""Scores of chosen answers, against numbers computed by hand and against those of the published implementations."""

import random

import pytest

from prefix_tuning.metrics import score
from prefix_tuning.metrics.entities import entities


def test_accuracy_accepts_any_reference():
    assert score(["accuracy"], ["a", "b", "c", "a"], [["a"], ["a"], ["b", "c"], ["a "]]) == {"accuracy": 0.5}


def test_f1_names_both_of_two_classes():
    right = [[name] for name in ("yes", "yes", "yes", "no", "no")]
    # yes: 2 of 3 predicted are right, of 3; no: 1 of 2, of 2
    assert score(["f1"], ["yes", "yes", "no", "no", "yes"], right) == pytest.approx(
        {"f1_macro": (2 / 3 + 1 / 2) / 2, "f1_yes": 2 / 3, "f1_no": 1 / 2}
    )


def test_f1_of_more_classes_is_their_mean():
    # a: precision 1/2, recall 1; b: 1, 1/2; c is never predicted; d never right
    scores = score(["f1"], ["a", "a", "b", "d"], [["a"], ["b"], ["b"], ["c"]])
    assert scores == pytest.approx({"f1_macro": (2 / 3 + 2 / 3 + 0 + 0) / 4})


def test_mcc():
    right = [[name] for name in "1110010"]
    # of the ones 3 true, 1 false; of the zeros 2 true, 1 false
    assert score(["mcc"], list("1101011"), right)["mcc"] == pytest.approx((3 * 1 - 2 * 1) / (5 * 4 * 2 * 3) ** 0.5)
    assert score(["mcc"], ["1"] * 7, right) == {"mcc": 0.0}


def test_multirc_groups_answers_by_question():
    sources = ["q1 p\ta", "q2 p\ta", "q1 p\tb", "q2 p\tb", "q3\tp\ta"]
    right = [["True"], ["True"], ["False"], ["False"], ["True"]]
    # q1 and q3 are all right; of the Trues 3 are found, and one too many
    scores = score(["multirc"], ["True", "True", "False", "True", "True"], right, sources)
    assert scores == pytest.approx({"multirc_f1a": 2 * 3 / (4 + 3), "multirc_em": 2 / 3})
    assert score(["multirc"], ["False"], [["False"]], ["q\ta"]) == {"multirc_f1a": 0.0, "multirc_em": 1.0}


def test_multirc_says_what_is_wrong():
    with pytest.raises(ValueError, match="needs the sources"):
        score(["multirc"], ["True"], [["True"]])
    with pytest.raises(ValueError, match="is about True and False, not 'yes'"):
        score(["multirc"], ["yes"], [["True"]], ["q\ta"])


@pytest.mark.parametrize("name", ["f1", "mcc", "seqeval"])
def test_one_class_is_right(name):
    with pytest.raises(ValueError, match="group 2 of 2 has 2 references; expected one class"):
        score([name], ["O", "O"], [["O"], ["O", "O"]])


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-PER I-PER O", {(1, 3, "PER")}),
        ("B-PER B-PER I-PER", {(0, 1, "PER"), (1, 3, "PER")}),
        ("I-PER O I-LOC I-LOC", {(0, 1, "PER"), (2, 4, "LOC")}),
        ("B-PER I-LOC I-PER", {(0, 1, "PER"), (1, 2, "LOC"), (2, 3, "PER")}),
        ("O B-work-of-art", {(1, 2, "work-of-art")}),
        ("", set()),
    ],
)
def test_entities(tags, found):
    assert entities(tags.split()) == found


def test_seqeval_counts_whole_entities():
    predictions = ["B-PER I-PER O B-LOC", "B-PER O O", "O O"]
    references = [["B-PER I-PER O B-ORG"], ["B-PER I-PER O"], ["O B-LOC"]]
    # found 3, right 4, both 1
    assert score(["seqeval"], predictions, references) == pytest.approx(
        {"entity_precision": 1 / 3, "entity_recall": 1 / 4, "entity_f1": 2 / 7}
    )
    zeros = {"entity_precision": 0.0, "entity_recall": 0.0, "entity_f1": 0.0}
    assert score(["seqeval"], ["O O"], [["O O"]]) == zeros


def test_seqeval_equals_the_package():
    draw = random.Random(5)
    tags = ["O", "O", "B-A", "I-A", "B-B", "I-B", "I-C"]
    references = [[draw.choice(tags) for _ in range(draw.randint(1, 13))] for _ in range(97)]
    predictions = [[tag if draw.random() < 0.6 else draw.choice(tags) for tag in row] for row in references]
    scores = score(["seqeval"], [" ".join(row) for row in predictions], [[" ".join(row)] for row in references])
    # seqeval 1.2.2: precision_score, recall_score, f1_score on the same lists
    assert scores == pytest.approx(
        {"entity_precision": 0.6625916870415648, "entity_recall": 0.6483253588516746, "entity_f1": 0.6553808948004837}
    )


def test_seqeval_says_what_is_wrong():
    with pytest.raises(ValueError, match="row 2: 1 tags predicted for 2 words"):
        score(["seqeval"], ["O", "O"], [["O"], ["O O"]])
    for tag in ("PER", "B-", "S-PER", "I"):
        with pytest.raises(ValueError, match=f"tag '{tag}'; expected O, B-TYPE or I-TYPE"):
            score(["seqeval"], [tag], [["O"]])


def test_squad_takes_the_best_reference():
    predictions = ["The Eiffel-Tower!", "in Paris, France", "42", "a cat cat"]
    references = [["eiffeltower"], ["France", "Paris France"], ["forty"], ["cat dog cat bird"]]
    # second: 2 of 3 words, all 2 of the reference; fourth: 2 of 2 words, 2 of 4
    assert score(["squad"], predictions, references) == pytest.approx(
        {"squad_em": 25.0, "squad_f1": (100 + 80 + 0 + 100 * 2 / 3) / 4}
    )


def test_squad_scores_unanswerable_questions_apart():
    scores = score(["squad"], ["", "guess", "", "red car"], [[""], [""], ["blue"], ["car"]])
    assert scores == pytest.approx(
        {
            "squad_em": 25.0,
            "squad_f1": (100 + 0 + 0 + 100 * 2 / 3) / 4,
            "squad_em_answerable": 0.0,
            "squad_f1_answerable": 100 / 3,
            "squad_em_unanswerable": 50.0,
        }
    )
    assert score(["squad"], ["the"], [[""]]) == {"squad_em": 100.0, "squad_f1": 100.0, "squad_em_unanswerable": 100.0}
