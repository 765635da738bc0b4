"""From pairs of texts to batches: templates, tokens, length buckets or packed rows, and an order that resumes.

Batches are dicts of NumPy arrays with the fields of `prefix_tuning.types.Batch`; the letters are those of that file.
What an epoch holds is a function of (seed, epoch, lengths), so a run resumes from a step number alone.
"""

import functools
import string
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import datasets
import grain
import numpy as np
from transformers import PreTrainedTokenizerBase

from prefix_tuning import template
from prefix_tuning.errors import UserError, at_least_one

WINDOW = 50  # batches sorted by length together: enough for little padding, few enough for a random order
OPEN_ROWS = 64  # rows that packing still adds to; more pack hardly tighter and cost time
SLACK = 1.25  # room for targets in a packed row, against the average: a row then rarely fills up with targets first
SPECIAL = ("bos", "eos", "cls", "sep", "mask")  # tokens that templates may name
CHAT = "{chat}"  # stands for a conversation as the tokenizer's chat template has it
ROUND = 128  # packed rows are as long as the longest example, rounded up to this


class Example(NamedTuple):
    """One example as a batch lays it out."""

    read: list[int]  # the tokens
    index: list[int]  # where among them the hidden state of each target lies
    targets: list[int]
    types: list[int] | None = None  # which text of a pair each token is of
    parts: list[int] | None = None  # lengths of the texts in it that do not see each other; None: it is one
    source: list[int] | None = None  # what an encoder reads, where `read` is what a decoder does

    @property
    def length(self) -> int:
        """How many positions of a row it takes: of the encoder's, where there is one beside the decoder."""
        return len(self.read if self.source is None else self.source)


class Tokens(NamedTuple):
    """One prompt and what to write after it; the target ends with the end token, which is only ever predicted."""

    prompt: list[int]
    target: list[int]

    @property
    def example(self) -> Example:
        """What is read, and that each token of the target is read off where the one before it is."""
        index = range(len(self.prompt) - 1, len(self.prompt) + len(self.target) - 1)
        return Example([*self.prompt, *self.target[:-1]], list(index), self.target)

    def after(self, start: int) -> Example:
        """For an encoder-decoder: the encoder reads the prompt, the decoder the token `start` and the target."""
        return Example([start, *self.target[:-1]], list(range(len(self.target))), self.target, source=self.prompt)


class Shape(NamedTuple):
    """The padded size of a batch; with sources the decoder reads as many tokens as there are targets, N."""

    length: int  # T, with sources S
    targets: int  # N


class Planned(NamedTuple):
    """One batch of a plan: which examples each row holds (none in a row that only fills the batch), and its size."""

    rows: list[list[int]]
    shape: Shape


class TrainData(NamedTuple):
    """All epochs of a run."""

    shapes: list[Shape]  # every shape that a batch can have
    steps_per_epoch: list[int]
    total_steps: int
    padding: float  # the share of [B T] in the first epoch that is no example's token
    batches: Callable[[int], grain.DatasetIterator]  # first step -> batches from there, with get_state and set_state


