"""Where virtual tokens stand in a text: `{rows:N}` stands for N of them; all else is `str.format`'s."""

import re

ROWS = re.compile(r"\{rows:(\d+)\}")


def pieces(template: str) -> list[str | int]:
    """The texts of a template, and between them the numbers of virtual tokens; empty texts are left out."""
    parts = ROWS.split(template)  # text, number, text, ..., text
    return [int(part) if i % 2 else part for i, part in enumerate(parts) if part]
