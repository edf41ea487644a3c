from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement, pairwise, product
from typing import Any

import pytest
import torch

from rest_rl.credit import (
    CreditConfig,
    find_part_stages,
    find_turn_stages,
    group_advantages,
    spread_credits,
    stage_credits,
)
from rest_rl.errors import UserError
from rest_rl.formats import FORMATS, get_format
from rest_rl.regions import decode_ids, token_char_lengths
from rest_rl.response import Gold, ToolCall
from rest_rl.rewards import (
    AuthorsReward,
    RewardConfig,
    accuracy_score,
    apply_reward,
    judge,
    match_calls_by_stage,
    split_reward,
)
from tests.tokenizers_in_memory import byte_fallback, byte_level

# Members with 2, 3, 1 and 1 stages; the third has no reward at all.
RAGGED = [[1.0, 2.0], [0.0, None, 3.0], [None], [5.0]]


def config(kind: Any, **settings: Any) -> CreditConfig:
    return CreditConfig(kind, **settings)


# ---- numbers by hand


def test_outcome_by_hand():
    # totals 3, 3 and 5: 3 - (3 + 5) / 2 = -1 and 5 - (3 + 3) / 2 = 2; with the mean 11/3 of all: -2/3 and 4/3
    found = stage_credits(RAGGED, "outcome")
    assert found.credits == [[-1, -1], [-1, -1, -1], [0], [2]]
    assert (found.num_stages, found.num_lone, found.num_unscored) == (6, 0, 1)
    mean = stage_credits(RAGGED, config("outcome", baseline="mean")).credits
    assert [credit for member in mean for credit in member] == pytest.approx([*[-2 / 3] * 5, 0, 4 / 3])


def test_outcome_with_the_mean_equals_dr_grpo():
    rewards = [0.2, 0.9, 0.4, 0.4, 0.1, 0.1, 0.1, 0.1]
    expected = group_advantages(torch.tensor(rewards, dtype=torch.float64), 4, "dr_grpo").tolist()
    groups = [[[reward] for reward in rewards[at : at + 4]] for at in (0, 4)]
    for kind in ("outcome", "return_to_go"):  # with one stage they are the same
        found = [stage_credits(group, config(kind, baseline="mean")).credits for group in groups]
        assert [credit for group in found for (credit,) in group] == pytest.approx(expected, abs=1e-12)
    assert stage_credits(groups[1], "outcome").credits == [[0.0]] * 4  # exactly: 3 x 0.1 / 3 is not 0.1


def test_return_to_go_by_hand():
    # stage 0: 3, 3, 5 to come. stage 1: 2 and 3 to come. stage 2 has one member, whose outcome credit is -1.
    found = stage_credits(RAGGED, "return_to_go")
    assert found.credits == [[-1, -1], [-1, 1, -1], [0], [2]]
    assert (found.num_stages, found.num_lone, found.num_unscored) == (6, 1, 1)
    assert stage_credits(RAGGED, config("return_to_go", lone="zero")).credits == [[-1, -1], [-1, 1, 0], [0], [2]]


def test_return_to_go_with_gamma_by_hand():
    # gamma 1/2: to come are (1 + 2/2, 2) = (2, 2), (0 + 3/4, 3/2, 3), (5). Stage 0: 2 - (0.75 + 5) / 2 = -0.875,
    # 0.75 - (2 + 5) / 2 = -2.75, 5 - (2 + 0.75) / 2 = 3.625. Stage 1: 2 - 1.5 = 0.5.
    found = stage_credits(RAGGED, config("return_to_go", gamma=0.5, lone="zero"))
    assert found.credits == [[-0.875, 0.5], [-2.75, -0.5, 0], [0], [3.625]]


def test_return_to_go_with_the_mean_by_hand():
    # stage 0: mean 11/3; stage 1: mean 5/2
    found = stage_credits(RAGGED, config("return_to_go", baseline="mean", lone="zero")).credits
    assert found[0] == pytest.approx([-2 / 3, -0.5])
    assert found[1] == pytest.approx([-2 / 3, 0.5, 0])


