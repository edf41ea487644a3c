"""`rest_rl.compare(...)` is `rest_rl.compare.run.compare`."""

from rest_rl.objects import make_package_callable

make_package_callable(__name__, "rest_rl.compare.run:compare")
