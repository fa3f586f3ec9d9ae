"""The two ways a user's command ends without its result."""


class InputError(Exception):
    """Bad input: what, where and how to mend it, in one line. The command line exits with 2."""


class CheckFailed(Exception):
    """A check on good input failed (validation, parity, audit), in one line. The command line exits with 1."""