def test_matched_by_hand():
    # outcomes 1 and 0: credit 1 and -1. Matched to come: (1, 0.5) and (0.25, 0): differences 0.75 and 0.5.
    found = stage_credits([[None, 1.0], [None, 0.0]], "matched", matched=[[0.5, 0.5], [0.25, 0.0]])
    assert found.credits == [[1.75, 1.5], [-1.75, -1.5]]
    # an unscored trajectory has no part in the baselines of the matched rewards either; then stage 1 is lone, and the
    # credit of all its matched rewards, 1 - 0.25, takes its place
    rewards = [[None, 1.0], [0.0], [None, None]]
    found = stage_credits(rewards, "matched", matched=[[0.5, 0.5], [0.25], [1.0, 1.0]])
    assert found.credits == [[1.75, 1.75], [-1.75], [0, 0]]
    assert found.num_lone == 1


def test_anchor_by_hand():
    # Outcomes 3, 0, 1: credits 2.5, -2, -0.5. The state "a" has 3, 0 and 1 to come: 3 - 0.5, 0 - 2, 1 - 1.5. The state
    # "b" is visited twice, but by one member; "c" once; None is unknown.
    rewards = [[1.0, 2.0], [0.0, None, 0.0], [1.0]]
    states = [["a", None], ["a", "b", "b"], ["a"]]
    found = stage_credits(rewards, "anchor", states=states)
    assert found.credits == [[5, 2.5], [-4, -2, -2], [-1]]
    assert found.num_lone == 3
    half = stage_credits(rewards, config("anchor", anchor_weight=0.5), states=states)
    assert half.credits == [[3.75, 2.5], [-3, -2, -2], [-0.75]]


def test_anchor_with_the_mean_compares_visits_of_one_member():
    # as published: one member's visits of "b" have 3 and 1 to come, with the mean 2; outcomes 3 and 1 with the mean 2
    found = stage_credits([[2.0, 1.0], [1.0]], config("anchor", baseline="mean"), states=[["b", "b"], ["c"]])
    assert found.credits == [[2, 0], [-1]]
    assert found.num_lone == 1


def test_an_unscored_stage_is_not_a_reward_of_zero():
    everyone = stage_credits([[0.0], [1.0], [1.0]], "outcome").credits
    without = stage_credits([[None], [1.0], [1.0]], "outcome").credits
    assert everyone[1] == [0.5]
    assert without == [[0.0]] * 3
    assert stage_credits([[None], [1.0]], "return_to_go").credits == [[0.0], [0.0]]  # nobody to compare with
    assert stage_credits([[None, 1.0], [0.0, None]], "return_to_go").credits == [[1, 1], [-1, -1]]


@pytest.mark.parametrize("kind", ["outcome", "return_to_go", "matched", "anchor"])
def test_degenerate_groups(kind: Any):
    for rewards in ([], [[]], [[1.0, 2.0]], [[None, None], [None]], [[0.1, 0.1]] * 4):
        states = [[f"state {turn}" for turn in range(len(member))] for member in rewards]
        found = stage_credits(rewards, kind, states=states, matched=rewards)
        assert found.credits == [[0.0] * len(member) for member in rewards]


def test_normalization_by_turn_index_is_refused_and_other_mistakes_are_errors():
    for settings in ({"turn_norm": "index"}, {"kind": "turn_index"}, {"kind": "mt_grpo"}):
        with pytest.raises(UserError) as caught:
            CreditConfig(**settings)  # type: ignore[arg-type]
        assert "0.000" in caught.value.problem
        assert "return_to_go" in caught.value.remedy
    for wrong in ({"kind": "x"}, {"baseline": "x"}, {"lone": "x"}, {"turn_norm": "x"}, {"gamma": 1.1}):
        with pytest.raises(UserError) as caught:
            CreditConfig(**wrong)  # type: ignore[arg-type]
        assert "0.000" not in caught.value.problem
    with pytest.raises(UserError):
        CreditConfig(anchor_weight=float("nan"))
    with pytest.raises(ValueError, match="states"):
        stage_credits([[1.0]], "anchor")
    with pytest.raises(ValueError, match="matched"):
        stage_credits([[1.0]], "matched", matched=[[1.0, 2.0]])


