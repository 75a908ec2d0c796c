"""`python -m leannorm` is the `leannorm` command."""

from leannorm.cli import main

main()
