"""Access to bfcl_eval's samples, executor and checkers. Only the process that `sandbox` starts uses this module.

A model's calls arrive as JSON. Only `write_call` turns them into text, which bfcl_eval's executor passes to `eval`.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import gc
import importlib
import inspect
import json
import keyword
import math
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

MODEL_NAME = "restrl"
"""The model name for the checkers; it contains no `_`, which they replace by `/`, and is in the stubbed config."""
BACKENDS = [
    *("gorilla_file_system", "math_api", "message_api", "posting_api"),
    *("ticket_api", "trading_bot", "travel_booking", "vehicle_control"),
]
MAX_MESSAGE_LENGTH = 2000


class InvalidRequestError(ValueError):
    """A request refers to something that does not exist; the process that sent it gets a ValueError."""


def stub_unneeded_modules() -> None:
    # bfcl_eval imports vendor SDKs, retries, parsers for Java and JavaScript, and file locks, none of which we need
    model = types.SimpleNamespace(underscore_to_dot=False, is_fc_model=False)
    retries = ["retry", "retry_if_exception_message", "retry_if_exception_type", "wait_random_exponential"]
    stubs: dict[str, dict[str, Any]] = {
        "bfcl_eval.constants.model_config": {"MODEL_CONFIG_MAPPING": {MODEL_NAME: model}},
        "filelock": {"FileLock": contextlib.nullcontext},
        "tenacity": dict.fromkeys(retries, lambda *_, **__: lambda function: function),
        "bfcl_eval.model_handler.parser.java_parser": {"parse_java_function_call": None},
        "bfcl_eval.model_handler.parser.js_parser": {"parse_javascript_function_call": None},
    }
    for name, attributes in stubs.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes)


def import_bfcl(name: str) -> Any:
    return importlib.import_module(f"bfcl_eval.{name}")


class BfclRelease:
    """The imported bfcl_eval release, and the samples read from it so far."""

    def __init__(self, version: str) -> None:
        stub_unneeded_modules()
        self.version = version
        self.config = import_bfcl("constants.eval_config")
        self.categories = import_bfcl("constants.category_mapping")
        self.checker = import_bfcl("eval_checker.ast_eval.ast_checker")
        self.turns = import_bfcl("eval_checker.multi_turn_eval.multi_turn_checker")
        self.executor = import_bfcl("eval_checker.multi_turn_eval.multi_turn_utils")
        # Import everything now: an import in a limited fork might fail, and its time would count against the sample.
        for backend in BACKENDS:
            import_bfcl(f"eval_checker.multi_turn_eval.func_source_code.{backend}")
        for lazily_imported in ("_strptime", "unicodedata"):
            importlib.import_module(lazily_imported)
        self.loaded: dict[str, dict[str, bytes]] = {}

    def constants(self) -> dict[str, Any]:
        prompts = import_bfcl("constants.default_prompts")
        return {
            "updated_functions": prompts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC,
            "max_steps": prompts.MAXIMUM_STEP_LIMIT,
            "types": import_bfcl("constants.type_mappings").GORILLA_TO_OPENAPI,
        }

    def samples(self, category: str) -> dict[str, bytes]:
        # Only what judging needs, as JSON bytes by id: the fewer objects this process has, the cheaper is each fork.
        if category not in self.loaded:
            kept = ("id", "category", "ground_truth", "involved_classes", "initial_config", "checked")
            rows = ({key: entry[key] for key in kept if key in entry} for entry in self.entries(category))
            self.loaded[category] = {row["id"]: json.dumps(row).encode() for row in rows}
            gc.collect()
            gc.freeze()  # the collector of a fork would touch, and thereby copy, every page
        return self.loaded[category]

    def load(self, category: str) -> int:
        # called before a sample's time limit starts
        return len(self.samples(category))

    def prepare(self, identity: str, category: str, *_: Any) -> None:
        # before forking, so that no fork has to read the file again
        if category.startswith("multi_turn"):
            self.conversation(identity)
            return
        sample = json.loads(self.samples(category).get(identity, b"{}"))
        if sample.get("ground_truth") is None or "involved_classes" in sample:
            raise InvalidRequestError(f"{identity!r} is not a single-turn sample with an answer")

    def entries(self, category: str) -> list[dict[str, Any]]:
        # `function` is what the model sees; `checked` (single-turn only) lacks the language-specific hints
        named = self.categories
        known = (
            list(named.TEST_FILE_MAPPING)
            if self.version == "v3"
            else [*named.NON_LIVE_CATEGORY, *named.LIVE_CATEGORY, *named.MULTI_TURN_CATEGORY]
        )
        if category not in known:
            raise InvalidRequestError(f"unknown category {category!r}, expected one of {', '.join(known)}")
        path = self.config.POSSIBLE_ANSWER_PATH / f"{named.VERSION_PREFIX}_{category}.json"
        # the relevance categories have no answers
        answers = {row["id"]: row["ground_truth"] for row in read_lines(path)} if path.exists() else {}
        found = []
        for shown, checked in (self.samples_v3 if self.version == "v3" else self.samples_v4)(category):
            docs = {} if "involved_classes" in shown else {"checked": checked["function"]}
            found.append({"category": category, **shown, **docs, "ground_truth": answers.get(shown["id"])})
        return found

    def samples_v4(self, category: str) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
        # yields (sample for the model, sample for the checker)
        load = import_bfcl("utils").load_dataset_entry
        shown = load(category)
        if "involved_classes" in shown[0]:
            return zip(shown, shown, strict=True)  # the checker does not use the docs, and loading them is slow
        return zip(shown, load(category, include_language_specific_hint=False), strict=True)

    def samples_v3(self, category: str) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
        # this release assembles its samples inside its model handlers
        hinted = import_bfcl("model_handler.utils").func_doc_language_specific_pre_processing
        for sample in read_lines(self.config.PROMPT_PATH / self.categories.TEST_FILE_MAPPING[category]):
            if "involved_classes" in sample:
                self.add_functions(sample)
                shown = sample
            else:
                shown = copy.deepcopy(sample)
            hinted(shown["function"], category)
            for functions in shown.get("missed_function", {}).values():
                hinted(functions, category)
            yield shown, sample

    def add_functions(self, sample: dict[str, Any]) -> None:
        # adds the docs of the sample's classes, without those of functions that are held out until a later turn
        files = self.categories.MULTI_TURN_FUNC_DOC_FILE_MAPPING
        folder = self.config.MULTI_TURN_FUNC_DOC_PATH
        docs = [doc for name in sample["involved_classes"] for doc in read_lines(folder / files[name])]
        for turn, names in sample.get("missed_function", {}).items():
            held_out = [next(doc for doc in docs if doc["name"] == name) for name in names]
            sample["missed_function"][turn] = held_out
            docs = [doc for doc in docs if not any(doc is other for other in held_out)]
        sample["function"] = docs

    def conversation(self, identity: str) -> dict[str, Any]:
        samples = self.samples(identity.rpartition("_")[0])
        if identity not in samples:
            raise InvalidRequestError(f"unknown id {identity!r}, expected one of the {len(samples)} of its category")
        sample = json.loads(samples[identity])
        if "involved_classes" not in sample:
            raise InvalidRequestError(f"{identity} is a single-turn sample, expected one of multi_turn_*")
        return sample

    def methods(self, sample: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        # if two classes have a method of the same name, the last one wins, as upstream
        homes = {name: self.executor.CLASS_FILE_PATH_MAPPING[name] for name in sample["involved_classes"]}
        classes = [getattr(importlib.import_module(home), name) for name, home in homes.items()]
        found = [pair for each in classes for pair in inspect.getmembers(each, inspect.isfunction)]
        return {name: function for name, function in found if not name.startswith("_")}

    def gold_calls(self, identity: str) -> list[list[dict[str, Any]]]:
        sample = self.conversation(identity)
        methods = self.methods(sample)
        return [[parse_gold_call(text, methods) for text in turn] for turn in sample["ground_truth"]]

    def check_calls(self, identity: str, category: str, calls: list[dict[str, Any]]) -> list[Any]:
        sample = json.loads(self.samples(category)[identity])
        language = "Java" if category.endswith("java") else "JavaScript" if "javascript" in category else "Python"
        if self.version == "v4":
            language = import_bfcl("constants.enums").Language[language.upper()]
        arguments = (sample["checked"], calls, sample["ground_truth"], language, category, MODEL_NAME)
        return run_checker(self.checker.ast_checker, *arguments)

    def check_turns(self, identity: str, category: str, turns: list[list[list[dict[str, Any]]]]) -> list[Any]:
        sample = self.conversation(identity)
        if len(turns) != len(sample["ground_truth"]):
            message = f"{len(turns)} of {len(sample['ground_truth'])} turns"
            return [False, "multi_turn:force_terminated", message]
        methods = self.methods(sample)
        texts = [[[text for text, why in write_calls(step, methods) if not why] for step in turn] for turn in turns]
        decoded = [[step for step in turn if step] for turn in texts]
        arguments = (decoded, sample["ground_truth"], sample, category, MODEL_NAME)
        return run_checker(self.turns.multi_turn_checker, *arguments)

    def execute(self, identity: str, calls: list[dict[str, Any]]) -> list[str]:
        # calls that are not executed get their reason in the executor's words
        sample = self.conversation(identity)
        written = write_calls(calls, self.methods(sample))
        results, _ = self.executor.execute_multi_turn_func_call(
            [text for text, why in written if not why],
            sample["initial_config"],
            sample["involved_classes"],
            MODEL_NAME,
            identity,
            long_context="long_context" in identity,
        )
        done = iter(results)
        return [f"Error during execution: {why}" if why else next(done) for _, why in written]

    def documents(self) -> dict[str, list[dict[str, Any]]]:
        files = import_bfcl("constants.executable_backend_config").MULTI_TURN_FUNC_DOC_FILE_MAPPING
        folder = self.config.MULTI_TURN_FUNC_DOC_PATH
        return {name: read_lines(folder / file) for name, file in files.items() if Path(file).stem in BACKENDS}

    def replay(self, backends: list[str], config: dict[str, Any], calls: list[dict[str, Any]]) -> dict[str, Any]:
        instances, methods = {}, {}
        for name in backends:
            home = importlib.import_module(self.executor.CLASS_FILE_PATH_MAPPING[name])
            instances[name] = backend = getattr(home, name)()
            if name not in self.executor.STATELESS_CLASSES:
                backend._load_scenario(copy.deepcopy(config[name]))  # noqa: SLF001 - as the executor does
            methods |= {key: method for key, method in inspect.getmembers(backend, inspect.ismethod) if key[0] != "_"}
        state, results = dump_state(instances), list[Any]()
        for call in calls:
            text, failed = run_method(methods, call)
            before, state = state, dump_state(instances)
            results.append([text, failed, state != before])
        return {"results": results, "state": json.loads(state)}


def run_method(methods: Mapping[str, Callable[..., Any]], call: dict[str, Any]) -> tuple[str, bool]:
    # Returns what the executor would return, without its `eval`, and whether the call failed. Defaults are copied: some
    # are lists that the backends change, which would reach the next session.
    try:
        write_call(call, methods)
        parameters = inspect.signature(methods[call["name"]]).parameters.values()
        defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
        result = methods[call["name"]](**copy.deepcopy({**defaults, **call["arguments"]}))
        first = result[0] if isinstance(result, list) and result else result
        text = json.dumps(result, default=str) if isinstance(result, dict) else str(result)
        return text, isinstance(first, dict) and "error" in first
    except Exception as error:
        return f"Error during execution: {error}"[:MAX_MESSAGE_LENGTH], True


def dump_state(backends: Mapping[str, Any]) -> str:
    # the attributes that BFCL compares, as JSON
    def encode(value: Any) -> Any:
        if isinstance(value, set):
            return sorted(map(str, value))
        return {key: item for key, item in vars(value).items() if key[0] != "_" and key != "parent"}

    try:
        return json.dumps(backends, default=encode)
    except ValueError:  # `cp a a` puts a folder into itself
        return '{"error": "circular"}'


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def run_checker(check: Callable[..., dict[str, Any]], *arguments: Any) -> list[Any]:
    # returns [valid, error type, message]; unusual calls make the checkers raise, which counts as wrong
    try:
        result = check(*arguments)
    except Exception as error:
        return [False, f"checker_error: {type(error).__name__}", str(error)[:MAX_MESSAGE_LENGTH]]
    message = result.get("error_message", result.get("error", ""))
    if isinstance(message, list):
        message = "; ".join(map(str, message))
    return [bool(result["valid"]), str(result.get("error_type") or ""), str(message)[:MAX_MESSAGE_LENGTH]]


def parse_gold_call(text: str, methods: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    # arguments are literals; positional ones get their name from the method's signature
    call = ast.parse(text.strip(), mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise InvalidRequestError(f"{text!r} is not a function call")
    positional = [ast.literal_eval(argument) for argument in call.args]
    named = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    parameters = list(inspect.signature(methods[call.func.id]).parameters)[1:]
    bound = dict(zip(parameters, positional, strict=False))
    return {"name": call.func.id, "arguments": {**bound, **named}}


def write_calls(calls: list[dict[str, Any]], methods: Mapping[str, Any]) -> list[tuple[str, str]]:
    # Returns per call (text, "") or ("", reason). Security: the executor passes the text to `eval`, so it may contain
    # only the name of a method, identifiers as keywords, and literals. Strings are not escaped further: the executor
    # removes blanks before brackets, in the gold's strings as well, and both sides must be treated alike.

    def write(call: dict[str, Any]) -> tuple[str, str]:
        try:
            return write_call(call, methods), ""
        except ValueError as error:
            return "", str(error)

    return list(map(write, calls))


# The model sees these messages: changing one changes what models respond.
def write_call(call: dict[str, Any], methods: Mapping[str, Any]) -> str:
    if "refused" in call:
        raise ValueError(call["refused"])
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not name.isidentifier() or name not in methods:
        raise ValueError(f"{str(name)[:80]!r} is not a function of this sample")
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are not an object")
    for key in arguments:
        if not key.isidentifier() or keyword.iskeyword(key):
            raise ValueError(f"{key[:80]!r} is not the name of an argument")
    return f"{name}({', '.join(f'{key}={python_literal(value)}' for key, value in arguments.items())})"


def python_literal(value: Any) -> str:
    # repr of inf and nan would be a name, not a literal
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {python_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(python_literal, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is not finite")
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    raise ValueError(f"a {type(value).__name__} is no JSON value")
