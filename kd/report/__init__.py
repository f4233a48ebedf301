"""The report over runs: what each length, section and window keeps of the accuracy, and what it
saves.
"""
