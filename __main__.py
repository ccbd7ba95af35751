"""`python -m headloom`."""

from headloom.cli import main

if __name__ == "__main__":
    main()
