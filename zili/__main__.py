"""`python -m zili`: the command line."""

from zili.cli import main

main()
