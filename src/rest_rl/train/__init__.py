"""Training: `rest_rl.train(run)`."""

from rest_rl.objects import make_package_callable

make_package_callable(__name__, "rest_rl.train.run:train")
