"""Evaluate models on benchmarks: `rest_rl.evaluate(benchmark, model, ...)` and the package behind it."""

from rest_rl.objects import make_package_callable

make_package_callable(__name__, "rest_rl.evaluate.run:evaluate")
