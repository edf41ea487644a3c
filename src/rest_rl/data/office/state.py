"""An office in memory that executes calls: it keeps what they change, and draws what it does not know from its seed.

Equal calls to equal offices have equal results in every process. A drawn value is held out if and only if the first
value that it is drawn for is.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import date
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from faker import Faker
from jsonschema import Draft202012Validator, ValidationError

from rest_rl.data.office.catalog import RATES, TOOLS, OfficeTool
from rest_rl.data.office.values import draw_any, is_held_out_value, write_email
from rest_rl.response import ToolCall

Arguments = Mapping[str, Any]
Result = dict[str, Any]
_MAX_CHARACTERS = 10_000
_TIME = re.compile(r"([01]\d|2[0-3]):[0-5]\d")
_SKIES = ("sunny", "cloudy", "rain", "snow", "windy")


class Office:
    """The state of an office, from `seed` and the calls so far (`log`)."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.log: list[ToolCall] = []
        self.contacts: dict[str, Result] = {}
        self.events: defaultdict[str, list[Result]] = defaultdict(list)
        self.bookings: list[tuple[str, str, int, int]] = []
        self.stock: dict[str, int] = {}
        self.files: dict[str, str] = {}
        self.closed: set[tuple[str, Any]] = set()

    def execute(self, call: ToolCall) -> str:
        """Execute a call and return its result as JSON text, `{"error": ...}` if the call is wrong; never raise."""
        try:
            text = json.dumps(call.arguments, allow_nan=False)
            if call.name not in TOOLS or len(text) > _MAX_CHARACTERS:
                raise ValueError("unknown tool" if call.name not in TOOLS else "the arguments are too long")
            arguments = json.loads(text)
            _check_arguments(TOOLS[call.name], arguments)
            result = json.dumps(_FUNCTIONS[call.name](self, arguments), allow_nan=False)
        # Schemas leave much open, and huge numbers and deep nesting have errors of their own.
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
            return json.dumps({"error": str(error)[:200]})
        self.log.append(ToolCall(call.name, arguments))
        return result

    def draw(self, kind: str, *key: Any, form: Callable[[Any], Any] = lambda value: value) -> Any:
        """Return the value of a kind that this office has for a key, in the form that a function gives it."""
        faker, side = _load_faker(), is_held_out_value(key[0])
        faker.seed_instance(_digest(self.seed, kind, *key))
        while is_held_out_value(value := form(draw_any(faker, kind).gold)) != side:
            pass
        return value

    def number(self, low: int, high: int, *key: Any) -> int:
        """Return the number from `low` to `high` that this office has for a key."""
        return random.Random(_digest(self.seed, low, high, *key)).randint(low, high)

    def close(self, what: str, identity: Any) -> Result:
        """Remember that something is done or cancelled, which is possible only once; return the new status."""
        if (what, identity) in self.closed:
            raise ValueError(f"{what} {identity} is already closed")
        self.closed.add((what, identity))
        return {"status": "closed"}


def execute(call: ToolCall, office: Office | None = None) -> str:
    """Execute a call in an office, by default in a fresh one."""
    return (office or Office()).execute(call)


# A hash seeds the draws, because `hash()` is salted per process.
def _digest(*key: Any) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


# Creating a Faker takes long. All offices share this one, which is seeded anew for every draw.
@cache
def _load_faker() -> Faker:
    return Faker("en_US")


@cache
def _validator(name: str) -> Draft202012Validator:
    return Draft202012Validator({**TOOLS[name].function["parameters"], "additionalProperties": False})


def _check_arguments(tool: OfficeTool, given: Any) -> None:
    try:
        _validator(tool.name).validate(given)
    except ValidationError as error:
        raise ValueError(f"{error.json_path}: {error.message}") from error
    for name in given:
        kind, value = tool.slots.get(name), given[name]
        if kind in ("date", "past_date") and date.fromisoformat(value).isoformat() != value:
            raise ValueError(f"{name} is {value}, expected YYYY-MM-DD")
        if kind == "time" and not _TIME.fullmatch(value):
            raise ValueError(f"{name} is {value}, expected HH:MM")
        if kind == "email" and "@" not in value:
            raise ValueError(f"{name} is {value}, expected an email address")
        if kind == "currency" and value not in RATES:
            raise ValueError(f"{name} is {value}, expected one of {', '.join(RATES)}")
        if isinstance(value, int | float) and not 0 <= value < 10**7:
            raise ValueError(f"{name} is out of range")


