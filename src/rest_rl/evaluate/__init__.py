"""`rest_rl.evaluate(benchmark, model, ...)`: models on benchmarks; as a package, what that is made of."""

from rest_rl.objects import make_package_callable

make_package_callable(__name__, "rest_rl.evaluate.run:evaluate")
