"""How much of a prompt a history starts with."""

PROMPT_ROWS = 64  # last rows: H of the published method