# ---- tokens


def test_credits_are_spread_over_the_tokens_of_their_stage():
    stages_BT = torch.tensor([[0, 0, -1, 1, -1], [-1, 0, 0, -1, -1]])
    assert torch.equal(stages_BT, find_turn_stages(torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0]])))
    assert spread_credits([[1.0, 2.0], [3.0, 9.0, 9.0]], stages_BT).tolist() == [[1, 1, 0, 2, 0], [0, 3, 3, 0, 0]]
    assert spread_credits([[], []], torch.full((2, 3), -1)).tolist() == [[0.0] * 3] * 2
    for credits in ([[1.0, 2.0]], [[1.0], [3.0]]):  # a row is missing; the stage 1 is missing
        with pytest.raises(ValueError, match="stages"):
            spread_credits(credits, stages_BT)


def test_a_token_belongs_to_the_stage_of_its_first_character():
    # tokens at 0-2, 2-5, (no characters) 5, 5-6, and two after the text; the stages end at 3, 5 and 6
    assert find_part_stages([2, 3, 0, 1, 0, 0], [3, 5, 6]) == [0, 0, 2, 2, 2, 2]
    assert find_part_stages([0], [0]) == [0]


@pytest.mark.parametrize("make_tokenizer", [byte_level, byte_fallback])
def test_credit_of_the_parts_of_a_response_reaches_its_tokens(make_tokenizer: Callable[[], Any]):
    tokenizer, gold = make_tokenizer(), Gold((ToolCall("get_weather", {"city": "東京", "days": 12}),))
    ids = tokenizer(get_format("hermes").render("Zürich?", gold.calls, None), add_special_tokens=False)["input_ids"]
    text = decode_ids(ids, tokenizer)
    found = split_reward(judge(text, gold, "hermes"), "hermes", RewardConfig(), 0.0)
    stages = find_part_stages(token_char_lengths([*ids, tokenizer.eos_token_id], tokenizer), found.ends)
    assert stages == sorted(stages)
    assert stages[-1] == len(found.ends) - 1 == 5
    # the other member has reward 0 and one stage, so every stage but the first is lone
    credits = stage_credits([found.rewards, [0.0]], config("return_to_go", lone="zero")).credits
    assert spread_credits(credits[:1], torch.tensor([stages]))[0].tolist() == pytest.approx(
        [1.0 if stage == 0 else 0.0 for stage in stages]
    )
    # the tokens of a stage, decoded, are its text up to the token that contains its end
    for stage, end in enumerate(found.ends):
        upto = decode_ids([i for i, own in zip(ids, stages, strict=False) if own <= stage], tokenizer)
        assert text.startswith(upto)
        assert len(upto) >= end


# ---- matched calls


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name, arguments)


def test_matched_rewards_by_hand():
    # Gold: f(a=1), g(b=2): 1 + 2 + 2 = 5 points. g with the wrong value: names 1/2, keys 1: 1.5 / 5. Then a second g
    # with the right value takes its place (names 1 of 3, keys and values 2): 7/3 / 5. Then f: names 2 of 3, 2 + 2.
    gold = (call("f", a=1), call("g", b=2))
    stages = [[call("g", b=3)], [], [call("g", b=2)], [call("f", a=1)]]
    assert match_calls_by_stage(stages, gold) == pytest.approx([1.5 / 5, 0, (7 / 3 - 1.5) / 5, (14 / 3 - 7 / 3) / 5])
    assert match_calls_by_stage([[*gold]], gold) == [1.0]
    # a superfluous call of an unknown tool: the names fall from 1 to 2/3
    assert match_calls_by_stage([[*gold], [call("h")]], gold) == pytest.approx([1, -1 / 3 / 5])
    assert match_calls_by_stage([[], [call("f")], [call("f")]], ()) == [1, -1, 0]
    assert match_calls_by_stage([], gold) == []


