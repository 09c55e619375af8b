"""`python -m nano_pretrain VERB ...`: what the launcher starts on each rank."""

from nano_pretrain.cli import main

if __name__ == "__main__":
    main()
