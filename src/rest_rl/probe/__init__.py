"""Predict, without training, whether token weights would help; `rest_rl.probe(...)` calls `probe/run.py:probe`."""

from rest_rl.objects import make_package_callable

make_package_callable(__name__, "rest_rl.probe.run:probe")
