"""An office in memory that executes calls: what it is told it remembers, and what it is asked for the first time it
draws from its seed and the question.

Equal calls to equal offices have equal results in every process. A drawn value is held out if and only if one of the
values that it is drawn for is.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from faker import Faker
from jsonschema import Draft202012Validator, ValidationError

from rest_rl.data.office.catalog import RATES, TOOLS
from rest_rl.data.office.values import draw_value, is_held_out_value, write_email
from rest_rl.response import ToolCall

Arguments = Mapping[str, Any]
Result = dict[str, Any]
_MAX_CHARACTERS = 10_000
_SKIES = ("sunny", "cloudy", "rain", "snow", "windy")


class Office:
    """The state of an office: `execute` runs a call and returns its result."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.contacts: dict[str, Result] = {}
        self.events: defaultdict[str, list[Result]] = defaultdict(list)
        self.bookings: list[tuple[str, str, int, int]] = []
        self.stock: dict[str, int] = {}
        self.files: dict[str, str] = {}
        self.done: set[tuple[str, str]] = set()
        self.log: list[ToolCall] = []

    def execute(self, call: ToolCall) -> str:
        """Execute a call and return its result as JSON text; the result of a call that cannot be executed is an error.

        Never raises, whatever the name and arguments are.
        """
        try:
            if not isinstance(call.name, str) or call.name not in TOOLS:
                raise ValueError("unknown tool")
            text = json.dumps(call.arguments, allow_nan=False)
            if len(text) > _MAX_CHARACTERS:
                raise ValueError("the arguments are too long")
            arguments = json.loads(text)
            _check_arguments(call.name, arguments)
            result = json.dumps(_FUNCTIONS[call.name](self, arguments), allow_nan=False)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            return json.dumps({"error": str(error)[:200]})
        self.log.append(call)
        return result

    def draw(self, slot: Any, *key: Any) -> Any:
        """Draw a value that is the same whenever the office draws this slot for this key."""
        faker = _seeded_faker(self.seed, slot, *key)
        return draw_value(faker, slot, any(map(is_held_out_value, key))).gold

    def number(self, low: int, high: int, *key: Any) -> int:
        return _seeded_random(self.seed, low, high, *key).randint(low, high)

    def choose(self, options: Any, *key: Any) -> Any:
        return options[self.number(0, len(options) - 1, *key)]

    def finish(self, what: str, identity: Any) -> None:
        """Remember that something was completed or cancelled, which is possible only once."""
        if (what, str(identity)) in self.done:
            raise ValueError(f"{what} {identity} was already closed")
        self.done.add((what, str(identity)))


def execute(call: ToolCall, office: Office | None = None) -> str:
    """Execute a call in an office, by default in a fresh one."""
    return (office or Office()).execute(call)


def _seeded_random(*key: Any) -> random.Random:
    return random.Random(hashlib.sha256(json.dumps(key).encode()).hexdigest())


@cache
def _load_faker() -> Faker:
    return Faker("en_US")


# Creating a Faker takes long. All offices share one, which is seeded for every draw.
def _seeded_faker(*key: Any) -> Faker:
    faker = _load_faker()
    faker.seed_instance(hashlib.sha256(json.dumps(key).encode()).hexdigest())
    return faker


@cache
def _validator(name: str) -> Draft202012Validator:
    return Draft202012Validator({**TOOLS[name].function["parameters"], "additionalProperties": False})


def _check_arguments(name: str, arguments: Any) -> None:
    try:
        _validator(name).validate(arguments)
    except ValidationError as error:
        raise ValueError(f"{error.json_path}: {error.message}") from error


_FUNCTIONS: dict[str, Callable[[Office, Arguments], Result]] = {}


def _tool(name: str) -> Callable[[Callable[[Office, Arguments], Result]], Callable[[Office, Arguments], Result]]:
    def register(function: Callable[[Office, Arguments], Result]) -> Callable[[Office, Arguments], Result]:
        _FUNCTIONS[name] = function
        return function

    return register


