import itertools
import threading
import time
from collections import Counter

import datasets
import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from prefix_tuning.data import pipeline
from prefix_tuning.data.pipeline import Shape, Tokens
from prefix_tuning.errors import UserError

END, BEGIN = 256, 257
RUN = {"batch_size": 3, "epochs": 3, "seed": 5, "packing": False, "shapes": 2, "prefetch": 2}


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, its id the byte."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that the byte level spells as themselves
    others = [byte for byte in range(256) if byte not in printed]
    vocabulary = {chr(byte): byte for byte in printed} | {chr(256 + n): byte for n, byte in enumerate(others)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens(["<end>", "<begin>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", bos_token="<begin>")


def ids(text):
    return list(text.encode())


def pairs(*rows):
    return datasets.Dataset.from_list([{"source": source, "target": target} for source, target in rows])


def encode(dataset, tokenizer, prompt="{source}\n", completion="{target}", max_source=None, max_target=None):
    return pipeline.encode(
        dataset, tokenizer, prompt=prompt, completion=completion, max_source=max_source, max_target=max_target
    )


def make_examples(count, seed=0):
    """Examples of 2 to 30 positions whose tokens tell them apart: example i begins with 1000 + i."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 16, size=(count, 2)).tolist()
    return [Tokens([1000 + i, *range(1, p)], [*range(50, 50 + t), END]) for i, (p, t) in enumerate(sizes)]


def sizes(examples):
    """Positions and targets of each: the end token is predicted and never read."""
    return np.array([[len(prompt) + len(target) - 1, len(target)] for prompt, target in examples]).T


def unpack(batch):
    """The examples of a batch, read back from its arrays alone."""
    found = []
    for b, count in enumerate(batch["examples"]):
        real = batch["mask"][b] == 1.0
        where, wanted = batch["target_index"][b][real], batch["targets"][b][real]
        for segment in range(1, count + 1):
            (span,) = np.nonzero(batch["segments"][b] == segment)
            assert batch["positions"][b][span].tolist() == list(range(len(span)))
            mine = (where >= span[0]) & (where <= span[-1])
            first = where[mine][0]
            target = wanted[mine].tolist()
            assert where[mine].tolist() == list(range(first, span[-1] + 1))
            assert batch["tokens"][b][first + 1 : span[-1] + 1].tolist() == target[:-1]
            found.append(Tokens(batch["tokens"][b][span[0] : first + 1].tolist(), target))
    return found


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_templates_special_tokens_and_the_end_token(tokenizer):
    dataset = pairs(("a {b}", "cd"), ("é", ""))
    assert encode(dataset, tokenizer)[0] == Tokens(ids("a {b}\n"), [*ids("cd"), END])
    assert encode(dataset, tokenizer)[1].target == [END]
    # Li & Liang's: ' ' + SRC + ' ' + BOS and ' ' + TGT + ' ' + EOS
    first = encode(dataset, tokenizer, prompt=" {source} {bos}", completion=" {target} ")[0]
    assert first == Tokens([*ids(" a {b} "), BEGIN], [*ids(" cd "), END])
    assert encode(dataset, tokenizer, prompt="{{{eos}}}")[0].prompt == [*ids("{"), END, *ids("}")]


def test_sources_and_targets_are_cut_at_their_ends(tokenizer):
    dataset = pairs(("abcdef", "uvwxyz"), ("ab", "uv"))
    long, short = encode(dataset, tokenizer, prompt="<{source}>", max_source=4, max_target=3)
    assert long == Tokens(ids("<abcd>"), [*ids("uv"), END])
    assert short == Tokens(ids("<ab>"), [*ids("uv"), END])
    assert encode(dataset, tokenizer, max_target=1)[0].target == [END]
    assert pipeline.encode_prompts(dataset, tokenizer, prompt="{source}", max_source=2) == [ids("ab"), ids("ab")]


def test_template_errors_say_what_is_valid(tokenizer):
    dataset = pairs(("a", "b"), ("", "b"))
    for template, message in (
        ("{article}", "unknown field 'article'; valid: source, target, bos, eos"),
        ("{}", "unknown field ''; valid: source"),
        ("{source.x}", "unknown field 'source.x'; valid: source"),
        ("{source", "is malformed"),
    ):
        with pytest.raises(UserError, match=message):
            encode(dataset, tokenizer, prompt=template)
        with pytest.raises(UserError, match=message):
            encode(dataset, tokenizer, completion=template)
    with pytest.raises(UserError, match=r"row 1: the prompt .* has no tokens"):
        encode(dataset, tokenizer, prompt="{source}")
    with pytest.raises(UserError, match="max_source is 0; expected at least 1"):
        encode(dataset, tokenizer, max_source=0)
    with pytest.raises(UserError, match="max_target is 0; expected at least 1"):
        encode(dataset, tokenizer, max_target=0)


def test_a_tokenizer_without_the_needed_tokens_is_refused(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no end token"):
        encode(pairs(("a", "b")), bare)
    bare.eos_token = "<end>"
    with pytest.raises(UserError, match="the tokenizer has no bos token"):
        encode(pairs(("a", "b")), bare, prompt="{source}{bos}")


def test_collate_by_hand():
    batch = pipeline.collate([[Tokens([3, 4], [5, 6, END]), Tokens([7], [END])], []], length=6, targets=5)
    expected = {
        "tokens": [[3, 4, 5, 6, 7, 0], [0] * 6],
        "positions": [[0, 1, 2, 3, 0, 0], [0] * 6],
        "segments": [[1, 1, 1, 1, 2, 0], [0] * 6],
        "target_index": [[1, 2, 3, 4, 0], [0] * 5],
        "targets": [[5, 6, END, END, 0], [0] * 5],
        "mask": [[1, 1, 1, 1, 0], [0] * 5],
        "examples": [2, 0],
    }
    assert {name: array.tolist() for name, array in batch.items()} == expected
    assert {name for name, array in batch.items() if array.dtype != np.int32} == {"mask"}
    assert batch["mask"].dtype == np.float32


def test_a_batch_has_the_fields_of_the_type_it_becomes():
    from prefix_tuning.types import Batch

    fields = [name for name in Batch.__dataclass_fields__ if name != "types" and not name.startswith("source")]
    assert list(pipeline.collate([[]], 1, 1)) == fields
    pair = pipeline.Example([3, 4, 5], [0], [1], types=[0, 1, 1])
    assert list(pipeline.collate([[pair]], 3, 1)) == [*fields, "types"]
    sourced = pipeline.Tokens([3, 4], [5]).after(2)
    source = [name for name in Batch.__dataclass_fields__ if name.startswith("source")]
    assert list(pipeline.collate([[sourced]], 3, 1)) == [*fields, *source]


def test_collate_of_sources_by_hand():
    """The decoder reads the start token and the target but for its end; sources are laid out beside."""
    one, two = pipeline.Tokens([7, 8, 9], [5, 1]).after(2), pipeline.Tokens([6], [4, 3, 1]).after(2)
    batch = pipeline.collate([[one, two], []], 6, 5)
    assert batch["tokens"].tolist() == [[2, 5, 2, 4, 3], [0] * 5]
    assert batch["positions"].tolist() == [[0, 1, 0, 1, 2], [0] * 5]
    assert batch["segments"].tolist() == [[1, 1, 2, 2, 2], [0] * 5]
    assert batch["target_index"].tolist() == [[0, 1, 2, 3, 4], [0] * 5]
    assert batch["targets"].tolist() == [[5, 1, 4, 3, 1], [0] * 5]
    assert batch["mask"].tolist() == [[1.0] * 5, [0.0] * 5]
    assert batch["source"].tolist() == [[7, 8, 9, 6, 0, 0], [0] * 6]
    assert batch["source_positions"].tolist() == [[0, 1, 2, 0, 0, 0], [0] * 6]
    assert batch["source_segments"].tolist() == [[1, 1, 1, 2, 0, 0], [0] * 6]
    assert (pipeline.longest([one, two]), one.length) == (3, 3)
    assert pipeline.without(one._replace(source=[7, 20, 8]), 20).source == [7, 8]


def test_bucket_shapes_by_hand():
    lengths, targets = np.array([2, 2, 2, 3, 9, 10]), np.array([1, 8, 1, 2, 3, 4])
    assert pipeline.bucket_shapes(lengths, targets, 1) == [Shape(10, 8)]
    assert pipeline.bucket_shapes(lengths, targets, 2) == [Shape(3, 8), Shape(10, 8)]
    assert [shape.length for shape in pipeline.bucket_shapes(lengths, targets, 3)] == [2, 3, 10]
    assert [shape.length for shape in pipeline.bucket_shapes(lengths, targets, 9)] == [2, 3, 9, 10]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_bucket_shapes_pad_least_of_all_choices(count):
    lengths = np.random.default_rng(count).integers(3, 15, size=40)

    def padding(bounds):
        return sum(min(b for b in bounds if b >= length) - length for length in lengths)

    values = sorted(set(lengths.tolist()))
    best = min(padding((*inner, values[-1])) for inner in itertools.combinations(values[:-1], count - 1))
    shapes = pipeline.bucket_shapes(lengths, lengths // 2, count)
    assert len(shapes) == count
    assert padding([shape.length for shape in shapes]) == best


@pytest.mark.parametrize("packing", [False, True])
def test_every_epoch_holds_every_example_once(packing):
    examples = make_examples(200)
    data = pipeline.train_data(examples, **RUN | {"packing": packing})
    batches = list(data.batches(0))
    assert len(batches) == data.total_steps == sum(data.steps_per_epoch)
    assert len(data.steps_per_epoch) == 3
    remaining, orders = iter(batches), []
    for steps in data.steps_per_epoch:
        seen = [example for batch in itertools.islice(remaining, steps) for example in unpack(batch)]
        orders.append([example.prompt[0] for example in seen])
        assert sorted(seen) == sorted(examples)
    assert len({tuple(order) for order in orders}) == 3
    assert (max(batch["examples"].max() for batch in batches) > 1) == packing
    shapes = {Shape(batch["tokens"].shape[1], batch["targets"].shape[1]) for batch in batches}
    assert shapes <= set(data.shapes)
    assert len(data.shapes) == (1 if packing else 2)


def test_packed_rows_are_full_and_hold_what_the_shape_allows():
    examples = make_examples(300)
    lengths, targets = sizes(examples)
    shape = pipeline.packed_shape(lengths, targets)
    assert shape.length == pipeline.ROUND
    plan = pipeline.plan_epoch(lengths, targets, shapes=[shape], batch_size=4, seed=0, epoch=0, packing=True)
    rows = [row for planned in plan for row in planned.rows if row]
    assert Counter(i for row in rows for i in row) == Counter(range(300))
    assert all(lengths[row].sum() <= shape.length and targets[row].sum() <= shape.targets for row in rows)
    fewest = max(lengths.sum() / shape.length, targets.sum() / shape.targets)
    assert len(rows) <= 1.15 * fewest + 1


def test_the_packed_shape_by_hand():
    lengths, targets = np.array([100, 20, 20]), np.array([10, 9, 9])
    assert pipeline.packed_shape(lengths, targets) == Shape(128, 32)  # 1.25 * 128 * 28 / 140
    assert pipeline.packed_shape(lengths, np.array([1, 20, 1])) == Shape(128, 26)  # 25.1, rounded up
    assert pipeline.packed_shape(np.array([100, 300]), np.array([1, 90])) == Shape(384, 110)
    assert pipeline.packed_shape(np.array([100, 60, 100]), np.array([1, 60, 1])) == Shape(128, 60)  # the longest
    assert pipeline.packed_shape(np.array([10, 10]), np.array([10, 10])) == Shape(128, 128)  # never more than T


@pytest.mark.parametrize("packing", [False, True])
def test_the_order_depends_on_seed_and_epoch_only(packing):
    lengths, targets = sizes(make_examples(100))
    shapes = [pipeline.packed_shape(lengths, targets)] if packing else pipeline.bucket_shapes(lengths, targets, 3)

    def plan(seed, epoch):
        return pipeline.plan_epoch(
            lengths, targets, shapes=shapes, batch_size=4, seed=seed, epoch=epoch, packing=packing
        )

    np.random.seed(1)
    first = plan(7, 2)
    np.random.seed(2)
    assert first == plan(7, 2)
    assert first != plan(7, 3)
    assert first != plan(8, 2)
    assert plan(1, 0) != plan(0, 1)


def test_sorting_leaves_neither_lengths_nor_the_short_batch_in_order():
    lengths, targets = sizes(make_examples(101))
    shapes = pipeline.bucket_shapes(lengths, targets, 3)
    ends = set()
    for epoch in range(5):
        plan = pipeline.plan_epoch(lengths, targets, shapes=shapes, batch_size=4, seed=0, epoch=epoch, packing=False)
        longest = [max(lengths[i] for row in planned.rows for i in row) for planned in plan]
        assert longest != sorted(longest)
        ends.add(next(n for n, planned in enumerate(plan) if [] in planned.rows))
    assert len(ends) > 1


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_resumed_run_continues_with_the_very_next_batch(packing, prefetch):
    options = RUN | {"packing": packing, "prefetch": prefetch}
    whole = list(pipeline.train_data(make_examples(90), **options).batches(0))
    assert not same(whole[0], whole[1])
    for start in (0, 1, len(whole) // 3, len(whole) // 3 + 1, len(whole) - 1, len(whole)):
        rest = list(pipeline.train_data(make_examples(90), **options).batches(start))
        assert len(rest) == len(whole) - start
        assert all(same(one, other) for one, other in zip(rest, whole[start:], strict=True))


def test_the_iterator_saves_and_restores_its_place():
    data = pipeline.train_data(make_examples(90), **RUN)
    iterator = data.batches(4)
    next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(3)]
    fresh = data.batches(0)
    fresh.set_state(state)
    assert all(same(next(fresh), batch) for batch in expected)


def test_padding_by_hand():
    examples = [Tokens([1] * p, [END]) for p in (2, 2, 2, 5, 6)]  # as many positions as the prompt has tokens
    run = RUN | {"batch_size": 2}
    # (2 2) in T=2, (2 5) and (6 filler) in T=6: 17 of 4 + 12 + 12 positions
    assert pipeline.train_data(examples, **run).padding == pytest.approx(1 - 17 / 28)
    # all in one row of T=128, and a row that only fills the batch
    assert pipeline.train_data(examples, **run | {"packing": True}).padding == pytest.approx(1 - 17 / 256)


def test_sorting_within_windows_saves_padding():
    examples = make_examples(600)
    lengths, _ = sizes(examples)
    shuffled = 1 - lengths.mean() / lengths.max()
    assert pipeline.train_data(examples, **RUN | {"shapes": 4}).padding < shuffled / 2


def grain_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain")]


def gone(threads, patience=5.0):
    deadline = time.monotonic() + patience
    while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(thread.is_alive() for thread in threads)


def test_prefetching_is_a_thread_that_ends_with_its_iterator():
    iterator = pipeline.train_data(make_examples(90), **RUN).batches(0)
    next(iterator)
    threads = grain_threads()
    assert threads
    del iterator
    assert gone(threads)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_while_making_a_batch_reaches_the_caller(prefetch):
    examples = [*make_examples(5), Tokens([2**40], [END])]  # no int32
    with pytest.raises(OverflowError):
        list(pipeline.train_data(examples, **RUN | {"prefetch": prefetch}).batches(0))


def test_settings_that_make_no_run_are_refused():
    for name in ("batch_size", "epochs", "shapes"):
        with pytest.raises(UserError, match=f"{name} is 0; expected at least 1"):
            pipeline.train_data(make_examples(5), **RUN | {name: 0})
    with pytest.raises(UserError, match="no examples"):
        pipeline.train_data([], **RUN)
    data = pipeline.train_data(make_examples(5), **RUN)
    with pytest.raises(UserError, match="cannot start at step 7; valid: 0 to 6"):
        data.batches(7)


def test_evaluation_sees_every_example_once_and_says_which():
    examples = make_examples(20)
    found, shapes, longest = {}, set(), []
    for indices, batch in pipeline.eval_batches(examples, batch_size=8, shapes=2):
        assert batch["examples"].tolist() == (indices >= 0).astype(int).tolist()
        shapes.add(batch["tokens"].shape)
        longest.append(int((batch["segments"] > 0).sum(axis=1).max()))
        real = [int(i) for i in indices if i >= 0]
        assert not found.keys() & set(real)
        found |= dict(zip(real, unpack(batch), strict=True))
    assert [found[i] for i in range(20)] == examples
    assert len(shapes) == 2
    assert longest == sorted(longest, reverse=True)


def test_prompt_batches_by_hand():
    prompts = [[2, 3, 4, 5, 6], [1], [7, 8], [9, 9, 9]]
    (first, second) = pipeline.prompt_batches(prompts, batch_size=3, multiple=4)
    assert [array.tolist() for array in first] == [
        [0, 3, 2],
        [[2, 3, 4, 5, 6, 0, 0, 0], [9, 9, 9, 0, 0, 0, 0, 0], [7, 8, 0, 0, 0, 0, 0, 0]],
        [5, 3, 2],
    ]
    assert [array.tolist() for array in second] == [[1, -1, -1], [[1, 0, 0, 0]] * 3, [1, 1, 1]]
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        list(pipeline.prompt_batches([[1], []], batch_size=3, multiple=4))
