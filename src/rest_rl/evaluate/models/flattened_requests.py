"""A server that is asked by ToolRL's published prompts: it is sent two messages, and no tools of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rest_rl.data.flattened_layout import Frame
from rest_rl.evaluate.conversation import Model, Reply, Request


class FlattenedRequests:
    """A model whose requests are flattened on the way to it."""

    def __init__(self, model: Model, frame: Frame) -> None:
        """Bind whoever answers and the texts around the tools."""
        self._model, self._frame = model, frame

    @property
    def batch_size(self) -> int:
        """The model's."""
        return self._model.batch_size

    @property
    def concurrency(self) -> int:
        """The model's."""
        return self._model.concurrency

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """The model's replies to the flattened requests."""
        return self._model.respond([self._flattened(request) for request in requests])

    def room(self, request: Request) -> tuple[int, int] | None:
        """What the flattened request takes."""
        return self._model.room(self._flattened(request))

    def stop(self) -> None:
        """The model's."""
        self._model.stop()

    def _flattened(self, request: Request) -> Request:
        return replace(request, sample=self._frame.flatten(request.sample))
