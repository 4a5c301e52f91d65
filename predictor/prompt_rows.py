"""The number of prompt rows that start a history."""

PROMPT_ROWS = 64  # the last ones; H of the published method
