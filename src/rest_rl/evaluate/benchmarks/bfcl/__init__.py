"""The Berkeley function-calling leaderboard, judged by its own package in a process apart."""
