"""`python -m parscale`, the same as the command `parscale`."""

from parscale.cli import main

if __name__ == "__main__":
    main()
