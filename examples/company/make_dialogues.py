"""Write dialogues.jsonl: 400 chats of a made-up bicycle workshop with its customers, logged with their faults.

One seed determines the file, except for the names, which depend on the version of Faker.
`FAULTS` lists the broken rows.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from faker import Faker

Row = dict[str, Any]
COMPANY = json.loads(Path(__file__).with_name("company.json").read_text("utf-8"))
TOOLS: dict[str, Row] = {tool["function"]["name"]: tool for tool in COMPANY["tools"]}
# Values of the tools' enums, and how customers say them.
SERVICES = {"tune-up": "a tune-up", "puncture": "a puncture", "brakes": "the brakes", "gears": "the gears"}
BIKES = {"city": "a city bike", "e-bike": "an e-bike", "cargo": "a cargo bike", "mountain": "a mountain bike"}


class Chat:
    """A dialogue under construction."""

    def __init__(self, rng: random.Random, faker: Faker) -> None:
        self.rng, self.name = rng, f"{faker.first_name()} {faker.last_name()}"
        self.customer_id, self.today = self.number("C", 4), date(2026, 3, 1) + timedelta(rng.randrange(200))
        self.is_known = rng.random() < 0.7
        customer = f" The customer is {self.name}, {self.customer_id}." if self.is_known else ""
        system = f"{COMPANY['system']} Today is {self.today:%A}, {self.today}.{customer}"
        self.messages: list[Row] = [{"role": "system", "content": system}]

    def number(self, letter: str, digits: int) -> str:
        return f"{letter}-{self.rng.randrange(10 ** (digits - 1), 10**digits)}"

    def day(self) -> tuple[str, str]:
        ahead = self.rng.randrange(1, 15)
        day = self.today + timedelta(ahead)
        said = [f"on {day:%B} {day.day}", f"on {day.day} {day:%b}", f"on {day}"]
        said += ["tomorrow"] * 3 if ahead == 1 else [f"on {day:%A}"] * 3 if ahead < 7 else []
        return str(day), self.rng.choice(said)

    def user(self, *phrasings: str) -> None:
        text = self.rng.choice(phrasings)
        if self.rng.random() < 0.35:
            text = " ".join(COMPANY["hurried"].get(word, word) for word in text.rstrip("?.!").split())
        self.messages.append({"role": "user", "content": text})

    def say(self, *phrasings: str) -> None:
        self.messages.append({"role": "assistant", "content": self.rng.choice(phrasings)})

    def call(self, name: str, *arguments: Row, result: Any) -> None:
        calls, results = [], []
        for each in arguments:
            call_id = f"call_{self.rng.randrange(16**8):08x}"
            function = {"name": name, "arguments": json.dumps(each)}
            calls.append({"id": call_id, "type": "function", "function": function})
            results.append({"role": "tool", "tool_call_id": call_id, "content": json.dumps(result)})
        self.messages += [{"role": "assistant", "content": None, "tool_calls": calls}, *results]

    # The app shows the result of the last call as a card, so half of the logs end there.
    def close(self, *phrasings: str) -> None:
        if self.rng.random() < 0.5:
            self.say(*phrasings)
            if self.rng.random() < 0.2:
                self.user("Thanks!", "Great, thank you.", "Perfect, that was all.")
                self.say("You are welcome. Have a good ride!", "You are welcome, see you soon.")

    def identify(self) -> None:
        if not self.is_known:
            self.say("Of course. What is your name or phone number?", "Happy to. What name or phone number is it?")
            key, value = self.rng.choice((("name", self.name), ("phone", self.number("555", 4))))
            self.user(value, f"It's {value}", f"{value}, I was there last month")
            self.call("find_customer", {key: value}, result={"customer_id": self.customer_id, "name": self.name})

    def row(self) -> Row:
        calls = [call["function"]["name"] for message in self.messages for call in message.get("tool_calls", ())]
        names, size = list(dict.fromkeys(calls)), self.rng.choice((2, 2, 2, 3))
        others = [name for name in TOOLS if name not in names]
        names += self.rng.sample(others, max(0, size - len(names)))
        return {"messages": self.messages, "tools": [TOOLS[name] for name in self.rng.sample(names, len(names))]}


def ask_status(chat: Chat) -> None:
    ids = [chat.number("R", 5) for _ in range(chat.rng.choice((1, 1, 2)))]
    said = " and ".join(ids)
    chat.user(f"Is my bike ready? {said}", f"Hello, what is the status of {said}?", f"Any news on {said}?")
    status, euros = chat.rng.choice(("ready", "in progress", "waiting for parts")), chat.rng.randrange(20, 180)
    chat.call("get_repair", *({"repair_id": each} for each in ids), result={"status": status, "euros": euros})
    if chat.rng.random() < 0.3:
        chat.say(f"Status: {status}. The price is {euros} euros.")
        channel = chat.rng.choice(("email", "post"))
        chat.user(f"Please send the invoice of {ids[0]} by {channel}", f"I need the invoice of {ids[0]} by {channel}")
        chat.call("send_invoice", {"repair_id": ids[0], "channel": channel}, result={"sent": True})
        chat.close(f"Done, the invoice is on its way by {channel}.")
    else:
        chat.close(f"Status: {status}. The price is {euros} euros.")


def ask_booking(chat: Chat) -> None:
    (day, said), service = chat.day(), chat.rng.choice(list(SERVICES))
    if chat.rng.random() < 0.3:
        chat.user(f"I need an appointment for {SERVICES[service]}", f"Can you do {SERVICES[service]} this month?")
        chat.say("Certainly. Which day suits you?", "Yes. When would you like to come?")
        chat.user(said, f"{said} if possible", f"Do you have anything {said}?")
    else:
        chat.user(
            f"Can I bring my bike for {SERVICES[service]} {said}?", f"What is free {said} for {SERVICES[service]}?"
        )
    times = sorted(chat.rng.sample(("09:00", "10:30", "11:00", "13:30", "15:00", "16:30"), 3))
    chat.call("list_slots", {"date": day, "service": service}, result={"slots": times})
    if chat.rng.random() < 0.4:
        chat.say(f"We have {times[0]}, {times[1]} and {times[2]}. Which one should I book?")
        time = chat.rng.choice(times)
        chat.user(f"{time} please", f"Please book {time}", f"{time} works", f"I would take {time}")
        chat.identify()
        booking = {"customer_id": chat.customer_id, "service": service, "date": day, "time": time}
        chat.call("book_repair", booking, result={"repair_id": (repair := chat.number("R", 5))})
        chat.close(f"Booked for {time}. Your repair number is {repair}.")


def ask_part(chat: Chat) -> None:
    parts = chat.rng.sample(COMPANY["parts"], chat.rng.choice((1, 1, 2)))
    said = " and ".join(parts)
    chat.user(f"Do you have {said} in stock?", f"What is the price of {said}?", f"I need {said}, is that available?")
    sku, euros = chat.number("P", 4), chat.rng.randrange(5, 60)
    chat.call("check_stock", *({"part": part} for part in parts), result={"sku": sku, "stock": 9, "euros": euros})
    if len(parts) == 1 and chat.rng.random() < 0.5:
        chat.say(
            f"Yes, for {euros} euros each. Shall I reserve it?", f"It costs {euros} euros. Would you like to order?"
        )
        count = chat.rng.randrange(1, 5)
        chat.user(f"Yes, {count} please", f"Please order {count}", f"I need {count}")
        chat.call("order_part", {"sku": sku, "quantity": count}, result={"order_id": chat.number("O", 4)})
        chat.close(f"Ordered: {count} x {parts[0]}.")
    else:
        chat.close(f"Yes, we have {said}, for {euros} euros each.")


def ask_rental(chat: Chat) -> None:
    (day, said), kind, days = chat.day(), chat.rng.choice(list(BIKES)), chat.rng.randrange(2, 8)
    wish = f"{BIKES[kind]} for {days} days {said}"
    chat.user(f"I would like to rent {wish}", f"Is there {wish}?", f"Do you have {wish}?")
    bikes, period = [chat.number("B", 3), chat.number("B", 3)], {"start_date": day, "days": days}
    chat.call("find_bikes", {"bike_type": kind, **period}, result={"bikes": bikes, "euros_per_day": 15})
    if chat.rng.random() < 0.4:
        chat.say(f"Yes: {bikes[0]} and {bikes[1]}, 15 euros a day. Which one, and do you need a helmet?")
        bike, helmet = chat.rng.choice(bikes), chat.rng.random() < 0.5
        which, wish = "first" if bike == bikes[0] else "second", "with a helmet" if helmet else "no helmet"
        chat.user(f"{bike}, {wish}", f"The {which} one please, {wish}")
        chat.identify()
        rental = {"bike_id": bike, "customer_id": chat.customer_id, **period, "helmet": helmet}
        chat.call("rent_bike", rental, result={"rental_id": chat.number("H", 4), "euros": 15 * days})
        chat.close(f"{bike} is yours for {days} days. That is {15 * days} euros.")


def ask_extension(chat: Chat) -> None:
    rental, days = chat.number("H", 4), chat.rng.randrange(2, 8)
    chat.user(f"Can I keep {rental} for {days} more days?", f"Please extend rental {rental} by {days} days")
    chat.call("extend_rental", {"rental_id": rental, "days": days}, result={"extended": True})
    chat.close(f"Done, you can keep it {days} days longer.")


def ask_quote(chat: Chat) -> None:
    services, euros = chat.rng.sample(list(SERVICES), chat.rng.choice((1, 2))), chat.rng.randrange(25, 160)
    said = " and ".join(SERVICES[each] for each in services)
    chat.user(f"What would you charge for {said}?", f"I need a price for {said}", f"How much is {said}?")
    chat.call("quote_price", {"services": services}, result={"euros": euros})
    chat.close(f"That costs {euros} euros.", f"It would be {euros} euros. Shall I look for a free time?")


def ask_hours(chat: Chat) -> None:
    (day, said), shops = chat.day(), chat.rng.sample(("Harbor", "Old Town"), chat.rng.choice((1, 1, 2)))
    chat.user(f"When are you open {said}, {' and '.join(shops)}?", f"Opening hours {said} in {' and '.join(shops)}?")
    chat.call("opening_hours", *({"shop": shop, "date": day} for shop in shops), result={"hours": "09:00-18:00"})
    chat.close("We are open from 09:00 to 18:00.")


def ask_off_topic(chat: Chat) -> None:
    question, answer = chat.rng.choice(COMPANY["off_topic"])
    chat.user(question, f"Hello, {question[0].lower()}{question[1:]}")
    chat.say(answer)


REQUESTS = [ask_status, ask_booking, ask_part, ask_rental, ask_quote, ask_hours] * 3
REQUESTS += [ask_status, ask_booking, ask_extension, ask_off_topic, ask_off_topic]


def edit(row: Row, change: Callable[[Row], Any]) -> None:
    function = row["messages"][2]["tool_calls"][0]["function"]
    changed = change(json.loads(function["arguments"]))
    function["arguments"] = changed if isinstance(changed, str) else json.dumps(changed)


def end_with(row: Row, kept: int, text: str) -> None:
    row["messages"] = [*row["messages"][:kept], {"role": "assistant", "content": text}]


def tag_call(row: Row) -> None:
    call = row["messages"][2]["tool_calls"][0]["function"]
    end_with(row, 2, f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {call["arguments"]}}}\n</tool_call>')


# Number of the row: (request, what breaks the row, the reasons that `data check` gives). Row 300 repeats row 100, and
# row 340 repeats row 140 and continues its dialogue. Row 380 is cut off.
FAULTS: dict[int, tuple[Callable[[Chat], None], Callable[[Row], Any] | None, tuple[str, ...]]] = {
    20: (ask_extension, lambda row: row.update(tools=[TOOLS["get_repair"]]), ("unknown_tool",)),
    70: (ask_extension, lambda row: edit(row, lambda a: {**a, "price": 0}), ("undocumented_argument",)),
    95: (ask_extension, lambda row: edit(row, lambda a: {"days": a["days"]}), ("missing_argument",)),
    120: (ask_hours, lambda row: edit(row, lambda a: {**a, "shop": "harbour"}), ("not_in_enum",)),
    145: (ask_extension, lambda row: edit(row, lambda a: {**a, "days": str(a["days"])}), ("number_as_string",)),
    170: (ask_extension, lambda row: edit(row, repr), ("arguments_as_python",)),
    195: (ask_booking, lambda row: edit(row, lambda a: json.dumps(a)[:-9]), ("bad_turn", "broken_history")),
    220: (ask_extension, tag_call, ("call_as_text",)),
    245: (ask_extension, lambda row: end_with(row, 3, "Done."), ("missing_result",)),
    270: (ask_extension, lambda row: end_with(row, 4, ""), ("empty_turn",)),
    295: (ask_off_topic, lambda row: row["messages"].pop(), ("no_assistant_turn",)),
    300: (ask_status, None, ("duplicate",)),
    340: (ask_status, None, ("duplicate",)),
    380: (ask_status, None, ("not_json",)),
}


def make_lines() -> list[str]:
    """Return the lines of the file."""
    rng, faker = random.Random(0), Faker("en_US")
    faker.seed_instance(0)
    rows: dict[str, Row] = {}  # by the start of the dialogue, so that only the two repeated rows are duplicates
    while len(rows) < 400:
        request, damage, _ = FAULTS.get(len(rows) + 1, (rng.choice(REQUESTS), None, ()))
        request(chat := Chat(rng, faker))
        if (start := json.dumps(chat.messages[:2])) not in rows:
            rows[start] = copy.deepcopy(chat.row())
            if damage:
                damage(rows[start])
    made = list(rows.values())
    made[299], made[339] = made[99], copy.deepcopy(made[139])
    made[339]["messages"] += [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "I am here."}]
    lines = [json.dumps(row) for row in made]
    return [*lines[:379], lines[379][:-60], *lines[380:]]


if __name__ == "__main__":
    Path("dialogues.jsonl").write_text("\n".join(make_lines()) + "\n", encoding="utf-8")
