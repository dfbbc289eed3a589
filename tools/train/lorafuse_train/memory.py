"""What a training will need in memory, said before the weights are loaded, and refused where it is too much."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse_common.errors import ConfigError
from lorafuse_train.dataset.data import Sample
from lorafuse_train.encoding.encode import Encodings
from lorafuse_train.lora.adapter import attach, dropout, spare_casts
from lorafuse_train.lora.ranks import trainable
from lorafuse_train.lora.targets import meta_model
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.plan import Plan
from lorafuse_train.precision import Precision
from lorafuse_train.steps.optimizers import SIDE, build_optimizer

GIB = 2**30
PASSING = 0.5
"""What is in use only for a moment, as a share of what one block keeps: measured, it was a sixth to a half."""


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes that one forward pass keeps for its backward pass."""

    whole: int
    checkpointed: int | None
    """With gradient checkpointing: the inputs of all blocks and the inside of one; None where that is not supported."""
    block: int
    """The most that the inside of one block keeps; all of it where there are no blocks."""
    pictures: str
    """Of what, in words."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the device that trains, without the few hundred MiB of its driver."""

    weights: int
    lora: int
    """Weights, gradients, optimizer and average of the LoRA."""
    activations: Activations | None
    unknown: str = ""
    """Why the activations are not known."""
    beside: int = 0
    """What `--objective_base` and `--train_adapter` keep beside the base."""

    def total(self, *, checkpointing: bool) -> int:
        """All of it; without activations where they are not known."""
        passing = round(PASSING * self.activations.block) if self.activations else 0
        return self.weights + self.beside + self.lora + self.kept(checkpointing=checkpointing) + passing

    def kept(self, *, checkpointing: bool) -> int:
        """Of the activations."""
        if self.activations is None:
            return 0
        return (self.activations.checkpointed if checkpointing else None) or self.activations.whole


def least_memory(plan: Plan) -> Memory:
    """What is needed before the first picture: weights and LoRA."""
    model = _model(plan)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    beside = plan.objective.beside_bytes(plan.base, sizes)
    return Memory(weights, lora_bytes(plan), None, "no picture was looked at yet", beside)


