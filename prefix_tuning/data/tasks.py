"""Tasks whose answers are not written but chosen: from rows of a data set to examples, and from scores to answers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from prefix_tuning import template
from prefix_tuning.data import pipeline
from prefix_tuning.data.pipeline import Example
from prefix_tuning.errors import UserError

LONGEST_ANSWER = 30  # tokens of an extracted answer, as in the official baselines for SQuAD


class Encoded(NamedTuple):
    """The examples of some rows, in order; a long row may have several."""

    examples: list[Example]
    owners: list[int]  # the row that each example is of
    rows: list[dict[str, Any]]
    notes: list[Any]  # what `Task.answer` wants to know of each example


class Task(NamedTuple):
    """How the rows of a data set become examples and answers."""

    # (dataset, tokenizer, first, **text) -> Encoded; `first` says that whole texts are read off their first token
    encode: Callable[..., Encoded]
    references: Callable[[dict[str, Any]], list[str]]  # the right answers to a row
    source: Callable[[dict[str, Any]], str]  # what a row asks, for those who read predictions
    # (row, notes, scores of each of its examples) -> the answer
    answer: Callable[[dict[str, Any], list[Any], list[np.ndarray]], str]


def answers(task: Task, encoded: Encoded, scores: Sequence[np.ndarray]) -> list[str]:
    """The answer to every row, from the scores of every example."""
    own: list[list[int]] = [[] for _ in encoded.rows]
    for number, owner in enumerate(encoded.owners):
        own[owner].append(number)
    return [
        task.answer(row, [encoded.notes[i] for i in numbers], [scores[i] for i in numbers])
        for row, numbers in zip(encoded.rows, own, strict=True)
    ]


def classify(
    *, labels: Sequence[str], words: Sequence[str] | None = None, pooling: str = "token", dropout: float = 0.0
) -> Task:
    """Rows with `source`, perhaps `source2`, and the name of a class in `label`."""
    del words, pooling, dropout  # the objective's business
    classes = list(labels)

    def encode(
        dataset: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        first: bool,
        *,
        prompt: str,
        max_length: int | None = None,
        virtual: int,
    ) -> Encoded:
        rows = list(dataset)
        texts = read_texts(dataset, tokenizer, prompt=prompt, max_length=max_length, virtual=virtual)
        masked = "{mask}" in prompt
        examples = []
        for number, (row, (tokens, types)) in enumerate(zip(rows, texts, strict=True)):
            if masked and tokenizer.mask_token_id not in tokens:
                raise UserError(f"row {number}: text.max_length={max_length} cuts {{mask}} off; expected more")
            if masked:
                index = tokens.index(tokenizer.mask_token_id)
            else:
                index = where_to_read(tokens, first, virtual)
            label = place("label", row, classes, number) if "label" in row else 0
            examples.append(Example(tokens, [index], [label], types))
        return Encoded(examples, list(range(len(rows))), rows, [None] * len(rows))

    def answer(row: dict[str, Any], notes: list[Any], scores: list[np.ndarray]) -> str:
        del row, notes
        return classes[int(scores[0][0].argmax())]

    return Task(encode, lambda row: [row["label"]], asked, answer)


def tag(*, labels: Sequence[str], dropout: float = 0.0) -> Task:
    """Rows with `words` and the `tags` of each; an answer is the tags with spaces between, "O" for words cut off."""
    del dropout  # the objective's business
    classes = list(labels)

    def encode(
        dataset: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        first: bool,
        *,
        prompt: str,
        max_length: int | None = None,
        virtual: int,
    ) -> Encoded:
        del first
        if prompt.count("{words}") != 1:
            raise UserError(f"text.prompt={prompt!r} must have {{words}} once, where the words to tag stand")
        before, after = prompt.split("{words}")
        rows = [row | {"words": row.get("words") or row["source"].split()} for row in dataset]
        front, back = encode_parts(dataset, tokenizer, (before, after), virtual)
        examples, notes = [], []
        for number, (row, head, tail) in enumerate(zip(rows, front, back, strict=True)):
            if len(row.get("tags", row["words"])) != len(row["words"]):
                raise UserError(
                    f"row {number}: {len(row['tags'])} tags for {len(row['words'])} words; expected one each"
                )
            # A space before each word: for byte-level vocabularies a word is another token without one.
            pieces = tokenizer([f" {word}" for word in row["words"]], add_special_tokens=False)["input_ids"]
            tokens, index, targets = list(head), [], []
            room = None if max_length is None else max_length - len(head) - len(tail)
            used = 0
            for i, piece in enumerate(pieces):
                if not piece or (room is not None and used + len(piece) > room):
                    break
                index.append(len(tokens))
                targets.append(place("tags", {"tags": row["tags"][i]}, classes, number) if "tags" in row else 0)
                tokens += piece
                used += len(piece)
            examples.append(Example([*tokens, *tail], index, targets))
            notes.append(len(index))
        return Encoded(examples, list(range(len(rows))), rows, notes)

    def answer(row: dict[str, Any], notes: list[Any], scores: list[np.ndarray]) -> str:
        read = [classes[i] for i in scores[0][: notes[0]].argmax(-1)]
        return " ".join(read + ["O"] * (len(row["words"]) - len(read)))

    return Task(encode, lambda row: [" ".join(row["tags"])], lambda row: " ".join(row["words"]), answer)


def choice(*, dropout: float = 0.0) -> Task:
    """Rows with `source`, the texts `choices` and the number of the right one in `label`."""
    del dropout  # the objective's business

    def encode(
        dataset: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        first: bool,
        *,
        prompt: str,
        max_length: int | None = None,
        virtual: int,
    ) -> Encoded:
        if "{choice}" not in prompt:
            raise UserError(f"text.prompt={prompt!r} must have {{choice}}, where each of the choices stands")
        rows = list(dataset)
        flat = datasets.Dataset.from_list([{**row, "choice": text} for row in rows for text in row["choices"]])
        texts = iter(
            read_texts(flat, tokenizer, prompt=prompt, max_length=max_length, virtual=virtual, second="choice")
        )
        examples = []
        for number, row in enumerate(rows):
            right = row.get("label", 0)
            if not isinstance(right, int) or not 0 <= right < len(row["choices"]):
                raise UserError(f"row {number}: label {right!r}; expected 0 to {len(row['choices']) - 1}")
            tokens, types, index, parts = [], [], [], []
            for _ in row["choices"]:
                own, kinds = next(texts)
                index.append(len(tokens) + where_to_read(own, first, virtual))
                tokens, types, parts = tokens + own, types + kinds, [*parts, len(own)]
            examples.append(Example(tokens, index, [int(i == right) for i in range(len(parts))], types, parts))
        return Encoded(examples, list(range(len(rows))), rows, [None] * len(rows))

    def answer(row: dict[str, Any], notes: list[Any], scores: list[np.ndarray]) -> str:
        del notes
        return row["choices"][int(scores[0][: len(row["choices"])].argmax())]

    return Task(encode, lambda row: [row["choices"][row["label"]]], asked, answer)


def span(*, dropout: float = 0.0) -> Task:
    """Rows with a question `source`, its context `source2`, and `answers` that start at `starts`; none is no answer.

    A context that is too long is read in windows that overlap by `stride` tokens; the best answer of any is taken.
    """
    del dropout  # the objective's business

    def encode(
        dataset: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        first: bool,
        *,
        prompt: str,
        max_length: int = 384,
        stride: int = 128,
        virtual: int,
    ) -> Encoded:
        if not first:
            raise UserError("objective 'span' needs an encoder, whose first token stands for no answer")
        if prompt.count("{source2}") != 1:
            raise UserError(f"text.prompt={prompt!r} must have {{source2}} once, where the context stands")
        before, after = prompt.split("{source2}")
        if stride < 0:
            raise UserError(f"text.stride is {stride}; expected at least 0 tokens of overlap")
        if not prompt.startswith("{cls}"):
            raise UserError(f"text.prompt={prompt!r} must begin with {{cls}}, which stands for no answer")
        rows = list(dataset)
        front, back = encode_parts(dataset, tokenizer, (before, after), virtual)
        contexts = tokenizer([row["source2"] for row in rows], add_special_tokens=False, return_offsets_mapping=True)
        examples, owners, notes = [], [], []
        for number, (row, head, tail) in enumerate(zip(rows, front, back, strict=True)):
            ids, offsets = contexts["input_ids"][number], contexts["offset_mapping"][number]
            room = max_length - len(head) - len(tail)
            if room <= stride:
                raise UserError(
                    f"row {number}: its question leaves {room} of text.max_length={max_length} tokens for the context; "
                    f"expected more than text.stride={stride}"
                )
            start = 0
            while True:
                window, spans = ids[start : start + room], offsets[start : start + room]
                types = [0] * len(head) + [1] * len(window) + [0] * len(tail)
                found = positions_of(row, spans) if row.get("answers") else None
                index = [0, 0] if found is None else [len(head) + i for i in found]
                examples.append(Example([*head, *window, *tail], index, [0, 0], types))
                owners.append(number)
                notes.append((len(head), spans))
                if start + room >= len(ids):
                    break
                start += room - stride
        return Encoded(examples, owners, rows, notes)

    def answer(row: dict[str, Any], notes: list[Any], scores: list[np.ndarray]) -> str:
        best, text, nothing = -np.inf, "", np.inf
        for (head, spans), score in zip(notes, scores, strict=True):
            nothing = min(nothing, float(score[0].sum()))  # every window must say that there is none
            starts, ends = score[head : head + len(spans)].T
            pairs = starts[:, None] + ends[None, :]
            distance = np.arange(len(spans))[None, :] - np.arange(len(spans))[:, None]
            pairs = np.where((distance >= 0) & (distance < LONGEST_ANSWER), pairs, -np.inf)
            i, j = np.unravel_index(pairs.argmax(), pairs.shape)
            if pairs[i, j] > best:
                best, text = float(pairs[i, j]), row["source2"][spans[i][0] : spans[j][1]]
        return text if best > nothing else ""

    return Task(encode, lambda row: list(row["answers"]) or [""], asked, answer)


TASKS = {"classify": classify, "tag": tag, "choice": choice, "span": span}


def asked(row: dict[str, Any]) -> str:
    """The texts of a row, a tab between two."""
    return "\t".join(row[name] for name in ("source", "source2") if row.get(name) is not None)


def place(column: str, row: dict[str, Any], classes: list[str], number: int) -> int:
    """The number of the class that a row names; raises `UserError` for a name that is not in `objective.labels`."""
    if row[column] not in classes:
        raise UserError(f"row {number}: {column} {row[column]!r}; valid, by objective.labels: {', '.join(classes)}")
    return classes.index(row[column])


def where_to_read(tokens: list[int], first: bool, virtual: int) -> int:
    """The position of the first real token, or of the last."""
    return next(i for i, token in enumerate(tokens) if token < virtual) if first else len(tokens) - 1


def positions_of(row: dict[str, Any], spans: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Where among the tokens' spans the first answer begins and ends; None if it does not lie in them."""
    start = row["starts"][0]
    end = start + len(row["answers"][0])
    if not spans or start < spans[0][0] or end > spans[-1][1]:
        return None
    begins = max(i for i, (a, _) in enumerate(spans) if a <= start)
    ends = min(i for i, (_, b) in enumerate(spans) if b >= end)
    return (begins, ends) if begins <= ends else None


