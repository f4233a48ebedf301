"""The tasks and models that the project ships or builds: arithmetic, GSM-Symbolic, SmolLM2."""