def test_matched_rewards_add_up_to_the_accuracy_of_all_calls():
    rng = random.Random(0)
    for _ in range(200):
        gold, made = (
            [call(rng.choice("fg"), **{key: rng.randint(0, 2) for key in rng.sample("abc", 2)}) for _ in range(number)]
            for number in (rng.randint(1, 4), rng.randint(0, 6))
        )
        cuts = sorted(rng.randint(0, len(made)) for _ in range(3))
        stages = [made[start:end] for start, end in pairwise([0, *cuts, len(made)])]
        parsed = judge(get_format("hermes").render(None, made, None), Gold(tuple(gold)), "hermes").parsed
        total = sum(match_calls_by_stage(stages, gold))
        assert total == pytest.approx(accuracy_score(parsed, Gold(tuple(gold)))[0])
        assert -1e-9 <= total <= 1 + 1e-9


# ---- the parts of a response

GOLD = Gold((call("get", city="Paris", days=2),))


def stages_of(text: str, gold: Gold = GOLD, format: str = "hermes", progress: float = 0.0, **more: Any):
    found = split_reward(judge(text, gold, format), format, RewardConfig(**more), progress)
    assert sum(found.rewards) == pytest.approx(apply_reward(RewardConfig(**more), judge(text, gold, format), 0).total)
    assert found.ends[-1] == len(text)
    assert sorted(found.ends) == list(found.ends)
    return [text[start:end] for start, end in pairwise((0, *found.ends))], found.rewards


def test_the_parts_of_a_call_by_hand():
    text = '<tool_call>\n{"name": "get", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
    parts, rewards = stages_of(text)
    assert parts == [
        '<tool_call>\n{"name": "get"',
        ', "arguments": {"city":',
        ' "Rome",',
        ' "days":',
        " 2}",
        "}\n</tool_call>",
    ]
    # 1 + 1 + 2 = 4 points, half of the reward: the name 1, one of two keys 1/2, a wrong value, the other key, its value
    assert rewards == pytest.approx([1 / 8, 1 / 16, 0, 1 / 16, 1 / 8, 1 / 2])


def test_the_parts_of_other_responses_by_hand():
    # A call where an answer was expected: the first stage takes all of S_acc, and nothing can change that
    parts, rewards = stages_of('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', Gold(answer="Hi."))
    assert len(parts) == 2
    assert rewards == pytest.approx([0, 0])
    assert stages_of("Hello.", Gold(answer="Hi.")) == (["Hello."], pytest.approx((1.0,)))
    assert stages_of("Hello.", Gold(answer="Hi."), answer="overlap") == (["Hello."], pytest.approx((0.5,)))
    # without a call, or with arguments before the name, there is one stage
    assert stages_of("")[1] == pytest.approx((0.0,))
    assert len(stages_of('<tool_call>\n{"arguments": {"days": 2}, "name": "get"}\n</tool_call>')[0]) == 1
    # the second name decides that the names are wrong: 1 of 2 is 1 - 1/2 less
    two = '<tool_call>\n{"name": "get", "arguments": {"days": 2}}\n</tool_call>\n<tool_call>\n{"name": "get"'
    assert stages_of(two + ', "arguments": {}}\n</tool_call>')[1][3] == pytest.approx(-0.5 / 4 / 2)
    # at progress 1, S_acc is 3/4 of the reward, here twice as much
    text = get_format("hermes").render(None, GOLD.calls, None)
    found = split_reward(judge(text, GOLD, "hermes"), "hermes", RewardConfig(accuracy_scale=2), 1.0)
    assert found.rewards == pytest.approx([1.5 / 4, 1.5 / 8, 1.5 / 4, 1.5 / 8, 1.5 / 4, 0.25])
    # other rules have one stage
    text = get_format("toolrl").render("", GOLD.calls, None)
    assert split_reward(judge(text, GOLD), "toolrl", AuthorsReward(), 0.0).rewards == (4.0,)


def test_broken_responses_keep_the_parts_before_the_break():
    text = get_format("toolrl").render("hm", GOLD.calls, None)
    whole, _ = stages_of(text, format="toolrl")
    cut, rewards = stages_of(text[: text.index("2}}")], format="toolrl")
    assert cut[:4] == whole[:4]
    assert cut[4:] == [" "]
    # all of S_acc that was decided is lost in the end, and the last stage pays for it
    assert rewards == pytest.approx([1 / 8, 1 / 16, 1 / 8, 1 / 16, -3 / 8])


