"""The other side of a comparison: a torch model under PEFT, its batches and steps as its users have them.

`python -m experiments.peft_side TASK.json` is that side of experiments/bench.py.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from experiments import in_turn, profiles

CLASSES = {
    "lm": transformers.AutoModelForCausalLM,
    "classify": transformers.AutoModelForSequenceClassification,
}


def shuffled(rows: Sequence[Any], batch_size: int, epochs: int, seed: int) -> Iterator[list[Any]]:
    """The batches of a Hugging Face trainer: every row once an epoch, in a random order."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(rows))
        for start in range(0, len(order), batch_size):
            yield [rows[i] for i in order[start : start + batch_size]]


def padded(rows: Sequence[Sequence[int]], fill: int = 0, *, left: bool = False) -> torch.Tensor:
    """Rows [B T] padded to the longest: on the right as a collator lays them out, on the left to generate from."""
    table = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.long)
    for b, row in enumerate(rows):
        start = table.shape[1] - len(row) if left else 0
        table[b, start : start + len(row)] = torch.tensor(row)
    return table


def read_batch(batch: dict[str, np.ndarray], objective: str) -> dict[str, torch.Tensor]:
    """A batch of ours as one of PEFT's, without the padding that no row needs and rows that only fill it.

    Of "lm" the last target is read as well, though nothing is predicted from it, since labels are shifted tokens there.
    """
    rows = batch["examples"] > 0
    tokens, real, mask = (batch[name][rows] for name in ("tokens", "segments", "mask"))
    if objective == "classify":
        longest = int((real > 0).any(0).sum())
        labels = torch.tensor(batch["targets"][rows, 0], dtype=torch.long)
        return {
            "input_ids": whole(tokens[:, :longest]),
            "attention_mask": whole(real[:, :longest] > 0),
            "labels": labels,
        }
    tokens, real = (np.pad(x, [(0, 0), (0, 1)]) for x in (tokens, real))
    labels = np.full(tokens.shape, -100)
    b, n = np.nonzero(mask)
    at, target = batch["target_index"][rows][b, n] + 1, batch["targets"][rows][b, n]
    tokens[b, at] = labels[b, at] = target
    real[b, at] = 1
    longest = int((real > 0).any(0).sum())
    return {
        "input_ids": whole(tokens[:, :longest]),
        "attention_mask": whole(real[:, :longest] > 0),
        "labels": whole(labels[:, :longest]),
    }


def whole(array: np.ndarray) -> torch.Tensor:
    """An array as int64."""
    return torch.tensor(array, dtype=torch.long)


def torch_step(
    model: torch.nn.Module, total: int, *, learning_rate: float, weight_decay: float = 0.0, clip: float = 1.0
) -> Callable[[dict[str, torch.Tensor]], float]:
    """step(batch) -> loss: AdamW with a learning rate that falls linearly to 0 after `total` steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)

    def step(batch: dict[str, torch.Tensor]) -> float:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.item()

    return step


class Side:
    """What experiments/bench.py asks of PEFT."""

    def __init__(self, task: dict[str, Any]):
        self.task, self.device = task, "cuda" if torch.cuda.is_available() else "cpu"
        self.model: torch.nn.Module | None = None
        self.step: Callable | None = None

    def load(self) -> dict[str, Any]:
        """The model with its adapter, ready."""
        task, options = self.task, {"dtype": getattr(torch, self.task["dtype"])}
        if task["objective"] == "classify":
            options["num_labels"] = task["labels"]
        model = CLASSES[task["objective"]].from_pretrained(task["folder"], **options)
        config = peft.PeftConfig.from_pretrained(task["adapter"])
        config.inference_mode = False
        self.model = peft.get_peft_model(model, config)
        peft.set_peft_model_state_dict(self.model, peft.utils.load_peft_weights(task["adapter"]))
        self.model.to(self.device)
        return {}

    def train(self, batch: str) -> dict[str, Any]:
        """A step on the batch in a file."""
        if self.step is None:
            self.step = torch_step(self.model.train(), self.task["steps"], learning_rate=self.task["learning_rate"])
        arrays = read_batch(dict(np.load(batch)), self.task["objective"])
        return {"loss": self.step({name: x.to(self.device) for name, x in arrays.items()})}

    def generate(self, prompts: list[list[int]], beams: int, new: int, end: list[int]) -> dict[str, Any]:
        """So many new tokens for each prompt, never an end token before them."""
        return {"tokens": self.written(prompts, beams, new, end, least=new)}

    def texts(self, prompts: list[list[int]], beams: int, new: int, end: list[int], rows: int) -> dict[str, Any]:
        """At most so many new tokens for each prompt, up to their end token; `rows` prompts at a time, in order."""
        found = []
        for first in range(0, len(prompts), rows):
            found += self.written(prompts[first : first + rows], beams, new, end)
        ends = [next((n + 1 for n, token in enumerate(row) if token in end), len(row)) for row in found]
        return {"tokens": [row[:n] for row, n in zip(found, ends, strict=True)]}

    def written(
        self, prompts: list[list[int]], beams: int, new: int, end: list[int], least: int = 0
    ) -> list[list[int]]:
        """What follows each of a batch of prompts, padded to the longest."""
        tokens, mask = padded(prompts, left=True), padded([[1] * len(row) for row in prompts], left=True)
        with torch.no_grad():
            out = self.model.eval().generate(
                input_ids=tokens.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=new,
                min_new_tokens=least,
                do_sample=False,
                num_beams=beams,
                eos_token_id=end,
                pad_token_id=0,
            )
        return out[:, tokens.shape[1] :].tolist()

    def profile(self, what: str, **values: Any) -> dict[str, Any]:
        """Where the time of one of the others goes."""
        with torch.profiler.profile() as profiler:
            start = time.perf_counter()
            getattr(self, what)(**values)
            seconds = time.perf_counter() - start
        own = "self_cpu_time_total" if self.device == "cpu" else "self_device_time_total"
        kinds = dict.fromkeys(profiles.KINDS, 0.0)
        for event in profiler.key_averages():
            kinds[profiles.kind(event.key)] += getattr(event, own) / 1e6
        kinds[profiles.WAITING] = max(0.0, seconds - sum(kinds.values()))
        return {"kinds": kinds}

    def memory(self) -> dict[str, Any]:
        """MiB held at most and still free, of the accelerator if there is one."""
        if self.device == "cpu":
            return in_turn.host_memory()
        return {"peak": torch.cuda.max_memory_allocated() / 2**20, "free": torch.cuda.mem_get_info()[0] / 2**20}


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not be taken for an answer
    side = Side(json.loads(Path(sys.argv[1]).read_text()))
    actions = ("load", "train", "generate", "texts", "profile", "memory")
    in_turn.serve({name: getattr(side, name) for name in actions}, answers)
