"""The Berkeley Function-Calling Leaderboard (BFCL), judged by the bfcl-eval package in a separate process."""
