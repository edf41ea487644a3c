"""The process that holds bfcl_eval: run by its path, standard library only, JSON lines in and out.

Everything a model has written is handled in a fork of it: a namespace, and limits, for one sample alone. The fork
answers on the same pipes while this process waits, which needs no more care than never to read ahead: a request is
sent only when the last one has been answered.
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
import os
import resource
import signal
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

NAME = "restrl"
"""The model, for the checkers: without `_`, which they take for a `/`, and listed in the stub of their models."""
BACKENDS = [
    *("gorilla_file_system", "math_api", "message_api", "posting_api"),
    *("ticket_api", "trading_bot", "travel_booking", "vehicle_control"),
]
REFUSED = (
    *("ctypes.", "fcntl.", "mmap.", "msvcrt.", "os.", "pty.", "resource.", "shutil.", "signal.", "socket."),
    *("sqlite3.", "subprocess.", "syslog.", "tempfile.", "webbrowser.", "winreg."),
)
"""Beginnings of the audit events that end in a PermissionError: the outside world."""
READS = {"os.listdir", "os.scandir"}
MAX_MESSAGE = 2000


class UnusableError(ValueError):
    """The request asks for something that is not there; the other side raises a ValueError."""


class Pipes:
    """The protocol's two ends, out of reach of whatever is printed."""

    def __init__(self) -> None:
        self.inbox, self.outbox = os.dup(0), os.dup(1)
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.close(null)

    def read(self) -> dict[str, Any] | None:
        """The next request, None at the end."""
        pieces = []
        while piece := os.read(self.inbox, 1 << 20):
            pieces.append(piece)
            if piece.endswith(b"\n"):
                return json.loads(b"".join(pieces))
        return None

    def write(self, answer: Mapping[str, Any]) -> None:
        """Send an answer, however long."""
        rest = memoryview(json.dumps(answer).encode() + b"\n")
        while rest:
            rest = rest[os.write(self.outbox, rest) :]


def stub(name: str, **attributes: Any) -> None:
    """Put an empty module in the place of one that is not needed, with the names others import from it."""
    module = types.ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def stub_what_is_not_needed() -> None:
    """Leave out the vendors' libraries, retries, parsers of Java and JavaScript, and locks on files only read."""
    model = types.SimpleNamespace(underscore_to_dot=False, is_fc_model=False)
    stub("bfcl_eval.constants.model_config", MODEL_CONFIG_MAPPING={NAME: model})
    stub("filelock", FileLock=contextlib.nullcontext)
    names = ["retry", "retry_if_exception_message", "retry_if_exception_type", "wait_random_exponential"]
    stub("tenacity", **dict.fromkeys(names, lambda *_, **__: lambda function: function))
    stub("bfcl_eval.model_handler.parser.java_parser", parse_java_function_call=None)
    stub("bfcl_eval.model_handler.parser.js_parser", parse_javascript_function_call=None)


def part(name: str) -> Any:
    """A module of bfcl_eval."""
    return importlib.import_module(f"bfcl_eval.{name}")


