"""lm-evaluation-harness: suites of tasks, their data, and runs of them."""
