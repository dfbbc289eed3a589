"""The sizes of the pieces a fuse works in; apart from `execute`, so that planning need not import torch."""

COPY_BLOCK_BYTES = 16 << 20
"""Untouched bytes are copied this many at a time."""

BUFFERS = 4
"""One being read, one computed on, one hashed and written, one to spare: 64 MB, whatever the model."""

EDIT_BLOCK_ELEMENTS = 1 << 20
"""4 MB of fp32: editing by blocks of rows is about 3x faster than whole tensors, and bounds memory. The size is
fixed because it takes part in the last bit of a matrix product: same inputs, same bytes."""
