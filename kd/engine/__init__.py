"""ZeRO engines: their JSON, their construction, their checkpoints. No other package imports
deepspeed.
"""
