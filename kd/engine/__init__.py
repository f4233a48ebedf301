"""ZeRO engines: their JSON, construction and checkpoints, with all imports of deepspeed."""
