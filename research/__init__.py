"""What serves the paper's referees and the package's makers, not its users; outside the wheel.

`python -m research.theory` measures the theory behind the weights, `python -m research.warm_start` makes the embedded
model. Both run from the repository's root, with rest-rl installed.
"""