def _weather(office: Office, city: str, day: int, unit: str = "celsius") -> int:
    celsius = office.number(-5, 32, city, day)
    return round(celsius * 9 / 5 + 32) if unit == "fahrenheit" else celsius


def _current_weather(office: Office, given: Arguments) -> Result:
    city, unit = given["location"], given.get("unit", "celsius")
    sky = _SKIES[office.number(0, len(_SKIES) - 1, city)]
    return {"sky": sky, "temperature": _weather(office, city, 0, unit), "unit": unit}


def _forecast(office: Office, given: Arguments) -> Result:
    if not 1 <= given["days"] <= 14:
        raise ValueError("expected 1 to 14 days")
    return {"celsius": [_weather(office, given["city"], day) for day in range(1, int(given["days"]) + 1)]}


def _create_event(office: Office, given: Arguments) -> Result:
    event = {"id": office.draw("event_id", given["title"], given["date"], given["start_time"])}
    office.events[given["date"]].append({**event, "title": given["title"], "time": given["start_time"]})
    return event


# Every day has one event of its own.
def _list_events(office: Office, given: Arguments) -> Result:
    day = given["date"]
    kinds = {"id": "event_id", "title": "title", "time": "time"}
    events = [{key: office.draw(kind, day) for key, kind in kinds.items()}, *office.events.get(day, ())]
    return {"events": [event for event in events if ("event", event["id"]) not in office.closed]}


def _cancel_event(office: Office, given: Arguments) -> Result:
    return {**office.close("event", given["event_id"]), "notified": given.get("notify", False)}


def _reschedule_event(office: Office, given: Arguments) -> Result:
    identity = given["event_id"]
    time = given.get("new_time") or office.draw("time", identity)
    event = {"id": identity, "title": office.draw("title", identity), "time": time}
    office.events[given["new_date"]].append(event)
    return {**event, "date": given["new_date"]}


def _send(office: Office, given: Arguments) -> Result:
    return {"status": "sent", "message_id": office.draw("message_id", given["to"], len(office.log))}


def _search_inbox(office: Office, given: Arguments) -> Result:
    sender = given["sender"]
    kinds = {"id": "message_id", "subject": "title"}
    number = min(office.number(1, 3, sender), int(given.get("limit", 3)))
    return {"mails": [{key: office.draw(kind, sender, n) for key, kind in kinds.items()} for n in range(number)]}


def _convert_currency(office: Office, given: Arguments) -> Result:
    rate = RATES[given["to"]] / RATES[given["from"]]
    return {"amount": round(given["amount"] * rate, 2), "currency": given["to"]}


def _historical_rate(office: Office, given: Arguments) -> Result:
    drift = office.number(80, 120, given["base"], given["quote"], given["date"]) / 100
    return {"rate": round(RATES[given["quote"]] / RATES[given["base"]] * drift, 4)}


def _connection(office: Office, name: str, kind: str, *key: Any) -> Result:
    return {name: office.draw(kind, *key), "departure": office.draw("time", *key)}


def _hotel(office: Office, given: Arguments) -> Result:
    name = office.draw("last_name", given["city"], given["checkIn"])
    return {"hotel": f"{name} Hotel", "price": office.number(60, 240, name) * int(given["nights"])}


def _with_ending(path: str, ending: str) -> str:
    return PurePosixPath(path).with_suffix(f".{ending}").as_posix()


def _search_files(office: Office, given: Arguments) -> Result:
    ending = given.get("type", "pdf")
    path = office.draw("path", given["query"], ending, form=lambda path: _with_ending(path, ending))
    return {"path": office.files.get(path, path)}


def _rename_file(office: Office, given: Arguments) -> Result:
    path = PurePosixPath(given["path"]).with_name(given["new_name"]).as_posix()
    office.files[given["path"]] = path
    return {"path": path}


def _find_contact(office: Office, given: Arguments) -> Result:
    name = given["name"]
    email = office.draw("domain_word", name, form=lambda domain: write_email(name, domain))
    return office.contacts.get(name) or {"email": email, "phone": office.draw("phone", name)}


def _add_contact(office: Office, given: Arguments) -> Result:
    office.contacts[given["name"]] = {key: value for key, value in given.items() if key != "name"}
    return {"status": "saved"}


def _company(office: Office, given: Arguments) -> Result:
    name = given["name"]
    orders = {"orders": [office.draw("sku", name)]} if given.get("includeOrders") else {}
    return {"email": office.draw("email", name), "city": office.draw("city", name), **orders}


