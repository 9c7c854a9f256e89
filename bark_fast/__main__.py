"""`python -m bark_fast` is `bark-fast`."""

from bark_fast.cli import main

if __name__ == "__main__":
    main()
