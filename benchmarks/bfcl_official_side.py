"""Official verdicts for `bfcl_official.py`: the inference loop and the runners of bfcl-eval in a separate process.

Needs an environment with the imports of `bfcl_eval.eval_checker.eval_runner` (see `bfcl_official.py`), but not rest_rl.
The official executor evaluates the calls as Python code: pass it only harmless texts.

    python benchmarks/bfcl_official_side.py VERSION FOLDER SAMPLES.json VERDICTS.json
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import os
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

MODEL_NAME = "restrl"
"""The model name that our sandbox uses too, because upstream writes it into tool results."""
RELEVANCE_CATEGORIES = ("irrelevance", "live_irrelevance", "live_relevance")


# Parse the calls of a text like ToolRL's evaluation: after the last tag, one per line, skipping bad lines.
def parse_tool_lines(text: str) -> list[dict[str, Any]]:
    if "<tool_call>" not in text:
        raise ValueError("no call")
    block = text.rsplit("<tool_call>", maxsplit=1)[-1].split("</tool_call>", maxsplit=1)[0]
    calls = []
    for line in block.strip().split("\n"):
        try:
            read = json.loads(line)
            name, arguments = read["name"], read["parameters"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(name, str) and isinstance(arguments, dict) and name.lower() != "none":
            calls.append({"name": name, "arguments": arguments})
    return calls


# Parse a text that is a JSON list of calls; an empty text ends a turn.
def parse_json_calls(text: str) -> list[dict[str, Any]]:
    return json.loads(text) if text else []


class ReplayHandler:
    """Overrides of the package's model handler that replay a recording turn by turn and step by step."""

    def begin(self, sample: dict[str, Any]) -> None:
        self.is_fc_model = True
        self.recording, self.turn, self.step, self.results = sample["response"], 0, 0, []
        self.read = parse_json_calls if sample.get("is_json") else parse_tool_lines

    def said(self) -> str:
        if isinstance(self.recording, str):
            return self.recording if self.turn == self.step == 0 else ""
        steps = self.recording[self.turn] if self.turn < len(self.recording) else []
        return steps[self.step] if self.step < len(steps) else ""

    def decode_ast(self, result: str, *_: Any, **__: Any) -> list[dict[str, Any]]:
        return [{call["name"]: call["arguments"]} for call in self.read(result)]

    def decode_execute(self, result: str, *_: Any, **__: Any) -> list[str]:
        calls = self.read(result)
        return [
            f"{call['name']}({', '.join(f'{key}={value!r}' for key, value in call['arguments'].items())})"
            for call in calls
        ]

    def _query_FC(self, inference_data: dict[str, Any]) -> tuple[str, float]:  # noqa: N802
        text = self.said()
        self.step += 1
        return text, 0.0

    def _pre_query_processing_FC(self, inference_data: dict[str, Any], test_entry: Any) -> dict[str, Any]:  # noqa: N802
        return inference_data

    def _compile_tools(self, inference_data: dict[str, Any], test_entry: Any) -> dict[str, Any]:
        return inference_data

    def _parse_query_response_FC(self, api_response: str) -> dict[str, Any]:  # noqa: N802
        return {"model_responses": api_response, "input_token": 0, "output_token": 0}

    def add_first_turn_message_FC(self, inference_data: dict[str, Any], messages: Any) -> dict[str, Any]:  # noqa: N802
        return inference_data

    def _add_next_turn_user_message_FC(self, inference_data: dict[str, Any], messages: Any) -> dict[str, Any]:  # noqa: N802
        self.turn, self.step = self.turn + 1, 0
        return inference_data

    def _add_assistant_message_FC(self, inference_data: dict[str, Any], said: Any) -> dict[str, Any]:  # noqa: N802
        return inference_data

    def _add_execution_results_FC(  # noqa: N802
        self, inference_data: dict[str, Any], execution_results: list[str], said: Any
    ) -> dict[str, Any]:
        self.results += execution_results
        return inference_data


def import_bfcl(name: str) -> Any:
    return importlib.import_module(f"bfcl_eval.{name}")