def encode(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str,
    completion: str,
    max_source: int | None,
    max_target: int | None,
    virtual: int | None = None,
    start: int | None = None,
) -> list[Tokens] | list[Example]:
    """Tokenises the two templates for every row and ends each target with the end token, which `max_target` counts.

    Templates are `str.format`'s over the columns and the `SPECIAL` tokens; in the prompt {rows:N} stands for the next
    N of the tokens `virtual`, `virtual` + 1, ...  Where both are {chat}, every answer in a row's `messages` is a target
    of its own.  With `start` the examples are an encoder-decoder's.  Raises UserError for an unknown field, a prompt
    without tokens and a tokenizer without an end token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token (eos_token), which every target ends with")
    at_least_one(max_target=max_target)
    if (CHAT in prompt) != (completion == CHAT):
        raise UserError(f"text.prompt={prompt!r} and text.completion={completion!r}; expected {CHAT} in both or none")
    if CHAT in prompt:
        if start is not None:
            raise UserError("an encoder-decoder reads one source and writes one target; {chat} is for decoders")
        if max_target is not None:
            raise UserError("text.max_target would cut answers short in a conversation; expected None with {chat}")
        prompts = encode_prompts(dataset, tokenizer, prompt=prompt, max_source=max_source, virtual=virtual)
        return [_conversation(row, tokenizer, last) for row, last in zip(dataset, prompts, strict=True)]
    prompts = encode_prompts(dataset, tokenizer, prompt=prompt, max_source=max_source, virtual=virtual)
    completions = _tokenise(_render(completion, dataset[:], tokenizer), tokenizer)
    kept = None if max_target is None else max_target - 1
    pairs = [Tokens(p, [*c[:kept], tokenizer.eos_token_id]) for p, c in zip(prompts, completions, strict=True)]
    return pairs if start is None else [pair.after(start) for pair in pairs]


def encode_prompts(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str,
    max_source: int | None,
    virtual: int | None = None,
    used: int = 0,
    empty: bool = False,
) -> list[list[int]]:
    """Tokenises the prompt template for every row, the column `source` cut after its first `max_source` tokens.

    `used` virtual tokens stand before it.  Raises UserError for an unknown field and, unless it may be `empty`, for a
    prompt without tokens.
    """
    columns = dataset[:]
    at_least_one(max_source=max_source)
    if CHAT in prompt:
        if max_source is not None:
            raise UserError("text.max_source would cut a conversation's form; expected None with {chat}")
        columns["chat"] = [_rendered(row, tokenizer) for row in dataset]
    if max_source is not None:
        # cut as text: the tokens of a source inside its template may differ from those of the source alone
        spans = tokenizer(columns["source"], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        cut = [s[max_source - 1][1] if len(s) > max_source else None for s in spans]
        columns["source"] = [text[:end] for text, end in zip(columns["source"], cut, strict=True)]
    prompts: list[list[int]] = [[] for _ in range(len(dataset))]
    for piece in template.pieces(prompt):
        if isinstance(piece, str):
            parts = _tokenise(_render(piece, columns, tokenizer), tokenizer)
        elif virtual is None:
            raise UserError(f"the prompt {prompt!r} has rows for virtual tokens; those come from method.template")
        else:
            parts = [list(range(virtual + used, virtual + used + piece))] * len(prompts)
            used += piece
        prompts = [[*before, *part] for before, part in zip(prompts, parts, strict=True)]
    for row, tokens in enumerate(prompts):
        if not (empty or any(virtual is None or token < virtual for token in tokens)):
            raise UserError(f"row {row}: the prompt {prompt!r} has no tokens; expected at least one to predict from")
    return prompts


def _rendered(row: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    """A row's conversation up to the answer that is asked for; a row without one asks with its `source`."""
    asked = row["messages"][:-1] if "messages" in row else [{"role": "user", "content": row["source"]}]
    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template, which {chat} in text.prompt needs")
    try:
        return tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises whatever its author chose, for a system message say
        raise UserError(f"the chat template refuses a conversation: {str(error).strip().splitlines()[0]}") from error


