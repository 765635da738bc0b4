"""Loaders of the benchmarks beside E2E and WebNLG, on small files in their own formats and in the hub's columns."""

import json

import datasets
import pytest
from test_data import SHARED, _own_cache, error, jsonl, needs_shared, write  # noqa: F401

from prefix_tuning.data import conll2003, dart, glue, squad, superglue, text, xsum


def write_tsv(folder, name, *rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


def write_hub(folder, split, *rows):
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(list(rows)).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def test_sst2_reads_files_with_and_without_a_header(tmp_path):
    expected = [{"source": 'a " joy', "label": "positive"}, {"source": "bad", "label": "negative"}]
    headed = write_tsv(tmp_path / "headed", "train.tsv", ("sentence", "label"), ('a " joy', "1"), ("bad", "0"))
    bare = write_tsv(tmp_path / "bare", "train.tsv", ('a " joy', "1"), ("bad", "0"))
    assert glue.load(headed, "train", task="sst2").to_list() == expected
    assert glue.load(bare, "train", task="sst2").to_list() == expected


GLUE = {  # task -> (folder, file, its lines, the row)
    "cola": ("CoLA", "dev.tsv", [("gj04", "0", "*", "They drank the pub.")], ("They drank the pub.", "unacceptable")),
    "mnli": (
        "MNLI",
        "dev_matched.tsv",
        [("index", "sentence1", "sentence2", "label1", "gold_label"), ("0", "p", "h", "neutral", "contradiction")],
        ("p", "h", "contradiction"),
    ),
    "mrpc": (
        "MRPC",
        "dev.tsv",
        [("\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"), ("1", "7", "8", "one", "two")],
        ("one", "two", "equivalent"),
    ),
    "qnli": (
        "QNLI",
        "dev.tsv",
        [("index", "question", "sentence", "label"), ("0", "q", "s", "not_entailment")],
        ("q", "s", "not_entailment"),
    ),
    "qqp": (
        "QQP",
        "dev.tsv",
        [("id", "qid1", "qid2", "question1", "question2", "is_duplicate"), ("0", "1", "2", "one?", "two?", "1")],
        ("one?", "two?", "duplicate"),
    ),
    "rte": (
        "RTE",
        "dev.tsv",
        [("index", "sentence1", "sentence2", "label"), ("0", "one", "two", "entailment")],
        ("one", "two", "entailment"),
    ),
    "sst2": ("SST-2", "dev.tsv", [("sentence", "label"), ("fine ", "1")], ("fine ", "positive")),
    "wnli": (
        "WNLI",
        "dev.tsv",
        [("index", "sentence1", "sentence2", "label"), ("0", "one", "two", "1")],
        ("one", "two", "entailment"),
    ),
}


@pytest.mark.parametrize("task", glue.TASKS)
def test_glue_reads_the_benchmarks_files_in_their_folders(tmp_path, task):
    folder, file, lines, row = GLUE[task]
    write_tsv(tmp_path / folder, file, *lines)
    columns = ["source", "label"] if len(row) == 2 else ["source", "source2", "label"]
    for path in (tmp_path, tmp_path / folder):
        assert glue.load(str(path), "validation", task=task).to_list() == [dict(zip(columns, row, strict=True))]


def test_mnli_has_two_validation_splits(tmp_path):
    header = ("sentence1", "sentence2", "gold_label")
    write_tsv(tmp_path, "dev_matched.tsv", header, ("p", "h", "neutral"))
    write_tsv(tmp_path, "dev_mismatched.tsv", header, ("q", "h", "entailment"))
    options = {"task": "mnli", "mismatched": True}
    assert glue.load(str(tmp_path), "validation", **options)["source"][:] == ["q"]
    assert "mismatched=True is about task 'mnli'" in error(glue.load, ".", "train", task="rte", mismatched=True)


def test_mnli_has_two_validation_splits_on_the_hub(monkeypatch):
    names = ["train", "validation_matched", "validation_mismatched"]
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: names)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: [{"premise": split, "hypothesis": "h", "label": 1}])
    for split, mismatched, premise in (("train", True, 0), ("validation", False, 1), ("validation", True, 2)):
        rows = glue.load("glue", split, task="mnli", mismatched=mismatched).to_list()
        assert rows == [{"source": names[premise], "source2": "h", "label": "neutral"}]


