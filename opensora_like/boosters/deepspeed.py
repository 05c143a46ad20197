"""DeepSpeed's ZeRO: optimizer, gradients and weights sharded over ranks by its engine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora_like.boosters import layout
from opensora_like.boosters.base import OptimizerFactory, ShardRange
from opensora_like.boosters.deepspeed_config import WHERE, Decided, check_optimizer, complete_config, read_config
from opensora_like.boosters.deepspeed_flat import gather_parts, places_of_groups, places_of_shards
from opensora_like.boosters.deepspeed_import import import_deepspeed
from opensora_like.boosters.update import OptimizerState, check_numbers
from opensora_like.registry import BOOSTERS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TYPE = "booster.type='deepspeed'"


@BOOSTERS.register_module("deepspeed")
class DeepSpeedBooster:
    """ZeRO stage 1, 2 or 3 over all ranks, configured by DeepSpeed's own JSON.

    Unlike DDP, a parameter that no loss uses counts as one whose gradient is zero: AdamW's weight decay and
    momentum move it, because the optimizer sees flat tensors of many parameters.

    Gradients are reduced and accumulated in the dtype of the weights, unless `config` sets
    ``data_types.grad_accum_dtype``. Stage 3 replaces ``torch.nn.functional.linear`` in the whole process by one that
    keeps no gathered weight for the backward; in bfloat16 it rounds once more, before the bias.

    Args:
        stage: 1 shards the optimizer, 2 the gradients as well, 3 the weights too. None: what `config` says, or 2.
        config: path of a JSON file, or its content. "auto" takes the program's value; a value that contradicts the
            program's is an error, and so is a name that would be ignored.
        cpu_offload: keep masters and optimizer state in host memory, and update there. None: what `config` says.
        dtype: of the working weights, "bf16" or "fp32"; masters and optimizer are float32.
        grad_clip: largest global L2 norm of the gradients; 0 does not clip.
        accumulation_steps: of the run, to compare with the JSON's; None knows it not, and "auto" must stand there.

    Raises:
        ValueError: settings that contradict each other or that DeepSpeed refuses, or it is not installed.
        FileNotFoundError: no such `config`.
        RuntimeError: torch.distributed is not initialised.
    """

    loads_in_parts = True

    def __init__(
        self,
        *,
        stage: Literal[1, 2, 3] | None = None,
        config: str | dict | None = None,
        cpu_offload: bool | None = None,
        dtype: str = "bf16",
        grad_clip: float = 0.0,
        accumulation_steps: int | None = None,
        device: torch.device,
    ) -> None:
        check_numbers(dtype=dtype, grad_clip=grad_clip, dtypes=tuple(DTYPES))
        if not dist.is_initialized():
            raise RuntimeError(f"{TYPE} needs a process group; call opensora_like.runtime.start() first")
        self._device, self._dtype = torch.device(device), DTYPES[dtype]
        written = read_config(config)
        import_deepspeed(self._device)
        self._config = complete_config(
            written,
            Decided(
                stage=stage,
                cpu_offload=cpu_offload,
                dtype=dtype,
                grad_clip=grad_clip,
                accumulation_steps=accumulation_steps,
            ),
        )
        self._optimizer_section = self._config.pop("optimizer", {})
        self._stage = self._config["zero_optimization"]["stage"]
        _check_values(self._config)
        self.dp_rank, self.dp_size = layout.ranks()

    def prepare(self, model: nn.Module, make_optimizer: OptimizerFactory) -> nn.Module:
        """Cast, move and shard `model`, equal on all ranks; see `Booster`. Float buffers stay float32."""
        import deepspeed

        layout.check_trainable(model, where=TYPE)
        on_meta = any(p.is_meta for p in model.parameters())
        exact = {} if on_meta else {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        if self._stage == 3:
            self._cut_weights(model)
        else:
            layout.materialize(model, torch.device("cpu"), self._dtype)
        parameters = layout.check_trainable(model, where=TYPE)
        if self._stage < 3:
            layout.make_contiguous(parameters.values())
        optimizer = make_optimizer(list(parameters.values()))
        check_optimizer(self._optimizer_section, optimizer)
        self._engine, self._zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self._config)
        names = {parameter: name for name, parameter in parameters.items()}
        find = places_of_shards if self._stage == 3 else places_of_groups
        self._places = dict(find(self._zero, names))
        self._state = OptimizerState(
            self._zero.optimizer,
            {name: self._places[name].flat for name in parameters},
            lambda name, flat: self._places[name].own(flat),
        )
        self._counters: dict[str, Tensor] = {}
        for name, weights in exact.items():  # DeepSpeed makes masters of weights that it has already rounded
            place = self._places[name]
            part = place.ranges[self.dp_rank]
            place.own(place.flat).copy_(weights.reshape(-1)[part.start : part.stop])
        return self._engine

    def _cut_weights(self, model: nn.Module) -> None:
        """Cast and shard one weight after another, so that no device and no host ever holds the whole model."""
        import deepspeed

        dtype = self._dtype

        class InTurn(nn.Module):
            """What DeepSpeed takes for the model: it shards each parameter before it asks for the next."""

            def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
                for parameter in layout.materialize_in_turn(model, torch.device("cpu"), dtype):
                    if parameter.is_floating_point():
                        parameter.data = parameter.data.to(dtype).contiguous()
                    yield parameter

        deepspeed.zero.Init(module=InTurn(), config_dict_or_path=self._config, dtype=dtype)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self._device)

    @property
    def param_groups(self) -> list[dict]:
        """The optimizer's groups."""
        return self._zero.param_groups

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Nothing: stage 1 reduces in `step`, the others in each backward."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate this rank's part of the averaged gradients."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """Clip, update the shards, spread the weights. Returns: the norm before clipping, inf if it is not finite."""
        self._counters.clear()
        self._engine.step()
        self._forget_gradients()
        return float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else math.inf

    def _forget_gradients(self) -> None:
        """Zero the buffers that DeepSpeed keeps: a parameter that the next step leaves out would be moved again."""
        buffers = [flat.grad for flat in self._flats() if flat.grad is not None]
        if self._stage == 3:
            buffers.append(self._zero.grad_partitions_flat_buffer)
        elif self._zero.cpu_offload:
            buffers.extend(self._zero.accumulated_grads_in_cpu.values())
        for buffer in buffers:
            buffer.zero_()

    def ranges(self) -> dict[str, ShardRange]:
        """DeepSpeed's parts: in stage 3 an even part of each parameter, before that any piece of it or nothing."""
        return {name: place.ranges[self.dp_rank] for name, place in self._places.items()}

    def master_shards(self) -> Iterator[tuple[str, Tensor]]:
        """Views of this rank's float32 masters."""
        for name, place in self._places.items():
            yield name, place.own(place.flat)

    def optimizer_shards(self) -> dict[str, dict[str, Tensor]]:
        """Views of this rank's optimizer state; counters, which parameters share, are read back by `refresh`."""
        with self._parameters_in_groups():
            found = self._state.shards()
        for kind, tensors in found.items():
            found[kind] = {name: t if t.ndim else t.clone() for name, t in tensors.items()}
            self._counters |= {name: t for name, t in found[kind].items() if not t.ndim}
        return found

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the masters and give every rank its weights; take over counters that a load wrote."""
        self._read_counters()
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole CPU tensors on rank 0; see `Booster`."""
        return gather_parts(shards, self._places)

    def _flats(self) -> list[Tensor]:
        """What the optimizer updates on this rank."""
        return (
            self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups
        )

    def _read_counters(self) -> None:
        """Give each flat tensor the count that was loaded for the parameters in it.

        The largest: a booster that counts per parameter leaves one that was never used at 0.
        """
        for flat in self._flats():
            counts = [
                self._counters[n] for n, place in self._places.items() if place.flat is flat and n in self._counters
            ]
            state = self._zero.optimizer.state[flat]
            if counts and isinstance(state["step"], Tensor):
                state["step"].fill_(max(counts))
            elif counts:
                state["step"] = int(max(counts))
        self._counters.clear()

    @contextmanager
    def _parameters_in_groups(self) -> Iterator[None]:
        """The optimizer's groups with what it updates; in stage 3 DeepSpeed keeps them empty between steps."""
        groups = self._zero.optimizer.param_groups
        if self._stage == 3:
            for i, flat in enumerate(self._flats()):
                groups[self._zero.sub_group_to_group_id[i]]["params"].append(flat)
        yield
        if self._stage == 3:
            for group in groups:
                group["params"] = []


def _check_values(config: dict[str, Any]) -> None:
    """Let DeepSpeed read its configuration.

    Raises:
        ValueError: it refuses.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    if config["zero_optimization"]["stage"] not in (1, 2, 3):
        raise ValueError(f"{WHERE}.zero_optimization.stage={config['zero_optimization']['stage']!r}; use 1, 2 or 3")
    try:
        DeepSpeedConfig(config)
    except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as problem:
        raise ValueError(f"{WHERE}: deepspeed refuses it: {' '.join(str(problem).split())}; mend it") from problem