def _degrees(office: Office, city: str, day: int, unit: str) -> int:
    celsius = office.number(-5, 32, city, day)
    return round(celsius * 9 / 5 + 32) if unit == "fahrenheit" else celsius


def _minutes(time: str) -> int:
    hour, _, minute = time.partition(":")
    return int(hour) * 60 + int(minute)


@_tool("get_current_weather")
def get_current_weather(office: Office, given: Arguments) -> Result:
    city, unit = given["location"], given.get("unit", "celsius")
    return {"sky": office.choose(_SKIES, city), "temperature": _degrees(office, city, 0, unit), "unit": unit}


@_tool("weather.forecast")
def forecast(office: Office, given: Arguments) -> Result:
    days = range(1, int(given["days"]) + 1)
    return {"temperatures": [_degrees(office, given["city"], day, "celsius") for day in days]}


@_tool("getAirQuality")
def get_air_quality(office: Office, given: Arguments) -> Result:
    names = given.get("pollutants") or ["pm25", "o3"]
    return {name: office.number(3, 90, given["city"], name) for name in names}


@_tool("create_event")
def create_event(office: Office, given: Arguments) -> Result:
    event = {"id": office.draw("event_id", given["title"], given["date"], given["start_time"])}
    office.events[given["date"]].append({**event, "title": given["title"], "start_time": given["start_time"]})
    return event


@_tool("list_events")
def list_events(office: Office, given: Arguments) -> Result:
    day = given["date"]
    old = {slot: office.draw(kind, day) for slot, kind in (("id", "event_id"), ("title", "title"))}
    events = [{**old, "start_time": office.draw("time", day)}, *office.events[day]]
    events = [event for event in events if ("event", event["id"]) not in office.done]
    return {"events": events}


@_tool("cancel_event")
def cancel_event(office: Office, given: Arguments) -> Result:
    office.finish("event", given["event_id"])
    return {"status": "cancelled", "notified": given.get("notify", False)}


@_tool("reschedule_event")
def reschedule_event(office: Office, given: Arguments) -> Result:
    moved = {"id": given["event_id"], "title": office.draw("title", given["event_id"])}
    time = given.get("new_time") or office.draw("time", given["event_id"])
    office.events[given["new_date"]].append({**moved, "start_time": time})
    return {**moved, "date": given["new_date"], "start_time": time}


@_tool("send_email")
@_tool("forward_message")
def send(office: Office, given: Arguments) -> Result:
    if "@" not in given["to"]:
        raise ValueError(f"{given['to']} is not an email address")
    return {"status": "sent", "message_id": office.draw("message_id", given["to"], len(office.log))}


@_tool("search_inbox")
def search_inbox(office: Office, given: Arguments) -> Result:
    sender = given["sender"]
    number = min(office.number(1, 3, sender), int(given.get("limit", 3)))
    mails = [
        {"id": office.draw("message_id", sender, n), "subject": office.draw("title", sender, n)} for n in range(number)
    ]
    return {"mails": mails}


@_tool("mail.setAutoReply")
def set_auto_reply(office: Office, given: Arguments) -> Result:
    return {"status": "on", "until": given["until"]}


@_tool("convert_currency")
def convert_currency(office: Office, given: Arguments) -> Result:
    return {"amount": round(given["amount"] * _rate(given["from"], given["to"]), 2), "currency": given["to"]}


def _rate(base: str, quote: str) -> float:
    if unknown := {base, quote} - set(RATES):
        raise ValueError(f"unknown currency {', '.join(sorted(unknown))}")
    return RATES[quote] / RATES[base]


@_tool("historicalRate")
def historical_rate(office: Office, given: Arguments) -> Result:
    drift = office.number(80, 120, given["base"], given["quote"], given["date"]) / 100
    return {"rate": round(_rate(given["base"], given["quote"]) * drift, 4)}


@_tool("submit_expense")
def submit_expense(office: Office, given: Arguments) -> Result:
    _rate(given["currency"], given["currency"])
    return {
        "status": "submitted",
        "claim": office.number(1000, 9999, given["amount"], given["category"], len(office.log)),
    }


