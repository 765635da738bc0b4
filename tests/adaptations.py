"""Adaptations for the tests: hooks of every kind, alone and together, every number in them random."""

import numpy as np
from conftest import K, L, P, V

from prefix_tuning.types import KV, Adaptation, Adapter, Delta, Gate, LayerHooks, Memory

R, M = 4, 9
# Ids from V on are virtual tokens: in the middle, side by side, at the start and at the end of a row.
VIRTUAL = [[1, V + 2, V, 5, 3, V + 1, 2], [4, V + 3], [V + 1, 7, 7, 2, V + 3]]
ROWS = [[token % V for token in row] for row in VIRTUAL]
SHIFTS = np.array([P + 4, P, P + 7], np.int32)


class Maker:
    """Random hooks that fit a model, and the cases made of them; shapes are written out from the letters."""

    def __init__(self, model, seed=0):
        self.sites, self.rng = model.sites["decoder"], np.random.default_rng(seed)
        self.D, self.G, self.H = self.sites.width, self.sites.groups["self"], self.sites.kv["self"][1]

    def draw(self, *shape, scale=0.4):
        return (scale * self.rng.normal(size=shape)).astype(np.float32)

    def kv(self, *, per_row=False, length=P, **options):
        shape = (L, *([len(ROWS)] if per_row else []), length, K, self.H)
        return {"self": KV(self.draw(*shape, scale=1), self.draw(*shape, scale=1), **options)}

    def mask(self, *, per_row=False):
        mask = self.rng.random((L, *([len(ROWS)] if per_row else []), P)) < 0.6
        mask[1] = False  # a layer without slots
        assert len({tuple(x.ravel()) for x in mask}) == L
        return mask

    def delta(self, *names, **options):
        shapes = {name: self.sites.projections[name] for name in names or self.sites.projections}
        return {
            name: Delta(self.draw(L, *shape.inner, R), self.draw(L, R, *shape.outer), **options)
            for name, shape in shapes.items()
        }

    def bias(self):
        return {name: self.draw(L, *shape.outer) for name, shape in self.sites.projections.items()}

    def adapter(self, norm=False, **options):
        values = [self.draw(L, *shape) for shape in ((self.D, M), (M,), (M, self.D), (self.D,))]
        norm = {"scale": 1 + self.draw(L, self.D), "bias": self.draw(L, self.D)} if norm else None
        return Adapter(*values, norm=norm, **options)

    def serial(self):
        return {
            "attention": self.adapter(),
            "mlp": self.adapter(norm=True, activation="gelu", scale=0.7),
            "block": self.adapter(norm=True),
        }

    def parallel(self):
        return {
            "attention": self.adapter(norm=True, parallel=True, activation="gelu"),
            "mlp": self.adapter(parallel=True, scale=2.0),
        }

    def memory(self, feature):
        return {"self": Memory(self.draw(L, K, self.G, self.H, self.H), feature)}

    def rows(self):
        return {"self": KV(self.draw(L, R, K, self.H, scale=1), self.draw(L, R, K, self.H, scale=1))}

    def gates(self, *kinds):
        return {kind: Gate(self.draw(L, self.D), self.draw(L)) for kind in kinds}

    def prompt(self, *shape, length=P):
        return self.draw(*shape, length, self.D, scale=1)


def made(*, before=None, rows=None, shift=None, **hooks):
    """An adaptation of layer hooks, prompt rows `before` every example, virtual tokens and a shift."""
    hooks = LayerHooks(rows=hooks.pop("added", None), **hooks)
    return Adaptation(hooks, None if shift is None else np.int32(shift), prompt=before, rows=rows)


CASES = {
    "delta": lambda m: made(delta=m.delta(scale=0.7)),
    "bias": lambda m: made(bias=m.bias()),
    "serial": lambda m: made(adapter=m.serial()),
    "parallel": lambda m: made(adapter=m.parallel()),
    "memory": lambda m: made(memory=m.memory("elu")),
    "gelu": lambda m: made(memory=m.memory("gelu")),
    "gate of slots beside a prompt": lambda m: made(
        kv=m.kv(), gate=m.gates("kv"), before=m.prompt(length=R), shift=P + R
    ),
    "mask of shared slots by row beside a prompt": lambda m: made(
        kv=m.kv(mask=m.mask(per_row=True)), before=m.prompt(length=R), shift=P + R
    ),
    "mask": lambda m: made(kv=m.kv(mask=m.mask()), shift=P),
    "mask of shared slots by row": lambda m: made(kv=m.kv(mask=m.mask(per_row=True))),
    "mask of slots by row": lambda m: made(kv=m.kv(per_row=True, mask=m.mask(per_row=True)), shift=P),
    "gate": lambda m: made(kv=m.kv(gate=m.draw(L, K, m.G))),
    "gates": lambda m: made(
        kv=m.kv(), delta=m.delta(scale=1.5), adapter=m.serial(), gate=m.gates("kv", "delta", "adapter"), shift=P
    ),
    "prompt": lambda m: made(before=m.prompt(), shift=P),
    "prompt without shift": lambda m: made(before=m.prompt()),
    "prompt by row": lambda m: made(before=m.prompt(len(ROWS)), shift=P),
    "prompt and prefix": lambda m: made(kv=m.kv(), before=m.prompt(length=R), shift=P + R),
    "shift by row": lambda m: made(kv=m.kv(), before=m.prompt(), shift=SHIFTS),
    "propagation": lambda m: made(prompt=m.prompt(L), before=m.prompt(), shift=P),
    "rows": lambda m: made(added=m.rows(), rows=m.prompt(length=R)),
    "everything": lambda m: made(
        kv=m.kv(per_row=True, mask=m.mask(per_row=True)),
        memory=m.memory("elu"),
        delta=m.delta(scale=0.3),
        bias=m.bias(),
        adapter={"attention": m.adapter(norm=True), "mlp": m.adapter(parallel=True)},
        gate=m.gates("delta", "adapter"),
        prompt=m.prompt(L, length=R),
        before=m.prompt(len(ROWS), length=R),
        added=m.rows(),
        rows=m.prompt(length=R),
        shift=SHIFTS,
    ),
}


def rows_for(adaptation):
    return ROWS if adaptation.rows is None else VIRTUAL
