"""What a table of a paper is, as data: the runs behind each row, and the numbers printed beside them."""

from typing import Any, NamedTuple


class Column(NamedTuple):
    """A number in every row: the mean of what a run calls `keys`, times `scale`, as the paper prints it."""

    label: str
    keys: tuple[str, ...]
    scale: float = 1.0
    digits: int = 2
    lower: bool = False  # lower is better
    arg: str = ""  # what the config takes for a column that has runs of its own, such as a task


class Row(NamedTuple):
    """A line of a table, or a point of a figure."""

    name: str  # for --only and for folders
    label: str  # the paper's
    file: str = ""  # the config's; "" for a row that the paper copied from elsewhere, which is never run
    arg: str = ""
    overrides: dict[str, Any] = {}  # "section.key" -> value  # noqa: RUF012
    published: dict[str, tuple[float | None, ...]] = {}  # version -> a number per column  # noqa: RUF012
    seeds: tuple[int, ...] | None = None  # None: the one that the config has
    seeds_a_subset: int | None = None  # so many successive seeds train on the same drawn pairs; None: on their own
    without: tuple[str, ...] = ()  # labels of columns that this row has no run for
    series: str = ""  # the line of a figure that this is a point of
    x: float | None = None  # where
    note: str = ""


class Table(NamedTuple):
    """A table or figure."""

    title: str
    source: str
    cost: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    pairs: int | None = None  # in the training split; None: it depends on the column
    records: int | None = None  # scored
    axis: str = ""  # what x is; "" for a table
    log: bool = False  # whether the axis is logarithmic
    mean: str = ""  # the label of a last column, the mean of all others in rows that have all of them
    shape: str = ""  # what the paper says of a figure whose numbers it does not print
    instead: tuple[str, ...] = ()  # what differs from the paper's setting in the rows themselves, in words
    needs: tuple[str, ...] = ()  # options of configs that only the user knows
    notes: tuple[str, ...] = ()  # where our runs differ from the paper's

    @property
    def versions(self) -> tuple[str, ...]:
        """Where numbers were published, the one to compare with first."""
        return tuple(dict.fromkeys(version for row in self.rows for version in row.published))


A = "a modest GPU, hours"
B = "a large GPU, days"
C = "large models or many seeds"
D = "two CPU cores, hours"
