"""What a user did wrong, in one line."""


class UserError(ValueError):
    """Bad input: the message names what was given, what was expected and what to do. The command exits with 2."""
