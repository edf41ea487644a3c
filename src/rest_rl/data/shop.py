"""A shop in memory: accounts, orders and invoices, tools that change them, and seeded tasks of several turns.

A task is a request, such as to refund an order. The ids that its calls need are found in the results of earlier calls,
and tools refuse what the state forbids: a shipped order cannot be cancelled, but it can be returned.

Goals:
    `address`: change an address, after unlocking the account if it is locked. `cancel`: cancel an order, or return it
    if it is shipped. `refund`: refund an order, which must be cancelled or returned before. `count`: change how many
    are ordered. `file`: move an invoice to a folder, after unlocking the file if it is locked.
Splits:
    `train`: for training. `unseen_goals`: combinations of a goal, the way the request names the customer (name or id)
    and the way it names the order (item or color) that `train` never uses. `unseen_values`: names, products and
    addresses that `train` never uses; it uses their parts in other combinations. Each held-out split differs from
    `train` only in this respect, but `unseen_goals` has no `address`, which has one combination.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rest_rl.data.samples import Dialogue, to_message_call
from rest_rl.data.tool_world import OPENING_TAGS
from rest_rl.errors import UserError
from rest_rl.response import ToolCall

SPLITS: tuple[str, ...] = ("train", "unseen_goals", "unseen_values")
GOALS = ("address", "cancel", "refund", "count", "file")
ANSWER = "done"
"""The answer after the last call."""

FIRST_NAMES = ("anna", "boris", "carla", "david", "elena", "felix", "greta", "hugo", "ines", "jonas")
LAST_NAMES = ("lund", "berg", "costa", "dahl", "evans", "fox", "grant", "hill", "klein", "moss")
ITEMS = ("lamp", "chair", "mirror", "clock", "carpet", "sofa", "shelf", "desk", "stool", "vase")
COLORS = ("red", "blue", "green", "black", "white", "pink", "brown", "grey", "gold", "purple")
CITIES = ("lima", "oslo", "rome", "cairo", "tokyo", "paris", "delhi", "quito")
FOLDERS = ("inbox", "taxes", "archive", "claims")
NUMBERS = range(10, 60)
"""Numbers of ids and of houses."""
COUNTS = range(1, 10)
# Every fifth combination of two parts is held out.
_FIFTH = 5

REFERENCES = tuple((customer, order) for customer in ("name", "id") for order in ("item", "color"))
"""The ways in which a request names a customer and an order."""
HELD_OUT_REFERENCES = {"cancel": REFERENCES[1], "refund": REFERENCES[2], "count": REFERENCES[3], "file": REFERENCES[0]}
"""For each goal, the references that only `unseen_goals` uses."""

State = dict[str, dict[str, dict[str, Any]]]
"""Tables `customers`, `orders` and `invoices`: the rows by their ids."""
UNKNOWN_TOOL, WRONG_ARGUMENTS = "unknown tool", "wrong arguments"
"""The errors of calls that are refused without looking at the state."""


class ShopError(ValueError):
    """A refused call: the kind of error, for the counts, and a message for the model."""


def _row(state: State, table: str, key: str) -> dict[str, Any]:
    if key not in state[table]:
        raise ShopError("unknown id", f"unknown {table[:-1]}")
    return state[table][key]


def _unlocked(state: State, table: str, key: str, name: str) -> dict[str, Any]:
    row = _row(state, table, key)
    if row["locked"]:
        raise ShopError("locked", f"{name} is locked")
    return row


def _order(state: State, order: str, *statuses: str) -> dict[str, Any]:
    row = _row(state, "orders", order)
    if row["status"] not in statuses:
        raise ShopError("wrong status", f"order is {row['status']}")
    return row


def find_customer(state: State, name: str) -> dict[str, Any]:
    for key, row in state["customers"].items():
        if row["name"] == name:
            return {"customer": key}
    raise ShopError("unknown id", "unknown name")


def list_orders(state: State, customer: str) -> dict[str, Any]:
    _row(state, "customers", customer)
    rows = [(key, row) for key, row in state["orders"].items() if row["customer"] == customer]
    return {"orders": [{"item": row["item"], "color": row["color"], "order": key} for key, row in rows]}


def list_invoices(state: State, customer: str) -> dict[str, Any]:
    orders = {record["order"]: record for record in list_orders(state, customer)["orders"]}
    rows = [(key, orders[row["order"]]) for key, row in state["invoices"].items() if row["order"] in orders]
    return {"invoices": [{"item": row["item"], "color": row["color"], "file": key} for key, row in rows]}


def show_order(state: State, order: str) -> dict[str, Any]:
    row = _row(state, "orders", order)
    return {"count": row["count"], "status": row["status"]}


def _change_status(after: str, *before: str) -> Callable[[State, str], dict[str, Any]]:
    def change(state: State, order: str) -> dict[str, Any]:
        _order(state, order, *before)["status"] = after
        return {"order": order, "status": after}

    return change


def set_count(state: State, order: str, count: int) -> dict[str, Any]:
    _order(state, order, "open")["count"] = count
    return {"order": order, "count": count}


def set_address(state: State, customer: str, address: str) -> dict[str, Any]:
    _unlocked(state, "customers", customer, "account")["address"] = address
    return {"customer": customer, "address": address}


def _set_lock(table: str, locked: bool) -> Callable[..., dict[str, Any]]:
    def change(state: State, **arguments: str) -> dict[str, Any]:
        _row(state, table, *arguments.values())["locked"] = locked
        return {**arguments, "locked": locked}

    return change


def move_file(state: State, file: str, folder: str) -> dict[str, Any]:
    _unlocked(state, "invoices", file, "file")["folder"] = folder
    return {"file": file, "folder": folder}


def delete_file(state: State, file: str) -> dict[str, Any]:
    _row(state, "invoices", file)
    del state["invoices"][file]
    return {"file": file, "status": "deleted"}


ARGUMENTS: dict[str, dict[str, Any]] = {
    **{key: {"type": "string"} for key in ("name", "customer", "order", "file", "address")},
    "folder": {"type": "string", "enum": list(FOLDERS)},
    "count": {"type": "integer", "minimum": COUNTS[0], "maximum": COUNTS[-1]},
}
"""The JSON schemas of all arguments."""


class ShopTool(NamedTuple):
    """What a tool does, its arguments, and the function that executes it on a state."""

    description: str
    arguments: tuple[str, ...]
    execute: Callable[..., dict[str, Any]]


TOOLS = {
    "find_customer": ShopTool("find the id of a name", ("name",), find_customer),
    "list_orders": ShopTool("list the orders of a customer", ("customer",), list_orders),
    "list_invoices": ShopTool("list the invoices of a customer", ("customer",), list_invoices),
    "show_order": ShopTool("show count and status", ("order",), show_order),
    "cancel_order": ShopTool("cancel an open order", ("order",), _change_status("cancelled", "open")),
    "return_order": ShopTool("return a shipped order", ("order",), _change_status("returned", "shipped")),
    "ship_order": ShopTool("ship an open order", ("order",), _change_status("shipped", "open")),
    "refund_order": ShopTool(
        "refund a cancelled or returned order", ("order",), _change_status("refunded", "cancelled", "returned")
    ),
    "set_count": ShopTool("change the count of an open order", ("order", "count"), set_count),
    "set_address": ShopTool("change an address", ("customer", "address"), set_address),
    "lock_account": ShopTool("lock an account", ("customer",), _set_lock("customers", True)),
    "unlock_account": ShopTool("unlock an account", ("customer",), _set_lock("customers", False)),
    "move_file": ShopTool("move a file to a folder", ("file", "folder"), move_file),
    "unlock_file": ShopTool("unlock a file", ("file",), _set_lock("invoices", False)),
    "delete_file": ShopTool("delete a file", ("file",), delete_file),
    "show_hours": ShopTool("show when the shop is open", (), lambda state: {"hours": "9 to 5"}),
}
_ORDER_TOOLS = ("find_customer", "list_orders", "cancel_order", "return_order")
USED_TOOLS = {
    "address": ("find_customer", "set_address", "unlock_account"),
    "cancel": _ORDER_TOOLS,
    "refund": (*_ORDER_TOOLS, "refund_order"),
    "count": ("find_customer", "list_orders", "set_count"),
    "file": ("find_customer", "list_invoices", "move_file", "unlock_file"),
}
"""The tools that a goal can need, all of which its tasks offer."""
MAIN_TOOLS = dict(zip(GOALS, ("set_address", "cancel_order", "refund_order", "set_count", "move_file"), strict=True))
"""The tool that does what a goal asks for, unless it fails; its first argument is the id of what changes."""
FIXES = {
    "account is locked": "unlock_account",
    "file is locked": "unlock_file",
    "order is open": "cancel_order",
    "order is shipped": "return_order",
}
"""The tool that helps after each error that a correct call can meet."""
STATUSES = {"cancel": ("open", "shipped"), "refund": ("open", "shipped", "cancelled"), "count": ("open",)}
"""The statuses that the order of a task can have."""


def describe_tool(name: str) -> dict[str, Any]:
    """Return the JSON schema of a tool in OpenAI's form."""
    tool = TOOLS[name]
    properties, required = {key: dict(ARGUMENTS[key]) for key in tool.arguments}, list(tool.arguments)
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": tool.description, "parameters": parameters}}


