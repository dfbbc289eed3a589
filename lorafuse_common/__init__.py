"""What both lorafuse tools know about files and names."""

__version__ = "0.1.0"