@_tool("search_flights")
def search_flights(office: Office, given: Arguments) -> Result:
    key = given["origin"], given["destination"], given["date"]
    return {"flight_number": office.draw("flight", *key), "departure": office.draw("time", *key)}


@_tool("find_trains")
def find_trains(office: Office, given: Arguments) -> Result:
    key = given["from"], given["to"], given["date"]
    return {"trainNumber": office.draw("train", *key), "departure": office.draw("time", *key)}


@_tool("book_flight")
def book_flight(office: Office, given: Arguments) -> Result:
    return {"status": "booked", "seat": f"{office.number(1, 40, given['flight_number'], given['passenger'])}C"}


@_tool("reserveSeat")
def reserve_seat(office: Office, given: Arguments) -> Result:
    return {"status": "reserved", "seat": office.number(1, 90, given["trainNumber"], given["passenger"])}


@_tool("bookHotel")
def book_hotel(office: Office, given: Arguments) -> Result:
    hotel = f"{office.draw('last_name', given['city'], given['checkIn'])} Hotel"
    return {"hotel": hotel, "price": office.number(60, 240, hotel) * int(given["nights"])}


@_tool("order_taxi")
def order_taxi(office: Office, given: Arguments) -> Result:
    return {"status": "ordered", "car": office.number(1, 99, given["pickup"], given["time"])}


@_tool("search_files")
def search_files(office: Office, given: Arguments) -> Result:
    topic = given["query"]
    ending = given.get("type") or office.choose(("pdf", "docx", "xlsx"), topic)
    path = PurePosixPath(office.draw("path", topic)).with_suffix(f".{ending}").as_posix()
    return {"path": office.files.get(path, path), "owner": office.draw("person", topic)}


@_tool("shareFile")
def share_file(office: Office, given: Arguments) -> Result:
    return {"status": "shared", "path": given["path"], "role": given["role"]}


@_tool("rename_file")
def rename_file(office: Office, given: Arguments) -> Result:
    path = (PurePosixPath(given["path"]).parent / given["new_name"]).as_posix()
    office.files[given["path"]] = path
    return {"path": path}


@_tool("files.convert")
def convert_file(office: Office, given: Arguments) -> Result:
    path = PurePosixPath(given["path"])
    if not path.name:
        raise ValueError(f"{given['path']} is not a file")
    return {"path": path.with_suffix(f".{given['format']}").as_posix()}


@_tool("print_document")
def print_document(office: Office, given: Arguments) -> Result:
    return {"status": "printing", "printer": office.choose(("2nd floor", "lobby"), given["path"])}


@_tool("find_contact")
def find_contact(office: Office, given: Arguments) -> Result:
    name = given["name"]
    if name not in office.contacts:
        office.contacts[name] = {"email": _draw_email(office, name), "phone": office.draw("phone", name)}
    return office.contacts[name]


def _draw_email(office: Office, name: str) -> str:
    faker, side = _seeded_faker(office.seed, "email", name), is_held_out_value(name)
    while True:
        email = write_email(faker, name)
        if is_held_out_value(email) == side:
            return email


@_tool("contacts.add")
def add_contact(office: Office, given: Arguments) -> Result:
    office.contacts[given["name"]] = {key: value for key, value in given.items() if key != "name"}
    return {"status": "saved"}


@_tool("start_call")
def start_call(office: Office, given: Arguments) -> Result:
    return {"status": office.choose(("ringing", "busy"), given["number"]), "video": given.get("video", False)}


@_tool("crm.getCompany")
def get_company(office: Office, given: Arguments) -> Result:
    name = given["name"]
    record = {"email": office.draw("email", name), "city": office.draw("city", name)}
    return {**record, "orders": [office.draw("sku", name)]} if given.get("includeOrders") else record


@_tool("find_free_room")
def find_free_room(office: Office, given: Arguments) -> Result:
    key = given["seats"], *sorted(given.get("equipment", ()))
    return {"room": _draw_room(office, key), "seats": given["seats"]}


