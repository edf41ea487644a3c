"""Several responses to one prompt, scored and cut into regions: what the analyses look at."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rest_rl.advantages import AdvantageKind, group_advantages
from rest_rl.data.samples import ToolSample


class Response(NamedTuple):
    """One sampled response: `ids` with the end-of-sequence token, and the `Region` of each of them."""

    ids: list[int]
    regions: list[int]
    reward: float
    s_format: float
    s_acc: float
    is_exact: bool


class Group(NamedTuple):
    """The responses to one prompt."""

    sample: ToolSample
    prompt_ids: list[int]
    responses: tuple[Response, ...]

    def advantages(self, kind: AdvantageKind = "grpo") -> Tensor:
        """The advantage of each response within the group: float64 (G,)."""
        rewards_G = torch.tensor([response.reward for response in self.responses], dtype=torch.float64)
        return group_advantages(rewards_G, len(self.responses), kind)
