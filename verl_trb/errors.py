"""Errors that are the user's to mend: one sentence each, shown without a traceback, exit code 2."""


class UserError(ValueError):
    """A value, file or machine that cannot work.

    The message is one sentence: what is wrong and what to do.
    """


class ConfigError(UserError):
    """A configuration key that does not exist, or a value that it cannot have."""


class RunError(RuntimeError):
    """A run that cannot go on. The message is one sentence: which component failed and how to go on."""


class ComponentLost(RunError):
    """A process of the run died or hangs: the run can go on from its last checkpoint, with new processes."""
