"""Constants that every package of kd agrees on."""

IGNORE_INDEX = -100

# What logits of both models take at a time; recipe and plan state it as the loss does.
LOGITS_GIB = 2.0

# Exit statuses of launch/train.py, besides 0 (done) and 1 (crashed).
EXIT_USER_ERROR = 2  # whatever a message said can be put right
EXIT_INTERRUPTED = 85  # a signal came, a checkpoint was written: start it again with --resume auto
EXIT_HANG = 86  # the watchdog saw no step
EXIT_NO_READER = 141  # the reader of a command's output left before its end; what a shell says then

# Of metrics.jsonl, recipe.json, plan.json and audit.json. Version 1 states none, and counts tokens
# under other names; CHANGELOG.md lists them.
FORMAT_VERSION = 2

# What plans take for granted where nothing is said
NETWORK_GBPS = 3200.0  # Gbit/s between nodes, of all adapters of a node: eight of 400
DISK_GB_S = 5.0  # GB/s at which all nodes together write a checkpoint
