"""The report over runs: what each length, section and window keeps, and what it saves."""