def call_shop(state: State, name: str, arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Execute a call, which changes the state in place; return its result as JSON text, and the kind of error or "".

    The result of a refused call is `{"error": ...}`; it leaves the state unchanged.
    """
    tool = TOOLS.get(name)
    try:
        if tool is None:
            raise ShopError(UNKNOWN_TOOL, UNKNOWN_TOOL)
        if set(arguments) != set(tool.arguments) or not all(map(_fits, arguments, arguments.values())):
            raise ShopError(WRONG_ARGUMENTS, WRONG_ARGUMENTS)
        return json.dumps(tool.execute(state, **arguments)), ""
    except ShopError as error:
        kind, message = error.args
        return json.dumps({"error": message}), kind


def _fits(key: str, value: Any) -> bool:
    if key == "count":
        return type(value) is int and value in COUNTS
    return isinstance(value, str) and len(value) <= 100 and (key != "folder" or value in FOLDERS)


def copy_state(state: State) -> State:
    """Return a copy that shares nothing with the state."""
    return {table: {key: dict(row) for key, row in rows.items()} for table, rows in state.items()}


class Step(NamedTuple):
    """A call of a demonstration, the reasoning before it, and its result; `error` is empty if the call succeeded."""

    thought: str
    call: ToolCall
    result: str
    error: str


def tasks(seed: int, split: str = "train", *, kinds: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the endless sequence of tasks that a seed and a split determine; all goals are equally frequent.

    A task is a JSON object with `id`, `goal` (also as `kind`), `request`, `tools` (names), `state` (at the start),
    `gold` (calls), and what the request says: `customer` and `by` (its name or its id), `reference` (item or color of
    the order), `target` (id of the order) and `value` (the new address, count or folder); a part that the goal lacks
    is None.

    Args:
        seed: The seed of the sequence.
        split: The split.
        kinds: Keep only these goals; None keeps all.
    """
    if split not in SPLITS:
        raise UserError(f"split is {split!r}", f"one of {', '.join(SPLITS)}")
    if not set(kinds or GOALS) <= set(GOALS):
        raise UserError(f"kinds is {kinds!r}", f"some of {', '.join(GOALS)}")
    goals = [goal for goal in GOALS if split != "unseen_goals" or goal in HELD_OUT_REFERENCES]
    rng, index = random.Random(f"shop {split} {seed}"), 0
    while not set(goals).isdisjoint(kinds or GOALS):
        for goal in rng.sample(goals, len(goals)):
            if goal in (kinds or GOALS):
                yield _draw_task(rng, f"shop-{split}-{seed}-{index}", goal, split)
                index += 1


def dialogues(seed: int, split: str = "train", *, kinds: Sequence[str] | None = None) -> Iterator[Dialogue]:
    """Yield the endless sequence of solved tasks of a seed and split; the arguments are the same as in `tasks`."""
    return (make_dialogue(task, solve(task)) for task in tasks(seed, split, kinds=kinds))


def make_dialogue(task: Mapping[str, Any], steps: Sequence[Step]) -> Dialogue:
    """Return a task with these steps, and the answer after them, as a dialogue."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": task["request"]}]
    for thought, call, result, _ in steps:
        turn = {"role": "assistant", "reasoning_content": thought, "content": ""}
        messages += [{**turn, "tool_calls": [to_message_call(call)]}, {"role": "tool", "content": result}]
    messages.append({"role": "assistant", "reasoning_content": "all done", "content": ANSWER})
    return Dialogue(task["id"], tuple(messages), tuple(map(describe_tool, task["tools"])), task["goal"])


def solve(task: Mapping[str, Any], *, takes_first: bool = False) -> list[Step]:
    """Return the steps that solve a task. With `takes_first`, they take the first order or invoice of a list as target.

    They use only what the request and earlier results say. Therefore they contain calls that fail: only the error tells
    that an order is shipped or a file is locked.
    """
    state, steps = copy_state(task["state"]), list[Step]()

    def act(thought: str, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        text, error = call_shop(state, name, arguments)
        steps.append(Step(thought, ToolCall(name, arguments), text, error))
        return json.loads(text)

    customer, goal = task["customer"], task["goal"]
    if task["by"] == "name":
        name = task["state"]["customers"][customer]["name"]
        customer = act(f'find "{name}"', "find_customer", {"name": name})["customer"]
    words = [customer]
    if goal != "address":
        listed, key = "invoices" if goal == "file" else "orders", task["reference"]
        records = act(f'{listed} of "{customer}"', f"list_{listed}", {"customer": customer})[listed]
        wanted = task["state"]["orders"][task["target"]][key]
        record = records[0] if takes_first else next(each for each in records if each[key] == wanted)
        # From the word of the request to the id, in the order of the record: each word follows from the one before.
        words = list(record.values())[list(record).index(key) :]
    target, tool = words[-1], MAIN_TOOLS[goal]
    arguments = dict(zip(TOOLS[tool].arguments, (target, task["value"]), strict=False))
    thought = " ".join([goal, *(f'"{word}"' for word in words)])
    if fix := FIXES.get(error := act(thought, tool, arguments).get("error", "")):
        act(f'{error} {fix.split("_")[0]} "{target}"', fix, {TOOLS[fix].arguments[0]: target})
        if goal != "cancel":
            act(f'again "{target}"', tool, arguments)
    return steps


def _draw_task(rng: random.Random, identity: str, goal: str, split: str) -> dict[str, Any]:
    state = _draw_state(rng, split)
    customer = rng.choice(list(state["customers"]))
    target = rng.choice([key for key, row in state["orders"].items() if row["customer"] == customer])
    invoice = next(row for row in state["invoices"].values() if row["order"] == target)
    value: Any = None
    if goal == "address":
        by, reference, row = "name", None, state["customers"][customer]
        row["locked"], value = rng.random() < 0.5, _draw_other(lambda: _draw_address(rng, split), row["address"])
    else:
        held_out = HELD_OUT_REFERENCES[goal]
        allowed = [each for each in REFERENCES if (each == held_out) == (split == "unseen_goals")]
        (by, reference), row = rng.choice(allowed), state["orders"][target]
    if goal == "file":
        invoice["locked"] = rng.random() < 0.5
        value = _draw_other(lambda: rng.choice(FOLDERS), invoice["folder"])
    elif goal in STATUSES:
        row["status"] = rng.choice(STATUSES[goal])
    if goal == "count":
        value = _draw_other(lambda: rng.choice(COUNTS), row["count"])
    others = [name for name in TOOLS if name not in USED_TOOLS[goal]]
    tools = [*USED_TOOLS[goal], *rng.sample(others, rng.choice((1, 2, 3)))]
    target = target if reference else None
    about = {
        "kind": goal,
        "goal": goal,
        "customer": customer,
        "by": by,
        "reference": reference,
        "target": target,
        "value": value,
    }
    task = {"id": identity, **about, "tools": rng.sample(tools, len(tools)), "state": state}
    request = f"{rng.choice(OPENING_TAGS)} {_describe_wish(task)}"
    gold = [{"name": call.name, "arguments": call.arguments} for _, call, _, _ in solve(task)]
    return {**task, "request": request, "gold": gold}


def _describe_wish(task: Mapping[str, Any]) -> str:
    goal, key = task["goal"], task["customer"]
    customer = f'"{task["state"]["customers"][key]["name"]}"' if task["by"] == "name" else f'customer "{key}"'
    if goal == "address":
        return f'set the address of {customer} to "{task["value"]}"'
    order = f'the "{task["state"]["orders"][task["target"]][task["reference"]]}" order of {customer}'
    if goal == "count":
        return f'set the count of {order} to "{task["value"]}"'
    return f'file the invoice of {order} to "{task["value"]}"' if goal == "file" else f"{goal} {order}"


def _draw_state(rng: random.Random, split: str) -> State:
    # Three customers, of whom each has three orders, and one invoice for each order. All ids have different numbers.
    numbers = iter(rng.sample(NUMBERS, 21))
    state: State = {"customers": {}, "orders": {}, "invoices": {}}
    names: set[str] = set()
    while len(names) < 3:
        names.add(" ".join(_draw_pair(rng, FIRST_NAMES, LAST_NAMES, split)))
    for name in sorted(names):
        customer = f"c-{next(numbers)}"
        state["customers"][customer] = {"name": name, "address": _draw_address(rng, split), "locked": False}
        for item, color in _draw_products(rng, split):
            order, status = f"o-{next(numbers)}", rng.choice(STATUSES["refund"])
            row = {"customer": customer, "item": item, "color": color, "count": rng.choice(COUNTS), "status": status}
            state["orders"][order] = row
            file = f"f-{next(numbers)}"
            state["invoices"][file] = {"order": order, "folder": rng.choice(FOLDERS), "locked": False}
    return state


def _draw_products(rng: random.Random, split: str) -> list[tuple[str, str]]:
    # Items and colors of one customer differ, so each identifies an order.
    products: list[tuple[str, str]] = []
    while len(products) < 3:
        product = _draw_pair(rng, ITEMS, COLORS, split)
        if all(set(product).isdisjoint(other) for other in products):
            products.append(product)
    return products


def _draw_address(rng: random.Random, split: str) -> str:
    return "-".join(_draw_pair(rng, CITIES, list(map(str, NUMBERS)), split))


def _draw_pair(rng: random.Random, firsts: Sequence[str], seconds: Sequence[str], split: str) -> tuple[str, str]:
    while True:
        first, second = rng.randrange(len(firsts)), rng.randrange(len(seconds))
        if is_held_out(first, second) == (split == "unseen_values"):
            return firsts[first], seconds[second]


def is_held_out(first: int, second: int) -> bool:
    """Return whether only `unseen_values` combines the parts of a value with these positions in their lists."""
    # A Latin-square rule, as in the tool world: it holds out one fifth of the pairs, spread evenly over both lists.
    return (first + 2 * second) % _FIFTH == 0


def _draw_other(draw: Callable[[], Any], value: Any) -> Any:
    return next(drawn for drawn in iter(draw, None) if drawn != value)
