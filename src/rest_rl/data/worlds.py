"""The worlds: generators of dialogues with executable tools, by their values of `data.path`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

from rest_rl.config import EMBEDDED
from rest_rl.data import shop, tool_world
from rest_rl.data.samples import Dialogue, ToolSample, iterate_samples


class World(NamedTuple):
    """The splits of a world, of which the first is for training, and the dialogues of a seed and a split."""

    splits: tuple[str, ...]
    dialogues: Callable[..., Iterator[Dialogue]]

    @property
    def held_out(self) -> tuple[str, ...]:
        """The splits for evaluation."""
        return self.splits[1:]

    def draw(self, seed: int, n: int, split: str) -> list[ToolSample]:
        """Return the first `n` samples of a seed and a split."""
        return list(islice(iterate_samples(self.dialogues(seed, split)), n))


def open_world(path: str, decision: tool_world.Decision = "reasoning") -> World:
    """Return the world with this value of `data.path`, one of `config.WORLDS`; `decision` is the tool world's."""
    if path == EMBEDDED:
        return World(tool_world.SPLITS, partial(tool_world.dialogues, decision=decision))
    if path == "shop":
        return World(shop.SPLITS, shop.dialogues)
    from rest_rl.data import office  # imports Faker, which takes time

    return World(office.SPLITS, office.dialogues)
