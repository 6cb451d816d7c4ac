"""`python -m nioodd` is the command `nioodd`. The only module that is written by hand: it has no notebook."""
import sys

from .app.cli import main

if __name__ == "__main__": sys.exit(main())