@pytest.mark.parametrize("format", FORMATS)
def test_parts_depend_only_on_the_text_before_their_end(format: str):
    # The stage of a token and the rewards before it may not depend on the token or what follows; otherwise the credit
    # is biased. So we cut responses anywhere, continue them differently, and compare the parts before the cut.
    rng, tool_format, num_compared = random.Random(0), get_format(format), 0
    values = [1, 12, "x y", [1, 2], {"u": "v"}, True, None, 'a"b,}']

    def sample() -> str:
        calls = [
            call(
                rng.choice(["f", "get_x"]), **{key: rng.choice(values) for key in rng.sample("abc", rng.randint(0, 3))}
            )
            for _ in range(rng.randint(1, 3))
        ]
        return tool_format.render(rng.choice([None, "hm"]), calls, None)

    gold = Gold((call("f", a=1, b="x y"), call("get_x", c=True)))
    for _ in range(150):
        text, other = sample(), sample()
        cut = rng.randrange(len(text))
        tails = ["", "}", "word", '"', "\n", "]", "(", other, other[rng.randrange(len(other)) :], *tool_format.tags]
        whole, changed = (
            split_reward(judge(each, gold, format), format, RewardConfig(), 0.5)
            for each in (text, text[:cut] + rng.choice(tails))
        )
        before = [
            [(end, reward) for end, reward in zip(found.ends[:-1], found.rewards[:-1], strict=True) if end <= cut]
            for found in (whole, changed)
        ]
        num_compared += len(before[0])
        assert before[0] == before[1]
    assert num_compared > 100


def test_hostile_responses_have_a_bounded_number_of_parts():
    many = [call("get", **{f"k{i}": i for i in range(300)}), *[call("get", city="Rome")] * 500]
    found = split_reward(judge(get_format("hermes").render(None, many, None), GOLD), "hermes", RewardConfig(), 0.0)
    assert len(found.ends) == 65


# ---- exact expectations


@dataclass
class Policy:
    """Makes the given choices; records their probability and the score of each."""

    forced: Sequence[int]
    probability: float = 1.0
    scores: list[tuple[Hashable, float]] = field(default_factory=list)

    def choose(self, name: Hashable, logit: float) -> int:
        p = 1 / (1 + math.exp(-logit))
        action = self.forced[len(self.scores)]
        self.probability *= p if action else 1 - p
        self.scores.append((name, action - p))  # d log pi / d logit
        return action


@dataclass
class Trajectory:
    probability: float
    scores: list[tuple[Hashable, float]]
    stages: list[int]  # of each choice
    rewards: list[float | None]
    states: list[str | None]
    matched: list[float]
    objective: float


Toy = Callable[[Policy], tuple[list[int], list[float | None], list[str | None], list[float]]]


def trajectories(toy: Toy, max_choices: int) -> list[Trajectory]:
    found: dict[tuple[Any, ...], Trajectory] = {}
    for forced in product((0, 1), repeat=max_choices):
        policy = Policy(forced)
        stages, rewards, states, matched = toy(policy)
        total = sum(reward for reward in rewards if reward is not None)
        key = forced[: len(policy.scores)]
        found[key] = Trajectory(policy.probability, policy.scores, stages, rewards, states, matched, total)
    assert sum(each.probability for each in found.values()) == pytest.approx(1)
    return list(found.values())


def exact_gradient(
    paths: list[Trajectory], value: Callable[[Trajectory], float] = lambda path: path.objective
) -> dict[Hashable, float]:
    gradient: dict[Hashable, float] = {}
    for path in paths:
        for name, score in path.scores:
            gradient[name] = gradient.get(name, 0.0) + path.probability * value(path) * score
    return gradient


Estimator = Callable[[list[Trajectory]], list[list[float]]]


