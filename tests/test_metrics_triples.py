"""WebNLG's and DART's scores: numbers typed in by hand, and those of the programs that the papers used."""

import json
import math
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
import tokenizers
import torch
import transformers

import run
from prefix_tuning import data, evaluate, setup
from prefix_tuning.data import webnlg as webnlg_data
from prefix_tuning.metrics import absent, learned, score
from prefix_tuning.metrics.meteor import meteor
from prefix_tuning.metrics.webnlg import count_edits, multi_bleu, spaced, ter

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no `java` on this machine")

PREDICTIONS = ["The A-Rosa Luna weighs 1,850.8 tonnes.", "Zoë was born in Genoa .", "Bananas are food.", ""]
REFERENCES = [
    ["The A-Rosa Luna weighs 1850.8 tonnes.", "A-Rosa Luna's weight is 1,850.8 tonnes."],
    ["Zoë was born in Genoa."],
    ["Bananas are a food in Italy.", "A banana is food.", "Food: bananas", "Bananas are food."],
    ["Alba is in Iceland."],
]
GROUPS = ["seen", "unseen", "seen", "unseen"]
# What `java -Xmx2G -jar meteor-1.5.jar TEXTS REFERENCES -l en -norm -r 3` gave for the groups and for all, spaced in
# lower case, with an empty line for every reference that is missing.
METEOR = [0.4382839556598504, 0.6106870229007633, 0.4191093836227342]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch, tmp_path):
    """No weights in the cache, no other Python, and nothing has been said yet."""
    monkeypatch.setattr(absent, "_SAID", set())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv(learned.PYTHON, raising=False)


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("  It's a-b_c, 1.5\tm! ", "It ' s a - b_c , 1 . 5 m !"),
        ("Čapek\n(x)", "Čapek ( x )"),
        ("", ""),
    ],
)
def test_spaced(text, words):
    assert spaced(text) == words


def perl(texts, groups):
    """What multi-bleu.perl does with three files of references, from its definition."""
    matches, totals, length, closest = Counter(), Counter(), 0, 0
    for text, group in zip(texts, groups, strict=True):
        words, lines = text.lower().split(), [line.lower().split() for line in [*group, "", "", ""][:3]]

        def grams(tokens, n):
            return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

        length += len(words)
        closest += min((abs(len(line) - len(words)), len(line)) for line in lines)[1]
        for n in range(1, 5):
            most = grams(lines[0], n) | grams(lines[1], n) | grams(lines[2], n)
            matches[n] += (grams(words, n) & most).total()
            totals[n] += grams(words, n).total()
    if not all(matches[n] for n in range(1, 5)):
        return 0.0
    brevity = min(1.0, math.exp(1 - closest / length))
    return 100 * brevity * math.exp(sum(math.log(matches[n] / totals[n]) for n in range(1, 5)) / 4)


def test_multi_bleu_by_hand():
    # Of "a b c d x" 4/5, 3/4, 2/3 and 1/2 n-grams are right; two words are missing.
    found = multi_bleu(["A b c d x"], [["a b c d e f g", "a b c d e f g", "a b c d e f g"]])
    assert found == pytest.approx(100 * math.exp(1 - 7 / 5) * 0.2**0.25)
    # With one reference the two other lines are empty, and neither is closer than seven words to five.
    assert multi_bleu(["A b c d x"], [["a b c d e f g"]]) == found
    # To four words a reference of nine is farther than an empty line, so that nothing is too short.
    assert multi_bleu(["a b c d"], [["a b c d e f g h i"]]) == pytest.approx(100)
    assert multi_bleu(["a b c"], [["a b c"]]) == 0  # no n-gram of four words, and no smoothing


def test_multi_bleu_is_the_scripts_on_random_texts():
    rng = random.Random(0)

    def text(longest):
        return " ".join(rng.choice("aBc.") for _ in range(rng.randint(0, longest)))

    for _ in range(200):
        size = rng.randint(1, 4)
        groups = [[f"a {text(9)}" for _ in range(rng.randint(1, 3))] for _ in range(size)]
        texts = [text(12) for _ in range(size)]
        assert multi_bleu(texts, groups) == pytest.approx(perl(texts, groups), abs=1e-9)