def encode_parts(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, parts: Sequence[str], virtual: int
) -> list[list[list[int]]]:
    """The tokens of each part of a template for every row; virtual tokens are counted through."""
    made, used = [], 0
    for part in parts:
        options = {"max_source": None, "virtual": virtual, "used": used, "empty": True}
        made.append(pipeline.encode_prompts(dataset, tokenizer, prompt=part, **options))
        used += sum(piece for piece in template.pieces(part) if isinstance(piece, int))
    return made


def read_texts(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str,
    max_length: int | None,
    virtual: int,
    second: str = "source2",
) -> list[tuple[list[int], list[int]]]:
    """(tokens, types) of the template for every row; from the column `second` on tokens are of type 1.

    Rows above `max_length` lose tokens from the end of the longer of `source` and `second`, as in BERT's recipe.
    Raises UserError for a template that leaves no room.
    """
    name = f"{{{second}}}"
    front, found, back = prompt.partition(name)
    parts = [front, found + back] if found else [front]
    columns = [column for column in ("source", second) if f"{{{column}}}" in prompt]

    def encoded(dataset: datasets.Dataset) -> list[list[list[int]]]:
        return [list(pieces) for pieces in zip(*encode_parts(dataset, tokenizer, parts, virtual), strict=True)]

    made = encoded(dataset)
    if max_length is not None and any(sum(map(len, pieces)) > max_length for pieces in made):
        made = encoded(shortened(dataset, tokenizer, columns, [sum(map(len, x)) - max_length for x in made]))
        # What was cut may be tokenised otherwise at its end; what is still too long loses it there.
        made = [[*pieces[:-1], pieces[-1][: max_length - sum(map(len, pieces[:-1]))]] for pieces in made]
    for row, pieces in enumerate(made):
        if not any(token < virtual for piece in pieces for token in piece):
            raise UserError(f"row {row}: the prompt {prompt!r} has no tokens; expected at least one to read")
    return [
        ([token for piece in pieces for token in piece], [kind for kind, piece in enumerate(pieces) for _ in piece])
        for pieces in made
    ]


def shortened(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, columns: list[str], excess: list[int]
) -> datasets.Dataset:
    """The rows with `excess` tokens (none if below 0) cut from the ends of their columns, the longest first."""
    texts = {name: list(dataset[name]) for name in columns}
    spans = {
        name: tokenizer(values, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        for name, values in texts.items()
    }
    for row, over in enumerate(excess):
        lengths = {name: len(spans[name][row]) for name in columns}
        if (over > 0 and sum(lengths.values()) - over < len(columns)) or not columns:
            raise UserError(f"row {row}: text.max_length leaves no token of {', '.join(columns)}; expected more")
        for _ in range(max(over, 0)):
            longest = max(lengths, key=lengths.get)
            lengths[longest] -= 1
        for name in columns:
            if lengths[name] < len(spans[name][row]):
                texts[name][row] = texts[name][row][: spans[name][row][lengths[name] - 1][1]]
    return datasets.Dataset.from_dict(dataset[:] | texts)
