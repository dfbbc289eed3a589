"""The options of every command: what they are, how they are read, which exclude each other."""
