"""Values of requests: names, dates, amounts and so on, each with the form in which a call takes it and a written form.

A hash of a value decides whether it is held out: about one in five is. Names come from Faker, other words from
`assets/office.json`. Values of an enum belong to the schema of a tool and are never held out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from datetime import date, timedelta
from typing import Any, NamedTuple

from faker import Faker

from rest_rl.data.office.catalog import VALUES

_FIFTH = 5
_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"
_FIRST_DAY = {"date": date(2027, 1, 1), "past_date": date(2021, 1, 1)}
_DAYS = 730


class Value(NamedTuple):
    """A value as the argument of a call, and as it is written in a request."""

    gold: Any
    text: str


def is_held_out_value(value: Any) -> bool:
    """Return whether the value occurs only in `unseen_values`: the rule is a hash of its text."""
    return hashlib.sha256(str(value).encode("utf-8", "surrogatepass")).digest()[0] % _FIFTH == 0


def draw_value(faker: Faker, slot: Any, held_out: bool, taken: set[str] | None = None) -> Value:
    """Draw a value for a slot of the catalog.

    Args:
        faker: The source of names and of randomness.
        slot: The name of a kind of value, a mapping from the values of an enum to their written forms, or a list with
            one slot, for an array of one or two values.
        held_out: Whether to draw a value that is held out or one that is not.
        taken: Texts that must not be drawn; the new one is added.
    """
    taken = set() if taken is None else taken
    if isinstance(slot, Mapping):
        gold = faker.random.choice(list(slot))
        return Value(gold, slot[gold])
    if slot == "yes":
        return Value(True, "")
    if slot == "order_lines" or isinstance(slot, list):
        kind = "order_line" if slot == "order_lines" else slot[0]
        values = [draw_value(faker, kind, held_out, taken) for _ in range(faker.random.choice((1, 2)))]
        if len(values) == 2 and values[0] == values[1]:  # the same value of an enum
            values = values[:1]
        return Value([value.gold for value in values], " and ".join(value.text for value in values))
    if slot == "order_line":
        sku, quantity = (draw_value(faker, kind, held_out, taken) for kind in ("sku", "count"))
        return Value({"sku": sku.gold, "quantity": quantity.gold}, f"{quantity.text} units of {sku.text}")
    while True:
        value = draw_any(faker, slot)
        if is_held_out_value(value.gold) == held_out and (not isinstance(value.gold, str) or value.gold not in taken):
            taken.add(str(value.gold))
            return value


def draw_any(faker: Faker, kind: str) -> Value:
    """Draw a value of a kind, held out or not."""
    rng = faker.random
    if kind in _FIRST_DAY:
        day = _FIRST_DAY[kind] + timedelta(rng.randrange(_DAYS))
        return Value(day.isoformat(), rng.choice(write_date(day)))
    if kind == "time":
        gold = f"{rng.randrange(7, 20):02}:{rng.randrange(0, 60, 5):02}"
        return Value(gold, rng.choice(write_time(gold)))
    if kind == "currency":
        gold = rng.choice(list(VALUES[kind]))
        return Value(gold, rng.choice((VALUES[kind][gold], VALUES[kind][gold], gold)))
    gold = _draw_plain(faker, kind)
    return Value(gold, str(gold))


def _draw_plain(faker: Faker, kind: str) -> Any:
    rng = faker.random
    if kind in ("amount", "price"):
        return rng.randrange(15, 900) + rng.choice((0, 0, 0.5))
    if kind == "task_id":
        return rng.randrange(100, 1000)
    if kind == "path":
        return f"{rng.choice(VALUES['folder'])}/{faker.last_name().lower()}_{rng.choice(VALUES['file_name'])}"
    if kind == "person":
        return f"{faker.first_name()} {faker.last_name()}"
    if kind == "email":
        return write_email(faker.first_name(), faker.domain_word())
    if kind == "street":
        return f"{rng.randrange(1, 300)} {faker.street_name()}"
    if kind == "company":
        return f"{faker.last_name()} {rng.choice(('Group', 'Ltd', 'Inc', 'Partners'))}"
    if kind not in VALUES:
        return getattr(faker, kind)()
    known = VALUES[kind]
    return faker.bothify(known, letters=_LETTERS) if isinstance(known, str) else rng.choice(known)


def write_email(name: str, domain: str) -> str:
    """Return the email address of a person at a company."""
    return f"{re.sub('[^a-z]', '', name.partition(' ')[0].lower()) or 'mail'}@{domain}.com"


def write_date(day: date) -> tuple[str, str]:
    """Return the two forms in which requests write a date."""
    month = day.strftime("%B")
    return f"{day.day} {month} {day.year}", f"{month} {day.day}, {day.year}"


def write_time(time: str) -> tuple[str, str]:
    """Return the two forms in which requests write a time such as 15:30."""
    hour, minute = time.split(":")
    past, half = "" if minute == "00" else f":{minute}", "am" if int(hour) < 12 else "pm"
    return time, f"{(int(hour) - 1) % 12 + 1}{past} {half}"