def lora_bytes(plan: Plan) -> int:
    """The LoRA's weights and gradients, the optimizer's state and the average, all in fp32."""
    config = plan.config
    weight = nn.Parameter(torch.zeros(SIDE, SIDE))
    optimizer = build_optimizer(config, [weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = sum(value.nbytes for value in optimizer.state[weight].values() if isinstance(value, Tensor))
    each = 8 + state / weight.numel() + 4 * bool(config.ema_decay) + 4 * config.starts_from_components
    return round(each * trainable(plan.targets, config))


def estimate_memory(plan: Plan, encodings: Encodings, precision: Precision) -> Memory:
    """All of it, for the batch that needs the most."""
    least = least_memory(plan)
    try:
        return dataclasses.replace(least, activations=_activations(plan, encodings, precision), unknown="")
    except Exception as error:  # an estimate, made with what torch does not promise to keep as it is
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return dataclasses.replace(least, unknown=f"this model cannot be tried without its weights ({reason})")


def _model(plan: Plan) -> nn.Module:
    """The transformer in the base's precision, without memory."""
    model = meta_model(plan.base.config["_class_name"], plan.base.config).requires_grad_(False)
    wide = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if any(part in name for part in wide) else plan.base.dtype)
    return model


def _activations(plan: Plan, encodings: Encodings, precision: Precision) -> Activations:
    """Count what autograd keeps of a forward pass on tensors that have a shape and a dtype, and no memory."""
    config, recipe = plan.config, plan.recipe
    batch = _largest(plan, encodings)
    model = _model(plan)
    # How the LoRA starts does not matter here, and singular values cannot be had without weights.
    attach(model, plan.targets, dataclasses.replace(config, init_lora_weights="true"))
    if precision.autocast:
        spare_casts(model)
    _pretend(model, precision.device)
    x0 = torch.stack([encodings.latents(sample) for sample in batch])
    condition = recipe.collate([encodings.condition(sample.prompt) for sample in batch])
    counted = _Counted({parameter.untyped_storage()._cdata for parameter in model.parameters()})
    supported = bool(getattr(model, "_supports_gradient_checkpointing", False))
    if supported:
        model.enable_gradient_checkpointing(counted.block)  # type: ignore[operator]  # diffusers' model
    sigma = torch.full((len(batch),), 0.5)
    with precision.compute(), dropout(model, config.lora_dropout, 0), counted.counting():
        recipe.predict(model, x0, sigma, condition)
    frames, height, width = batch[0].shape
    long = f" of {frames} frames" if frames > 1 else ""
    pictures = f"{len(batch)} x {width}x{height}{long} with the longest caption"
    if not counted.blocks:
        return Activations(counted.whole, None, counted.whole, pictures)
    return Activations(counted.whole, counted.checkpointed, counted.largest, pictures)


def _largest(plan: Plan, encodings: Encodings) -> list[Sample]:
    """A batch of the largest pictures, those with the longest captions."""

    def length(sample: Sample) -> int:
        return sum(tensor.numel() for tensor in encodings.condition(sample.prompt).values())

    most = max(plan.samples, key=lambda sample: sample.pixels).bucket
    ranked = sorted((sample for sample in plan.samples if sample.bucket == most), key=length, reverse=True)
    size = min(plan.config.train_batch_size, len(ranked) * plan.config.dataset_repeat)
    return [ranked[index % len(ranked)] for index in range(size)]


class _Counted:
    """Bytes of the storages that are kept, each counted once, and apart for every block."""

    def __init__(self, parameters: set[int]) -> None:
        self._parameters = parameters
        self._kept: dict[int, Any] = {}
        """Storages, held on to so that no other gets their place."""
        self._inside: dict[int, Any] | None = None
        self._entering: dict[int, Any] = {}
        self.largest = 0
        self.blocks = 0

    @property
    def whole(self) -> int:
        """Without gradient checkpointing."""
        return _bytes(self._kept)

    @property
    def checkpointed(self) -> int:
        """What was kept outside of blocks and where they begin, and the largest inside."""
        return _bytes(self._entering) + self.largest

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within it, whatever autograd keeps is counted."""
        with torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor):
            yield

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._parameters:
            self._kept[storage._cdata] = storage
            (self._entering if self._inside is None else self._inside)[storage._cdata] = storage
        return tensor

    def block(self, function: Any, *arguments: Any) -> Any:
        """In place of `torch.utils.checkpoint.checkpoint`: count what goes in, and what is kept inside."""
        for argument in arguments:
            if isinstance(argument, Tensor):
                storage = argument.untyped_storage()
                self._entering[storage._cdata] = storage
        self.blocks += 1
        self._inside = {}
        found = function(*arguments)
        self.largest = max(self.largest, _bytes(self._inside))
        self._inside = None
        return found


def _bytes(storages: dict[int, Any]) -> int:
    return sum(storage.nbytes() for storage in storages.values())


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB // 10 else f"{count / 2**20:.1f} MiB"


def _pretend(model: nn.Module, device: torch.device) -> None:
    """Let a model without memory pass for one on `device`, so that autocast and attention do there what they would."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def pretended(tensor: Tensor) -> Tensor:
        return FakeTensor(mode, tensor.detach(), device) if tensor.is_meta else tensor

    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(pretended(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = pretended(buffer)
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                setattr(module, name, pretended(value))


def require_memory(memory: Memory, config: TrainConfig) -> None:
    """Refuse a training that needs more than `--max_memory`.

    Raises:
        ConfigError: it does; says what would help.
    """
    allowed, checkpointing = config.max_memory_bytes, config.use_gradient_checkpointing
    needed = memory.total(checkpointing=checkpointing)
    if allowed is None or needed <= allowed:
        return
    raise ConfigError(
        f"--max_memory {config.max_memory}: the training needs about {_size(needed)} "
        f"({describe_parts(memory, config)}). {_advice(memory, config, allowed)}"
    )


def _advice(memory: Memory, config: TrainConfig, allowed: int) -> str:
    if memory.weights > allowed:
        narrow = " --base_dtype bf16 may halve them." if config.base_dtype != "bf16" else ""
        return f"The weights of the base alone are too much.{narrow}"
    advice = []
    if memory.activations and memory.activations.checkpointed and not config.use_gradient_checkpointing:
        spared = memory.total(checkpointing=True)
        advice.append(f"--use_gradient_checkpointing (about {_size(spared)} then)")
    if config.train_batch_size > 1:
        accumulation = config.train_batch_size * config.gradient_accumulation_steps
        advice.append(f"--train_batch_size 1 --gradient_accumulation_steps {accumulation}")
    if memory.activations:
        advice.append("less --max_pixels")
    if memory.lora > 0.05 * allowed:
        advice.append("a lower --lora_rank, fewer --lora_target_modules or --optimizer adamw8bit")
    return f"Try {', or '.join(advice)}." if advice else "A smaller model is needed."


def describe_parts(memory: Memory, config: TrainConfig) -> str:
    """The parts of an estimate."""
    kept = memory.kept(checkpointing=config.use_gradient_checkpointing)
    beside = f"for --objective_base {_size(memory.beside)}, " if memory.beside else ""
    parts = f"weights {_size(memory.weights)}, {beside}LoRA and {config.optimizer} {_size(memory.lora)}"
    if memory.activations is None:
        return f"{parts}; activations unknown"
    return f"{parts}, activations {_size(kept)} for {memory.activations.pictures}"


def describe_memory(memory: Memory, config: TrainConfig, device: torch.device) -> str:
    """The estimate, in a line or two."""
    total = memory.total(checkpointing=config.use_gradient_checkpointing)
    text = f"memory: about {_size(total)} on {device} ({describe_parts(memory, config)})"
    if memory.activations is None:
        return f"{text}, for {memory.unknown}"
    other = memory.activations.checkpointed
    if not config.use_gradient_checkpointing and other is not None:
        text += f"; {_size(memory.total(checkpointing=True))} with --use_gradient_checkpointing"
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        text += f"\n  more than the {_size(free)} that are free there" if total > free else ""
    return text
