"""`python -m tca_fast` is `tca-fast`."""

from tca_fast.cli import main

main()