def test_glue_reads_the_hubs_columns(tmp_path):
    path = write_hub(tmp_path, "train", {"question": "q", "sentence": "s", "label": 1, "idx": 0})
    write_hub(tmp_path, "test", {"question": "q", "sentence": "s", "label": -1, "idx": 0})
    assert glue.load(path, "train", task="qnli").to_list() == [
        {"source": "q", "source2": "s", "label": "not_entailment"}
    ]
    assert "row 0 has no label: the benchmark keeps those" in error(glue.load, path, "test", task="qnli")


def test_glue_asks_the_hub_for_the_task(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *name: asked.append(name) or [])
    for path in ("nyu-mll/glue", "nyu-mll/glue:cola", "someone/cola"):
        error(glue.load, path, "train", task="cola")
    assert asked == [("nyu-mll/glue", "cola"), ("nyu-mll/glue", "cola"), ("someone/cola", None)]
    message = error(glue.load, "nyu-mll/glue:sst2", "train", task="cola")
    assert message == "path 'nyu-mll/glue:sst2' and task 'cola' are not the same; leave out ':sst2'"


def test_glue_says_what_is_wrong(tmp_path):
    assert "task 'stsb' is a regression and has no classes; valid: cola" in error(glue.load, ".", "train", task="stsb")
    assert "unknown task 'sst'; valid: cola, mnli" in error(glue.load, ".", "train", task="sst")
    path = write_tsv(tmp_path, "train.tsv", ("good", "1"), ("bad",))
    assert "train.tsv:2 has 1 cells; expected 2: sentence, label" in error(glue.load, path, "train", task="sst2")
    write_tsv(tmp_path, "train.tsv", ("good", "1"), ("bad", "2"))
    message = error(glue.load, path, "train", task="sst2")
    assert "train.tsv:2: label '2'; valid: negative, positive, or a number below 2" in message
    write_tsv(tmp_path, "test.tsv", ("index", "sentence"), ("0", "good"))
    assert "test.tsv:2 has no label" in error(glue.load, path, "test", task="sst2")
    write_tsv(tmp_path, "dev.tsv", ("index", "text", "label"), ("0", "good", "1"))
    assert "dev.tsv:2: no column 'sentence'; present: index" in error(glue.load, path, "validation", task="sst2")


def test_qqp_leaves_its_broken_lines_out_and_says_so(tmp_path):
    header = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
    path = write_tsv(tmp_path, "train.tsv", header, ("0", "1", "2", "broken"), ("1", "3", "4", "a", "b", "0"))
    with pytest.warns(UserWarning, match=r"train.tsv: 1 broken lines are left out"):
        rows = glue.load(path, "train", task="qqp").to_list()
    assert rows == [{"source": "a", "source2": "b", "label": "not_duplicate"}]


@needs_shared
@pytest.mark.parametrize(("split", "size", "positive"), [("train", 6_920, 3_610), ("validation", 872, 444)])
def test_real_sst2_has_the_published_counts(split, size, positive):
    rows = glue.load(str(SHARED / "sst2"), split, task="sst2")
    assert (len(rows), rows["label"][:].count("positive")) == (size, positive)


@pytest.mark.parametrize(
    "row",
    [
        {"source": "a", "label": "good"},
        {"source": "a", "source2": "b", "label": "1"},
        {"words": ["a", "b"], "tags": ["O", "B-X"]},
        {"source": "a", "choices": ["x", "y"], "label": 1},
        {"source": "a", "source2": "b", "choices": ["x"], "label": 0},
    ],
)
def test_text_keeps_rows_of_each_kind(tmp_path, row):
    path = write(tmp_path, train__jsonl=jsonl(row | {"id": 7}, row))
    assert text.load(path, "train").to_list() == [row, row]