@pytest.mark.parametrize(
    ("text", "group", "edits", "length"),
    [
        ("a b c", ["a b c"], 0, 3),
        ("a b x", ["a b c d"], 2, 4),  # one word is another, one is missing
        ("c d e a b", ["a b c d e"], 1, 5),  # a phrase that moves is one edit, however long
        ("b a", ["a b"], 1, 2),
        ("A B C", ["a b c"], 0, 3),  # case does not count
        ("a b c .", ["a b c"], 1, 3),  # punctuation does
        ("a b c", ["a b c d e f", "a x c d"], 2, 5),  # edits to the closest, words of the mean one
        ("", ["a b"], 2, 2),
    ],
)
def test_edits_are_those_of_tercom(text, group, edits, length):
    assert count_edits(text, group) == (edits, length)


def test_ter_is_of_the_corpus():
    assert ter([(1, 2.0), (0, 6.0)]) == 1 / 8
    assert ter([(3, 2.0)]) == 1.5


def test_webnlg_reads_three_references_in_ascii_and_lower_case(no_java):
    with pytest.warns(UserWarning, match="METEOR will be null"):
        scores = score(["webnlg"], PREDICTIONS, REFERENCES, None, GROUPS)
    # "1 , 850" should be "1850"; "a", "in" and "italy" are missing, since a fourth reference does not count.  The first
    # three have 11 and 15, and 7, 5 and 3 words.
    assert scores["ter_seen"] == pytest.approx((3 + 3) / ((11 + 15) / 2 + (7 + 5 + 3) / 3))
    # The first of these is right, with one letter in ASCII; the other lacks all five words.
    assert scores["ter_unseen"] == pytest.approx(5 / (6 + 5))
    assert scores["ter_all"] == pytest.approx((3 + 3 + 5) / (13 + 5 + 6 + 5))
    assert {key: value for key, value in scores.items() if "meteor" in key} == {
        f"meteor_{name}": None for name in ("seen", "unseen", "all")
    }


