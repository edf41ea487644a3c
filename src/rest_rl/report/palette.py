"""One color per region, the same in the terminal and in all plots, chosen to be distinct for color-blind readers."""

from __future__ import annotations

from collections.abc import Mapping

from rest_rl.response import Region

REGION_COLORS: Mapping[str, str] = {
    Region.FORMAT.label: "#8c6bb1",
    Region.NAME.label: "#d6401f",
    Region.ARGUMENTS.label: "#e69f00",
    Region.REASONING.label: "#2b7bba",
    Region.ANSWER.label: "#1a9e6c",
    Region.OTHER.label: "#8f8f8f",
}

SERIES_COLORS = ("#2b7bba", "#d6401f", "#1a9e6c", "#e69f00", "#8c6bb1", "#5c5c5c", "#c2438a", "#6b8e23")
"""Colors for runs and for parts of the reward, in order."""
