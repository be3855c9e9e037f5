"""`python -m olapipe` is the command `olapipe`."""

from olapipe.cli import main

main()
