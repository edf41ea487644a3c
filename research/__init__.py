"""Research commands that are not part of the wheel.

`python -m research.theory` tests the theory behind the weights, `python -m research.warm_start` trains the embedded
model. Run both from the root of the repository, with rest-rl installed.
"""
