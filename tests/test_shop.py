"""The shop: deterministic, isolated, its tools as documented, its gold worth full marks, its splits held out."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from rest_rl.data.samples import decompose
from rest_rl.data.shop import (
    ANSWER,
    CITIES,
    COLORS,
    FIRST_NAMES,
    FIXES,
    FOLDERS,
    GOALS,
    HELD_OUT_REFERENCES,
    ITEMS,
    LAST_NAMES,
    NUMBERS,
    SPLITS,
    TOOLS,
    USED_TOOLS,
    State,
    call_shop,
    describe_tool,
    dialogues,
    is_held_out,
    solve,
    tasks,
)
from rest_rl.envs.session import OPTIONAL_METHODS
from rest_rl.envs.shop import STEP_SHARE, Shop, ShopSession
from rest_rl.response import ToolCall

N = 200
ANSWERED = [{"role": "assistant", "content": "done"}]
TASKS = {split: Shop().tasks(split, 0, N) for split in SPLITS}


def make_state() -> State:
    """A shop of two customers, with one order in each status."""
    statuses = ("open", "shipped", "cancelled", "returned", "refunded")
    return {
        "customers": {
            "c-1": {"name": "anna lund", "address": "oslo-11", "locked": False},
            "c-2": {"name": "boris berg", "address": "rome-12", "locked": True},
        },
        "orders": {
            f"o-{n}": {
                "customer": "c-1" if n < 3 else "c-2",
                "item": ITEMS[n],
                "color": COLORS[n],
                "count": n,
                "status": s,
            }
            for n, s in enumerate(statuses, 1)
        },
        "invoices": {
            "f-1": {"order": "o-1", "folder": "inbox", "locked": False},
            "f-2": {"order": "o-2", "folder": "inbox", "locked": True},
        },
    }


def changes(before: State, after: State) -> dict[str, Any]:
    """The changed values by `id.field`; a removed row has None."""
    found: dict[str, Any] = {}
    for table, rows in before.items():
        assert set(after[table]) <= set(rows)
        for key, row in rows.items():
            now = after[table].get(key)
            if now is None:
                found[key] = None
            else:
                found |= {f"{key}.{field}": now[field] for field in row if now[field] != row[field]}
    return found


def play(session: ShopSession, calls: list[dict[str, Any]]) -> list[float]:
    """Make the calls; return all rewards, the final one last."""
    rewards = [session.call_tool(call["name"], call["arguments"]).reward for call in calls]
    return [reward or 0.0 for reward in [*rewards, session.verify(ANSWERED).reward]]


@pytest.mark.parametrize(
    ("call", "result", "changed"),
    [
        (("find_customer", {"name": "boris berg"}), {"customer": "c-2"}, {}),
        (("find_customer", {"name": "anna berg"}), {"error": "unknown name"}, {}),
        (
            ("list_orders", {"customer": "c-1"}),
            {
                "orders": [
                    {"item": "chair", "color": "blue", "order": "o-1"},
                    {"item": "mirror", "color": "green", "order": "o-2"},
                ]
            },
            {},
        ),
        (("list_orders", {"customer": "c-9"}), {"error": "unknown customer"}, {}),
        (
            ("list_invoices", {"customer": "c-1"}),
            {
                "invoices": [
                    {"item": "chair", "color": "blue", "file": "f-1"},
                    {"item": "mirror", "color": "green", "file": "f-2"},
                ]
            },
            {},
        ),
        (("list_invoices", {"customer": "c-2"}), {"invoices": []}, {}),
        (("list_invoices", {"customer": "o-1"}), {"error": "unknown customer"}, {}),
        (("show_order", {"order": "o-2"}), {"count": 2, "status": "shipped"}, {}),
        (("show_order", {"order": "f-2"}), {"error": "unknown order"}, {}),
        (("cancel_order", {"order": "o-1"}), {"order": "o-1", "status": "cancelled"}, {"o-1.status": "cancelled"}),
        (("cancel_order", {"order": "o-2"}), {"error": "order is shipped"}, {}),
        (("return_order", {"order": "o-2"}), {"order": "o-2", "status": "returned"}, {"o-2.status": "returned"}),
        (("return_order", {"order": "o-1"}), {"error": "order is open"}, {}),
        (("ship_order", {"order": "o-1"}), {"order": "o-1", "status": "shipped"}, {"o-1.status": "shipped"}),
        (("ship_order", {"order": "o-5"}), {"error": "order is refunded"}, {}),
        (("refund_order", {"order": "o-3"}), {"order": "o-3", "status": "refunded"}, {"o-3.status": "refunded"}),
        (("refund_order", {"order": "o-4"}), {"order": "o-4", "status": "refunded"}, {"o-4.status": "refunded"}),
        (("refund_order", {"order": "o-1"}), {"error": "order is open"}, {}),
        (("refund_order", {"order": "o-7"}), {"error": "unknown order"}, {}),
        (("set_count", {"order": "o-1", "count": 9}), {"order": "o-1", "count": 9}, {"o-1.count": 9}),
        (("set_count", {"order": "o-3", "count": 9}), {"error": "order is cancelled"}, {}),
        (
            ("set_address", {"customer": "c-1", "address": "lima-20"}),
            {"customer": "c-1", "address": "lima-20"},
            {"c-1.address": "lima-20"},
        ),
        (("set_address", {"customer": "c-2", "address": "lima-20"}), {"error": "account is locked"}, {}),
        (("lock_account", {"customer": "c-1"}), {"customer": "c-1", "locked": True}, {"c-1.locked": True}),
        (("unlock_account", {"customer": "c-2"}), {"customer": "c-2", "locked": False}, {"c-2.locked": False}),
        (("unlock_account", {"customer": "c-3"}), {"error": "unknown customer"}, {}),
        (
            ("move_file", {"file": "f-1", "folder": "taxes"}),
            {"file": "f-1", "folder": "taxes"},
            {"f-1.folder": "taxes"},
        ),
        (("move_file", {"file": "f-2", "folder": "taxes"}), {"error": "file is locked"}, {}),
        (("unlock_file", {"file": "f-2"}), {"file": "f-2", "locked": False}, {"f-2.locked": False}),
        (("unlock_file", {"file": "o-2"}), {"error": "unknown invoice"}, {}),
        (("delete_file", {"file": "f-2"}), {"file": "f-2", "status": "deleted"}, {"f-2": None}),
        (("delete_file", {"file": "f-3"}), {"error": "unknown invoice"}, {}),
        (("show_hours", {}), {"hours": "9 to 5"}, {}),
        (("open_account", {"name": "anna lund"}), {"error": "unknown tool"}, {}),
        (("cancel_order", {"order": "o-1", "customer": "c-1"}), {"error": "wrong arguments"}, {}),
        (("cancel_order", {}), {"error": "wrong arguments"}, {}),
        (("cancel_order", {"order": ["o-1"]}), {"error": "wrong arguments"}, {}),
        (("set_count", {"order": "o-1", "count": 10}), {"error": "wrong arguments"}, {}),
        (("set_count", {"order": "o-1", "count": True}), {"error": "wrong arguments"}, {}),
        (("set_count", {"order": "o-1", "count": "2"}), {"error": "wrong arguments"}, {}),
        (("move_file", {"file": "f-1", "folder": "bin"}), {"error": "wrong arguments"}, {}),
    ],
)
def test_every_tool_does_what_it_says_and_refuses_the_rest(
    call: tuple[str, dict[str, Any]], result: dict[str, Any], changed: dict[str, Any]
) -> None:
    before, state = make_state(), make_state()
    text, error = call_shop(state, *call)
    assert json.loads(text) == result
    assert bool(error) == ("error" in result)
    assert changes(before, state) == changed


def test_errors_have_kinds() -> None:
    calls = {
        "unknown id": ("show_order", {"order": "o-9"}),
        "wrong status": ("return_order", {"order": "o-1"}),
        "locked": ("move_file", {"file": "f-2", "folder": "taxes"}),
        "unknown tool": ("x", {}),
        "wrong arguments": ("show_order", {"file": "f-1"}),
    }
    assert {kind: call_shop(make_state(), *call)[1] for kind, call in calls.items()} == {kind: kind for kind in calls}


@pytest.mark.parametrize("split", SPLITS)
def test_a_seed_gives_the_same_tasks_and_another_seed_others(split: str) -> None:
    assert Shop().tasks(split, 0, N) == TASKS[split]
    assert Shop().tasks(split, 0, 17) == TASKS[split][:17]
    assert not {json.dumps(task["state"]) for task in Shop().tasks(split, 1, N)} & {
        json.dumps(task["state"]) for task in TASKS[split]
    }
    assert Shop().tasks(split, 0, 0) == []
    assert len({task["id"] for task in TASKS[split]}) == N


def test_tools_have_valid_schemas_which_gold_arguments_match() -> None:
    schemas = {name: describe_tool(name)["function"]["parameters"] for name in TOOLS}
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    validators = {name: Draft202012Validator(schema) for name, schema in schemas.items()}
    for task in (task for split in SPLITS for task in TASKS[split]):
        assert json.loads(json.dumps(task)) == task
        assert [tool["function"]["name"] for tool in Shop().open(task, 0).list_tools()] == task["tools"]
        assert {call["name"] for call in task["gold"]} <= set(USED_TOOLS[task["goal"]]) <= set(task["tools"])
        assert len(set(task["tools"]) - set(USED_TOOLS[task["goal"]])) in (1, 2, 3)
        for call in task["gold"]:
            validators[call["name"]].validate(call["arguments"])


@pytest.mark.parametrize("split", SPLITS)
def test_gold_calls_are_worth_1_and_no_call_is_worth_0(split: str) -> None:
    for task in TASKS[split]:
        session = Shop().open(task, 0)
        *steps, final = play(session, session.gold_calls())
        assert sum(steps) == pytest.approx(STEP_SHARE)
        assert final == pytest.approx(1 - STEP_SHARE)
        assert session.verify(ANSWERED).parts == {"success": 1.0, "progress": 1.0}
        assert play(Shop().open(task, 0), []) == [0.0]
        assert 2 <= len(steps) <= 5


def test_goals_are_equally_frequent_and_half_of_the_tasks_meet_an_error() -> None:
    many = list(islice(tasks(3), 1000))
    assert Counter(task["goal"] for task in many) == dict.fromkeys(GOALS, 200)
    met = {step.result for task in many for step in solve(task) if step.error}
    assert met == {json.dumps({"error": error}) for error in FIXES}
    # Chance of an error: 0 for count, 2/3 for refund, 1/2 for the others, so (0 + 2/3 + 3/2) / 5 = 0.433 on average.
    assert sum(any(step.error for step in solve(task)) for task in many) / 1000 == pytest.approx(0.433, abs=0.05)


def find_task(goal: str, **wanted: Any) -> Mapping[str, Any]:
    """The first task of a goal whose order, invoice or account has these values."""
    for task in tasks(0, kinds=[goal]):
        rows = [task["state"]["customers"][task["customer"]], task["state"]["orders"].get(task["target"], {})]
        if all(any(row.get(key) == value for row in rows) for key, value in wanted.items()) and task["by"] == "name":
            return task
    raise AssertionError


def test_steps_are_paid_once_when_a_needed_call_first_succeeds() -> None:
    task = find_task("refund", status="shipped")
    session = Shop().open(task, 0)
    find, orders, refund, send_back, again = session.gold_calls()
    assert refund == again
    # Four of the five gold calls succeed: each is worth 0.3 / 4 = 0.075.
    assert play(session, [find, find, orders, refund, send_back, send_back, again, again]) == pytest.approx(
        [0.075, 0, 0.075, 0, 0.075, 0, 0.075, 0, 0.7]
    )


def test_a_rollout_that_stops_early_keeps_its_steps() -> None:
    session = Shop().open(find_task("cancel", status="shipped"), 0)
    find, orders, cancel, _ = session.gold_calls()
    # Three of the four gold calls succeed: each is worth 0.1.
    assert play(session, [orders, cancel, find]) == pytest.approx([0.1, 0, 0.1, 0])
    assert session.verify(ANSWERED).parts == pytest.approx({"success": 0, "progress": 2 / 3})


def test_the_shortest_way_succeeds_without_the_steps_it_leaves_out() -> None:
    session = Shop().open(find_task("cancel", status="shipped"), 0)
    assert play(session, session.gold_calls()[-1:]) == pytest.approx([0.1, 0.7])


def test_a_needless_change_costs_the_outcome() -> None:
    task = find_task("count")
    other = next(key for key in task["state"]["customers"] if key != task["customer"])
    session = ShopSession({**task, "tools": [*task["tools"], "lock_account", "unlock_account"]})
    assert play(session, [*session.gold_calls(), {"name": "lock_account", "arguments": {"customer": other}}])[-1] == 0
    assert play(session, [{"name": "unlock_account", "arguments": {"customer": other}}])[-1] == pytest.approx(0.7)


def test_tools_that_are_not_offered_do_not_run() -> None:
    task = find_task("cancel", status="open")
    session = ShopSession({**task, "tools": [name for name in task["tools"] if name != "cancel_order"]})
    before = session.state()
    assert session.call_tool("cancel_order", {"order": task["target"]}).error == "unknown tool"
    assert session.state() == before


def test_sessions_share_no_state_and_leave_the_task_unchanged() -> None:
    for task in TASKS["train"][:50]:
        original = copy.deepcopy(dict(task))
        first, second = Shop().open(task, 1), Shop().open(task, 1)
        assert first.state_hash() == second.state_hash()
        play(first, first.gold_calls())
        first.state()["orders"].clear()
        first.gold_calls()[0]["arguments"].clear()
        first.list_tools()[0]["function"].clear()
        assert second.state() == task["state"] == original["state"]
        assert dict(task) == original
        assert play(second, second.gold_calls())[-1] == pytest.approx(0.7)


def test_the_hash_tells_what_has_been_changed_and_what_is_known() -> None:
    task = find_task("cancel", status="open")
    find, orders, cancel = Shop().open(task, 0).gold_calls()

    def hash_after(*calls: dict[str, Any]) -> str:
        session = Shop().open(task, 0)
        play(session, list(calls))
        return session.state_hash()

    assert len({hash_after(), hash_after(find), hash_after(find, orders), hash_after(find, orders, cancel)}) == 4
    assert hash_after(find, orders) == hash_after(orders, find, find)
    assert hash_after() == hash_after({"name": "x", "arguments": {}})


def test_a_session_has_all_optional_methods() -> None:
    assert {name for name in OPTIONAL_METHODS if hasattr(ShopSession, name)} == set(OPTIONAL_METHODS) - {"gold_answer"}


def test_success_needs_an_answer_at_the_end() -> None:
    task = TASKS["train"][0]
    session = Shop().open(task, 0)
    for call in task["gold"]:
        session.call_tool(call["name"], call["arguments"])
    calling = {"role": "assistant", "content": "", "tool_calls": [{}]}
    for messages in ([], [calling], [calling, {"role": "tool", "content": "{}"}]):
        assert session.verify(messages).parts == {"success": 0.0, "progress": 1.0}
    assert session.verify(ANSWERED).reward == pytest.approx(0.7)


def test_dialogues_are_the_gold_calls_with_their_results() -> None:
    for split in SPLITS:
        for task, dialogue in zip(TASKS[split][:50], dialogues(0, split), strict=False):
            session = Shop().open(task, 0)
            turns = [message for message in dialogue.messages if message["role"] == "assistant"]
            results = [message["content"] for message in dialogue.messages if message["role"] == "tool"]
            calls = [call["function"] for turn in turns for call in turn.get("tool_calls", ())]
            assert [{"name": call["name"], "arguments": call["arguments"]} for call in calls] == session.gold_calls()
            assert [session.call_tool(call["name"], call["arguments"]).text for call in calls] == results
            assert turns[-1]["content"] == ANSWER
            assert list(dialogue.tools) == session.list_tools()
            samples = decompose(dialogue)
            assert [sample.gold.calls for sample in samples] == [
                *((ToolCall(call["name"], call["arguments"]),) for call in calls),
                (),
            ]


def test_the_first_record_is_the_right_one_in_a_third_of_the_tasks() -> None:
    hits = total = 0
    for task in islice(tasks(5, kinds=["cancel"]), 300):
        session = Shop().open(task, 0)
        for step in solve(task, takes_first=True):
            session.call_tool(step.call.name, step.call.arguments)
        hits += session.verify(ANSWERED).parts["success"] == 1
        total += 1
    assert hits / total == pytest.approx(1 / 3, abs=0.08)


def values(task: Mapping[str, Any]) -> set[tuple[str, str]]:
    """The two parts of all names, products and addresses of a task."""
    rows = task["state"]["customers"].values()
    texts = {(first, last) for row in rows for first, last in [row["name"].split()]}
    addresses = {row["address"] for row in rows} | ({task["value"]} if task["goal"] == "address" else set())
    texts |= {(city, number) for address in addresses for city, number in [address.split("-")]}
    return texts | {(row["item"], row["color"]) for row in task["state"]["orders"].values()}


def is_unseen(pair: tuple[str, str]) -> bool:
    lists = ((FIRST_NAMES, LAST_NAMES), (ITEMS, COLORS), (CITIES, tuple(map(str, NUMBERS))))
    first, second = next(each for each in lists if pair[0] in each[0])
    return is_held_out(first.index(pair[0]), second.index(pair[1]))


def test_held_out_values_occur_only_in_their_split_and_references_only_in_theirs() -> None:
    for split in SPLITS:
        pairs = set().union(*map(values, TASKS[split]))
        assert {is_unseen(pair) for pair in pairs} == {split == "unseen_values"}
        for task in TASKS[split]:
            if task["goal"] != "address":
                is_held = (task["by"], task["reference"]) == HELD_OUT_REFERENCES[task["goal"]]
                assert is_held == (split == "unseen_goals")
    # The parts of held-out values are all known from training.
    known = {part for task in Shop().tasks("train", 0, 500) for pair in values(task) for part in pair}
    assert known >= {part for task in TASKS["unseen_values"] for pair in values(task) for part in pair}


@pytest.mark.parametrize("arguments", [{"split": "test"}, {"kinds": ["triple"]}])
def test_wrong_settings_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        next(tasks(0, **arguments))


def test_a_kind_that_a_split_lacks_gives_no_tasks() -> None:
    assert list(tasks(0, "unseen_goals", kinds=["address"])) == []


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["o-1", "c-1", "f-1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("name", "customer", "order", "file", "address", "folder", "count")
HOSTILE = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), JSON, max_size=3)


def check_state(state: State) -> None:
    assert set(state) == {"customers", "orders", "invoices"}
    for row in state["customers"].values():
        assert set(row) == {"name", "address", "locked"}
        assert [type(row[key]) for key in ("name", "address", "locked")] == [str, str, bool]
    for row in state["orders"].values():
        assert row["status"] in ("open", "shipped", "cancelled", "returned", "refunded")
        assert type(row["count"]) is int
        assert row["count"] in range(1, 10)
    for row in state["invoices"].values():
        assert row["folder"] in FOLDERS
        assert type(row["locked"]) is bool


@given(st.lists(st.tuples(st.sampled_from(list(TOOLS)), HOSTILE), max_size=8))
@settings(max_examples=100, deadline=None)
def test_hostile_arguments_never_corrupt_the_state(calls: list[tuple[str, dict[str, Any]]]) -> None:
    gold = [{"name": "cancel_order", "arguments": {"order": "o-1"}}]
    session = ShopSession({**TASKS["train"][0], "tools": list(TOOLS), "state": make_state(), "gold": gold})
    for name, arguments in calls:
        before = session.state()
        result = session.call_tool(name, arguments)
        assert json.loads(result.text)
        assert not result.error or session.state() == before
    check_state(session.state())
    assert 0 <= (session.verify(ANSWERED).reward or 0) <= 1


def test_random_valid_calls_keep_rewards_in_range_and_the_state_sound() -> None:
    rng = random.Random(0)
    for task in TASKS["train"][:100]:
        session = ShopSession({**task, "tools": list(TOOLS)})
        state = session.state()
        drawn = {
            "customer": list(state["customers"]),
            "order": list(state["orders"]),
            "file": list(state["invoices"]),
            "name": [row["name"] for row in state["customers"].values()],
            "address": ["x" * 100],
            "folder": list(FOLDERS),
            "count": [1, 9],
        }
        calls = []
        for _ in range(20):
            name = rng.choice(list(TOOLS))
            calls.append({"name": name, "arguments": {key: rng.choice(drawn[key]) for key in TOOLS[name].arguments}})
        assert 0 <= sum(play(session, [*calls, *session.gold_calls()])) <= 1 + 1e-9
        check_state(session.state())


def test_huge_arguments_are_refused() -> None:
    session = Shop().open(find_task("address"), 0)
    before = session.state_hash()
    assert session.call_tool("find_customer", {"name": "x" * 5_000_000}).error == "wrong arguments"
    assert session.state_hash() == before
