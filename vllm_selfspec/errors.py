"""Errors that a person at the command line reads as one sentence."""


class UsageError(ValueError):
    """The input is wrong: the message names the option or field and says how to mend it. Exit code 2."""


class EngineError(RuntimeError):
    """An engine process could not start or died: the message says why and where its log is. Exit code 1."""