def test_webnlg_bleu_is_of_each_group(no_java):
    texts = ["a b c d x", "one two three four five", "a b c d e"]
    references = [["a b c d e"], ["one two three four five"], ["a b c d e"]]
    with pytest.warns(UserWarning, match="METEOR"):
        scores = score(["webnlg"], texts, references, None, ["unseen", "seen", "unseen"])
    assert scores["bleu_seen"] == pytest.approx(100)
    assert scores["bleu_unseen"] == pytest.approx(100 * (9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25)
    assert scores["bleu_all"] == pytest.approx(100 * (14 / 15 * 11 / 12 * 8 / 9 * 5 / 6) ** 0.25)


def test_pound_signs_are_what_they_are_to_the_challenge(no_java):
    with pytest.warns(UserWarning, match="METEOR|categories"):
        scores = score(["webnlg"], ["a £20"], [["a £20"]])
    assert scores["ter_all"] == pytest.approx(2 / 3)  # "a ps20", but should be "a PS 20"


def test_without_groups_seen_and_unseen_are_null_and_one_warning_says_so(no_java):
    with pytest.warns(UserWarning, match="will be null") as caught:
        first, second = (score(["webnlg"], ["a b c d"], [["a b c d"]]) for _ in range(2))
    assert sorted(str(warning.message).split(" will be null: ")[0] for warning in caught) == [
        "METEOR",
        "what is for seen and unseen categories",
    ]
    assert first == second
    assert {key for key, value in first.items() if value is not None} == {"bleu_all", "ter_all"}


def test_a_group_without_records_has_no_score(no_java):
    with pytest.warns(UserWarning, match="unseen categories will be null: none of the 1 records is of one|METEOR"):
        scores = score(["webnlg"], ["a b c d"], [["a b c d"]], None, ["seen"])
    assert scores["bleu_unseen"] is scores["ter_unseen"] is None
    assert scores["bleu_seen"] == scores["bleu_all"] == pytest.approx(100)


@needs_java
def test_meteor_of_parts_is_that_of_each_alone(one_meteor):
    texts = [spaced(text.lower()) for text in PREDICTIONS]
    groups = [[spaced(text.lower()) for text in group[:3]] for group in REFERENCES]
    assert meteor(texts, groups, [[0, 2], [1, 3], [0, 1, 2, 3]]) == pytest.approx(METEOR, abs=1e-12)


def test_groups_travel_from_the_data_to_the_metric(tmp_path, no_java):
    def entry(category, subject, text):
        triple = {"subject": subject, "property": "isA", "object": "B"}
        texts = [{"comment": "good", "lex": text}]
        return {"category": category, "modifiedtripleset": [triple], "lexicalisations": texts}

    entries = [entry("Food", "Apple", "Apple is a B."), entry("Artist", "Bo", "Bo is a B."), entry("City", "C", "C.")]
    content = {"entries": [{str(number): record} for number, record in enumerate(entries, 1)]}
    (tmp_path / "test.json").write_text(json.dumps(content))
    options = {"leading_separator": False, "only_good": True, "domain": "all"}
    records = data.group_references(webnlg_data.load(str(tmp_path), "test", **options))
    split = setup.Split([], records, [])
    with pytest.warns(UserWarning, match="METEOR"):
        scores = evaluate.score(("webnlg",), ["apple is a b.", "Bo", "C."], split)
    assert scores["ter_seen"] == 0
    assert scores["ter_unseen"] == pytest.approx(4 / 5)
    assert scores["ter_all"] == pytest.approx(4 / 12)


def test_the_command_takes_groups(tmp_path, capsys, no_java):
    files = {"predictions": "a b c d\na b\n", "references": "a b c d\n\na b c d\n", "groups": "seen\nunseen\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    arguments = [f"--{name}={tmp_path / name}" for name in files]
    with pytest.warns(UserWarning, match="METEOR"):
        assert run.main(["score", "--metrics=webnlg", *arguments]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["bleu_seen"], scores["ter_seen"], scores["ter_unseen"]) == (pytest.approx(100), 0, 0.5)
    (tmp_path / "groups").write_text("seen\nnew\n")
    assert run.main(["score", "--metrics=webnlg", *arguments]) == 1
    assert capsys.readouterr().err == "error: group 'new' of record 2; valid: seen, unseen\n"


FAKES = {  # packages that say what they were given
    "bleurt/score.py": """
        class BleurtScorer:
            def __init__(self, checkpoint):
                assert checkpoint.replace("\\\\", "/").endswith("bleurt/test_checkpoint")
            def score(self, *, references, candidates, batch_size):
                print("noise on standard output")
                return [len(a) + len(b) / 100 for a, b in zip(candidates, references)]
    """,
    "moverscore_v2.py": """
        def get_idf_dict(texts):
            return len(texts)
        def word_mover_score(refs, hyps, idf_ref, idf_hyp, stop_words, n_gram, remove_subwords):
            assert (idf_ref, idf_hyp, stop_words, n_gram, remove_subwords) == (2, 2, [], 1, True)
            return [1 - len(a) / 10 - len(b) / 100 for a, b in zip(hyps, refs)]
    """,
}


def install(folder, name, text):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(line[8:] for line in text.splitlines()) + "\n")


def test_dart_of_packages_that_are_there(tmp_path, monkeypatch, no_java):
    for name, text in FAKES.items():
        install(tmp_path, name, text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.warns(UserWarning, match="METEOR|BERTScore"):
        scores = score(["dart"], ["É-b", "a b c d e"], [["é - b", "é"], ["A b c d", "a b c d e"]])
    assert scores == {
        "dart_bleu": pytest.approx(100),  # of all references
        "dart_meteor": None,
        "dart_ter": pytest.approx(1 / 7),  # of the first
        "dart_moverscore": pytest.approx(1 - (0.5 + 0.05 + 0.9 + 0.07) / 2),
        "dart_bertscore": None,
        "dart_bleurt": pytest.approx((5.05 + 9.07) / 2),
    }


def test_what_is_not_there_is_null_with_a_reason(no_java):
    with pytest.warns(UserWarning, match="will be null") as caught:
        first, second = (score(["dart"], ["a b c d"], [["a b c d"]]) for _ in range(2))
    said = {title: reason for title, _, reason in (str(w.message).partition(" will be null: ") for w in caught)}
    assert len(caught) == len(said) == 4
    assert said["BERTScore"].startswith("roberta-large is not in the cache of Hugging Face; `pip install bert-score`")
    assert "No module named 'bleurt'; `pip install git+" in said["BLEURT"]
    assert "No module named 'moverscore_v2'; it runs on a GPU only" in said["MoverScore"]
    assert first == second
    assert {key for key, value in first.items() if value is not None} == {"dart_bleu", "dart_ter"}


def test_another_formula_of_moverscore_is_refused(tmp_path, monkeypatch):
    install(tmp_path, "moverscore_v2.py", FAKES["moverscore_v2.py"].replace("1 - len(a)", "1./(1. + len(a)) + len(a)"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.warns(UserWarning, match="MoverScore will be null: ImportError: .*another formula"):
        assert learned.moverscore(["a", "b"], [["a"], ["b"]]) is None


def test_another_python_can_hold_the_packages(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    install(tmp_path, "bleurt/score.py", FAKES["bleurt/score.py"])
    monkeypatch.setenv(learned.PYTHON, str(python))
    assert learned.bleurt(["abc"], [["ab", "b"]]) == pytest.approx(3.02)
    monkeypatch.setenv(learned.PYTHON, str(tmp_path / "none"))
    with pytest.warns(UserWarning, match="BLEURT will be null: .*No such file"):
        assert learned.bleurt(["abc"], [["ab"]]) is None


def test_bertscore_is_its_definition(tmp_path):
    """The real package on a tiny random RoBERTa, which has a token of its own for a first word after a space."""
    pytest.importorskip("bert_score")
    folder = tmp_path / "models--roberta-large" / "snapshots" / "0"
    (tmp_path / "models--roberta-large" / "refs").mkdir(parents=True)
    (tmp_path / "models--roberta-large" / "refs" / "main").write_text("0")
    model, encode = tiny_roberta(folder)
    texts = ["a pub by the river", "", "cheap bar"]
    groups = [["a bar by the river", "a pub"], ["a pub"], ["a cheap bar near the pub"]]

    def f1(text, reference):
        ours, theirs = (torch.nn.functional.normalize(encode(line), dim=-1) for line in (text, reference))
        similar = ours @ theirs.T
        # The two special tokens of each may be the closest to a word, but are none themselves.
        p, r = similar.max(1).values[1:-1].mean(), similar.max(0).values[1:-1].mean()
        return float(2 * p * r / (p + r))

    wanted = [
        max(f1(text, reference) for reference in group) if text else 0.0
        for text, group in zip(texts, groups, strict=True)
    ]
    assert learned.bertscore(texts, groups) == pytest.approx(sum(wanted) / 3, abs=1e-5)
    assert model.config.num_hidden_layers > 17


def tiny_roberta(folder):
    """Writes a model and a tokenizer; returns the model and text -> the states [T D] after 17 of its layers."""
    folder.mkdir(parents=True)
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(["a pub by the river", "cheap bar near the pub"] * 9, trainer)
    trained.model.save(str(folder))
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    tokenizer = transformers.RobertaTokenizer(**files, model_max_length=40)
    tokenizer.save_pretrained(folder)
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=18,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=48,
        initializer_range=0.2,  # more, and all words end in the same state
        pad_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.RobertaModel(config).eval()
    model.save_pretrained(folder)
    vocabulary = json.loads(Path(files["vocab"]).read_text())
    spaced_words = [trained.encode(word).ids for word in ("a", "cheap")]
    assert spaced_words == [[vocabulary["Ġa"]], [vocabulary["Ġcheap"]]]

    def encode(text):
        with torch.no_grad():
            states = model(torch.tensor([[0, *trained.encode(text).ids, 2]]), output_hidden_states=True).hidden_states
        return states[17][0]

    return model, encode
