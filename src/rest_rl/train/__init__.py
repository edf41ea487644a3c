"""Training: `rest_rl.train(run)`."""

from rest_rl.objects import make_callable

make_callable(__name__, "rest_rl.train.run:train")