def test_text_reads_classes_from_csv(tmp_path):
    path = write(tmp_path, test__csv="label,source\nNA,a\n0,b\n")
    assert text.load(path, "test").to_list() == [{"source": "a", "label": "NA"}, {"source": "b", "label": "0"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"source": "a"}], ":1: no column of an answer (target, targets, label, words and tags, or choices and"),
        ([{"source": "a", "target": "b", "label": "c"}], ":1: columns of several kinds of task, target, label; expect"),
        ([{"source": "a", "label": "c"}, {"source": "a", "target": "b"}], ":2: another kind of task than the rows"),
        ([{"source": "a", "label": "c"}, {"source": "a"}], ":2: no column 'label'; present: source"),
        ([{"source": "a", "label": 1}], ":1: column 'label' holds 1; expected a string"),
        ([{"source": "a", "source2": "b", "label": "c"}, {"source": "a", "label": "c"}], ":2: only some rows have"),
        ([{"source": "a", "label": "c"}, {"source": "a", "source2": "b", "label": "c"}], ":2: only some rows have"),
        ([{"source": "a", "source2": None, "label": "c"}], ":1: column 'source2' holds None; expected a string"),
        ([{"words": ["a"], "tags": ["O", "O"]}], ":1: 1 words, but 2 tags; expected a tag for each word"),
        ([{"words": "a b", "tags": ["O", "O"]}], ":1: column 'words' holds 'a b'; expected a list of strings"),
        ([{"words": ["a"]}], ":1: no column 'tags'; present: words"),
        ([{"source": "a", "choices": ["x", "y"], "label": 2}], "'label' holds 2; expected a number from 0 to 1"),
        ([{"source": "a", "choices": ["x", "y"], "label": True}], "'label' holds True; expected a number from 0 to 1"),
        ([{"source": "a", "choices": ["x", "y"], "label": "x"}], "'label' holds 'x'; expected a number from 0 to 1"),
        ([{"source": "a", "choices": [], "label": 0}], "'choices' holds []; expected a list of strings"),
    ],
)
def test_text_names_the_row_that_is_of_no_kind(tmp_path, rows, message):
    assert message in error(text.load, write(tmp_path, train__jsonl=jsonl(*rows)), "train")


CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP I-ORG
and CC I-NP O
New NNP I-NP I-LOC
York NNP I-NP I-LOC
Paris NNP I-NP B-LOC

