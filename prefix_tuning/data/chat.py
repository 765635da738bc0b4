"""Instructions and conversations: chat JSON (`messages`, or ShareGPT's `conversations`) and Alpaca's three fields."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from prefix_tuning.data import sources
from prefix_tuning.errors import UserError

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def read_array(file: Path) -> Iterator[sources.Row]:
    """Yields the objects of a JSON array; raises UserError for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, list) or not all(isinstance(fields, dict) for fields in found):
        raise UserError(f"{file} is not a JSON array of objects")
    for number, fields in enumerate(found):
        yield sources.Row(f"{file}, entry {number}", fields)


FILES = {split: {f"{split}.jsonl": sources.read_jsonl, f"{split}.json": read_array} for split in sources.SPLITS}


def load(path: str, split: str, *, system: str | None = None) -> datasets.Dataset:
    """Conversations as `messages`, each of which ends with the assistant's answer; `system` begins those without one.

    `target` is that answer, `source` all before it.  Raises UserError for what cannot be read and for turns out of
    order, naming file and line.
    """
    pairs = []
    for row in sources.rows(path, split, FILES):
        messages = turns(row)
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        check_order(row, messages)
        *before, last = messages
        asked = before[-1]["content"] if len(before) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in before)
        pairs.append({"source": asked, "target": last["content"], "messages": messages})
    return datasets.Dataset.from_list(pairs)


def turns(row: sources.Row) -> list[dict[str, str]]:
    """The messages that a row holds in any of the three forms."""
    fields = row.fields
    if "messages" in fields or "conversations" in fields:
        name = "messages" if "messages" in fields else "conversations"
        role, content = ("role", "content") if name == "messages" else ("from", "value")
        given = fields[name]
        if not isinstance(given, list) or not all(isinstance(turn, dict) for turn in given) or not given:
            raise UserError(f"{row.where}: {name} holds {given!r}; expected a list of turns")
        return [message(row, turn.get(role), turn.get(content)) for turn in given]
    if "instruction" not in fields:
        present = ", ".join(fields)
        raise UserError(f"{row.where}: no messages, conversations or instruction; present: {present}")
    asked, answer = (sources.string(row, name) for name in ("instruction", "output"))
    given = fields.get("input") or ""
    return [message(row, "user", f"{asked}\n\n{given}" if given else asked), message(row, "assistant", answer)]


def message(row: sources.Row, role: Any, content: Any) -> dict[str, str]:
    """One turn; raises UserError for an unknown role and for content that is no text."""
    if role not in ROLES or not isinstance(content, str):
        raise UserError(f"{row.where}: a turn of {role!r} with {content!r}; expected a text of {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": content}


def check_order(row: sources.Row, messages: list[dict[str, str]]) -> None:
    """Raises UserError unless user and assistant take turns, perhaps after a system message, and the latter ends."""
    roles = [m["role"] for m in messages if m is not messages[0] or m["role"] != "system"]
    wanted = ["user", "assistant"] * (len(roles) // 2)
    if not roles or roles != wanted:
        raise UserError(f"{row.where}: turns of {', '.join(roles)}; expected user and assistant by turns, to the end")
