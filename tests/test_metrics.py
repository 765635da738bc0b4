"""Scores against numbers typed in by hand and against those of the official E2E scorer."""

import json
import random
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

from prefix_tuning.metrics import METRICS, absent, score
from prefix_tuning.metrics import e2e as e2e_metric
from prefix_tuning.metrics import slots as slots_metric
from prefix_tuning.metrics.meteor import meteor
from prefix_tuning.metrics.ptb import java_tokens, python_tokens

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no `java` on this machine")

PREDICTIONS = [
    "Green Man is a family - friendly pub by the river .",
    "The Eagle serves cheap French food near Burger King .",
    "Zizzi doesn't have 0 stars; it has 5 out of 5, and costs £20-25.",
    "",
]
REFERENCES = [
    ["The Green Man is a family friendly pub by the river .", "Green Man is a pub on the riverside ."],
    ["The Eagle is a cheap French restaurant near Burger King .", "Near Burger King , The Eagle has French food ."],
    ["Zizzi has 5 out of 5 stars and costs £20-25.", "It doesn't have 0 stars, it has five!", "A £20-25 place: Zizzi."],
    ["Alimentum is in the city centre ."],
]
# What mteval-v13a-sig.pl (BLEU, NIST) and the caption code of the official scorer gave for these.
OFFICIAL = {
    "bleu": 0.5879087547,
    "nist": 5.7469028516,
    "meteor": 0.44259363800762136,
    "rouge_l": 0.6101296585066052,
    "cider": 3.0234115268061386,
}


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch):
    monkeypatch.setattr(absent, "_SAID", set())


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")


def test_bleu_and_nist_are_the_official_ones():
    scores = e2e_metric.bleu_nist(PREDICTIONS, REFERENCES)
    assert scores == pytest.approx({key: OFFICIAL[key] for key in ("bleu", "nist")}, abs=1e-8)


@needs_java
def test_e2e_is_the_official_score_and_prints_nothing(one_meteor, capfd):
    with warnings.catch_warnings(action="error"):
        assert score(["e2e"], PREDICTIONS, REFERENCES) == pytest.approx(OFFICIAL, abs=1e-8)
    assert capfd.readouterr().out == ""


def test_without_java_meteor_is_null_and_one_warning_says_so(no_java):
    with pytest.warns(UserWarning, match=r"METEOR will be null: it needs Java .*java.*; install Java") as caught:
        first, second = (score(["e2e"], PREDICTIONS, REFERENCES) for _ in range(2))
    assert len(caught) == 1
    assert first == second
    assert first["meteor"] is None
    assert {**first, "meteor": 0} == pytest.approx({**OFFICIAL, "meteor": 0}, abs=1e-8)


def test_without_java_an_odd_text_leaves_no_score_rather_than_another(no_java):
    with pytest.warns(UserWarning, match=r"METEOR and ROUGE-L and CIDEr will be null: .*not sure of '☃'"):
        scores = score(["e2e"], ["a ☃ pub"], [["a pub"]])
    assert [scores[key] for key in ("meteor", "rouge_l", "cider")] == [None] * 3
    assert scores["bleu"] > 0


def test_a_java_that_fails_counts_as_none(monkeypatch, tmp_path):
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.warns(UserWarning, match="METEOR will be null"):
        assert score(["e2e"], PREDICTIONS, REFERENCES)["rouge_l"] == pytest.approx(OFFICIAL["rouge_l"], abs=1e-8)
    with pytest.raises((OSError, subprocess.SubprocessError)):
        meteor(["a"], [["a"]], [[0]])


def test_e2e_of_one_example_and_of_texts_with_line_breaks(no_java):
    with pytest.warns(UserWarning, match="METEOR"):
        broken = score(["e2e"], ["a pub\nby the river"], [["a pub by the river", "  "]])
    # With one example every n-gram is in all of them, and its inverse document frequency is log 1.
    assert broken == {"bleu": 1.0, "nist": pytest.approx(1.9219280948873623 + 0.4), "meteor": None} | {
        "rouge_l": 1.0,
        "cider": 0.0,
    }


def test_e2e_refuses_blank_references():
    with pytest.raises(ValueError, match="group 2 of 2 has only blank references"):
        score(["e2e"], ["a", "b"], [["a"], ["", " . "]])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Café Rouge, £20-25: 3.5 out of 5!", "café rouge , £20 - 25 : 3.5 out of 5 !"),
        ("It's &quot;family-friendly&quot; (1,000 m).", 'it\'s " family-friendly " ( 1,000 m ) .'),
        ("ÉCLAIR a/b x. 5.", "Éclair a / b x . 5 ."),  # only ASCII is put in lower case
    ],
)
def test_mteval_tokens(text, tokens):
    assert " ".join(e2e_metric.mteval_tokens(text)) == tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("It's £20-25, isn't it?", "it 's # 20-25 is n't it"),
        ('(Dr. Who) cannot - or "can\'t" - say 10.50.', "-lrb- dr. who -rrb- can not or ca n't say 10.50"),
        ("The U.S. family-friendly café.", "the u.s. family-friendly café"),
        ("", ""),
    ],
)
def test_ptb_tokens(text, tokens):
    assert python_tokens([text]) == [tokens]


@pytest.mark.parametrize(
    "text", ["Serie A.", "wanna eat", "nice :)", "call 123 456 7890", "a\tb", "<b>", "日本", "hm..."]
)
def test_python_tokens_refuses_what_it_was_not_checked_on(text):
    with pytest.raises(ValueError, match="not sure of"):
        python_tokens(["fine .", text])