# The equipment is an enum, which has no held-out values, so the number of seats alone decides.
def _draw_room(office: Office, key: tuple[Any, ...]) -> str:
    faker = _seeded_faker(office.seed, "room", *key)
    return draw_value(faker, "room", is_held_out_value(key[0])).gold


@_tool("book_room")
def book_room(office: Office, given: Arguments) -> Result:
    start = _minutes(given["start"])
    end = start + int(given["minutes"])
    for room, day, begin, until in office.bookings:
        if (room, day) == (given["room"], given["date"]) and begin < end and start < until:
            raise ValueError(f"{room} is taken on {day}")
    office.bookings.append((given["room"], given["date"], start, end))
    return {"status": "booked", "room": given["room"], "until": f"{end // 60 % 24:02}:{end % 60:02}"}


@_tool("setRoomTemperature")
def set_room_temperature(office: Office, given: Arguments) -> Result:
    if not 10 <= given["celsius"] <= 30:
        raise ValueError("expected 10 to 30 degrees")
    return {"room": given["room"], "celsius": given["celsius"]}


@_tool("add_task")
def add_task(office: Office, given: Arguments) -> Result:
    return {"task_id": office.draw("task_id", given["title"], len(office.log)), "status": "open"}


@_tool("tasks.complete")
def complete_task(office: Office, given: Arguments) -> Result:
    office.finish("task", int(given["taskId"]))
    return {"status": "done"}


@_tool("assign_task")
def assign_task(office: Office, given: Arguments) -> Result:
    return {"task_id": given["task_id"], "assignee": given["assignee"]}


@_tool("translate_text")
def translate_text(office: Office, given: Arguments) -> Result:
    return {"translation": f"[{given['target']}] {given['text']}"}


@_tool("get_stock_price")
def get_stock_price(office: Office, given: Arguments) -> Result:
    return {"price": office.number(20, 900, given["symbol"]), "currency": given.get("currency", "USD")}


@_tool("createPriceAlert")
def create_price_alert(office: Office, given: Arguments) -> Result:
    return {"status": "active", "symbol": given["symbol"], **given["condition"]}


@_tool("set_timer")
def set_timer(office: Office, given: Arguments) -> Result:
    if not 0 < given["minutes"] <= 1440:
        raise ValueError("expected 1 to 1440 minutes")
    return {"status": "running", "seconds": 60 * int(given["minutes"])}


@_tool("clock.now")
def get_time(office: Office, given: Arguments) -> Result:
    hour, minute = office.number(0, 23, given["city"]), office.number(0, 59, given["city"])
    if given.get("format") == "12h":
        return {"time": f"{(hour - 1) % 12 + 1}:{minute:02} {'am' if hour < 12 else 'pm'}"}
    return {"time": f"{hour:02}:{minute:02}"}


@_tool("set_reminder")
def set_reminder(office: Office, given: Arguments) -> Result:
    return {"status": "set", "minute_of_day": _minutes(given["at"])}


@_tool("order_supplies")
def order_supplies(office: Office, given: Arguments) -> Result:
    for item in given["items"]:
        office.stock[item["sku"]] = _stock(office, item["sku"]) + int(item["quantity"])
    return {"status": "ordered", "days": 1 if given.get("express") else 4}


@_tool("checkInventory")
def check_inventory(office: Office, given: Arguments) -> Result:
    return {"sku": given["sku"], "units": _stock(office, given["sku"])}


def _stock(office: Office, sku: str) -> int:
    return office.stock.setdefault(sku, office.number(0, 60, sku))


@_tool("track_parcel")
def track_parcel(office: Office, given: Arguments) -> Result:
    number = given["tracking_number"]
    return {"status": office.choose(("in transit", "delivered"), number), "city": office.draw("city", number)}


@_tool("get_manager")
def get_manager(office: Office, given: Arguments) -> Result:
    return {"manager": office.draw("person", given["employee"])}


@_tool("hr.requestLeave")
def request_leave(office: Office, given: Arguments) -> Result:
    if not math.isfinite(given["days"]) or given["days"] < 1:
        raise ValueError("expected at least one day")
    return {"status": "requested", "days_left": office.number(5, 30, given["start"])}
