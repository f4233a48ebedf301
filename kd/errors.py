"""One exception for everything a user can put right: the entry points print it as one block, without a stack."""


class UserError(ValueError):
    """A bad field, value or file. The message names the field, the value and the remedy."""
