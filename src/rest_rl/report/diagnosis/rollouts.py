"""The symptoms of rollouts in an environment that do not learn."""

from __future__ import annotations

from rest_rl.report.diagnosis.findings import Symptom, format_percent, format_steps
from rest_rl.report.diagnosis.history import History
from rest_rl.report.diagnosis.settings import DiagnosisSettings

# With a smaller share of rollouts that call anything, most groups of eight contain none.
MIN_CALL_RATE = 0.08
# More failures than this of the environment's own hide what the policy does.
MAX_FAILED_SHARE = 0.05
MAX_LIMITED_SHARE = 0.5


def rollouts_fail(history: History, settings: DiagnosisSettings) -> Symptom | None:
    failed = history.newest_window("env/stop/failed")
    if failed is None or failed.value <= MAX_FAILED_SHARE:
        return None
    return Symptom(
        f"{format_percent(failed)} of the rollouts failed in the environment ({format_steps(failed)})",
        "sessions do not start, hang, or cannot score; such rollouts have a final reward of 0, whatever the policy did",
        "read `failure` in responses.jsonl; run rest-rl env check; raise env.timeout",
    )


def turn_limit_reached(history: History, settings: DiagnosisSettings) -> Symptom | None:
    limited = history.newest_window("env/stop/turn limit")
    if limited is None or not limited.exceeds(MAX_LIMITED_SHARE, history.threshold):
        return None
    return Symptom(
        f"{format_percent(limited)} of the rollouts reached the limit of turns ({format_steps(limited)})",
        "the tasks need more turns, or the policy never answers",
        "raise env.turns, or start with supervised fine-tuning on whole dialogues",
    )


def never_calls(history: History, settings: DiagnosisSettings) -> Symptom | None:
    called, turns = history.newest_window("rest/call_rate"), history.newest_window("env/turns")
    if called is None or turns is None or called.value >= MIN_CALL_RATE:
        return None
    return Symptom(
        f"{format_percent(called)} of the rollouts call a tool ({format_steps(called)})",
        "the policy answers without calling, so that most groups have equal rewards",
        "check rest.format and the prompt (rest-rl eval env --dry-run); start with supervised fine-tuning",
    )


def repeats_itself(history: History, settings: DiagnosisSettings) -> Symptom | None:
    repeated = history.newest_window("env/repeated_calls")
    if repeated is None or not repeated.exceeds(1 / 3, history.threshold):
        return None
    return Symptom(
        f"{format_percent(repeated)} of the calls repeat an earlier call of their rollout ({format_steps(repeated)})",
        "the policy does not use results, or repeated calls are rewarded",
        "reward each useful call once; check that results say what went wrong",
    )


def step_reward_misleads(history: History, settings: DiagnosisSettings) -> Symptom | None:
    gap = history.newest_window("env/step_reward_gap")
    if gap is None or gap.value + history.threshold * gap.error >= 0:
        return None
    return Symptom(
        f"step rewards are {-gap.value:.3f} ± {gap.error:.3f} higher in rollouts that fail ({format_steps(gap)})",
        "single calls are rewarded that do not lead to success",
        "run rest-rl env check, which names the tools; reward fewer calls, or use rest.credit = 'outcome'",
    )


ROLLOUT_SYMPTOMS = (rollouts_fail, turn_limit_reached, never_calls, repeats_itself, step_reward_misleads)