def groups(paths: list[Trajectory], size: int) -> Iterator[tuple[float, list[Trajectory]]]:
    # All groups and their probabilities; the order of the members does not matter.
    for members in combinations_with_replacement(range(len(paths)), size):
        orders = math.factorial(size) / math.prod(math.factorial(count) for count in Counter(members).values())
        group = [paths[member] for member in members]
        yield orders * math.prod(path.probability for path in group), group


def group_gradient(group: list[Trajectory], estimate: Estimator) -> dict[Hashable, float]:
    # The mean over members of sum_t credit_t grad log pi(a_t)
    gradient: dict[Hashable, float] = {}
    for path, credits in zip(group, estimate(group), strict=True):
        for (name, score), stage in zip(path.scores, path.stages, strict=True):
            gradient[name] = gradient.get(name, 0.0) + credits[stage] * score / len(group)
    return gradient


def expected_gradient(paths: list[Trajectory], group_size: int, estimate: Estimator) -> dict[Hashable, float]:
    gradient: dict[Hashable, float] = {}
    for probability, group in groups(paths, group_size):
        for name, value in group_gradient(group, estimate).items():
            gradient[name] = gradient.get(name, 0.0) + probability * value
    return gradient


def using(kind: Any, **settings: Any) -> Estimator:
    wanted = config(kind, **settings)

    def estimate(group: list[Trajectory]) -> list[list[float]]:
        states, matched = [path.states for path in group], [path.matched for path in group]
        return stage_credits([path.rewards for path in group], wanted, states=states, matched=matched).credits

    return estimate


def normalized_by_index(group: list[Trajectory]) -> list[list[float]]:
    # What `CreditConfig` refuses: each turn's own reward, compared with the rewards at the same index.
    means = {}
    for stage in range(max(len(path.rewards) for path in group)):
        found = [path.rewards[stage] or 0.0 for path in group if len(path.rewards) > stage]
        means[stage] = sum(found) / len(found)
    return [[(reward or 0.0) - means[stage] for stage, reward in enumerate(path.rewards)] for path in group]


def difference(left: dict[Hashable, float], right: dict[Hashable, float]) -> float:
    assert left.keys() == right.keys()
    return max(abs(left[name] - right[name]) for name in left)


def chain(policy: Policy) -> Any:
    # Two turns. The first choice earns something and decides the state in which the second is made.
    first = policy.choose("first", 0.3)
    second = policy.choose(("second", first), -0.2 + first)
    rewards = [0.4 * (1 - first), 1.0 * first * second + 0.2 * (1 - second)]
    calls = [[call("f", a=first + 1)], [call("f", a=second + 1)]]
    return [0, 1], rewards, ["start", f"after {first}"], match_calls_by_stage(calls, (call("f", a=1), call("f", a=2)))


def door(policy: Policy) -> Any:
    # The first choice decides whether the second turn is reached, which earns 1 plus something: d V / d logit is
    # p (1 - p) (value of going on), with p = 1/2.
    first = policy.choose("first", 0.0)
    if not first:
        return [0], [0.0], ["start"], [0.0]
    second = policy.choose("second", 0.5)
    return [0, 1], [None, 1.0 + 0.3 * second], ["start", "inside"], [0.0, 0.0]


def bare_door(policy: Policy) -> Any:
    # As `door`, but the second turn always earns 1: the exact gradient of the first choice is 0.25.
    if not policy.choose("first", 0.0):
        return [0], [0.0], ["start"], [0.0]
    policy.choose("second", 0.5)
    return [0, 1], [0.0, 1.0], ["start", "inside"], [0.0, 0.0]


TOYS = [(chain, 2), (door, 2), (bare_door, 2)]


@pytest.mark.parametrize(("toy", "choices"), TOYS)
@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_unbiased_estimators_equal_the_gradient(toy: Toy, choices: int, group_size: int):
    paths = trajectories(toy, choices)
    exact = exact_gradient(paths)
    for kind in ("outcome", "return_to_go"):
        assert difference(expected_gradient(paths, group_size, using(kind)), exact) < 1e-9
    with_mean = expected_gradient(paths, group_size, using("outcome", baseline="mean"))
    scaled = {name: value * (group_size - 1) / group_size for name, value in exact.items()}
    assert difference(with_mean, scaled) < 1e-9


