"""Why groups have no spread and why responses are cut off: cause and remedy of what can have several causes."""

from __future__ import annotations

import math

from rest_rl.report.diagnosis.history import WINDOW, History, Mean
from rest_rl.report.diagnosis.settings import Settings

ENDLESS = 0.25
"""Mean length of the responses that end, as a share of the limit, below which the others do not end: with a constant
chance to end at every token it would be 0.31 where most groups hold one that is cut off, and more where more are."""


def why_flat(history: History, settings: Settings, flat: Mean) -> tuple[str, str]:
    """Cause and remedy of groups without spread: responses that do not differ, are right, are cut off or unreadable."""
    exact, well_formed = history.now("rest/exact_match"), history.now("rest/format")
    solved = exact.value - (1 - flat.value) if exact else 0.0  # were every response of the other groups right
    is_learnt = exact is not None and exact.value >= 1 - settings.most_groups
    is_broken = well_formed is not None and well_formed.value < 0.5
    surely_same = is_deterministic(history, settings)
    if not is_learnt and (surely_same or (settings.is_cold and not is_broken)):
        return why_same(history, settings, surely_same)
    if exact and solved >= flat.value / 2:
        share = min(1.0, solved / flat.value)
        return (
            f"at least {100 * share:.0f} % of them are right throughout (exact match {percent(exact)})",
            "little is left to learn here: take harder prompts or more kinds of them, or end",
        )
    if well_formed and is_broken:
        return why_broken(history, settings, well_formed)
    remedy = (
        f"raise trl.num_generations (now {settings.group}); begin with demonstrations (rest-rl sft); leave out "
        "prompts that are never or always answered right"
    )
    return "responses to one prompt hardly differ, or the prompts are beyond the policy", remedy


def is_deterministic(history: History, settings: Settings) -> bool:
    """Whether most groups hold one response G times, in the newest window as in the first rows.

    By Jensen the chance of G equal responses, E[p^(G-1)], is at least exp(-(G-1) H) with H the entropy of a response,
    so more than 1/2 where (G-1) H < ln 2.
    """
    latest, length = history.latest("entropy"), history.now("completions/mean_length")
    tokens = length.value if length else settings.max_length
    if not latest or tokens is None:
        return False
    most = max(*history.values("entropy")[:WINDOW], *latest)
    return (settings.group - 1) * most * tokens < math.log(2)


def why_same(history: History, settings: Settings, surely_same: bool) -> tuple[str, str]:
    """Cause and remedy of responses that differ too little for a spread."""
    now, entropy = settings.temperature, history.now("entropy")
    figures = [f"trl.temperature = {now:g}"] if now is not None else []
    figures += [f"entropy {entropy.value:.1g} nats a token{', as in the first rows' * surely_same}"] if entropy else []
    return (
        f"the responses to a prompt {'do not differ' if surely_same else 'hardly differ'} ({', '.join(figures)})",
        f"raise trl.temperature{f' (now {now:g})' if now is not None else ''}",
    )


def why_broken(history: History, settings: Settings, well_formed: Mean) -> tuple[str, str]:
    """Cause and remedy of responses that score alike since most of them break the format."""
    cut, was = history.now("completions/clipped_ratio"), max(history.values("rest/format"))
    if cut and cut.value >= (1 - well_formed.value) / 2:
        cause = (
            f"{percent(cut)} of the responses hit the length limit{settings.at_limit}, and what is cut off fails the "
            f"format and so scores alike (format {percent(well_formed)})"
        )
        return cause, why_cut(history, settings)[1]
    cause = f"most responses break the format and so score alike (format {percent(well_formed)})"
    if was >= 0.5:
        forgotten = f", which {100 * was:.0f} % of them kept in the best step: the policy has forgotten it"
        return cause + forgotten, settings.slower
    return cause, "begin with demonstrations (rest-rl sft); check that rest.format is how this model writes calls"


def why_cut(history: History, settings: Settings) -> tuple[str, str]:
    """Cause and remedy of responses that hit the length limit."""
    limit = settings.max_length
    ended, least = history.now("completions/mean_terminated_length"), min(history.values("completions/clipped_ratio"))
    if least < settings.most_groups:
        return (
            f"they fitted before ({100 * least:.0f} % cut off in the best step): the policy rambles or forgets to end",
            settings.longer_or_slower,
        )
    if limit and ended and 0 < ended.value < ENDLESS * limit:
        return (
            f"those that end do so after {ended.value:.0f} tokens: the others run on and would not end",
            "begin with demonstrations (rest-rl sft), which teach the end; check that the end-of-turn token is right",
        )
    return (
        "the limit is shorter than what the policy has to say; what is cut off fails the format",
        f"raise trl.max_completion_length{f' (now {limit})' if limit else ''}",
    )


def percent(mean: Mean) -> str:
    """`62.0 ± 3.1 %`."""
    return f"{100 * mean.value:.1f} ± {100 * mean.error:.1f} %"