def _book_room(office: Office, given: Arguments) -> Result:
    start = 60 * int(given["start"][:2]) + int(given["start"][3:])
    end = start + int(given["minutes"])
    for room, day, begin, until in office.bookings:
        if (room, day) == (given["room"], given["date"]) and begin < end and start < until:
            raise ValueError(f"{room} is taken")
    office.bookings.append((given["room"], given["date"], start, end))
    return {"status": "booked", "until": f"{end // 60 % 24:02}:{end % 60:02}"}


def _clock(office: Office, given: Arguments) -> Result:
    hour, minute = office.number(0, 23, given["city"]), office.number(0, 59, given["city"])
    is_short = given.get("format") == "12h"
    return {"time": f"{(hour - 1) % 12 + 1}:{minute:02} {'ap'[hour > 11]}m" if is_short else f"{hour:02}:{minute:02}"}


def _stock(office: Office, sku: str) -> int:
    return office.stock.setdefault(sku, office.number(0, 60, sku))


def _order_supplies(office: Office, given: Arguments) -> Result:
    for item in given["items"]:
        office.stock[item["sku"]] = _stock(office, item["sku"]) + int(item["quantity"])
    return {"status": "ordered", "days": 1 if given.get("express") else 4}


_FUNCTIONS: dict[str, Callable[[Office, Arguments], Result]] = {
    "get_current_weather": _current_weather,
    "weather.forecast": _forecast,
    "getAirQuality": lambda office, given: {
        name: office.number(3, 90, given["city"], name) for name in given.get("pollutants", ("pm25", "o3"))
    },
    "create_event": _create_event,
    "list_events": _list_events,
    "cancel_event": _cancel_event,
    "reschedule_event": _reschedule_event,
    "send_email": _send,
    "search_inbox": _search_inbox,
    "mail.setAutoReply": lambda office, given: {"status": "on", "until": given["until"]},
    "forward_message": _send,
    "convert_currency": _convert_currency,
    "historicalRate": _historical_rate,
    "submit_expense": lambda office, given: {"claim": office.number(1000, 9999, len(office.log), given["amount"])},
    "search_flights": lambda office, given: _connection(office, "flight_number", "flight", *given.values()),
    "book_flight": lambda office, given: {"seat": f"{office.number(1, 40, *given.values())}C"},
    "bookHotel": _hotel,
    "order_taxi": lambda office, given: {"status": "ordered", "car": office.number(1, 99, given["pickup"])},
    "find_trains": lambda office, given: _connection(office, "trainNumber", "train", *given.values()),
    "reserveSeat": lambda office, given: {"seat": office.number(1, 90, *given.values())},
    "search_files": _search_files,
    "shareFile": lambda office, given: {"status": "shared", "role": given["role"]},
    "rename_file": _rename_file,
    "files.convert": lambda office, given: {"path": _with_ending(given["path"], given["format"])},
    "print_document": lambda office, given: {"status": "printing", "copies": given["copies"]},
    "find_contact": _find_contact,
    "contacts.add": _add_contact,
    "start_call": lambda office, given: {"status": "ringing", "video": given.get("video", False)},
    "crm.getCompany": _company,
    "find_free_room": lambda office, given: {"room": office.draw("room", given["seats"], given.get("equipment"))},
    "book_room": _book_room,
    "setRoomTemperature": lambda office, given: {"status": "set", "celsius": given["celsius"]},
    "add_task": lambda office, given: {"task_id": office.draw("task_id", given["title"], len(office.log))},
    "tasks.complete": lambda office, given: office.close("task", given["taskId"]),
    "assign_task": lambda office, given: {"status": "assigned", "assignee": given["assignee"]},
    "translate_text": lambda office, given: {"translation": f"({given['target']}) {given['text']}"},
    "get_stock_price": lambda office, given: {"price": office.number(20, 900, given["symbol"], given.get("currency"))},
    "createPriceAlert": lambda office, given: {"status": "active", **given["condition"]},
    "set_timer": lambda office, given: {"status": "running", "seconds": 60 * int(given["minutes"])},
    "clock.now": _clock,
    "set_reminder": lambda office, given: {"status": "set", "at": given["at"]},
    "order_supplies": _order_supplies,
    "checkInventory": lambda office, given: {"units": _stock(office, given["sku"])},
    "track_parcel": lambda office, given: {"city": office.draw("city", given["tracking_number"])},
    "get_manager": lambda office, given: {"manager": office.draw("person", given["employee"])},
    "hr.requestLeave": lambda office, given: {"days_left": office.number(5, 30, given["start"], given["kind"])},
}
