import csv
import json
from pathlib import Path

import datasets
import pytest

from prefix_tuning import data
from prefix_tuning.data import e2e, text, webnlg
from prefix_tuning.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
WEBNLG = {"leading_separator": False, "only_good": False, "domain": "all"}

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data is not at {SHARED}")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(folder, **files):
    """Writes `name__suffix=content`; returns the folder as the string that loaders take."""
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content, encoding="utf-8")
    return str(folder)


def write_csv(file, *rows):
    with file.open("w", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows(rows)


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def entry(number, category, triples, *texts):
    names = ("subject", "property", "object")
    return {
        number: {
            "category": category,
            "modifiedtripleset": [dict(zip(names, triple, strict=True)) for triple in triples],
            "lexicalisations": [{"comment": comment, "lex": lex} for comment, lex in texts],
        }
    }


def challenge(*entries):
    return json.dumps({"entries": entries})


AIRPORT = entry("1", "Airport", [("A_1", "isA", "B")], ("good", "A is B."), ("toFix", "A B."))
ARTIST = entry("2", "Artist", [("C", "wrote", '"D | E"'), ("C", "born", "1950")], ("good", "C wrote D E."))


def error(load, *arguments, **options):
    """The message of the UserError that loading raises; one line, as the command line prints it."""
    with pytest.raises(UserError) as caught:
        load(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_e2e_reads_the_papers_files_and_strips_on_demand(tmp_path):
    folder = write(
        tmp_path, src1_train__txt="name : Aromi | Type : pub||Aromi is a pub . \nname : Cotto||It is || it .\n"
    )
    kept = e2e.load(folder, "train", strip=False)
    assert kept.column_names == ["source", "target"]
    assert kept["target"][:] == ["Aromi is a pub . ", "It is || it ."]
    assert e2e.load(folder, "train", strip=True)["target"][0] == "Aromi is a pub ."
    assert kept["source"][:] == ["name : Aromi | Type : pub", "name : Cotto"]


RECORD = (
    "name[Blue Spice], eatType[coffee shop], food[Fast food], priceRange[£20-25], customer rating[3 out of 5], "
    "area[city centre], familyFriendly[yes], near[Café Rouge]"
)
LINEARISED = (
    "name : Blue Spice | Type : coffee shop | food : Fast food | price : £ 20 - 25 | customer rating : 3 out of 5 | "
    "area : city centre | family friendly : yes | near : Café Rouge"
)


def test_e2e_reads_the_challenges_csv(tmp_path):
    more = ("name[Aromi], priceRange[less than £20]", "Aromi, in\ntwo lines")
    write_csv(tmp_path / "devset.csv", ("mr", "ref"), (RECORD, "Blue Spice."), more)
    table = tmp_path / "devset.csv"
    table.write_text("\ufeff" + table.read_text(encoding="utf-8"), encoding="utf-8")  # as spreadsheets save it
    pairs = e2e.load(str(tmp_path), "validation", strip=False)
    assert pairs["source"][:] == [LINEARISED, "name : Aromi | price : less than £ 20"]
    assert pairs["target"][:] == ["Blue Spice.", "Aromi, in\ntwo lines"]


def test_e2e_reads_the_hubs_columns(tmp_path):
    rows = {"meaning_representation": [RECORD], "human_reference": ["Blue Spice."]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "validation-00000-of-00001.parquet")
    pairs = e2e.load(str(tmp_path), "validation", strip=False)
    assert pairs[:] == {"source": [LINEARISED], "target": ["Blue Spice."]}
    assert error(e2e.load, str(tmp_path), "test", strip=False).endswith("no test split; present: validation")


@pytest.mark.parametrize("line", ["name : Aromi", "||text", "name : Aromi||  ", ""])
def test_e2e_names_the_malformed_line(tmp_path, line):
    folder = write(tmp_path, src1_test__txt=f"a||b\n{line}\nc||d\n")
    assert "src1_test.txt:2 is not `record||text`" in error(e2e.load, folder, "test", strip=True)


def test_e2e_refuses_records_it_does_not_understand(tmp_path):
    for record, message in (("size[big]", "'size'; valid: area, customer rating"), ("name Aromi", "not of the form")):
        write_csv(tmp_path / "trainset.csv", ("mr", "ref"), ("name[Aromi]", "fine"), (record, "not"))
        assert message in (found := error(e2e.load, str(tmp_path), "train", strip=True))
        assert "trainset.csv:3" in found


def test_webnlg_linearises_and_filters(tmp_path):
    folder = write(tmp_path, dev__json=challenge(AIRPORT, ARTIST))
    assert webnlg.load(folder, "validation", **WEBNLG).to_list() == [
        {"source": "A_1 : isA : B", "target": "A is B.", "category": "Airport", "group": "seen", "entry": "1"},
        {"source": "A_1 : isA : B", "target": "A B.", "category": "Airport", "group": "seen", "entry": "1"},
        {
            "source": 'C : wrote : "D | E" | C : born : 1950',
            "target": "C wrote D E.",
            "category": "Artist",
            "group": "unseen",
            "entry": "2",
        },
    ]

    def targets(**options):
        return webnlg.load(folder, "validation", **WEBNLG | options)["target"][:]

    assert targets(only_good=True) == ["A is B.", "C wrote D E."]
    assert targets(domain="seen") == ["A is B.", "A B."]
    assert targets(domain="unseen") == ["C wrote D E."]
    led = webnlg.load(folder, "validation", **WEBNLG | {"leading_separator": True})
    assert led["source"][1:] == [" | A_1 : isA : B", ' | C : wrote : "D | E" | C : born : 1950']


def test_webnlg_reads_the_hubs_columns_and_drops_its_repeats(tmp_path):
    def row(number, kind, comments, texts):
        return {
            "category": "Airport",
            "eid": number,
            "test_category": kind,
            "modified_triple_sets": {"mtriple_set": [["A_1 | isA | B", "B | in | C"]]},
            "lex": {"comment": comments, "text": texts},
        }

    rows = [
        row("Id1", "testdata_with_lex", ["good", "good"], ["One.", "Two."]),
        row("Id2", "testdata_unseen_with_lex", ["good"], ["One again."]),
        row("Id3", "testdata_no_lex", [], []),
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    pairs = webnlg.load(str(tmp_path), "test", **WEBNLG)
    assert pairs["target"][:] == ["One.", "Two."]
    assert pairs["source"][0] == "A_1 : isA : B | B : in : C"


def test_webnlg_says_what_is_wrong(tmp_path):
    folder = write(tmp_path, train__json=challenge(AIRPORT), dev__json='{"rows": []}', test__json=challenge({"7": {}}))
    assert "valid: all, seen, unseen" in error(webnlg.load, folder, "train", **WEBNLG | {"domain": "new"})
    assert "no text left with domain='unseen'" in error(webnlg.load, folder, "train", **WEBNLG | {"domain": "unseen"})
    assert "dev.json is not the WebNLG challenge's JSON" in error(webnlg.load, folder, "validation", **WEBNLG)
    assert "test.json is not the WebNLG challenge's JSON" in error(webnlg.load, folder, "test", **WEBNLG)
    (tmp_path / "hub").mkdir()
    hub = write(tmp_path / "hub", train__jsonl=jsonl({"source": "a", "lex": "b"}))
    assert "row 0: not WebNLG's columns; present: source, lex" in error(webnlg.load, hub, "train", **WEBNLG)


def test_text_reads_json_lines_csv_and_the_hubs_layout(tmp_path):
    rows = jsonl({"source": "s1", "target": "t1"}, {"source": "s2", "targets": ["t2", "t3"]})
    write(tmp_path, train__jsonl=rows)
    # cells that a guessing reader would turn into numbers and missing values
    write_csv(tmp_path / "validation.csv", ("target", "source"), ("12", "NA"), ("null", "a,\nb"))
    expected = {"source": ["s1", "s2", "s2"], "target": ["t1", "t2", "t3"]}
    assert text.load(str(tmp_path), "train")[:] == expected
    assert text.load(str(tmp_path), "validation")[:] == {"source": ["NA", "a,\nb"], "target": ["12", "null"]}

    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    datasets.Dataset.from_dict(expected).to_parquet(hub / "dev-00000-of-00001.parquet")
    assert text.load(str(hub.parent), "validation")[:] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", " is empty; expected rows of the train split"),
        (jsonl({"source": "a", "target": "b"}, {"source": "c"}), ":2: no column 'target'; present: source"),
        (jsonl({"target": "b"}), ":1: no column 'source'; present: target"),
        (jsonl({"source": 3, "target": "b"}), ":1: column 'source' holds 3; expected a string"),
        (jsonl({"source": "a", "target": None}), ":1: column 'target' holds None; expected a string"),
        (jsonl({"source": "a", "targets": []}), ":1: column 'targets' holds []; expected a list of strings"),
        (jsonl({"source": "a", "targets": ["b", 4]}), ":1: column 'targets' holds ['b', 4]"),
        (jsonl({"source": "a", "targets": "b"}), ":1: column 'targets' holds 'b'"),
        ('{"source": "a", "target": "b"}\n{"sou\n', ":2 is not JSON"),
        ("[1, 2]\n", ":1 is not a JSON object: [1, 2]"),
    ],
)
def test_text_names_file_line_and_column(tmp_path, content, message):
    assert "train.jsonl" + message in error(text.load, write(tmp_path, train__jsonl=content), "train")


def test_text_names_the_csv_line(tmp_path):
    for row in (["a"], ["a", "b", "c"]):
        write_csv(tmp_path / "test.csv", ("source", "target"), ("a", "b"), row)
        message = "test.csv:3 has not as many cells as the header: source, target"
        assert message in error(text.load, str(tmp_path), "test")
    (tmp_path / "test.csv").write_bytes("source,target\nCafé,b\n".encode("latin-1"))
    assert "test.csv cannot be read: 'utf-8' codec" in error(text.load, str(tmp_path), "test")


def test_paths_and_splits_that_are_not_there(tmp_path):
    folder = write(tmp_path, train__jsonl=jsonl({"source": "a", "target": "b"}))
    assert "unknown split 'dev'; valid: test, train, validation" in error(text.load, folder, "dev")
    missing = error(text.load, folder, "test")
    assert "no test split (test.jsonl or test.csv); present: train" in missing
    assert "is a file; expected the folder" in error(text.load, str(tmp_path / "train.jsonl"), "train")
    for path in (str(tmp_path / "absent"), "./absent", "a/b/c", "../x"):
        assert f"no folder {path}, and that is no hub name" in error(text.load, path, "train")
    (tmp_path / "bare").mkdir()
    assert "cannot load" in error(text.load, str(tmp_path / "bare"), "train")


def test_an_unreachable_hub_is_one_line(monkeypatch):
    asked = []

    def unreachable(*name):
        asked.append(name)
        raise ConnectionError("Couldn't reach the hub\nafter 5 tries")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    message = error(e2e.load, "tuetschek/e2e_nlg", "train", strip=True)
    assert "cannot load 'tuetschek/e2e_nlg'" in message
    assert "Couldn't reach the hub after 5 tries" in message
    error(webnlg.load, "web_nlg:webnlg_challenge_2017", "train", **WEBNLG)
    assert asked == [("tuetschek/e2e_nlg", None), ("web_nlg", "webnlg_challenge_2017")]


def test_subsample_is_a_function_of_size_and_seed():
    dataset = datasets.Dataset.from_dict({"source": [str(i) for i in range(50)]})
    drawn = data.subsample(dataset, 20, seed=3)["source"][:]
    assert len(set(drawn)) == 20
    assert drawn == data.subsample(dataset, 20, seed=3)["source"][:]
    assert drawn[:5] == data.subsample(dataset, 5, seed=3)["source"][:]
    assert set(drawn) != set(data.subsample(dataset, 20, seed=4)["source"][:])
    for size in (0, 51):
        assert error(data.subsample, dataset, size, 3) == f"cannot draw {size} rows of 50; valid: 1 to 50"


def test_references_are_grouped_by_source_in_order_of_appearance():
    dataset = datasets.Dataset.from_dict(
        {"source": ["b", "a", "b", "b"], "target": ["1", "2", "3", "1"], "category": ["x", "y", "z", "x"]}
    )
    assert data.group_references(dataset).to_list() == [
        {"source": "b", "category": "x", "targets": ["1", "3", "1"]},
        {"source": "a", "category": "y", "targets": ["2"]},
    ]


@needs_shared
def test_real_e2e_has_the_published_counts():
    folder = str(SHARED / "e2e")
    train, dev = (data.DATASETS["e2e"](folder, split, strip=True) for split in ("train", "validation"))
    assert (len(train), len(dev)) == (42_061, 4_672)
    grouped = data.group_references(dev)
    assert (len(grouped), sum(map(len, grouped["targets"]))) == (547, 4_672)
    # every field that the CSVs are mapped to is one that these files have, and the reverse
    fields = {field.split(" : ")[0] for source in set(train["source"]) for field in source.split(" | ")}
    assert fields == set(e2e.FIELDS.values())


@needs_shared
@pytest.mark.parametrize(
    ("split", "entries", "texts", "good"), [("train", 6_940, 18_102, 18_025), ("validation", 872, 2_268, 2_258)]
)
def test_real_webnlg_has_the_published_counts(split, entries, texts, good):
    def load(**options):
        return data.DATASETS["webnlg"](str(SHARED / "webnlg"), split, **WEBNLG | options)

    pairs = load()
    assert (len(set(pairs["entry"])), len(pairs)) == (entries, texts)
    assert len(load(only_good=True)) == good
    assert set(pairs["category"]) == webnlg.SEEN
