"""The office: deterministic, executable, unambiguous, its splits held out in one respect, its gold worth full marks."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from rest_rl.config import WORLDS
from rest_rl.data.gold import check_against_tools
from rest_rl.data.office import SPLITS, Split, dialogues
from rest_rl.data.office.catalog import CHAINS, CHAT, PLACEHOLDER, TOOLS, VALUES, choose_options
from rest_rl.data.office.state import Office, execute
from rest_rl.data.office.values import is_held_out_value, write_date, write_time
from rest_rl.data.samples import Dialogue, ToolSample, decompose, get_calls
from rest_rl.data.tool_world import KINDS
from rest_rl.evaluate.request import WORLD_BENCHMARKS
from rest_rl.formats import FORMATS, get_format
from rest_rl.response import ToolCall
from rest_rl.rewards import judge
from rest_rl.train.prompts import render_demonstration

N = 270
DIALOGUES: dict[Split, list[Dialogue]] = {split: list(islice(dialogues(0, split), N)) for split in SPLITS}
SAMPLES = {split: [sample for each in DIALOGUES[split] for sample in decompose(each)] for split in SPLITS}
KINDS_OF_ARGUMENTS = {
    (name, path.split(".")[0]): slot for name, tool in TOOLS.items() for path, slot in tool.slots.items()
}


def names(dialogue: Dialogue) -> set[str]:
    return {tool["function"]["name"] for tool in dialogue.tools}


def request(sample: ToolSample) -> str:
    return sample.messages[0]["content"]


def leaves(value: Any) -> Iterator[Any]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if parts is None:
        yield value
    else:
        yield from (leaf for part in parts for leaf in leaves(part))


def is_open(call: ToolCall, argument: str) -> bool:
    """Whether the argument has neither an enum nor booleans, whose values belong to the schema."""
    slot = KINDS_OF_ARGUMENTS[call.name, argument]
    return isinstance(slot, str) and slot != "yes" and argument != "condition"


def written(call: ToolCall, argument: str, value: Any) -> tuple[str, ...]:
    """The forms in which a request may write a value; a boolean has none."""
    slot = TOOLS[call.name].slots.get(argument)
    if isinstance(value, bool):
        return ("",)
    if slot in ("date", "past_date"):
        return write_date(date.fromisoformat(value))
    if slot == "time":
        return write_time(value)
    if slot == "currency":
        return value, VALUES["currency"][value]
    enum = slot[0] if isinstance(slot, list) else slot
    return (enum[value],) if isinstance(enum, dict) else (str(value),)


def test_the_benchmarks_are_those_of_the_worlds() -> None:
    assert tuple(WORLDS.values()) == WORLD_BENCHMARKS


@pytest.mark.parametrize("split", SPLITS)
def test_a_seed_gives_the_same_dialogues_and_another_seed_others(split: Split) -> None:
    again, other = (list(islice(dialogues(seed, split), 30)) for seed in (0, 1))
    assert again == DIALOGUES[split][:30]
    assert [each.messages for each in other] != [each.messages for each in again]


def test_dialogues_do_not_depend_on_other_sequences() -> None:
    first, second = dialogues(0, "train"), dialogues(1, "train")
    taken = []
    for _ in range(20):
        taken.append(next(first))
        next(second)
        execute(ToolCall("get_manager", {"employee": "Ada Byron"}))
    assert taken == DIALOGUES["train"][:20]


@pytest.mark.parametrize("settings", [{"split": "test"}, {"kinds": ["triple"]}])
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        next(dialogues(0, **settings))


@pytest.mark.parametrize("split", SPLITS)
def test_shares_of_kinds_are_those_of_the_tool_world(split: Split) -> None:
    # Nine dialogues give ten samples, so 270 give 300: 120 single, 60 of each other kind.
    assert Counter(sample.kind for sample in SAMPLES[split]) == {
        kind: 120 if kind == "single" else 60 for kind in KINDS
    }


def test_every_schema_is_valid_and_every_tool_has_enough_phrasings() -> None:
    assert len(TOOLS) >= 40
    for tool in TOOLS.values():
        parameters = tool.function["parameters"]
        Draft202012Validator.check_schema(parameters)
        assert {path.split(".")[0] for path in tool.slots} == set(parameters["properties"])
        assert len(tool.requests) >= 4
        assert bool(tool.unseen_requests) != tool.unseen
        assert set(tool.rivals) <= set(TOOLS)
    held_out = {tool.area for tool in TOOLS.values() if tool.unseen}
    assert {"weather", "calendar", "mail", "currency", "travel", "files", "contacts"} <= held_out


def test_every_phrasing_states_what_is_required() -> None:
    for tool in TOOLS.values():
        for phrasing in [*tool.requests, *tool.unseen_requests]:
            stated = {path.split(".")[0] for path in PLACEHOLDER.findall(phrasing)}
            always = {path.split(".")[0] for path in PLACEHOLDER.findall(choose_options(Never(), phrasing))}
            assert always == set(tool.function["parameters"]["required"]), phrasing
            assert stated <= set(tool.function["parameters"]["properties"]), phrasing
    for chain in CHAINS:
        first, second = (TOOLS[name].function["parameters"]["required"] for name in chain.tools)
        for phrasing in [*chain.requests, *chain.unseen_requests]:
            always = set(PLACEHOLDER.findall(choose_options(Never(), phrasing)))
            assert always == {f"1.{path}" for path in first} | {
                f"2.{path}" for path in second if path not in chain.take
            }, phrasing


def to_pattern(phrasing: str) -> str:
    """A regular expression that all requests with the phrasing match."""
    text = re.escape(phrasing).replace("\\|", "|").replace("\\[", "(?:").replace("\\]", "|)")
    return re.sub(r"\\\{[\w.\\]+?\\\}", ".*", text)


class Never:
    """A generator of randomness that leaves every optional part out."""

    def random(self) -> float:
        return 0.0


@pytest.mark.parametrize("split", SPLITS)
def test_gold_fits_the_schemas_and_can_be_executed(split: Split) -> None:
    for dialogue in DIALOGUES[split]:
        office = Office()
        for sample in decompose(dialogue):
            assert check_against_tools(sample) == (sample, [])
            for call in sample.gold.calls:
                Draft202012Validator(TOOLS[call.name].function["parameters"]).validate(call.arguments)
            for call in sample.gold.calls:
                assert "error" not in json.loads(office.execute(call)), call


@pytest.mark.parametrize("split", SPLITS)
def test_requests_state_every_value_of_the_gold(split: Split) -> None:
    for sample in SAMPLES[split]:
        told = " ".join(str(message["content"]) for message in sample.messages)
        for call in sample.gold.calls:
            for argument, value in call.arguments.items():
                for leaf in leaves(value):
                    assert any(form in told for form in written(call, argument, leaf)), (told, call)


def test_the_second_call_of_a_dependent_dialogue_takes_the_result_of_the_first() -> None:
    for split in SPLITS:
        for dialogue in islice(dialogues(2, split, kinds=["dependent"]), 20):
            first, second = decompose(dialogue)
            result = execute(first.gold.calls[0])
            assert second.messages[-1] == {"role": "tool", "content": result}
            (chain,) = [each for each in CHAINS if each.tools == [first.gold.calls[0].name, second.gold.calls[0].name]]
            found = set(map(str, leaves(json.loads(result))))
            for argument in chain.take:
                value = second.gold.calls[0].arguments[argument]
                assert str(value) in found
                assert argument == "currency" or str(value) not in request(first)


@pytest.mark.parametrize("split", SPLITS)
def test_exactly_the_gold_tools_serve_the_request(split: Split) -> None:
    for dialogue in DIALOGUES[split]:
        called = {call.name for sample in decompose(dialogue) for call in sample.gold.calls}
        assert len(called) == {"single": 1, "none": 0}.get(dialogue.kind, 2)
        assert called <= names(dialogue)
        assert len(names(dialogue)) == len(dialogue.tools)
        assert 2 <= len(dialogue.tools) <= 4
        for name in names(dialogue) - called:
            assert not any(TOOLS[name].is_rival(TOOLS[other]) for other in names(dialogue) - {name})
        if dialogue.kind == "none":
            assert decompose(dialogue)[0].gold.answer


def test_no_request_of_one_tool_reads_like_that_of_another() -> None:
    texts = [PLACEHOLDER.sub("", phrasing) for tool in TOOLS.values() for phrasing in tool.requests]
    texts += [PLACEHOLDER.sub("", phrasing) for tool in TOOLS.values() for phrasing in tool.unseen_requests]
    assert [text for text, number in Counter(texts).items() if number > 1] == []


def test_requests_have_no_traces_of_templates() -> None:
    for split in SPLITS:
        for text in map(request, SAMPLES[split]):
            assert not re.search(r"  |[{}\[\]|]| [.,?!:]|^\s|\s$|\ba [aeio]", text), text


def test_unseen_tools_occur_only_in_their_split() -> None:
    for split in SPLITS:
        offered = set().union(*map(names, DIALOGUES[split]))
        assert offered == {name for name, tool in TOOLS.items() if tool.unseen == (split == "unseen_tools")}


def test_only_unseen_values_has_held_out_values() -> None:
    for split in SPLITS:
        for sample in SAMPLES[split]:
            for call in sample.gold.calls:
                for argument, value in call.arguments.items():
                    is_computed = call.name in ("submit_expense", "print_document") and sample.kind == "dependent"
                    if is_open(call, argument) and not is_computed:
                        assert {is_held_out_value(leaf) for leaf in leaves(value)} == {split == "unseen_values"}, call


def test_only_unseen_phrasings_has_held_out_phrasings() -> None:
    def fits(text: str, phrasings: Sequence[str]) -> bool:
        return any(re.fullmatch(to_pattern(phrasing), text) for phrasing in phrasings)

    chat = {text for text, _ in CHAT["unseen_requests"]}
    for split in SPLITS:
        is_unseen = split == "unseen_phrasings"
        for sample in SAMPLES[split]:
            if sample.kind == "single":
                tool = TOOLS[sample.gold.calls[0].name]
                assert fits(request(sample), tool.unseen_requests) == is_unseen, request(sample)
                assert fits(request(sample), tool.requests) != is_unseen, request(sample)
        assert any(request(sample) in chat for sample in SAMPLES[split]) == is_unseen


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_gold_gets_full_marks_in_every_format(name: str) -> None:
    tool_format = get_format(name)
    for split in SPLITS:
        for sample in SAMPLES[split][:60]:
            found = judge(render_demonstration(sample, tool_format), sample.gold, tool_format)
            assert (found.accuracy, found.format, found.exact_match) == (1, 1, True), sample


def test_an_office_remembers_what_it_is_told() -> None:
    office = Office()

    def ask(tool: str, **arguments: Any) -> Any:
        return json.loads(office.execute(ToolCall(tool, arguments)))

    before = ask("checkInventory", sku="A-100")["units"]
    ask("order_supplies", items=[{"sku": "A-100", "quantity": 5}])
    assert ask("checkInventory", sku="A-100") == {"units": before + 5}
    (own,) = ask("list_events", date="2027-05-04")["events"]
    made = ask("create_event", title="Lunch", date="2027-05-04", start_time="12:00")
    assert [event["id"] for event in ask("list_events", date="2027-05-04")["events"]] == [own["id"], made["id"]]
    ask("cancel_event", event_id=own["id"])
    assert [event["id"] for event in ask("list_events", date="2027-05-04")["events"]] == [made["id"]]
    assert "error" in ask("cancel_event", event_id=own["id"])
    ask("contacts.add", name="Ada Byron", phone="555-0001")
    assert ask("find_contact", name="Ada Byron") == {"phone": "555-0001"}
    room = {"room": "Atlas", "date": "2027-05-04", "minutes": 60}
    assert ask("book_room", **room, start="10:30") == {"status": "booked", "until": "11:30"}
    assert "error" in ask("book_room", **room, start="11:00")
    assert "error" not in ask("book_room", **room, start="11:30")
    # 100 GBP at 0.75 GBP and 0.9 EUR per dollar.
    assert ask("convert_currency", amount=100, **{"from": "GBP"}, to="EUR") == {"amount": 120.0, "currency": "EUR"}
    assert len(office.log) == 13  # the two errors are not in it


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("nosuch", {}),
        ([], {}),
        ("find_contact", {}),
        ("find_contact", {"name": 3}),
        ("find_contact", {"name": "Ada", "age": 3}),
        ("find_contact", []),
        ("find_contact", {"name": {1}}),
        ("find_contact", {"name": "x" * 20_000}),
        ("weather.forecast", {"city": "Oslo", "days": 10**9}),
        ("weather.forecast", {"city": "Oslo", "days": 10**6}),
        ("set_timer", {"minutes": -1}),
        ("set_timer", {"minutes": 10**5000}),
        ("convert_currency", {"amount": float("nan"), "from": "EUR", "to": "USD"}),
        ("convert_currency", {"amount": 1e308, "from": "EUR", "to": "USD"}),
        ("convert_currency", {"amount": 1, "from": "XXX", "to": "USD"}),
        ("list_events", {"date": "tomorrow"}),
        ("list_events", {"date": "20270504"}),
        ("set_reminder", {"text": "x", "at": "25:00"}),
        ("send_email", {"to": "Ada", "subject": "x", "body": "x"}),
        ("order_supplies", {"items": [{}]}),
        ("files.convert", {"path": "", "format": "pdf"}),
        ("rename_file", {"path": "a/b.docx", "new_name": "c/d.docx"}),
    ],
)
def test_a_call_that_cannot_be_executed_gives_an_error(name: Any, arguments: Any) -> None:
    office = Office()
    assert list(json.loads(office.execute(ToolCall(name, arguments)))) == ["error"]
    assert office.log == []


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(TOOLS)), st.data())
def test_hostile_arguments_never_raise(name: str, data: st.DataObject) -> None:
    properties = TOOLS[name].function["parameters"]["properties"]
    kinds = {"string": st.text() | st.just("\ud800"), "integer": st.integers(), "number": st.floats()}
    arguments = {
        key: data.draw(kinds.get(schema["type"], JSON_VALUES) | JSON_VALUES) for key, schema in properties.items()
    }
    office = Office()
    result = json.loads(office.execute(ToolCall(name, arguments)))
    assert isinstance(result, dict)
    assert len(office.log) == ("error" not in result)  # only calls that were executed are logged
    assert json.loads(execute(ToolCall(name, arguments))) == result


def test_histories_hold_calls_and_results() -> None:
    for dialogue in DIALOGUES["train"]:
        if dialogue.kind == "dependent":
            roles = [message["role"] for message in dialogue.messages]
            assert roles == ["user", "assistant", "tool", "assistant"]
            assert len(get_calls(dialogue.messages[1])) == 1
