"""`python -m olatrain`: how the launcher starts its ranks."""

from olatrain.cli import main

main()