\tBonn NNP I-NP I-MISC\r
IBM NNP I-NP I-ORG"""


def test_conll2003_reads_columns_and_begins_entities_with_b(tmp_path):
    expected = [
        {"words": ["EU", "and", "New", "York", "Paris"], "tags": ["B-ORG", "O", "B-LOC", "I-LOC", "B-LOC"]},
        {"words": ["Bonn", "IBM"], "tags": ["B-MISC", "B-ORG"]},
    ]
    path = write(tmp_path, eng__train=CONLL, valid__txt=CONLL + "\n\n\n")
    assert conll2003.load(path, "train").to_list() == expected
    assert conll2003.load(path, "validation").to_list() == expected


def test_iob2_is_left_alone():
    tags = ["B-PER", "I-PER", "B-PER", "O", "B-LOC", "B-PER", "I-PER"]
    assert conll2003.iob2(tags) == tags
    assert conll2003.iob2([]) == []


def test_conll2003_reads_the_hubs_numbers(tmp_path):
    path = write_hub(tmp_path, "test", {"id": "0", "tokens": ["A", "B", "C", "D"], "ner_tags": [1, 2, 0, 7]})
    assert conll2003.load(path, "test").to_list() == [
        {"words": ["A", "B", "C", "D"], "tags": ["B-PER", "I-PER", "O", "B-MISC"]}
    ]
    path = write_hub(tmp_path / "more", "test", {"tokens": ["A"], "ner_tags": [9]})
    assert "row 0: tag 9; expected a number from 0 to 8" in error(conll2003.load, path, "test")
    path = write_hub(tmp_path / "short", "test", {"tokens": ["A", "B"], "ner_tags": [1]})
    assert "row 0: column 'ner_tags' holds [1]; expected a tag for each of" in error(conll2003.load, path, "test")


@pytest.mark.parametrize("line", ["EU", "EU NNP I-NP ORG", "EU B-"])
def test_conll2003_names_the_malformed_line(tmp_path, line):
    path = write(tmp_path, test__txt=f"A NNP I-NP O\n{line}\n")
    assert f"test.txt:2 is not `WORD ... TAG`, TAG being O, B-TYPE or I-TYPE: {line!r}" in error(
        conll2003.load, path, "test"
    )


def squad_json(context, *questions):
    asked = [
        {"id": str(number), "question": question, "answers": [{"text": t, "answer_start": s} for t, s in answers]}
        for number, (question, answers) in enumerate(questions)
    ]
    return json.dumps({"version": "1", "data": [{"title": "T", "paragraphs": [{"context": context, "qas": asked}]}]})


CONTEXT = "Café Rouge is in Paris, in Paris."
QUESTION = {"source": "Where?", "source2": CONTEXT, "answers": ["Paris", "in Paris"], "starts": [17, 14]}
NOWHERE = {"source": "When?", "source2": CONTEXT, "answers": [], "starts": []}


def test_squad_reads_the_benchmarks_json(tmp_path):
    content = squad_json(CONTEXT, ("Where?", [("Paris", 17), ("in Paris", 14)]), ("When?", []))
    (tmp_path / "train-v2.0.json").write_text(content, encoding="utf-8")
    assert squad.load(str(tmp_path), "train").to_list() == [QUESTION, NOWHERE]
    assert "has no test split; present: train" in error(squad.load, str(tmp_path), "test")
    (tmp_path / "dev-v1.1.json").write_text(content, encoding="utf-8")
    message = error(squad.load, str(tmp_path), "train")
    assert "two versions, train-v2.0.json, dev-v1.1.json; expected a folder with one" in message


def test_squad_reads_the_hubs_columns(tmp_path):
    answers = {"text": ["Paris", "in Paris"], "answer_start": [17, 14]}
    rows = [{"id": "0", "title": "T", "context": CONTEXT, "question": "Where?", "answers": answers}]
    rows.append(rows[0] | {"question": "When?", "answers": {"text": [], "answer_start": []}})
    path = write_hub(tmp_path, "validation", *rows)
    assert squad.load(path, "validation").to_list() == [QUESTION, NOWHERE]


def test_squad_says_what_is_wrong(tmp_path):
    (tmp_path / "dev-v1.1.json").write_text(squad_json(CONTEXT, ("Where?", [("Paris", 16)])), encoding="utf-8")
    message = error(squad.load, str(tmp_path), "validation")
    assert "dev-v1.1.json, question 0: the context does not say 'Paris' at character 16" in message
    for content in ('{"rows": []}', '{"data": [{"paragraphs": [{"context": "c"}]}]}', "[", '{"data": 3}'):
        (tmp_path / "dev-v1.1.json").write_text(content)
        assert "dev-v1.1.json is not SQuAD's JSON" in error(squad.load, str(tmp_path), "validation")
    path = write_hub(tmp_path / "hub", "train", {"question": "q", "context": "c", "answers": ["c"]})
    assert "row 0: no answers with text and answer_start" in error(squad.load, path, "train")


WSC = "Mark told Pete lies, which he included in his book. He should have been wary."
SUPERGLUE = {  # task -> (folder, a line of the benchmark's, columns of the hub's, the row)
    "boolq": (
        "BoolQ",
        {"question": "q", "passage": "p", "idx": 0, "label": True},
        {"question": "q", "passage": "p", "label": 1},
        {"source": "q", "source2": "p", "label": "True"},
    ),
    "cb": (
        "CB",
        {"premise": "p", "hypothesis": "h", "label": "neutral", "idx": 0},
        {"premise": "p", "hypothesis": "h", "label": 2},
        {"source": "p", "source2": "h", "label": "neutral"},
    ),
    "copa": (
        "COPA",
        {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "label": 1, "idx": 0},
        {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "label": 1},
        {"source": "p", "source2": "What was the cause?", "choices": ["a", "b"], "label": 1},
    ),
    "multirc": (
        "MultiRC",
        {"passage": {"text": "p", "questions": [{"question": "q?", "answers": [{"text": "a\tb", "label": 0}]}]}},
        {"paragraph": "p", "question": "q?", "answer": "a\tb", "label": 0},
        {"source": "q? p", "source2": "a b", "label": "False"},
    ),
    "rte": (
        "RTE",
        {"premise": "p", "hypothesis": "h", "label": "not_entailment", "idx": 0},
        {"premise": "p", "hypothesis": "h", "label": 1},
        {"source": "p", "source2": "h", "label": "not_entailment"},
    ),
    "wic": (
        "WiC",
        {"word": "bed", "sentence1": "A bed.", "sentence2": "A river bed.", "label": False, "start1": 2},
        {"word": "bed", "sentence1": "A bed.", "sentence2": "A river bed.", "label": 0},
        {"source": "bed: A bed.", "source2": "A river bed.", "label": "False"},
    ),
    "wsc": (
        "WSC",
        {"text": WSC, "target": {"span1_text": "Pete", "span2_text": "He", "span2_index": 9}, "label": True},
        {"text": WSC, "span1_text": "Pete", "span2_text": "He", "span2_index": 10, "label": 1},
        {"source": WSC.replace("He", "*He*"), "source2": "Pete", "label": "True"},
    ),
}


@pytest.mark.parametrize("task", superglue.TASKS)
def test_superglue_reads_the_benchmarks_files_and_the_hubs_columns(tmp_path, task):
    folder, line, columns, row = SUPERGLUE[task]
    (tmp_path / folder).mkdir()
    write(tmp_path / folder, val__jsonl=jsonl(line))
    for path in (tmp_path, tmp_path / folder):
        assert superglue.load(str(path), "validation", task=task).to_list() == [row]
    path = write_hub(tmp_path / "hub", "train", columns)
    assert superglue.load(path, "train", task=task).to_list() == [row]


def test_multirc_has_a_row_for_every_answer(tmp_path):
    answers = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    questions = [{"question": "q1", "answers": answers}, {"question": "q2", "answers": answers[:1]}]
    path = write(tmp_path, train__jsonl=jsonl({"idx": 0, "passage": {"text": "p", "questions": questions}}))
    rows = superglue.load(path, "train", task="multirc").to_list()
    assert [tuple(row.values()) for row in rows] == [
        ("q1 p", "a", "True"),
        ("q1 p", "b", "False"),
        ("q2 p", "a", "True"),
    ]


def test_wsc_marks_the_pronoun_nearest_to_its_number(tmp_path):
    for number, marked in ((1, "Ann met *her,* and her cat"), (4, "Ann met her, and *her* cat")):
        fields = {"text": "Ann met her, and her cat", "span1_text": "Ann", "span2_text": "her", "label": False}
        path = write(tmp_path, train__jsonl=jsonl(fields | {"span2_index": number}))
        assert superglue.load(path, "train", task="wsc")["source"][:] == [marked]


def test_superglue_says_what_is_wrong(tmp_path):
    assert "unknown task 'record'; valid: boolq, cb" in error(superglue.load, ".", "train", task="record")
    for task, (_, line, _, _) in SUPERGLUE.items():
        unlabelled = {key: value for key, value in line.items() if key != "label"}
        if task == "multirc":
            passage = {"text": "p", "questions": [{"question": "q", "answers": [{"text": "a"}]}]}
            unlabelled = {"passage": passage}
        path = write(tmp_path, test__jsonl=jsonl(unlabelled))
        assert "test.jsonl:1 has no label: the benchmark keeps" in error(superglue.load, path, "test", task=task)
    for task, changed, message in (
        (
            "wsc",
            {"target": {"span1_text": "Pete", "span2_text": "they", "span2_index": 3}},
            "has no word 'they'; expected",
        ),
        (
            "wsc",
            {"target": {"span1_text": "Pete", "span2_text": "He", "span2_index": 99}},
            "holds 99; expected a number",
        ),
        ("wsc", {"target": 3}, "is no line of SuperGLUE (TypeError"),
        ("copa", {"question": "why"}, "unknown question in"),
        ("copa", {"label": 2}, "label 2; valid: 0, 1"),
        ("boolq", {"passage": None}, "column 'passage' holds None; expected a string"),
        ("boolq", {"label": "yes"}, "label 'yes'; valid: False, True"),
        ("cb", {"label": True}, "label 'True'; valid: entailment, contradiction, neutral"),
        ("multirc", {"passage": {"text": "p"}}, "is no line of SuperGLUE (KeyError: 'questions')"),
    ):
        path = write(tmp_path, train__jsonl=jsonl(SUPERGLUE[task][1] | changed))
        assert message in (found := error(superglue.load, path, "train", task=task))
        assert "train.jsonl:1" in found


TRIPLES = [["Mars", "HAS_MOON", "Phobos"], ["[TABLECONTEXT]", "Title", "Moons : all"]]
DART = [
    {"source": "Mars : has_moon : Phobos | [TABLECONTEXT] : title : Moons : all", "target": target}
    for target in ("Phobos orbits Mars.", "Mars has Phobos.")
]


def test_dart_reads_the_releases_json_and_the_hubs_columns(tmp_path):
    texts = [{"source": "x", "text": f"{pair['target']} "} for pair in DART]
    content = json.dumps([{"tripleset": TRIPLES, "subtree_was_extended": False, "annotations": texts}])
    (tmp_path / "dart-v1.1.1-full-dev.json").write_text(content)
    assert dart.load(str(tmp_path), "validation").to_list() == DART
    annotations = {"source": ["x", "y"], "text": [pair["target"] for pair in DART]}
    path = write_hub(tmp_path / "hub", "test", {"tripleset": TRIPLES, "annotations": annotations})
    assert dart.load(path, "test").to_list() == DART


def test_dart_says_what_is_wrong(tmp_path):
    for content in ("{", '{"a": 1}', '[{"tripleset": []}]'):
        (tmp_path / "dart-v1.1.1-full-train.json").write_text(content)
        assert "full-train.json is not DART's JSON" in error(dart.load, str(tmp_path), "train")
    (tmp_path / "dart-v1.1.1-full-train.json").write_text('[{"tripleset": [["a", "b"]], "annotations": []}]')
    message = error(dart.load, str(tmp_path), "train")
    assert "entry 0: not DART's columns; present: tripleset, annotations" in message


def test_xsum_reads_lines_and_the_hubs_columns(tmp_path):
    write(tmp_path, val__source="a b\nc\n", val__target="A.\nC.\n")
    expected = [{"source": "a b", "target": "A."}, {"source": "c", "target": "C."}]
    assert xsum.load(str(tmp_path), "validation").to_list() == expected
    rows = [{"document": "a\nb", "summary": "A.", "id": "1"}, {"document": "c", "summary": "C.", "id": "2"}]
    assert xsum.load(write_hub(tmp_path / "hub", "train", *rows), "train").to_list() == expected


def test_xsum_says_what_is_wrong(tmp_path):
    path = write(tmp_path, test__source="a\nb\n")
    assert "test.source has no test.target beside it" in error(xsum.load, path, "test")
    for summaries in ("A.\n", "A.\nB.\nC.\n"):
        write(tmp_path, test__target=summaries)
        assert "test.source and test.target differ in length" in error(xsum.load, path, "test")
    hub = write_hub(tmp_path / "hub", "train", {"article": "a", "summary": "A."})
    assert "row 0: no column 'document'; present: article, summary" in error(xsum.load, hub, "train")


ADDRESSES = {  # article -> where it was archived
    "1": "http://web.archive.org/web/20160926150011/http://www.bbc.co.uk/news/uk-wales-1",
    "2": "http://web.archive.org/web/20170224210716/http://www.bbc.com:80/news/world-2",
    "3": "http://web.archive.org/web/20170224210716/http://www.bbc.co.uk:80/news/science-environment-3",
    "4": "http://web.archive.org/web/20160610062355/http://www.bbc.com/sport/rugby-league/4",
    "5": "http://web.archive.org/web/20160610062355/http://www.bbc.co.uk/newsround/5",
    "6": "http://web.archive.org/web/20160610062355/http://www.bbc.co.uk/news/business-6",
}


def write_xsum(folder):
    """All articles in every split, and the list of their addresses."""
    urls = write(folder, urls__txt="".join(f"{url} {number}\n" for number, url in ADDRESSES.items())) + "/urls.txt"
    content = jsonl(*({"document": number, "summary": "S.", "id": number} for number in ADDRESSES))
    return write(folder, train__jsonl=content, validation__jsonl=content, test__jsonl=content), urls


@pytest.mark.parametrize(
    ("part", "learnt", "tested"),
    [("news_to_sports", ["1", "2", "3", "6"], ["4"]), ("within_news", ["1", "2", "6"], ["3"])],
)
def test_xsum_tests_on_what_it_does_not_train_on(tmp_path, part, learnt, tested):
    path, urls = write_xsum(tmp_path)
    for split, expected in (("train", learnt), ("validation", learnt), ("test", tested)):
        assert xsum.load(path, split, part=part, urls=urls)["source"][:] == expected
        assert xsum.load(path, split)["source"][:] == list(ADDRESSES)


def test_xsum_says_what_is_wrong_with_a_part(tmp_path):
    path, urls = write_xsum(tmp_path)

    def message(split="train", part="within_news", urls=urls):
        return error(xsum.load, path, split, part=part, urls=urls)

    assert message(part="sports") == "unknown part 'sports'; valid: news_to_sports, within_news"
    assert message(urls=None).startswith("part='within_news' and urls=None; expected both or neither")
    assert message(part=None).startswith(f"part=None and urls={urls!r}; expected both or neither")
    assert message(urls="absent.txt").startswith("urls='absent.txt' is no file; expected the benchmark's XSum-Web")
    for line in ("http://www.bbc.co.uk/news/uk-7", "http://www.bbc.co.uk/news/uk-7 seven", ""):
        write(tmp_path, other__txt=f"http://www.bbc.co.uk/news/uk-1 1\n{line}\n")
        assert f"other.txt:2 is not `ADDRESS NUMBER`: {line!r}" in message(urls=str(tmp_path / "other.txt"))
    write(tmp_path, other__txt="http://www.bbc.co.uk/news/uk-1 1\n")
    assert "train.jsonl:2: " in (found := message(urls=str(tmp_path / "other.txt")))
    assert found.endswith("other.txt has no address of article '2'")
    write(tmp_path, train__jsonl=jsonl({"document": "d", "summary": "S.", "id": "4"}))
    assert message().endswith("the train split has no article left with part='within_news'")
    write(tmp_path, train__jsonl=jsonl({"document": "d", "summary": "S."}))
    assert "train.jsonl:1: no column 'id'; present: document, summary" in message()


def test_superglue_as_text_is_read_and_written_by_name(tmp_path):
    for task, (_, line, _, _) in SUPERGLUE.items():
        path = write(tmp_path, train__jsonl=jsonl(line))
        if task in ("multirc", "wsc"):
            assert "unknown task with as_text=True" in error(superglue.load, path, "train", task=task, as_text=True)
            continue
        (plain,) = superglue.load(path, "train", task=task).to_list()
        (text,) = superglue.load(path, "train", task=task, as_text=True).to_list()
        assert text["target"] == (f"choice{plain['label'] + 1}" if task == "copa" else plain["label"])
        assert plain["source2"] in text["source"]
        if task == "wic":
            word, _, first = plain["source"].partition(": ")
            assert text["source"] == f"sentence1: {first} sentence2: {plain['source2']} word: {word}"
        else:
            assert plain["source"] in text["source"]
        assert all(choice in text["source"] for choice in plain.get("choices", ()))