def test_return_to_go_with_the_mean_is_scaled_by_stage():
    # In `chain` both members reach both stages, so the factor is (G - 1) / G, also for stage 1.
    paths = trajectories(chain, 2)
    found = expected_gradient(paths, 3, using("return_to_go", baseline="mean"))
    assert difference(found, {name: value * 2 / 3 for name, value in exact_gradient(paths).items()}) < 1e-9


def test_a_lone_stage_without_credit_shrinks_its_gradient():
    # In `door` a stage is lone if none of the G - 1 others went on, which has probability 1/2^(G - 1).
    paths = trajectories(door, 2)
    exact, found = exact_gradient(paths), expected_gradient(paths, 3, using("return_to_go", lone="zero"))
    assert found["first"] == pytest.approx(exact["first"])
    assert found["second"] == pytest.approx(exact["second"] * (1 - 1 / 4))


def test_normalization_by_turn_index_loses_the_first_choice():
    paths = trajectories(bare_door, 2)
    assert exact_gradient(paths)["first"] == pytest.approx(0.25)
    assert expected_gradient(paths, 8, normalized_by_index)["first"] == 0.0
    assert expected_gradient(paths, 8, using("outcome", baseline="mean"))["first"] == pytest.approx(0.21875)
    assert expected_gradient(paths, 8, using("return_to_go"))["first"] == pytest.approx(0.25)
    for toy, choices in TOYS:
        some = trajectories(toy, choices)
        assert difference(expected_gradient(some, 3, normalized_by_index), exact_gradient(some)) > 0.05


def test_gamma_below_one_is_biased():
    paths = trajectories(chain, 2)
    found = expected_gradient(paths, 3, using("return_to_go", gamma=0.9))
    exact = exact_gradient(paths)
    assert (exact["first"], found["first"]) == pytest.approx((0.0592, 0.0435), abs=5e-5)
    assert found[("second", 1)] == pytest.approx(exact[("second", 1)])  # nothing is left to discount


def test_matched_is_the_gradient_of_reward_plus_accuracy():
    paths = trajectories(chain, 2)
    exact = exact_gradient(paths, lambda path: path.objective + sum(path.matched))
    assert difference(expected_gradient(paths, 3, using("matched")), exact) < 1e-9


def test_rewards_from_one_assignment_of_all_calls_are_biased():
    # As MatchTIR: gold is f(a=1); the call that has the right value gets the reward, of equal calls the first. The
    # reward of turn 0 then depends on turn 1, whose return-to-go does not contain it.
    def assigned(policy: Policy) -> Any:
        right = [policy.choose(turn, 0.2) for turn in range(2)]
        winner = 0 if right[0] >= right[1] else 1
        rewards = [(1.0 if right[turn] else 0.5) if turn == winner else 0.0 for turn in range(2)]
        return [0, 1], rewards, ["a", "b"], [0.0, 0.0]

    def by_stage(policy: Policy) -> Any:
        right = [policy.choose(turn, 0.2) for turn in range(2)]
        best = [0.0, 1.0 if right[0] else 0.5, 1.0 if any(right) else 0.5]
        return [0, 1], [best[1], best[2] - best[1]], ["a", "b"], [0.0, 0.0]

    biased, unbiased = trajectories(assigned, 2), trajectories(by_stage, 2)
    exact = exact_gradient(biased)
    assert difference(exact, exact_gradient(unbiased)) < 1e-12  # the same objective
    assert difference(expected_gradient(unbiased, 3, using("return_to_go")), exact) < 1e-9
    assert difference(expected_gradient(biased, 3, using("return_to_go")), exact) > 0.02


def test_anchor_adds_a_gradient_that_is_weighted_by_visits():
    # Everybody visits "start", so there the second term is the gradient once more. A member's second state is visited
    # by another one with probability 1 - (1 - p)^(G - 1), where p is the probability of that state.
    paths = trajectories(chain, 2)
    exact, found = exact_gradient(paths), expected_gradient(paths, 3, using("anchor"))
    p = 1 / (1 + math.exp(-0.3))
    assert found["first"] == pytest.approx(2 * exact["first"])
    assert found[("second", 1)] == pytest.approx(exact[("second", 1)] * (1 + 1 - (1 - p) ** 2))
    assert found[("second", 0)] == pytest.approx(exact[("second", 0)] * (1 + 1 - p**2))


