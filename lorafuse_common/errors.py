"""The errors lorafuse shows its users: each is one message that says what to do, without a traceback."""


class LorafuseError(Exception):
    """A fault in what the user gave us; command lines print its text and exit with status 1."""


class CheckpointError(LorafuseError):
    """A model file or folder that cannot be read as what it claims to be."""


class LoraFileError(LorafuseError):
    """A LoRA file that cannot be read at all."""


class NotALoraError(LoraFileError):
    """A readable safetensors file without a single LoRA factor."""


class HubError(LorafuseError):
    """Something on the hub that is not there, or cannot be had now."""


class ManifestError(LorafuseError):
    """A `lorafuse.json` that is broken, or whose checkpoint does not match it."""


class OutputError(LorafuseError):
    """An output that may not, or cannot, be written."""


class PlanError(LorafuseError):
    """A fuse that would not do what was asked; lists every problem at once."""


class ConvertError(LorafuseError):
    """A conversion that would not give the same LoRA; lists every problem at once."""


class ConfigError(LorafuseError):
    """Options that are unknown, malformed or contradict each other."""


class DatasetError(LorafuseError):
    """A data set with faulty rows; lists every fault at once."""
