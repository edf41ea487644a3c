"""Three tools of your own, a calendar, arithmetic and a table of units, and a small model that learns to use them.

It is trained on demonstrations made from the gold calls, until it solves some tasks, and then with rewards.
"""

import random
import sqlite3
from typing import Literal, get_args

import rest_rl
from rest_rl.cli.terminal import Screen

TITLES = ("lunch", "call with Ana", "team meeting", "dentist", "review", "train to Lyon", "interview", "gym")
Day = Literal["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
Unit = Literal["meters", "kilometers", "miles", "feet"]
UNITS = {"meters": 1.0, "kilometers": 1000.0, "miles": 1609.344, "feet": 0.3048}


class Assistant:
    """An environment in TRL's form: `reset` sets a task up, methods are tools, and the first effect ends the task."""

    def _open(self) -> None:
        self.calendar, self.results = sqlite3.connect(":memory:"), list[float]()
        self.calendar.execute("CREATE TABLE events (day TEXT, title TEXT)")

    def reset(self, seed: int, **task: str) -> str:
        self._open()
        rng = random.Random(seed)
        (a, b), sign, units = rng.sample(range(12, 100), 2), rng.choice("+-*"), rng.sample(tuple(UNITS), 2)
        event = {"day": rng.choice(get_args(Day)), "title": rng.choice(TITLES)}
        self.wanted, request = rng.choice((
            (("add_event", event), f"Put {event['title']} into my calendar on {event['day']}."),
            (("calculate", {"a": a, "operation": sign, "b": b}), f"How much is {a} {sign} {b}?"),
            (("convert", {"amount": a, "unit": units[0], "target": units[1]}), f"Convert {a} {' to '.join(units)}."),
        ))  # fmt: skip
        return request

    def add_event(self, day: Day, title: str) -> str:
        """Add an event to the calendar."""
        self.calendar.execute("INSERT INTO events VALUES (?, ?)", (day, title))
        return f"added {title} on {day}"

    def calculate(self, a: float, operation: Literal["+", "-", "*"], b: float) -> float:
        """Calculate with two numbers."""
        self.results.append({"+": a + b, "-": a - b, "*": a * b}[operation])
        return self.results[-1]

    def convert(self, amount: float, unit: Unit, target: Unit) -> float:
        """Convert a length to another unit."""
        self.results.append(round(amount * UNITS[unit] / UNITS[target], 3))
        return self.results[-1]

    @property
    def done(self) -> bool:
        return bool(self._list_effects())

    def gold_calls(self) -> list[dict[str, object]]:
        return [{"name": self.wanted[0], "arguments": self.wanted[1]}]

    def get_reward(self) -> float:
        """One point if the tools did what the user asked for, and nothing else."""
        effects = self._list_effects()
        self._open()
        getattr(self, self.wanted[0])(**self.wanted[1])
        return float(effects == self._list_effects())

    def _list_effects(self) -> list[object]:
        return [*self.calendar.execute("SELECT day, title FROM events"), *self.results]


SFT = ["data.path=runs/demonstrations.jsonl", "rest.preset=sft", "eval.prompts=0", "trl.max_steps=250",
       "trl.learning_rate=2e-3", "trl.lr_scheduler_type=constant_with_warmup", "trl.per_device_train_batch_size=16",
       "trl.gradient_accumulation_steps=1"]  # fmt: skip
RL = ["env.turns=2", "eval.prompts=128", "trl.max_steps=60", "trl.learning_rate=1e-4", "trl.max_completion_length=96"]
if __name__ == "__main__":
    screen = Screen(show_every=5)  # prints progress, sample rollouts, and the scores before and after training
    rest_rl.write_demonstrations(Assistant, "runs/demonstrations.jsonl", number=800)
    start = rest_rl.train(out="runs/own-tools-sft", overrides=SFT, observer=screen).model
    rest_rl.train(env=Assistant, model=start, out="runs/own-tools", overrides=RL, observer=screen)
