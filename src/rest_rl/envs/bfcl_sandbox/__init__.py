"""The process that runs bfcl-eval and its backends, for the benchmark and for the environment `bfcl-tasks`."""
