"""`rest_rl.compare(...)` is `rest_rl.compare.run.compare`."""

from rest_rl.objects import make_callable

make_callable(__name__, "rest_rl.compare.run:compare")
