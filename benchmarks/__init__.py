"""What `make bench` runs: a fuse against `cp` and against other programs, measured as whole processes."""
