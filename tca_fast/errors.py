"""The one exception for mistakes a user can mend."""

import textwrap


class UserError(ValueError):
    """A mistake in input that the user can mend.

    The message is one line that names the field or file, the offending value and the remedy;
    the command line prints it without a traceback and exits with status 2.
    """


def one_line(error: BaseException, width: int = 200) -> str:
    """What another library says in an error, in one line of at most so many characters."""
    said = textwrap.shorten(str(error), width, placeholder=" …")
    return said or type(error).__name__
