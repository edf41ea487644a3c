"""Environments: tools that run, for training and evaluation over several turns."""