class Bfcl:
    """The loaded release, with the samples asked for so far."""

    def __init__(self, version: str) -> None:
        stub_what_is_not_needed()
        self.version = version
        self.config = part("constants.eval_config")
        self.categories = part("constants.category_mapping")
        self.checker = part("eval_checker.ast_eval.ast_checker")
        self.turns = part("eval_checker.multi_turn_eval.multi_turn_checker")
        self.executor = part("eval_checker.multi_turn_eval.multi_turn_utils")
        # Once a sample is under way, nothing may have to be imported.
        for backend in BACKENDS:
            part(f"eval_checker.multi_turn_eval.func_source_code.{backend}")
        for lazily_imported in ("_strptime", "unicodedata"):
            importlib.import_module(lazily_imported)
        self.loaded: dict[str, dict[str, bytes]] = {}

    def constants(self) -> dict[str, Any]:
        """What the loop over a conversation must know."""
        prompts = part("constants.default_prompts")
        return {
            "updated_functions": prompts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC,
            "max_steps": prompts.MAXIMUM_STEP_LIMIT,
            "types": part("constants.type_mappings").GORILLA_TO_OPENAPI,
        }

    def known(self) -> list[str]:
        """The categories that need no network."""
        if self.version == "v3":
            return list(self.categories.TEST_FILE_MAPPING)
        named = self.categories
        return [*named.NON_LIVE_CATEGORY, *named.LIVE_CATEGORY, *named.MULTI_TURN_CATEGORY]

    def samples(self, category: str) -> dict[str, bytes]:
        """What is needed to judge the samples of a category, as JSON by id.

        Bytes rather than objects: a fork costs what this process holds in memory, and every sample is a fork.
        """
        if category not in self.loaded:
            kept = ("id", "category", "ground_truth", "involved_classes", "initial_config", "checked")
            rows = ({key: entry[key] for key in kept if key in entry} for entry in self.entries(category))
            self.loaded[category] = {row["id"]: json.dumps(row).encode() for row in rows}
            gc.collect()
            gc.freeze()  # what a fork's collector never touches is never copied
        return self.loaded[category]

    def entries(self, category: str) -> Iterator[dict[str, Any]]:
        """The samples of a category, with the docs as a model is shown them and, for one turn, as they are checked."""
        if category not in self.known():
            raise UnusableError(f"got category {category!r}, expected one of {', '.join(self.known())}")
        answers = self.answers(category)
        for shown, checked in (self.samples_v3 if self.version == "v3" else self.samples_v4)(category):
            docs = {} if "involved_classes" in shown else {"checked": checked["function"]}
            yield {"category": category, **shown, **docs, "ground_truth": answers.get(shown["id"])}

    def answers(self, category: str) -> dict[str, Any]:
        """The ground truth by id; relevance has none."""
        path = self.config.POSSIBLE_ANSWER_PATH / f"{self.categories.VERSION_PREFIX}_{category}.json"
        return {row["id"]: row["ground_truth"] for row in read_lines(path)} if path.exists() else {}

    def samples_v4(self, category: str) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
        """Each sample as a model sees it, and as the checker does."""
        load = part("utils").load_dataset_entry
        return zip(load(category), load(category, include_language_specific_hint=False), strict=True)

    def samples_v3(self, category: str) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
        """As `samples_v4`; this release puts its samples together inside its handlers."""
        hinted = part("model_handler.utils").func_doc_language_specific_pre_processing
        for sample in read_lines(self.config.PROMPT_PATH / self.categories.TEST_FILE_MAPPING[category]):
            if "involved_classes" in sample:
                self.add_functions(sample)
            shown = copy.deepcopy(sample)
            hinted(shown["function"], category)
            for functions in shown.get("missed_function", {}).values():
                hinted(functions, category)
            yield shown, sample

    def add_functions(self, sample: dict[str, Any]) -> None:
        """Give a conversation the docs of its classes, and set apart those that are held out at first."""
        files = self.categories.MULTI_TURN_FUNC_DOC_FILE_MAPPING
        folder = self.config.MULTI_TURN_FUNC_DOC_PATH
        docs = [doc for name in sample["involved_classes"] for doc in read_lines(folder / files[name])]
        for turn, names in sample.get("missed_function", {}).items():
            held_out = [next(doc for doc in docs if doc["name"] == name) for name in names]
            sample["missed_function"][turn] = held_out
            docs = [doc for doc in docs if not any(doc is other for other in held_out)]
        sample["function"] = docs

    def sample(self, identity: str) -> dict[str, Any]:
        """One sample; UnusableError for an id that is not there."""
        samples = self.samples(identity.rpartition("_")[0])
        if identity not in samples:
            raise UnusableError(f"got id {identity!r}, expected one of the {len(samples)} of its category")
        return json.loads(samples[identity])

    def conversation(self, identity: str) -> dict[str, Any]:
        """One sample of several turns."""
        sample = self.sample(identity)
        if "involved_classes" not in sample:
            raise UnusableError(f"got {identity}, which has a single turn, expected one of multi_turn_*")
        return sample

    def methods(self, sample: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        """The methods a sample may call by name; where two classes share a name the last has it, as upstream."""
        classes = [self.backend(name) for name in sample["involved_classes"]]
        found = [pair for each in classes for pair in inspect.getmembers(each, inspect.isfunction)]
        return {name: function for name, function in found if not name.startswith("_")}

    def backend(self, name: str) -> type:
        """The class of a name in `involved_classes`."""
        return getattr(importlib.import_module(self.executor.CLASS_FILE_PATH_MAPPING[name]), name)

    def gold_calls(self, identity: str) -> list[list[dict[str, Any]]]:
        """Per turn the calls of the ground truth, their positional arguments named by the method's signature."""
        sample = self.conversation(identity)
        methods = self.methods(sample)
        return [[read_call(text, methods) for text in turn] for turn in sample["ground_truth"]]

    def check_calls(self, identity: str, category: str, calls: list[dict[str, Any]]) -> list[Any]:
        """The checker's verdict on the calls of a sample with one turn; odd calls make it raise, which is a verdict."""
        sample = json.loads(self.samples(category)[identity])
        language = "Java" if category.endswith("java") else "JavaScript" if "javascript" in category else "Python"
        if self.version == "v4":
            language = part("constants.enums").Language[language.upper()]
        arguments = (sample["checked"], calls, sample["ground_truth"], language, category, NAME)
        return verdict(self.checker.ast_checker, *arguments)

    def check_turns(self, identity: str, turns: list[list[list[dict[str, Any]]]]) -> list[Any]:
        """The checker's verdict on a whole conversation, which it executes again."""
        sample = self.conversation(identity)
        if len(turns) != len(sample["ground_truth"]):
            message = f"got {len(turns)} turns of {len(sample['ground_truth'])}"
            return [False, "multi_turn:force_terminated", message]
        methods = self.methods(sample)
        texts = [[[text for text, why in map_calls(step, methods) if not why] for step in turn] for turn in turns]
        decoded = [[step for step in turn if step] for turn in texts]
        arguments = (decoded, sample["ground_truth"], sample, sample["category"], NAME)
        return verdict(self.turns.multi_turn_checker, *arguments)

    def execute(self, identity: str, calls: list[dict[str, Any]]) -> list[str]:
        """What each call returned, in the words of the official executor, also for those that are refused."""
        sample = self.conversation(identity)
        written = map_calls(calls, self.methods(sample))
        results, _ = self.executor.execute_multi_turn_func_call(
            [text for text, why in written if not why],
            sample["initial_config"],
            sample["involved_classes"],
            NAME,
            identity,
            long_context="long_context" in identity,
        )
        done = iter(results)
        return [f"Error during execution: {why}" if why else next(done) for _, why in written]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def verdict(check: Callable[..., dict[str, Any]], *arguments: Any) -> list[Any]:
    """[valid, kind of error, message] of a checker, whatever it does."""
    try:
        result = check(*arguments)
    except Exception as error:
        return [False, f"checker_error: {type(error).__name__}", str(error)[:MAX_MESSAGE]]
    message = result.get("error_message", result.get("error", ""))
    if isinstance(message, list):
        message = "; ".join(map(str, message))
    return [bool(result["valid"]), str(result.get("error_type") or ""), str(message)[:MAX_MESSAGE]]


def read_call(text: str, methods: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """A call as the ground truth writes it, of literals only."""
    call = ast.parse(text.strip(), mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise UnusableError(f"got {text!r}, expected a call by name")
    positional = [ast.literal_eval(argument) for argument in call.args]
    named = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    parameters = list(inspect.signature(methods[call.func.id]).parameters)[1:]
    bound = dict(zip(parameters, positional, strict=False))
    return {"name": call.func.id, "arguments": {**bound, **named}}


def map_calls(calls: list[dict[str, Any]], methods: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Per call its text, or why there is none.

    The executor evaluates the text: a name that is a method, keywords that are identifiers and literals are all that
    may stand in it. It also drops blanks before a bracket, in the gold's strings too, so nothing is escaped here.
    """
    return [write_or_refuse(call, methods) for call in calls]


def write_or_refuse(call: dict[str, Any], methods: Mapping[str, Any]) -> tuple[str, str]:
    """The text of a call and "", or "" and why there is none."""
    try:
        return write_call(call, methods), ""
    except ValueError as error:
        return "", str(error)


def write_call(call: dict[str, Any], methods: Mapping[str, Any]) -> str:
    """The text of a call; ValueError for anything but a method with arguments that are JSON."""
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
    return f"{name}({', '.join(f'{key}={literal(value)}' for key, value in arguments.items())})"


def literal(value: Any) -> str:
    """A JSON value as Python writes it; infinities and NaN, which it writes as names, are refused."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is not finite")
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    raise ValueError(f"a {type(value).__name__} is no JSON value")


def leave_the_network() -> bool:
    """Move into an empty network of one's own, where the kernel lets its users do so."""
    new_user_and_network = 0x10000000 | 0x40000000
    try:
        if sys.version_info >= (3, 12):
            os.unshare(new_user_and_network)
            return True
        ctypes = importlib.import_module("ctypes")
        return ctypes.CDLL(None).unshare(new_user_and_network) == 0
    except (OSError, AttributeError, ImportError):
        return False


def limit(kind: int, value: int, grace: int = 0) -> None:
    """Lower one limit of the process; some systems refuse some (macOS: memory)."""
    _, most = resource.getrlimit(kind)
    hard = value + grace if most == resource.RLIM_INFINITY else min(value + grace, most)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(kind, (min(value, hard), hard))


def confine(seconds: int, memory_mb: int) -> None:
    """From here on this process can compute, within limits, and nothing else."""
    limit(resource.RLIMIT_AS, memory_mb << 20)
    limit(resource.RLIMIT_CPU, seconds, grace=2)
    for nothing in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC):
        limit(nothing, 0)
    guard([os.path.abspath(folder) for folder in sys.path if folder])  # noqa: PTH100


def guard(readable: list[str]) -> None:
    """Refuse the outside world to this process for good; only files below the given folders can be read."""
    folders = tuple(folder.rstrip(os.sep) + os.sep for folder in readable)

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = (mode and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes or not below(path, folders):
                raise PermissionError("no files here")
        elif event in READS and arguments and below(arguments[0], folders):
            return
        elif event.startswith(REFUSED):
            raise PermissionError(f"not here: {event}")

    sys.addaudithook(refuse)


def below(path: Any, folders: tuple[str, ...]) -> bool:
    """Whether a path lies in one of the folders."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        return False
    # Not Path.resolve: the guard calls this, and what it opens or reads would call the guard.
    return (os.path.abspath(os.fsdecode(path)) + os.sep).startswith(folders)  # noqa: PTH100


def answer(handle: Callable[[], Any]) -> dict[str, Any]:
    """What a request came to."""
    try:
        return {"ok": handle()}
    except UnusableError as error:
        return {"invalid": str(error)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:MAX_MESSAGE]}


class Server:
    """Answers requests, those about what a model has written in a fork."""

    def __init__(self, pipes: Pipes, bfcl: Bfcl, seconds: int, memory_mb: int) -> None:
        self.pipes, self.bfcl, self.seconds, self.memory_mb = pipes, bfcl, seconds, memory_mb

    def run(self) -> None:
        """Until the other side closes."""
        while (request := self.pipes.read()) is not None:
            if request["do"] in ("open", "check_calls", "check_turns"):
                self.prepare(request)
            else:
                self.pipes.write(answer(lambda request=request: self.look_up(request)))

    def look_up(self, request: dict[str, Any]) -> Any:
        """Answer what concerns the release alone."""
        if request["do"] == "entries":
            return list(self.bfcl.entries(request["category"]))
        if request["do"] == "gold_calls":
            return self.bfcl.gold_calls(request["id"])
        return self.bfcl.constants()

    def prepare(self, request: dict[str, Any]) -> None:
        """Read what the fork will need, then fork."""
        is_single = request["do"] == "check_calls"
        found = answer(lambda: self.needs(request) if is_single else self.bfcl.conversation(request["id"]))
        if "ok" in found:
            self.fork(request)
        else:
            self.pipes.write(found)

    def needs(self, request: dict[str, Any]) -> None:
        """Load a sample with one turn, which must have an answer."""
        sample = json.loads(self.bfcl.samples(request["category"]).get(request["id"], b"{}"))
        if sample.get("ground_truth") is None or "involved_classes" in sample:
            raise UnusableError(f"got {request['id']!r}, expected a single-turn sample with an answer")

    def fork(self, request: dict[str, Any]) -> None:
        """Have the request answered apart, and say so where that comes to no end of its own."""
        process = os.fork()
        if process == 0:
            status = 1
            try:
                confine(self.seconds, self.memory_mb)
                self.serve_apart(request)
                status = 0
            finally:
                os._exit(status)  # no clean-up of the parent's
        _, status = os.waitpid(process, 0)
        if status:
            self.pipes.write({"died": cause(status)})

    def serve_apart(self, request: dict[str, Any]) -> None:
        """In the fork: one check, or a conversation until its end."""
        identity = request["id"]
        if request["do"] == "check_calls":
            self.pipes.write(answer(lambda: self.bfcl.check_calls(identity, request["category"], request["calls"])))
            return
        if request["do"] == "check_turns":
            self.pipes.write(answer(lambda: self.bfcl.check_turns(identity, request["turns"])))
            return
        self.pipes.write({"ok": None})
        while (step := self.pipes.read()) is not None and step["do"] != "end":
            self.pipes.write(answer(lambda step=step: self.step(identity, step)))
        self.pipes.write({"ok": None})

    def step(self, identity: str, request: dict[str, Any]) -> Any:
        """Execute calls, or look something up in between."""
        return self.bfcl.execute(identity, request["calls"]) if request["do"] == "execute" else self.look_up(request)


def cause(status: int) -> str:
    """Why a process ended, in words."""
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU:
        return "it ran out of processor time"
    return f"signal {-code} ended it" if code < 0 else "it ended early, probably out of memory"


def main() -> None:
    """Load the release in the given folder, say how that went, and serve."""
    version, folder, seconds, memory_mb = sys.argv[1:]
    sys.path.insert(0, folder)
    pipes = Pipes()
    started = answer(lambda: Bfcl(version))
    if "ok" not in started:
        pipes.write(started)
        return
    apart = leave_the_network()
    pipes.write({"ok": {"own_network": apart}})
    Server(pipes, started["ok"], int(seconds), int(memory_mb)).run()


if __name__ == "__main__":
    main()