@needs_java
@pytest.mark.skipif(not DATA.exists(), reason="the data sets are not beside the repository")
def test_both_tokenisers_agree_on_the_data():
    lines = (DATA / "e2e" / "src1_train.txt").read_text().splitlines()
    texts = [line.split("||")[1].strip() for line in lines]
    entries = json.loads((DATA / "webnlg" / "dev.json").read_text())["entries"]
    texts += [" ".join(lex["lex"].split()) for entry in entries for e in entry.values() for lex in e["lexicalisations"]]
    plain = [text for text in random.Random(0).sample(texts, 4000) if _accepted(text)]
    assert len(plain) > 3900
    assert python_tokens(plain) == java_tokens(plain)


def _accepted(text):
    try:
        return python_tokens([text])
    except ValueError:
        return False


def test_text_metrics_on_small_examples():
    scores = score(["rouge", "exact_match", "ter"], ["the cats sat", " a  dog"], [["x", "the cat sat on"], ["a dog"]])
    # Against "the cat sat on": precision 3/3 and recall 3/4, bigrams 2/2 and 2/3.
    assert scores["rouge1"] == pytest.approx(100 * (6 / 7 + 1) / 2)
    assert scores["rouge2"] == pytest.approx(100 * (4 / 5 + 1) / 2)
    assert scores["rougeL"] == pytest.approx(100 * (6 / 7 + 1) / 2)
    assert scores["exact_match"] == 50
    # Two edits ("cats" -> "cat", "on" added) to the mean lengths 2.5 and 2.
    assert scores["ter"] == pytest.approx(100 * 2 / 4.5)


def test_bleu_and_chrf_on_groups_of_unequal_size():
    perfect = score(["bleu", "chrf"], ["one two three four five", "six"], [["one two three four five"], ["x", "six"]])
    assert perfect == pytest.approx({"sacrebleu": 100, "chrf": 100})
    # Precisions 4/5, 3/4, 2/3, 1/2; lengths equal.
    assert score(["bleu"], ["a b c d x"], [["a b c d e"]])["sacrebleu"] == pytest.approx(100 * 0.2**0.25)


@pytest.mark.parametrize(
    ("source", "values"),
    [
        ("name : The Eagle | price : less than £20", ["The Eagle", "less than £20"]),
        ("name[The Eagle], eat type[coffee shop]", ["The Eagle", "coffee shop"]),
        (
            "Aarhus : leader : Jacob Bundsgaard | Aarhus : in : Denmark",
            ["Aarhus", "Jacob Bundsgaard", "Aarhus", "Denmark"],
        ),
        ("name = The Eagle; food = French", ["The Eagle", "French"]),
        ("no record", []),
    ],
)
def test_slot_values(source, values):
    assert slots_metric.values(source) == values


def test_every_kind_of_record_has_an_example_that_reads_as_that_kind():
    for example, pattern in slots_metric.RECORDS.items():
        found = [value.strip() for match in pattern.finditer(example) for value in match.groups()]
        assert slots_metric.values(example)[:2] == found[:2] != []


def test_slots_counts_whole_words_in_any_case():
    predictions = ["the  eagle is a coffee\nshop", "A publican in C++ (cheap)."]
    sources = ["name : The Eagle | type : coffee shop | area : riverside", "type : pub | price : cheap | in : C++"]
    assert score(["slots"], predictions, [["x"], ["x"]], sources) == {"slot_accuracy": pytest.approx(100 * 4 / 6)}


CHOSEN = ("f1", "mcc", "multirc", "seqeval")  # these are about names of classes, with one reference each


@pytest.mark.parametrize("name", sorted(set(METRICS) - set(CHOSEN)))
def test_every_metric_takes_empty_and_foreign_predictions(name, no_java):
    with warnings.catch_warnings(action="ignore"):
        scores = score([name], ["", "Müller\n日本"], [["a pub"], ["a bar", ""]], ["name : pub", "name : bar"])
    assert all(value is None or value == value >= 0 for value in scores.values())
    assert scores


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["blue"], ["a"], [["a"]]), f"unknown metric 'blue'; valid: {', '.join(sorted(METRICS))}"),
        ((["bleu"], [], []), "nothing to score: 0 predictions, 0 groups"),
        ((["bleu"], ["a"], [["a"], ["b"]]), "1 predictions, but 2 groups of references"),
        ((["bleu"], ["a", "b"], [["a"], []]), "group 2 of 2 has no reference"),
        ((["slots"], ["a"], [["a"]]), "needs the sources"),
        ((["slots"], ["a"], [["a"]], ["a", "b"]), "1 predictions, but 2 sources"),
        ((["webnlg"], ["a"], [["a"]], None, ["seen", "unseen"]), "1 predictions, but 2 groups"),
        ((["webnlg"], ["a"], [["a"]], None, ["new"]), "group 'new' of record 1; valid: seen, unseen"),
        ((["webnlg"], ["a", "b"], [["a"], ["", " "]]), "group 2 of 2 has only blank references"),
        ((["dart"], ["a"], [["\n"]]), "group 1 of 1 has only blank references"),
        ((["slots"], ["a"], [["a"]], ["text"]), "no slot in any of 1 sources"),
    ],
)
def test_wrong_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        score(*arguments)


def test_scores_of_several_metrics_are_merged():
    assert set(score(["exact_match", "ter", "rouge"], ["a"], [["a"]])) == {
        "exact_match",
        "ter",
        "rouge1",
        "rouge2",
        "rougeL",
    }


def test_the_metrics_do_not_import_jax():
    sources = (Path(__file__).parents[1] / "prefix_tuning" / "metrics").glob("*.py")
    assert not [path for path in sources if "import jax" in path.read_text() or "types import" in path.read_text()]
