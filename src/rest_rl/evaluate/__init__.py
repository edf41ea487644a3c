"""`rest_rl.evaluate(benchmark, model, ...)`: models on benchmarks; as a package, what that is made of."""

from rest_rl.objects import make_callable

make_callable(__name__, "rest_rl.evaluate.run:evaluate")
