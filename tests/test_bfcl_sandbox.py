"""The separate process that executes and checks model output: real processes, both releases of bfcl-eval."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from rest_rl.envs.bfcl_sandbox import walls
from rest_rl.envs.bfcl_sandbox.package import PINS, BfclPackage, Version, find_package
from rest_rl.envs.bfcl_sandbox.sandbox import Sandbox, SandboxError, Session, Verdict

COUNTS = {
    "multiple": 200, "parallel": 200, "parallel_multiple": 200, "irrelevance": 240, "live_simple": 258,
    "live_multiple": 1053, "live_parallel": 16, "live_parallel_multiple": 24, "multi_turn_base": 200,
    "multi_turn_miss_func": 200, "multi_turn_miss_param": 200, "multi_turn_long_context": 200,
}  # fmt: skip
OWN_COUNTS = {
    "v3": {"simple": 400, "java": 100, "javascript": 50, "live_irrelevance": 882, "live_relevance": 18},
    "v4": {"simple_python": 400, "simple_java": 100, "simple_javascript": 50, "live_irrelevance": 884,
           "live_relevance": 16},
}  # fmt: skip
MULTI_TURN = ["multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context"]
SIMPLE = {"v3": "simple", "v4": "simple_python"}
POWER = {"name": "power", "arguments": {"base": 7, "exponent": 10**9}}
"""A number of 845 million digits: hours of multiplication in C code, during which Python runs no signal handler."""


def package_of(version: Version) -> BfclPackage:
    try:
        return find_package(version)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["v3", "v4"])
def package(request: pytest.FixtureRequest) -> BfclPackage:
    return package_of(request.param)


@pytest.fixture(scope="module")
def sandbox(package: BfclPackage) -> Iterator[Sandbox]:
    with Sandbox(package) as opened:
        yield opened


@pytest.fixture
def hasty() -> Iterator[Sandbox]:
    """A sandbox with a time limit of one second."""
    with Sandbox(package_of("v4"), seconds=1.0) as opened:
        yield opened


LOADED: dict[tuple[str, str], list[dict]] = {}


def entries(sandbox: Sandbox, category: str) -> list[dict]:
    """The entries of a category, read once per release."""
    key = (sandbox._package.version, category)
    if key not in LOADED:
        LOADED[key] = sandbox.entries(category)
    return LOADED[key]


def simple(sandbox: Sandbox, package: BfclPackage) -> tuple[str, dict]:
    category = SIMPLE[package.version]
    return category, entries(sandbox, category)[0]


def math_sample(sandbox: Sandbox) -> str:
    """A conversation with the math backend."""
    return next(entry["id"] for entry in entries(sandbox, "multi_turn_base") if "MathAPI" in entry["involved_classes"])


def still_running(group: int) -> list[int]:
    """The processes of a group without zombies, which orphans may become in containers."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def are_gone(group: int) -> bool:
    """Whether the processes of a group end; on a busy machine a killed one may remain visible for a moment."""
    deadline = time.monotonic() + 60
    while still_running(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not still_running(group)


def oracle(session: Session, gold: list[list[dict]]) -> Verdict:
    for turn in gold:
        results = session.execute(turn)
        assert len(results) == len(turn)
    return session.check([[turn] for turn in gold])


class TestData:
    def test_every_category_is_complete(self, sandbox: Sandbox, package: BfclPackage) -> None:
        expected = COUNTS | OWN_COUNTS[package.version]
        assert {category: len(entries(sandbox, category)) for category in expected} == expected
        assert sum(expected.values()) == 4441

    def test_unknown_categories_are_refused(self, sandbox: Sandbox) -> None:
        with pytest.raises(ValueError, match=r"unknown category '../secret', expected one of .*live_simple"):
            sandbox.entries("../secret")

    def test_only_the_model_sees_hints(self, sandbox: Sandbox, package: BfclPackage) -> None:
        category = {"v3": "java", "v4": "simple_java"}[package.version]
        entry = entries(sandbox, category)[0]
        (shown,), (checked,) = entry["function"], entry["checked"]
        assert (
            shown["description"] == checked["description"] + " Note that the provided function is in Java 8 SDK syntax."
        )
        assert {value["type"] for value in shown["parameters"]["properties"].values()} == {"string"}
        assert {value["type"] for value in checked["parameters"]["properties"].values()} != {"string"}

    def test_functions_are_held_out(self, sandbox: Sandbox) -> None:
        for entry in entries(sandbox, "multi_turn_miss_func"):
            names = {doc["name"] for doc in entry["function"]}
            held_out = {doc["name"] for docs in entry["missed_function"].values() for doc in docs}
            assert names
            assert held_out
            assert not names & held_out
            assert all(entry["question"][int(turn)] == [] for turn in entry["missed_function"])

    def test_relevance_has_no_answer(self, sandbox: Sandbox) -> None:
        assert {entry["ground_truth"] for entry in entries(sandbox, "irrelevance")} == {None}
        with pytest.raises(ValueError, match="is not a single-turn sample with an answer"):
            sandbox.check_calls("irrelevance_0", "irrelevance", [])

    def test_constants(self, sandbox: Sandbox) -> None:
        constants = sandbox.constants()
        assert constants["max_steps"] == 20
        assert constants["updated_functions"].startswith("I have updated some more functions")
        assert constants["types"]["dict"] == "object"


class TestSingleTurn:
    def test_right_and_wrong_calls(self, sandbox: Sandbox, package: BfclPackage) -> None:
        category, entry = simple(sandbox, package)
        (answer,) = entry["ground_truth"]
        ((name, alternatives),) = answer.items()
        right = {key: values[0] for key, values in alternatives.items()}
        assert sandbox.check_calls(entry["id"], category, [{name: right}]) == Verdict(True)
        wrong = sandbox.check_calls(entry["id"], category, [{name: right | {"base": 11}}])
        assert (wrong.valid, wrong.error_type) == (False, "value_error:others")
        assert "base" in wrong.message
        assert sandbox.check_calls(entry["id"], category, []).error_type == "simple_function_checker:wrong_count"

    @pytest.mark.parametrize(
        "calls",
        [
            [1], ["f"], [None], [[]], [{}], [{"calculate_triangle_area": [1]}], [{"calculate_triangle_area": None}],
            [{"calculate_triangle_area": {"base": {"a": []}, "height": [[]]}}], [{"a.b": {}}], [{"": {"": ""}}],
            [{"calculate_triangle_area": {"base": float("nan"), "height": float("inf")}}],
            [{"calculate_triangle_area": {"base": 10**5000, "height": 5}}],
            [{"calculate_triangle_area": {"base": 10, "height": 5, "unit": "x" * 5_000_000}}],
            [{"calculate_triangle_area": {"base": 10, "height": {1, 2}}}],
        ],
    )  # fmt: skip
    def test_odd_calls_are_wrong(self, sandbox: Sandbox, package: BfclPackage, calls: list) -> None:
        category, entry = simple(sandbox, package)
        verdict = sandbox.check_calls(entry["id"], category, calls)
        assert not verdict.valid
        assert verdict.error_type
        assert len(verdict.message) <= 2000

    def test_deep_nesting_is_wrong(self, sandbox: Sandbox, package: BfclPackage) -> None:
        category, entry = simple(sandbox, package)
        deep: list = []
        for _ in range(100_000):
            deep = [deep]
        verdict = sandbox.check_calls(entry["id"], category, [{"calculate_triangle_area": {"base": deep}}])
        assert verdict == Verdict(False, "checker_error: ValueError", "nesting deeper than 100 levels")

    def test_checks_share_a_process_until_one_fails(self) -> None:
        package = package_of("v4")
        with Sandbox(package) as sandbox:
            category, entry = simple(sandbox, package)

            def workers(calls: list) -> set[int]:
                sandbox.check_calls(entry["id"], category, calls)
                return {*still_running(sandbox._process.pid)} - {sandbox._process.pid}

            right = [
                {name: {key: v[0] for key, v in values.items()} for name, values in entry["ground_truth"][0].items()}
            ]
            (first,) = workers(right)
            assert workers([]) == workers(right) == {first}
            assert workers([1]) == set()  # the checker raised
            (second,) = workers(right)
            os.kill(second, signal.SIGKILL)
            assert sandbox.check_calls(entry["id"], category, right).valid
            assert second not in workers(right)

    def test_each_check_has_its_own_time_limit(self, tmp_path: Path) -> None:
        script = """
import os, sys, time
from rest_rl.envs.bfcl_sandbox.child import Pipes, Server

class Release:
    def check_calls(self, seconds):
        begin = time.process_time()
        while time.process_time() - begin < seconds:
            pass
        return [True, "", str(os.getpid())]

server = Server(Pipes(*os.pipe()), Release(), 1, 4096)
check = lambda seconds: server.check_in_worker({"method": "check_calls", "arguments": [seconds]})
first, second, endless, last = check(0.7), check(0.7), check(1e9), check(0.0)
assert first["ok"][2] == second["ok"][2] != last["ok"][2], (first, second, last)
assert endless == {"died": "it ran out of processor time", "limit": True}, endless
"""
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


class TestConversations:
    @pytest.mark.parametrize("category", MULTI_TURN)
    def test_gold_is_right(self, sandbox: Sandbox, category: str) -> None:
        for entry in entries(sandbox, category)[::41]:
            with sandbox.session(entry["id"]) as session:
                assert oracle(session, sandbox.gold_calls(entry["id"])) == Verdict(True), entry["id"]

    @pytest.mark.slow
    @pytest.mark.parametrize("category", MULTI_TURN)
    def test_all_gold_is_right(self, sandbox: Sandbox, category: str) -> None:
        right = 0
        for entry in entries(sandbox, category):
            with sandbox.session(entry["id"]) as session:
                right += oracle(session, sandbox.gold_calls(entry["id"])).valid
        assert right == 200

    def test_positional_arguments_get_their_names(self, sandbox: Sandbox) -> None:
        golds = {entry["id"]: entry["ground_truth"] for entry in entries(sandbox, "multi_turn_base")}
        identity = next(
            key for key, turns in golds.items() if any("sort('final_report.pdf')" in turn for turn in turns)
        )
        calls = [call for turn in sandbox.gold_calls(identity) for call in turn]
        assert {"name": "sort", "arguments": {"file_name": "final_report.pdf"}} in calls

    def test_sessions_do_not_share_state(self, sandbox: Sandbox) -> None:
        gold = sandbox.gold_calls("multi_turn_base_0")
        with sandbox.session("multi_turn_base_0") as session:
            session.execute([{"name": "mkdir", "arguments": {"dir_name": "left_behind"}}])
            assert "left_behind" in session.execute([{"name": "ls", "arguments": {}}])[0]
            spoilt = [[{"name": "mkdir", "arguments": {"dir_name": "left_behind"}}, *gold[0]], *gold[1:]]
            assert session.check([[turn] for turn in spoilt]).error_type == "multi_turn:instance_state_mismatch"
        with sandbox.session("multi_turn_base_0") as session:
            assert "left_behind" not in session.execute([{"name": "ls", "arguments": {}}])[0]
            assert session.check([[turn] for turn in gold]) == Verdict(True)
            assert session.check([[turn] for turn in gold]) == Verdict(True)

    def test_missing_or_empty_turns_are_wrong(self, sandbox: Sandbox) -> None:
        gold = sandbox.gold_calls("multi_turn_base_0")
        session = sandbox.session("multi_turn_base_0")
        assert session.check([[turn] for turn in gold[:-1]]).error_type == "multi_turn:force_terminated"
        assert session.check([[] for _ in gold]).error_type == "multi_turn:empty_turn_model_response"
        assert session.check([[[]] for _ in gold]).error_type == "multi_turn:empty_turn_model_response"
        assert session.check([[*[[call] for call in turn], []] for turn in gold]) == Verdict(True)

    def test_look_ups_work_while_a_session_is_open(self, sandbox: Sandbox) -> None:
        gold = sandbox.gold_calls("multi_turn_base_0")
        with sandbox.session("multi_turn_base_0") as session:
            session.execute([])
            assert sandbox.gold_calls("multi_turn_base_0") == gold
            assert sandbox.constants()["max_steps"] == 20
            assert session.execute([{"name": "pwd", "arguments": {}}])[0].startswith("{")

    def test_single_turn_samples_have_no_session(self, sandbox: Sandbox, package: BfclPackage) -> None:
        _, entry = simple(sandbox, package)
        with pytest.raises(ValueError, match=r"is a single-turn sample, expected one of multi_turn"):
            sandbox.session(entry["id"]).execute([])
        with pytest.raises(ValueError, match=r"unknown id 'multi_turn_base_999'"):
            sandbox.gold_calls("multi_turn_base_999")


class TestHostileCalls:
    def test_code_stays_text(self, sandbox: Sandbox, tmp_path: Path) -> None:
        trace = tmp_path / "trace"
        code = f"__import__('os').system('touch {trace}')"
        calls: list = [
            {"name": code, "arguments": {}},
            {"name": "__import__", "arguments": {"name": "os"}},
            {"name": "__init__", "arguments": {}},
            {"name": "_load_scenario", "arguments": {"scenario": {}}},
            {"name": "cd", "arguments": {f"folder={code}, a": "x"}},
            {"name": "cd", "arguments": {"lambda": 1}},
            {"name": "cd", "arguments": code},
            {"name": None, "arguments": {}},
            {"name": "cd", "arguments": {"folder": code}},
            {"name": "cd", "arguments": {"folder": f"'); {code}; ('"}},
            {"name": "cd", "arguments": {"folder": {f"'+{code}+'": [f"{{{code}}}", "\\'+" + code]}}},
        ]
        with sandbox.session("multi_turn_base_0") as session:
            before = session.execute([{"name": "ls", "arguments": {"a": True}}])
            results = session.execute(calls)
            assert all("rror" in result for result in results), results
            assert results[0].startswith("Error during execution: ")
            assert session.execute([{"name": "ls", "arguments": {"a": True}}]) == before
            verdict = session.check([[calls], *[[] for _ in sandbox.gold_calls("multi_turn_base_0")[1:]]])
        assert not verdict.valid
        assert not trace.exists()

    def test_numbers_do_not_become_names(self, sandbox: Sandbox) -> None:
        with sandbox.session(math_sample(sandbox)) as session:
            values = [float("nan"), float("inf"), float("-inf"), 1e300, 10**5000]
            results = session.execute([{"name": "absolute_value", "arguments": {"number": value}} for value in values])
        assert results[:3] == ["Error during execution: a number is not finite"] * 3
        assert results[3:] == ['{"result": 1e+300}', "Error during execution: an integer is too long"]

    def test_large_and_deep_arguments(self, sandbox: Sandbox) -> None:
        deep: dict = {}
        for _ in range(100_000):
            deep = {"a": deep}
        large = "x(" * 2_500_000
        with sandbox.session("multi_turn_base_0") as session:
            calls = [{"name": "echo", "arguments": {"content": value}} for value in (large, deep, "short")]
            first, second, third = session.execute(calls)
        assert len(first) > 5_000_000
        assert second == "Error during execution: nesting deeper than 100 levels"
        assert third == '{"terminal_output": "short"}'

    def test_memory_is_limited(self) -> None:
        with Sandbox(package_of("v4"), memory_mb=128) as sandbox, sandbox.session(math_sample(sandbox)) as session:
            huge = {"name": "power", "arguments": {"base": 2, "exponent": 4 * 10**9}}  # 500 MB
            assert session.execute([huge]) == ["Error during execution: "]
            assert session.execute([{"name": "add", "arguments": {"a": 1, "b": 2}}]) == ['{"result": 3}']

    def test_an_endless_computation_is_killed_and_the_next_sample_works(self, hasty: Sandbox) -> None:
        identity = math_sample(hasty)
        session = hasty.session(identity)
        session.execute([])
        group = hasty._process.pid
        assert len(still_running(group)) == 2
        with pytest.raises(SandboxError, match=r"no answer within 3 s|out of processor time"):
            session.execute([POWER])
        assert are_gone(group)
        with pytest.raises(SandboxError, match="has ended"):
            session.execute([])
        session.close()
        assert hasty.session("multi_turn_base_0").execute([{"name": "pwd", "arguments": {}}])[0].startswith("{")

    def test_an_endless_check_ends(self, hasty: Sandbox) -> None:
        identity = math_sample(hasty)
        turns = [[[POWER]], *[[] for _ in hasty.gold_calls(identity)[1:]]]
        with pytest.raises(SandboxError, match=r"no answer within 3 s|out of processor time"):
            hasty.session(identity).check(turns)
        assert hasty.constants()["max_steps"] == 20

    def test_a_session_does_not_outlive_its_sandbox_or_the_next_session(self, hasty: Sandbox) -> None:
        first = hasty.session("multi_turn_base_0")
        first.execute([])
        second = hasty.session("multi_turn_base_1")
        with pytest.raises(SandboxError, match="has ended"):
            first.execute([])
        second.execute([])
        hasty.close()
        with pytest.raises(SandboxError, match="has ended"):
            second.execute([])
        second.close()

    def test_a_process_that_is_killed_is_replaced(self, hasty: Sandbox) -> None:
        session = hasty.session("multi_turn_base_0")
        session.execute([])
        os.killpg(hasty._process.pid, signal.SIGKILL)
        with pytest.raises(SandboxError, match="it ended without an answer"):
            session.execute([])
        assert hasty.gold_calls("multi_turn_base_0")


class TestWalls:
    def test_nothing_is_left_behind(
        self, package: BfclPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "cwd").mkdir()
        (tmp_path / "temporary").mkdir()
        monkeypatch.chdir(tmp_path / "cwd")
        monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
        monkeypatch.setattr(tempfile, "tempdir", None)
        before = sorted(package.folder.rglob("*"))
        with Sandbox(package) as sandbox:
            with sandbox.session("multi_turn_base_0") as session:
                oracle(session, sandbox.gold_calls("multi_turn_base_0"))
            process = sandbox._process
        assert process.returncode == 0
        assert sorted(package.folder.rglob("*")) == before
        assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["cwd", "temporary"]

    def test_no_process_outlives_its_killed_owner(self, package: BfclPackage) -> None:
        code = (
            "import os, signal, sys; from pathlib import Path; "
            "from rest_rl.envs.bfcl_sandbox.package import BfclPackage; "
            "from rest_rl.envs.bfcl_sandbox.sandbox import Sandbox; "
            "sandbox = Sandbox(BfclPackage(sys.argv[1], Path(sys.argv[2]))); "
            "sandbox.session('multi_turn_base_0').execute([]); "
            "print(sandbox._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
        )
        arguments = [sys.executable, "-c", code, package.version, str(package.folder)]
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert are_gone(int(done.stdout))

    def test_secrets_are_not_inherited(self, package: BfclPackage, monkeypatch: pytest.MonkeyPatch) -> None:
        environment = Path("/proc/self/environ")
        if not environment.exists():
            pytest.skip("needs /proc")
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        with Sandbox(package) as sandbox:
            sandbox.constants()
            inherited = Path(f"/proc/{sandbox._process.pid}/environ").read_text()
        assert "BFCL_PROJECT_ROOT" in inherited
        assert "secret" not in inherited

    def test_the_process_has_its_own_network_namespace(self, sandbox: Sandbox) -> None:
        try:
            subprocess.run(["unshare", "-Un", "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("the kernel refuses network namespaces here")
        sandbox.constants()
        assert Path(f"/proc/{sandbox._process.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()

    def test_the_guard_refuses_the_outside_world(self, tmp_path: Path) -> None:
        (tmp_path / "readable").mkdir()
        (tmp_path / "readable" / "file").write_text("inside")
        (tmp_path / "file").write_text("outside")
        done = subprocess.run(
            [sys.executable, "-c", ATTEMPTS, str(walls.__file__), str(tmp_path)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["inside", "imported", "refused:16"]
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "file", "readable"]

    def test_calls_are_executed_inside_the_walls(self, tmp_path: Path) -> None:
        """A release whose backend tries to escape, and prints text that must not reach the protocol."""
        copied, trace = tmp_path / "release", tmp_path / "trace"
        shutil.copytree(package_of("v4").folder, copied)
        backend = copied / "bfcl_eval/eval_checker/multi_turn_eval/func_source_code/math_api.py"
        backend.write_text(backend.read_text() + ESCAPES.replace("TRACE", str(trace)))
        with Sandbox(BfclPackage("v4", copied), memory_mb=500) as sandbox:
            result = sandbox.session(math_sample(sandbox)).execute([{"name": "add", "arguments": {"a": 1, "b": 2}}])
            assert sandbox.constants()["max_steps"] == 20
        refused = ["PermissionError"] * 5
        assert result == [str([*refused, "MemoryError", ""])]
        assert not trace.exists()

    def test_limits_are_lowered(self) -> None:
        code = (
            "import resource, runpy, sys; confine = runpy.run_path(sys.argv[1])['confine']; confine(3, 1000); "
            "print(*(resource.getrlimit(getattr(resource, 'RLIMIT_' + name)) for name in "
            "('AS', 'CPU', 'FSIZE', 'CORE', 'NPROC')))"
        )
        done = subprocess.run([sys.executable, "-c", code, str(walls.__file__)], capture_output=True, text=True)
        assert done.stdout.split("\n")[0].startswith("(1048576000, 1048576000) (3, 5) (0, 0) (0, 0)"), done.stderr


class TestPackage:
    def test_the_pin_is_named(self) -> None:
        assert BfclPackage("v3", Path()).pin == "bfcl-eval 2025.6.14 (BFCL v3)"

    @pytest.mark.parametrize("version", ["v3", "v4"])
    def test_a_missing_release_explains_how_to_install_it(
        self, version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(f"REST_RL_BFCL_{version.upper()}", raising=False)
        monkeypatch.setattr(sys, "prefix", str(tmp_path))
        monkeypatch.setattr(sys, "path", [])
        pin = PINS[version]
        with pytest.raises(ValueError, match="install it with") as caught:
            find_package(version)
        folder = tmp_path / "share" / "rest-rl" / f"bfcl-eval-{pin}"
        assert f"pip install --no-deps --target {folder} bfcl-eval=={pin} (" in str(caught.value)

    def test_the_share_folder_is_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("REST_RL_BFCL_V3", raising=False)
        monkeypatch.setattr(sys, "prefix", str(tmp_path))
        folder = tmp_path / "share" / "rest-rl" / "bfcl-eval-2025.6.14"
        pretend_release(folder, "2025.6.14")
        assert find_package("v3") == BfclPackage("v3", folder)

    def test_a_folder_with_another_release_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pretend_release(tmp_path, "2026.3.23")
        monkeypatch.setenv("REST_RL_BFCL_V3", str(tmp_path))
        with pytest.raises(ValueError, match=r"contains 2026\.3\.23, expected the folder with bfcl-eval 2025\.6\.14"):
            find_package("v3")
        monkeypatch.setenv("REST_RL_BFCL_V3", str(tmp_path / "nothing"))
        with pytest.raises(ValueError, match=r"contains no bfcl-eval"):
            find_package("v3")

    def test_a_release_that_does_not_load_explains_why(self, tmp_path: Path) -> None:
        pretend_release(tmp_path, "2025.6.14")
        with (
            Sandbox(BfclPackage("v3", tmp_path)) as sandbox,
            pytest.raises(ValueError, match=r"cannot load .*Module.*pip install"),
        ):
            sandbox.constants()


def pretend_release(folder: Path, version: str) -> None:
    (folder / "bfcl_eval").mkdir(parents=True)
    (folder / f"bfcl_eval-{version}.dist-info").mkdir()
    (folder / f"bfcl_eval-{version}.dist-info" / "METADATA").write_text(f"Name: bfcl-eval\nVersion: {version}\n")


ATTEMPTS = """
import ctypes, os, runpy, shutil, signal, socket, subprocess, sys, tempfile
from pathlib import Path

folder = Path(sys.argv[2])
guard = runpy.run_path(sys.argv[1])["install_audit_guard"]
guard([*(path for path in sys.path if path), str(folder / "readable")])
attempts = {
    "socket": lambda: socket.socket(),
    "connect": lambda: socket.create_connection(("127.0.0.1", 9)),
    "subprocess": lambda: subprocess.run(["true"]),
    "system": lambda: os.system("true"),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "fork": lambda: os.fork() or os._exit(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "ctypes": lambda: ctypes.CDLL(None),
    "write": lambda: open(folder / "readable" / "new", "w"),
    "low write": lambda: os.open(folder / "readable" / "new", os.O_WRONLY | os.O_CREAT),
    "read": lambda: (folder / "file").read_text(),
    "list": lambda: os.listdir(folder),
    "remove": lambda: (folder / "file").unlink(),
    "rename": lambda: os.rename(folder / "file", folder / "other"),
    "mkdir": lambda: os.mkdir(folder / "new"),
}
print((folder / "readable" / "file").read_text())
import colorsys
print("imported")
refused = 0
for name, attempt in attempts.items():
    try:
        attempt()
    except PermissionError as error:
        refused += "here" in str(error)
    else:
        print("allowed:", name)
print(f"refused:{refused}")
"""
ESCAPES = """

import os, socket, subprocess, sys


def tried(attempt):
    try:
        return attempt()
    except BaseException as error:
        return type(error).__name__


def escape(self, a, b):
    print('{"ok": "printed"}', flush=True)
    attempts = [
        lambda: open("TRACE", "w"),
        lambda: os.system("touch TRACE"),
        lambda: subprocess.run(["touch", "TRACE"]),
        lambda: os.fork() or os._exit(0),
        lambda: socket.socket(),
        lambda: bytearray(1 << 30),
        lambda: sys.stdin.read(),
    ]
    return [tried(attempt) for attempt in attempts]


MathAPI.add = escape
"""


def test_backend_outputs_are_the_same_in_every_process() -> None:
    package, said = package_of("v4"), set()
    flight = {"travel_class": "none", "travel_from": "a", "travel_to": "b", "travel_date": "2024-11-10"}
    call = {"name": "book_flight", "arguments": {"access_token": "t", "card_id": "c", **flight}}
    for _ in range(4):
        with Sandbox(package) as opened:
            entry = next(e for e in opened.entries("multi_turn_base") if "TravelAPI" in e["involved_classes"])
            with opened.session(entry["id"]) as session:
                said.update(session.execute([call]))
    assert len(said) == 1
    assert next(iter(said)).count("{") > 0