def _conversation(row: dict, tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> Example:
    """A conversation of which every answer is a target, its end token included; `prompt` is all before the last one.

    What stands before an answer is tokenised apart from it, as it is when answers are generated.
    """
    turns = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    texts = [_rendered({"messages": row["messages"][: turn + 1]}, tokenizer) for turn in turns]
    whole = _tokenise([texts[-1]], tokenizer)[0]
    at = next((i for i in range(len(prompt) - len(whole) + 1) if prompt[i : i + len(whole)] == whole), None)
    if at is None:
        raise UserError("virtual tokens cannot stand within a conversation; expected them before or after {chat}")
    read, index, targets, told = prompt[:at], [], [], ""
    for turn, text in zip(turns, texts, strict=True):
        if not text.startswith(told):
            raise UserError("the chat template changes earlier turns of a conversation; expected it to append")
        answer = row["messages"][turn]["content"]
        asked, own = _tokenise([text[len(told) :], answer], tokenizer)  # the end token of the answer before is in it
        own = [*own, tokenizer.eos_token_id]
        read = [*read, *asked, *(prompt[at + len(whole) :] if turn == turns[-1] else [])]
        index += range(len(read) - 1, len(read) - 1 + len(own))
        targets += own
        read += own[:-1]
        told = text + answer
    return Example(read, index, targets)


def without(example: Example, virtual: int) -> Example:
    """The example without its virtual tokens; what was read off one of them is read off the token before it."""
    if example.source is not None:
        return example._replace(source=[token for token in example.source if token < virtual])
    kept = [i for i, token in enumerate(example.read) if token < virtual]
    moved = [max(np.searchsorted(kept, i, side="right") - 1, 0) for i in example.index]
    types = None if example.types is None else [example.types[i] for i in kept]
    ends = None if example.parts is None else np.searchsorted(kept, np.cumsum(example.parts))
    parts = None if ends is None else np.diff(ends, prepend=0).tolist()
    return Example([example.read[i] for i in kept], moved, example.targets, types, parts)


class Part(NamedTuple):
    """Which rows of every batch a process makes: one of so many equal parts, in order, of each of its blocks."""

    index: int = 0
    count: int = 1
    blocks: int = 1

    def of(self, rows: Sequence) -> Sequence:
        """This part of them."""
        size = len(rows) // self.blocks // self.count
        starts = [(block * self.count + self.index) * size for block in range(self.blocks)]
        parts = [rows[start : start + size] for start in starts]
        return parts[0] if self.blocks == 1 else [row for part in parts for row in part]


WHOLE = Part()


def collate(
    rows: Sequence[Sequence[Tokens | Example]], length: int, targets: int, part: Part = WHOLE
) -> dict[str, np.ndarray]:
    """Lays out rows of packed examples as a batch of T = `length` and N = `targets`; a row without any is filler.

    With sources S = `length` and T = N.  Of the rows only a `part` is laid out, with the fields that all would have.
    """
    rows = [[x.example if isinstance(x, Tokens) else x for x in row] for row in rows]
    sourced = any(x.source is not None for row in rows for x in row)
    typed = any(x.types is not None for row in rows for x in row)
    rows = part.of(rows)
    written = targets if sourced else length
    batch = {name: np.zeros((len(rows), written), np.int32) for name in ("tokens", "positions", "segments")}
    batch |= {name: np.zeros((len(rows), targets), np.int32) for name in ("target_index", "targets")}
    batch["mask"] = np.zeros((len(rows), targets), np.float32)
    batch["examples"] = np.array([len(row) for row in rows], np.int32)
    if typed:
        batch["types"] = np.zeros((len(rows), length), np.int32)
    for b, row in enumerate(rows):
        start, first, segment = 0, 0, 0
        for example in row:
            span, predicted = (slice(at, at + len(x)) for at, x in ((start, example.read), (first, example.targets)))
            batch["tokens"][b, span] = example.read
            batch["target_index"][b, predicted] = np.add(start, example.index)
            batch["targets"][b, predicted] = example.targets
            batch["mask"][b, predicted] = 1.0
            if example.types is not None:
                batch["types"][b, span] = example.types
            for part in example.parts or [len(example.read)]:
                segment += 1
                batch["positions"][b, start : start + part] = np.arange(part)
                batch["segments"][b, start : start + part] = segment
                start += part
            first = predicted.stop
    if sourced:
        read = collate([[Example(x.source, [], []) for x in row] for row in rows], length, 0)
        batch |= {"source": read["tokens"]} | {f"source_{n}": read[n] for n in ("positions", "segments")}
    return batch


def bucket_shapes(lengths: np.ndarray, targets: np.ndarray, count: int) -> list[Shape]:
    """At most `count` shapes, ascending, with the least padding when every example goes to the smallest that fits.

    A batch may hold shorter examples than its shape is made for, so N is the maximum over all that fit its T.
    """
    values, weights = np.unique(lengths, return_counts=True)
    ceiling, below = np.append(0, values), np.append(0, np.cumsum(weights))
    cost, choices = np.append(0.0, np.full(len(values), np.inf)), []
    for _ in range(count):  # one more bucket: the first i distinct lengths as before, those up to j in the new one
        options = [cost[: j + 1] + (below[j] - below[: j + 1]) * ceiling[j] for j in range(len(ceiling))]
        choices.append([int(option.argmin()) for option in options])
        cost = np.array([option.min() for option in options])
    end, bounds = len(values), []
    for choice in reversed(choices):
        if choice[end] < end:
            bounds.append(int(ceiling[end]))
        end = choice[end]
    return [Shape(bound, int(targets[lengths <= bound].max())) for bound in reversed(bounds)]


def packed_shape(lengths: np.ndarray, targets: np.ndarray) -> Shape:
    """The one shape of packed rows: T holds the longest example, N the average share of targets and some more."""
    length = int(-(-lengths.max() // ROUND) * ROUND)
    average = length * targets.sum() / lengths.sum()
    return Shape(length, min(length, int(max(targets.max(), np.ceil(SLACK * average)))))


def plan_epoch(
    lengths: np.ndarray,
    targets: np.ndarray,
    *,
    shapes: Sequence[Shape],
    batch_size: int,
    seed: int,
    epoch: int,
    packing: bool,
) -> list[Planned]:
    """The batches of one epoch, every example once: one a row, or as many as fit the first of `shapes`."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    if packing:
        rows = _pack(order, np.stack([lengths, targets], axis=1), shapes[0])
    else:
        windows = np.split(order, range(WINDOW * batch_size, len(order), WINDOW * batch_size))
        rows = [[int(i)] for window in windows for i in window[np.argsort(lengths[window], kind="stable")]]
    rows += [[]] * (-len(rows) % batch_size)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    longest = [max(sum(lengths[i] for i in row) for row in batch) for batch in batches]
    return [Planned(batches[i], _smallest(shapes, longest[i])) for i in rng.permutation(len(batches))]


def train_data(
    examples: Sequence[Tokens | Example],
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    packing: bool,
    shapes: int,
    prefetch: int,
    part: Part = WHOLE,
) -> TrainData:
    """Plans a run of `epochs` in batches of `batch_size` rows, `prefetch` of which a thread makes ahead.

    Unpacked, batches take at most `shapes` shapes; packed, one.  Of each batch it makes a `part`.  Raises
    UserError without examples, and for a first step beyond the last.
    """
    at_least_one(batch_size=batch_size, epochs=epochs, shapes=shapes)
    lengths, targets = _sizes(examples)
    sizes = [packed_shape(lengths, targets)] if packing else bucket_shapes(lengths, targets, shapes)

    @functools.lru_cache(maxsize=2)  # prefetching crosses from one epoch to the next
    def plan(epoch: int) -> list[Planned]:
        return plan_epoch(
            lengths, targets, shapes=sizes, batch_size=batch_size, seed=seed, epoch=epoch, packing=packing
        )

    padded = batch_size * sum(shape.length for _, shape in plan(0))
    # packing fits more or fewer rows into an epoch; without it, all have the same number of steps
    steps = [len(plan(epoch)) for epoch in range(epochs)] if packing else [len(plan(0))] * epochs
    ends = np.cumsum(steps)

    def batch(step: int) -> dict[str, np.ndarray]:
        epoch = int(np.searchsorted(ends, step, side="right"))
        rows, shape = plan(epoch)[step - (ends[epoch] - steps[epoch])]
        return collate([[examples[i] for i in row] for row in rows], *shape, part)

    def batches(start_step: int) -> grain.DatasetIterator:
        if not 0 <= start_step <= ends[-1]:
            raise UserError(f"cannot start at step {start_step}; valid: 0 to {ends[-1]}")
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        iterator = iter(grain.MapDataset.range(int(ends[-1])).map(batch).to_iter_dataset(options))
        iterator.set_state({"next_index": start_step})
        return iterator

    return TrainData(sizes, steps, int(ends[-1]), 1 - int(lengths.sum()) / padded, batches)


def eval_batches(
    examples: Sequence[Tokens | Example], *, batch_size: int, shapes: int, part: Part = WHOLE
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Yields (indices [B], batch) with every example once, longest first; -1 is a row that only fills the batch.

    Of each batch it makes a `part`.
    """
    at_least_one(batch_size=batch_size, shapes=shapes)
    lengths, targets = _sizes(examples)
    sizes = bucket_shapes(lengths, targets, shapes)
    for indices in _longest_first(lengths, batch_size):
        shape = _smallest(sizes, lengths[indices[0]])
        yield part.of(indices), collate([[examples[i]] if i >= 0 else [] for i in indices], *shape, part)


def prompt_batches(
    prompts: Sequence[Sequence[int]], *, batch_size: int, multiple: int, longest: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (indices [B], tokens [B T], lengths [B]) with every prompt once, longest first, padded on the right.

    T is a multiple of `multiple`, but no more than `longest`, which no prompt may exceed.  A row that only fills the
    batch has the index -1 and repeats a prompt, because decoding from nothing is undefined.  Raises UserError for a
    prompt without tokens.
    """
    at_least_one(batch_size=batch_size, multiple=multiple)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if 0 in lengths:
        raise UserError(f"prompt {lengths.tolist().index(0)} has no tokens; expected at least one to decode from")
    for indices in _longest_first(lengths, batch_size):
        real = np.where(indices >= 0, indices, indices[0])
        room = -(-lengths[real[0]] // multiple) * multiple
        tokens = np.zeros((batch_size, room if longest is None else min(room, longest)), np.int32)
        for b, i in enumerate(real):
            tokens[b, : lengths[i]] = prompts[i]
        yield indices, tokens, lengths[real]


def _render(text: str, columns: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The template filled in for every row."""
    special = {name: getattr(tokenizer, f"{name}_token") for name in SPECIAL}
    for field in sorted(_fields(text)):
        if field not in columns and field not in special:
            raise UserError(f"template {text!r}: unknown field {field!r}; valid: {', '.join([*columns, *special])}")
        if field not in columns and special[field] is None:
            raise UserError(f"template {text!r}: the tokenizer has no {field} token")
    rows = zip(*columns.values(), strict=True)
    return [text.format_map(special | dict(zip(columns, row, strict=True))) for row in rows]


def _fields(text: str) -> set[str]:
    """What a template names."""
    try:
        return {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
    except ValueError as error:
        raise UserError(f"template {text!r} is malformed: {error}") from error


def check_fields(option: str, text: str, columns: Sequence[str]) -> None:
    """Raises UserError for a template of this option that reads the same for every row, which are of these columns."""
    pieces = [piece for piece in template.pieces(text) if isinstance(piece, str)]
    if not any(_fields(piece) - set(SPECIAL) for piece in pieces):
        known = ", ".join(f"{{{name}}}" for name in columns)
        raise UserError(f"{option}: the template {text!r} is the same for every row; expected a field in it: {known}")


def _tokenise(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # special tokens are the template's business; texts beyond the model's length are the model's
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def longest(examples: Sequence[Tokens | Example]) -> int:
    """How many positions of a row the longest example takes, with the token after it where there is one to predict."""
    return max(len(x.prompt) + len(x.target) if isinstance(x, Tokens) else x.length for x in examples)


def _sizes(examples: Sequence[Tokens | Example]) -> tuple[np.ndarray, np.ndarray]:
    """How many positions and how many targets each example takes."""
    if not examples:
        raise UserError("no examples to make batches of")
    laid_out = [x.example if isinstance(x, Tokens) else x for x in examples]
    return np.array([x.length for x in laid_out]), np.array([len(x.targets) for x in laid_out])


def _smallest(shapes: Sequence[Shape], length: int) -> Shape:
    return next(shape for shape in shapes if shape.length >= length)


def _pack(order: np.ndarray, needs: np.ndarray, shape: Shape) -> list[list[int]]:
    """First fit of examples that need (positions, targets) into rows of `shape`, trying the last rows still open."""
    rows, owners, room = [], [[]] * OPEN_ROWS, np.zeros((OPEN_ROWS, 2), int)
    for i in order:
        fits = (room >= needs[i]).all(axis=1)
        slot = int(fits.argmax())
        if not fits[slot]:
            slot = int(room[:, 0].argmin())  # the fullest row closes
            rows.append([])
            owners[slot], room[slot] = rows[-1], shape
        owners[slot].append(int(i))
        room[slot] -= needs[i]
    return rows


def _longest_first(lengths: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Yields indices [B] in order of falling length, so too little memory shows at once; -1 fills the last."""
    order = np.argsort(-lengths, kind="stable")
    order = np.append(order, np.full(-len(order) % batch_size, -1, order.dtype))
    yield from order.reshape(-1, batch_size)
