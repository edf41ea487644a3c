"""Predict, without training, whether token weights would help; `rest_rl.probe(...)` calls `probe/run.py:probe`."""

from rest_rl.objects import make_callable

make_callable(__name__, "rest_rl.probe.run:probe")
