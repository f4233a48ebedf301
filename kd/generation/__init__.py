"""Text from a model: prompts in, responses out, and the journal that survives a crash."""