class OfficialEvaluator:
    """One release: its samples by category, and its runners with their score files kept in memory."""

    def __init__(self, version: str) -> None:
        self.version = version
        # A stand-in for the module that imports the client libraries of all model vendors.
        models = types.ModuleType("bfcl_eval.constants.model_config")
        config = types.SimpleNamespace(underscore_to_dot=False, is_fc_model=True)
        vars(models)["MODEL_CONFIG_MAPPING"] = {MODEL_NAME: config}
        sys.modules[models.__name__] = models
        self.runner = import_bfcl("eval_checker.eval_runner")
        self.written: list[dict[str, Any]] = []
        for module in (self.runner, import_bfcl("eval_checker.eval_runner_helper")):
            vars(module)["write_list_of_dicts_to_file"] = self.keep
        named = {"registry_name": MODEL_NAME, "is_fc_model": True} if version == "v4" else {}
        handler = type("Handler", (ReplayHandler, import_bfcl("model_handler.base_handler").BaseHandler), {})
        self.handler = handler(MODEL_NAME, 0, **named)
        self.loaded: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {}

    def keep(self, filename: str, data: list[dict[str, Any]], *_: Any, **__: Any) -> None:
        # Called instead of writing a score file, which has a header row and then the failed samples.
        self.written = data

    # Load a category as the package does; return samples for the loop, samples for the runner, answers, by id.
    def load(self, category: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        utils = import_bfcl("utils")
        config = import_bfcl("constants.eval_config")
        if self.version == "v4":
            loop_samples = utils.load_dataset_entry(category)
            runner_samples = utils.load_dataset_entry(
                category, include_prereq=False, include_language_specific_hint=False
            )
            answers = [] if category in RELEVANCE_CATEGORIES else utils.load_ground_truth_entry(category)
        else:
            path = utils.find_file_with_suffix(config.PROMPT_PATH, category)
            loop_samples, runner_samples = (
                utils.load_file(path, sort_by_id=True),
                utils.load_file(path, sort_by_id=True),
            )
            loop_samples = import_bfcl("_llm_response_generation").process_multi_turn_test_case(loop_samples)
            answers = []
            if category not in RELEVANCE_CATEGORIES:
                path = utils.find_file_with_suffix(config.POSSIBLE_ANSWER_PATH, category)
                answers = utils.load_file(path, sort_by_id=True)
        # Reversed, so that the first sample of a duplicate id wins.
        by_id = {row["id"]: row for row in reversed(loop_samples)}, {row["id"]: row for row in reversed(runner_samples)}
        pairs = zip(reversed(runner_samples), reversed(answers), strict=True) if answers else ()
        return *by_id, {row["id"]: answer for row, answer in pairs}

    # Run the loop and the category's runner on one recording.
    def verdict(self, sample: dict[str, Any]) -> dict[str, Any]:
        category, identity = sample["category"], sample["id"].partition("#")[0]
        if category not in self.loaded:
            self.loaded[category] = self.load(category)
        loop_samples, runner_samples, answers = self.loaded[category]
        start = time.perf_counter()
        entry, checked = copy.deepcopy(loop_samples[identity]), copy.deepcopy(runner_samples[identity])
        self.handler.begin(sample)
        try:
            result, _ = self.handler.inference(entry, include_input_log=False, exclude_state_log=False)
            self.run(category, {"id": identity, "result": result}, checked, answers.get(identity))
            failed = self.written[1:]
            error = failed[0].get("error_type") or failed[0].get("error", {}).get("error_type") if failed else ""
            found = {"valid": not failed, "error": error, "raised": ""}
        except Exception as problem:  # a run of the package would stop here
            found = {"valid": False, "error": "", "raised": f"{type(problem).__name__}: {problem}"[:200]}
        seconds = time.perf_counter() - start
        executor = vars(import_bfcl("eval_checker.multi_turn_eval.multi_turn_utils"))
        for name in [name for name in executor if name.endswith("_instance")]:
            del executor[name]  # otherwise the next recording of this sample continues with this state
        return {**found, "results": self.handler.results, "seconds": seconds}

    # Run the runner that `evaluate_task` selects for the category on one sample.
    def run(self, category: str, result: dict[str, Any], prompt: Any, answer: Any) -> None:
        results, prompts, answers, folder = [result], [prompt], [answer], Path()
        if category in RELEVANCE_CATEGORIES:
            self.runner.relevance_file_runner(self.handler, results, prompts, MODEL_NAME, category, folder)
        elif category.startswith("multi_turn"):
            self.runner.multi_turn_runner(self.handler, results, prompts, answers, MODEL_NAME, category, folder)
        else:
            language = "JavaScript" if "javascript" in category else "Java" if "java" in category else "Python"
            languages = [] if self.version == "v4" else [language]
            self.runner.ast_file_runner(
                self.handler, results, prompts, answers, *languages, category, MODEL_NAME, folder
            )


# Return the calls of a recording by turn and step, as the handler parses them.
def decode_recording(response: Any) -> Any:
    if not isinstance(response, str):
        return [[decode_recording(step) for step in turn] for turn in response]
    try:
        return parse_tool_lines(response)
    except ValueError:
        return []


def main() -> None:
    """Judge every sample of the first file and write the verdicts to the second."""
    version, folder, source, target = sys.argv[1:]
    samples = json.loads(Path(source).read_text(encoding="utf-8"))
    output = Path(target).resolve()
    # Upstream reads BFCL_PROJECT_ROOT at import and writes there; a temporary folder keeps the release untouched.
    sys.path.insert(0, str(Path(folder).resolve()))
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        os.environ["BFCL_PROJECT_ROOT"] = place
        os.chdir(place)
        official = OfficialEvaluator(version)
        verdicts = [{**official.verdict(sample), "decoded": decode_recording(sample["response"])} for sample in samples]
        os.chdir("/")
    output.write_text(json.dumps(verdicts), encoding="utf-8")


if __name__ == "__main__":
    main()