# ---- exact expectations for the parts of a response


def response_toy(policy: Policy) -> Any:
    # Writes a call piece by piece. One number may go on after its first digit, a second call may follow, and the
    # response may break in the middle or at the end. The stage of a choice is that of its first character.
    pieces: list[tuple[str, bool]] = []  # the text of each piece, and whether it was a choice

    def write(text: str) -> None:
        pieces.append((text, False))

    def pick(name: str, logit: float, no: str, yes: str) -> int:
        action = policy.choose(name, logit)
        pieces.append((yes if action else no, True))
        return action

    write('<tool_call>\n{"name": "')
    if pick("name", 0.4, 'g"', 'f"'):
        write(', "arguments": {')
        if pick("key", 0.1, '"x": 1', '"a": 1') and pick("digit", -0.3, "2", ", "):
            pick("value", 0.2, '"b": 3', '"b": 2')
    else:
        write(', "arguments": {')
    if pick("broken", -0.5, "}}\n</tool_call>", "} oops"):
        pick("closed", 0.7, "", "\n</tool_call>")
    text = "".join(text for text, _ in pieces)
    gold = Gold((call("f", a=1, b=2),))
    found = split_reward(judge(text, gold, "hermes"), "hermes", RewardConfig(), 0.25)
    stages = find_part_stages([len(text) for text, _ in pieces], found.ends)
    of_choices = [stage for stage, (_, is_choice) in zip(stages, pieces, strict=True) if is_choice]
    return of_choices, list(found.rewards), [None] * len(found.ends), [0.0] * len(found.ends)


def unlocated(paths: list[Trajectory]) -> Iterator[Trajectory]:
    # The same with all of a broken response in one stage.
    for path in paths:
        if any(name == "broken" and score > 0 for name, score in path.scores):
            yield Trajectory(
                path.probability, path.scores, [0] * len(path.scores), [path.objective], [None], [0.0], path.objective
            )
        else:
            yield path


def test_the_parts_of_a_response_are_unbiased():
    paths = trajectories(response_toy, 6)
    assert len({tuple(path.stages) for path in paths}) > 5
    exact = exact_gradient(paths)
    assert difference(expected_gradient(paths, 2, using("return_to_go")), exact) < 1e-9
    assert difference(expected_gradient(paths, 3, using("return_to_go")), exact) < 1e-9
    # If a broken response is one stage, the stage of its first tokens depends on the break: 8% off for that choice.
    found = expected_gradient(list(unlocated(paths)), 2, using("return_to_go"))
    assert (exact["broken"], found["broken"]) == pytest.approx((-0.0682, -0.0735), abs=5e-5)


def variance(paths: list[Trajectory], group_size: int, estimate: Estimator) -> float:
    # The total variance of the gradient of one group
    square = sum(
        probability * sum(value**2 for value in group_gradient(group, estimate).values())
        for probability, group in groups(paths, group_size)
    )
    return square - sum(value**2 for value in expected_gradient(paths, group_size, estimate).values())


def independent(policy: Policy) -> Any:
    turns = range(3)
    rewards: list[float | None] = [float(policy.choose(turn, 0.3)) for turn in turns]
    return list(turns), rewards, [None] * 3, [0.0] * 3


@pytest.mark.parametrize(
    ("toy", "choices", "group_size", "ratio"),
    [(independent, 3, 3, 0.633), (door, 2, 4, 0.78), (response_toy, 6, 3, 1.02), (chain, 2, 4, 1.29)],
)
def test_variance_of_return_to_go_relative_to_the_outcome(toy: Toy, choices: int, group_size: int, ratio: float):
    # Often less. More in `chain`, where what the first choice earned and what is still to come cancel each other.
    paths = trajectories(toy, choices)
    found = variance(paths, group_size, using("return_to_go")) / variance(paths, group_size, using("outcome"))
    assert found == pytest.approx(ratio, abs=0.005)
