"""The exception a user is meant to read. It must not know who raises it."""


class FellrayError(Exception):
    """Something the user can mend: the message names the file, the field and the way out.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """


class HeldError(FellrayError):
    """Another process holds what was asked for. The way out is to come back later."""
