"""`python -m lorafuse_fuse`."""

from .cli import main

main()
