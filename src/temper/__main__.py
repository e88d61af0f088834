"""`python -m temper`: the same as the command `temper`."""

from temper.cli import main

main()
