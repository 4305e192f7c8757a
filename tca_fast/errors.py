"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """A mistake in input that the user can mend.

    The message is one line that names the field or file, the offending value and the remedy;
    the command line prints it without a traceback and exits with status 2.
    """
