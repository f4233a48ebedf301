"""How a run ends before its last step: entry points print each as one block, without a stack."""


class UserError(ValueError):
    """A bad field, value or file. The message names the field, the value and the remedy."""


class NothingToLearn(UserError):
    """Truncation and sections leave no supervised token in any example."""


class NotMet(UserError):
    """A rank did not reach the store where the run's ranks meet."""


class LostPeer(RuntimeError):
    """Another rank has ended or does not answer. The cause is in that rank's own message."""


class Interrupted(Exception):
    """A signal asked the run to stop, and it has saved a checkpoint."""
