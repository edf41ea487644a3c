"""Evaluate models on benchmarks. The entry point is `rest_rl.evaluate(benchmark, model, ...)`."""

from rest_rl.objects import make_package_callable

make_package_callable(__name__, "rest_rl.evaluate.run:evaluate")
