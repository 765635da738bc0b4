"""What the comparison of methods makes of finished runs and of data without a test split, and that with PEFT."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from experiments import bench, compare, in_turn, peft_side, profiles, sst2, style
from prefix_tuning.data import pipeline
from prefix_tuning.files import read_lines


def finished(root, method, seed, bleu, step=1):
    folder = root / "final" / method / str(seed)
    folder.mkdir(parents=True)
    tuned = {"loss": 2 - bleu, "bleu": bleu, "rouge_l": 0.5, "slot_accuracy": 80.0}
    summary = {"tuned": tuned, "untuned": tuned | {"bleu": 0.01}, "peak_memory_mb": 1000 * step}
    summary["parameters"] = {"trained": 2000, "stored": 500}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps({"optimizer": {"learning_rate": 0.003}}))


def test_report_has_a_line_per_method_best_first_and_names_the_rest(tmp_path):
    compare.FLAGS(["compare", "--config=c", "--workdir=w", "--methods=prefix,lora,memory"])
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        compare.report(tmp_path)
    for seed, bleu in enumerate((0.2, 0.4)):
        finished(tmp_path, "prefix", seed, bleu, seed + 1)
    finished(tmp_path, "lora", 0, 0.5)
    lines = compare.report(tmp_path).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:5]]
    assert [row[0] for row in cells] == ["method", "---", "lora", "prefix", "(untuned)"]
    assert all(len(row) == len(cells[0]) for row in cells)
    prefix = dict(zip(cells[0], cells[3], strict=True))
    assert prefix["BLEU"] == "0.300 ± 0.141"
    assert prefix["slot error %"] == "20.0 ± 0.0"
    assert (prefix["trained"], prefix["stored kB"], prefix["peak MiB"], prefix["seeds"]) == ("2,000", "2", "2,000", "2")
    assert prefix["time per step"] == "-"
    assert dict(zip(cells[0], cells[2], strict=True))["BLEU"] == "0.500"
    assert lines[-1] == "Not run: memory."
    (tmp_path / "seconds_per_step.json").write_text(json.dumps({"prefix": 2.0, "lora": 3.0}))
    assert "| 1.50 |" in compare.report(tmp_path).splitlines()[2]


def test_validation_records_are_halved_where_there_is_no_test_split(tmp_path):
    (tmp_path / "e2e").mkdir()
    (tmp_path / "e2e" / "src1_train.txt").write_text("name : A||a\n")
    (tmp_path / "e2e" / "src1_valid.txt").write_text("".join(f"name : {r}||{r}{i}\n" for r in "abcd" for i in range(2)))
    options = ["--config.seed=1", f"--config.dataset.path={tmp_path}/e2e"]
    changed = compare.halve(options, tmp_path)
    assert changed == ["--config.seed=1", f"--config.dataset.path={tmp_path}/data"]
    first, second = ((tmp_path / "data" / f"src1_{n}.txt").read_text().splitlines() for n in ("valid", "test"))
    assert [line[-2] for line in first] == ["a", "a", "b", "b"]
    assert [line[-2] for line in second] == ["c", "c", "d", "d"]
    (tmp_path / "e2e" / "src1_test.txt").write_text("name : Z||z\n")
    assert compare.halve(options, tmp_path) == options


# --- Style


def test_pairs_are_in_the_style_and_kinds_of_the_test_split_are_new(tmp_path):
    style.write(tmp_path)
    rows = {split: read_lines(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    assert [len(own) for own in rows.values()] == [300, 20, 60]
    assert all(style.follows(row["instruction"], row["output"]) for own in rows.values() for row in own)
    kinds = {s: {k for k in style.KINDS for row in own if f" {k}" in row["instruction"]} for s, own in rows.items()}
    assert not kinds["train"] & (kinds["test"] | kinds["validation"])
    style.write(tmp_path / "again")
    assert (tmp_path / "again" / "train.jsonl").read_text() == (tmp_path / "train.jsonl").read_text()


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("1. Oak\n2. Pine\nThat makes two.", True),
        ("1. Oak\n2. Brown bear\nThat makes two.", True),
        ("1. Oak\n2. Pine\n3. Ash\nThat makes three.", False),
        ("1. Oak\n2. Pine", False),
        ("1. Oak\n2. Pine\nThat makes three.", False),
        ("1. Oak\n2. Oak\nThat makes two.", False),
        ("1. oak\n2. Pine\nThat makes two.", False),
        ("1. Oak\n3. Pine\nThat makes two.", False),
        ("Oak and pine.", False),
    ],
)
def test_following_the_style(text, right):
    assert style.follows("Name two trees.", text) is right


def test_style_report_counts_answers(tmp_path):
    (tmp_path / "predictions").mkdir()
    asked = {"source": "Name two trees.", "references": ["-"]}
    for file, texts in (
        ("untuned", ["Oak"] * 2),
        ("test_7", ["1. Oak\n2. Ash\nThat makes two.", "1. Oak\n2. Oak\nThat makes two."]),
    ):
        rows = "".join(json.dumps(asked | {"prediction": text}) + "\n" for text in texts)
        (tmp_path / "predictions" / f"{file}.jsonl").write_text(rows)
    summary = {"steps": 7, "untuned": {"rougeL": 1.0}, "tuned": {"rougeL": 50.0}, "seconds": 90}
    summary["parameters"] = {"trained": 20, "frozen": 1000}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    lines = style.report(tmp_path).splitlines()
    assert lines[2:4] == ["| before | 0 of 2 | 0 of 2 | 1.0 |", "| after | 2 of 2 | 1 of 2 | 50.0 |"]
    assert lines[-1] == "20 of 1,000 parameters, 7 steps, 1.5 minutes of training"


# --- Beside PEFT


def test_batches_of_a_trainer_hold_every_row_once_an_epoch_in_another_order():
    batches = list(peft_side.shuffled("abcdefg", 3, 2, seed=0))
    assert [len(batch) for batch in batches] == [3, 3, 1] * 2
    first, second = ([row for batch in own for row in batch] for own in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list("abcdefg")
    assert first != second
    assert list(peft_side.shuffled("abcdefg", 3, 2, seed=0)) == batches
    assert peft_side.padded([[1], [2, 3]], -100).tolist() == [[1, -100], [2, 3]]


def test_step_of_torch_clips_and_ends_at_a_learning_rate_of_0():
    class Slope(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(2.0))
            self.frozen = torch.nn.Parameter(torch.tensor(1.0), requires_grad=False)

        def forward(self, x):
            return SimpleNamespace(loss=self.weight * self.frozen * x)

    model, moved = Slope(), [2.0]
    step = peft_side.torch_step(model, 2, learning_rate=0.5, clip=1.0)
    for x in (3.0, 300.0, 3.0):  # without clipping the second would weigh down Adam's third
        assert step({"x": torch.tensor(x)}) == pytest.approx(moved[-1] * x)
        moved.append(model.weight.item())
    np.testing.assert_allclose(moved, [2.0, 1.5, 1.25, 1.25], atol=1e-6)


def test_both_sides_read_the_same_tokens_and_labels():
    examples = [pipeline.Example([5, 6, 7], [0], [1]), pipeline.Example([8], [0], [0])]
    wanted = {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [1, 0],
    }
    assert {name: x.tolist() for name, x in sst2.peft_batch(examples).items()} == wanted
    ours = pipeline.collate([[examples[0]], [examples[1]], []], 5, 1)
    assert {name: x.tolist() for name, x in peft_side.read_batch(ours, "classify").items()} == wanted


def test_peft_reads_the_last_target_too_and_shifts_labels_itself():
    pairs = [pipeline.Tokens([5, 6], [7, 8, 1]), pipeline.Tokens([9], [1])]
    batch = pipeline.collate([[pair] for pair in pairs] + [[]], 6, 4)
    found = peft_side.read_batch(batch, "lm")
    assert {name: x.tolist() for name, x in found.items()} == {
        "input_ids": [[5, 6, 7, 8, 1], [9, 1, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
        "labels": [[-100, -100, 7, 8, 1], [-100, 1, -100, -100, -100]],
    }


def test_accuracy_of_the_other_side_is_over_all_sentences():
    class Reader(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            assert not self.training
            last = attention_mask.sum(1) - 1  # the class is the last token, where padding does not count
            return SimpleNamespace(logits=torch.eye(2)[input_ids[torch.arange(len(last)), last]])

    examples = [pipeline.Example(read, [0], [label]) for read, label in (([1, 0], 0), ([1], 1), ([0, 0, 1], 0))]
    model = Reader().train()
    accuracy = sst2.peft_accuracy(model, SimpleNamespace(prompts=SimpleNamespace(examples=examples)), 2)
    assert accuracy == pytest.approx(100 * 2 / 3)
    assert model.training


def test_table_of_both_sides():
    runs = [
        {
            "accuracy": {"PEFT": [80.0], "ours": [82.0]},
            "steps": {
                "PEFT": [(0.5, 32, 800)] * 2,
                "ours": [(9.0, 32, 700), (0.2, 32, 700), (0.2, 32, 700)],
                "PEFT on our batches": [(0.4, 32, 700)],
            },
            "trained": {"PEFT": 1234, "ours": 1234},
        },
        {
            "accuracy": {"PEFT": [81.0], "ours": [84.0]},
            "steps": {"PEFT": [(0.5, 32, 800)], "ours": [(0.2, 32, 700)], "PEFT on our batches": [(0.4, 32, 700)]},
            "trained": {"PEFT": 1234, "ours": 1234},
        },
    ]
    lines = sst2.table(runs).splitlines()[2:]
    assert lines[:4] == [
        "| accuracy after epoch 1, % | 80.50 (80.00, 81.00) | 83.00 (82.00, 84.00) | |",
        "| sentences per second, median of the steps | 64 | 160 | 2.50 |",
        "| the same, PEFT on our batches | 80 | 160 | 2.00 |",
        "| tokens per second, padding not counted | 1600 | 3500 | 2.19 |",
    ]
    assert lines[4:] == [
        "| seconds per step | 0.500 | 0.200 | 0.40 |",
        "| minutes of training, compiling included | 0.01 | 0.08 | 6.40 |",
        "| parameters trained | 1,234 | 1,234 | |",
    ]
    assert "accuracy after epoch 1, % | 80.00 | 82.00 |" in sst2.table(runs[:1])


# --- Speed beside PEFT


def test_worker_waits_answers_and_says_what_it_took(tmp_path):
    (tmp_path / "side.py").write_text(
        "import sys, time\nfrom experiments import in_turn\n"
        "def add(a, b):\n    time.sleep(0.05)\n    return {'sum': a + b}\n"
        "def leave():\n    sys.exit(3)\n"
        "held = bytearray(b'x') * (64 << 20)\n"
        "in_turn.serve({'add': add, 'leave': leave, 'memory': in_turn.host_memory}, sys.stdout)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with in_turn.Worker("side", environment=environment) as worker:
        found = worker.ask("add", a=2, b=3)
        assert found["sum"] == 5
        assert found["seconds"] >= 0.05
        memory = worker.ask("memory")
        assert 64 < memory["peak"] < 256  # its own, whatever this process holds
        assert memory["free"] > 0
        with pytest.raises(RuntimeError, match="side ended with exit code 3 instead of answering to 'leave'"):
            worker.ask("leave")


def test_bench_table_says_how_much_faster_and_how_much_larger():
    rate = bench.Row(
        "greedy", "gpt2", 8, "tokens/s", {"PEFT": [9, 10, 99], "ours": [20, 1, 30]}, {"PEFT": 1000, "ours": 800}
    )._replace(operations=[1e12, 2.2e12, 3e12])
    time = bench.Row("start", "gpt2", 8, "s", {"PEFT": [9, 10], "ours": [5, 4]}, {"PEFT": 1000, "ours": 1500}, "same")
    lines = bench.table([rate, time]).splitlines()[2:]
    assert lines == [
        "| greedy | gpt2 | 8 | tokens/s | 10 | 20 | 2.00 | 1,000 | 800 | 0.80 | 2,200 |  |",
        "| start | gpt2 | 8 | s | 9.5 | 4.5 | 2.11 | 1,000 | 1,500 | 1.50 |  | same |",
    ]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--parts=train,sing", "unknown --parts sing; valid: train, greedy, beam, texts, classify, profile, start"),
        ("--model=gpt5", "unknown --model gpt5; valid: smollm2, gpt2, gpt2-medium, gpt2-large, bert, quickstart"),
        (
            "--parts=texts",
            "--parts=texts and --adapter, the folder adapter/ of a run that trained a prefix, go together",
        ),
        ("--adapter=runs/e2e/adapter", "--parts=texts and --adapter"),
        ("--batch=8,all", "--batch has 'all'; expected sizes of at least 1, and largest"),
    ],
)
def test_bench_refuses_what_it_does_not_know(flag, message):
    bench.FLAGS.unparse_flags()
    with pytest.raises(SystemExit, match=re.escape(f"error: {message}")):
        bench.main(["bench", flag])


class Told:
    """A side that answers what it was told, and remembers what it was asked."""

    def __init__(self, **answers):
        self.answers, self.asked = answers, []

    def ask(self, action, **values):
        self.asked.append((action, values))
        return {"peak": 7.0} if action == "memory" else self.answers[action]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def told(monkeypatch):
    """How both sides answer, and a subject whose validation split has three prompts."""

    def tell(**sides):
        monkeypatch.setattr(bench, "start", lambda side, *_: sides[side])
        monkeypatch.setattr(bench, "write_task", lambda subject: Path("task.json"))

    monkeypatch.setattr(bench.setup, "load_split", lambda *_: {"source": ["a", "b", "a", "c"]})
    monkeypatch.setattr(bench.setup, "make_prompts", lambda base, rows: [[len(rows), i] for i, _ in enumerate(rows)])
    decode = SimpleNamespace(max_new_tokens=9, end_tokens=(2,))
    base = SimpleNamespace(decode=decode)
    bench.FLAGS.unparse_flags()
    bench.FLAGS(["bench", "--rounds=2", "--records=3", "--rows=2", "--new=4"])
    return tell, bench.Subject("tiny", {"train": {"batch_size": 5}}, base, Path(), Path())


def test_bench_writes_whole_texts_and_counts_what_each_side_wrote(told):
    tell, subject = told
    theirs = Told(load={}, texts={"tokens": [[5, 2], [6, 6, 2], [7]], "seconds": 2.0})
    ours = Told(load={}, texts={"tokens": [[5, 2], [6, 2], [7]], "seconds": 1.0})
    tell(PEFT=theirs, ours=ours)
    greedy, beams = bench.texts(subject)
    assert (greedy.part, greedy.batch, beams.part, beams.batch) == (
        "texts of 3 records, greedy",
        2,
        "texts of 3 records, 5 beams",
        4,
    )
    assert greedy.values == {"PEFT": [3.0, 3.0], "ours": [5.0, 5.0]}  # tokens a second, of each round
    assert greedy.agreement == "2 of 3 texts equal"
    prompts = [[3, 0], [3, 1], [3, 2]]
    asked = {"prompts": prompts, "beams": 1, "new": 9, "end": [2], "rows": 2}
    assert theirs.asked[:2] == [("load", {}), ("texts", asked)]
    assert ours.asked[1:4] == [("texts", asked)] * 3  # one of them compiles
    assert [values["beams"] for action, values in ours.asked if action == "texts"] == [1, 1, 1, 5, 5, 5]


def test_bench_refuses_more_prompts_than_there_are(told):
    _, subject = told
    with pytest.raises(SystemExit, match=r"error: 4 prompts are asked for; the validation split of tiny's data has 3"):
        bench.first_prompts(subject, 4)


def test_bench_profiles_a_step_and_decoding_on_each_side(told, monkeypatch):
    tell, subject = told
    kinds = dict.fromkeys(profiles.KINDS, 0.0) | {"matrix products": 1.5, "waiting": 0.5}
    sides = {name: Told(load={}, train={}, generate={}, profile={"kinds": kinds}) for name in bench.SIDES}
    tell(**sides)
    monkeypatch.setattr(bench, "batches", lambda *_: ([], [Path("own.npz")]))
    found = list(bench.profile(subject, Path()))
    assert [(one.side, one.what, one.batch) for one in found] == [
        (side, *what) for side in bench.SIDES for what in (("a step", 5), ("4 tokens, greedy", 2))
    ]
    line = "| a step | tiny | 5 | PEFT | 2 | 75 % | 0 % | 0 % | 0 % | 25 % |"
    assert bench.profile_table(found[:1]).splitlines()[-1] == line
    for side in sides.values():
        step, text = (values for action, values in side.asked if action == "profile")
        assert step == {"what": "train", "batch": "own.npz"}
        assert text == {"what": "generate", "prompts": [[2, 0], [2, 1]], "beams": 1, "new": 4, "end": [2]}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ynn_fusion.12", "matrix products"),
        ("dot_general.3", "matrix products"),
        ("void cutlass::Kernel2", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("copy_bitcast_fusion.7", "copies"),
        ("bitcast_dynamic-update-slice_fusion", "copies"),
        ("aten::copy_", "copies"),
        ("multiply_bitcast_fusion.1", "other"),
        ("aten::gelu", "other"),
    ],
)
def test_kinds_of_operations(name, kind):
    assert profiles.kind(name) == kind


def test_operations_end_where_the_trace_says_so():
    """On a CPU at their "end:" events, on a GPU after their own time; what is around others is left out."""

    def event(name, start, duration, pid=1, **args):
        return {"ph": "X", "name": name, "ts": start, "dur": duration, "pid": pid, "args": args}

    host = [
        event("end: dot.1", 9e6, 1e6),
        event("dot.1", 1e6, 2e6, device_ordinal="0"),
        event("while.2", 0, 9e6, device_ordinal="0"),
        event("add_fusion", 2e6, 1e6, device_ordinal="0"),
        event("end: add_fusion", 3e6, 0),
        event("end: while.2", 9e6, 0),
        event("$python", 0, 9e6),
    ]
    assert profiles.operations(host) == [(2.0, 3.0, "add_fusion"), (1.0, 10.0, "dot.1")]
    name = {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/device:GPU:0"}}
    assert profiles.operations([name, *host, event("gemm", 4e6, 2e6, pid=2)]) == [(4.0, 6.0, "gemm")]


def test_time_is_divided_among_what_runs():
    """Nothing is lost or counted twice: what runs beside a product is hidden, others share."""
    spans = [(1.0, 3.0, "dot"), (2.0, 5.0, "add_fusion"), (4.0, 6.0, "copy"), (8.0, 9.0, "copy")]
    found = profiles.by_kind(spans, 10.0)
    assert found == {"matrix products": 2.0, "attention": 0.0, "copies": 2.5, "other": 1.5, "waiting": 4.0}


def test_what_xla_runs_is_traced():
    x = np.ones((600, 600), np.float32)
    both = jax.jit(lambda x: jnp.sort(x @ x, axis=0))
    both(x).block_until_ready()
    found = profiles.traced(lambda: both(x))
    assert set(found) == set(profiles.KINDS)
    assert found["matrix products"] > 0
    assert found["other"] > 0
