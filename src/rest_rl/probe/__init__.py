"""`rest_rl.probe(...)` is `probe/run.py:probe`."""

from rest_rl.objects import make_callable

make_callable(__name__, "rest_rl.probe.run:probe")
