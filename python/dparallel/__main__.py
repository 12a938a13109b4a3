"""`python -m dparallel`: the command line."""

from .cli import main

main()
