"""ParallelGroup: the ranks that hold a model together, the part of each, and their exchanges.

They go over torch.distributed: NCCL between GPUs, gloo between CPUs. A group is handed down, never
a global.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.errors import ConfigError

if TYPE_CHECKING:
    import torch

JOIN_TIMEOUT = timedelta(minutes=10)  # for all ranks to come to the rendezvous
# A rank may wait as long as nobody asks anything; that others have died or hang is noticed
# otherwise.
EXCHANGE_TIMEOUT = timedelta(days=365)
MEET_TIMEOUT = timedelta(seconds=10)  # for all ranks to find that a step does not fit into memory
FRAME_BYTES = 1 << 16  # an object up to this size travels in one broadcast
LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class Part:
    """Elements [start, start + size) of `total`."""

    start: int
    size: int
    total: int

    def times(self, count: int) -> Part:
        """The same part where each element stands for `count`, as heads do for dimensions."""
        return Part(self.start * count, self.size * count, self.total * count)


class ParallelGroup:
    """A group of one: every part is the whole, and nothing is exchanged."""

    rank: int = 0
    size: int = 1

    def part(self, total: int) -> Part:
        """This rank's part of what divides evenly: see check_parts."""
        return Part(self.rank * (total // self.size), total // self.size, total)

    def kv_part(self, num_heads: int) -> Part:
        """This rank's kv heads: a share, or one in common where there are more ranks."""
        if self.size <= num_heads:
            return self.part(num_heads)
        return Part(self.rank * num_heads // self.size, 1, num_heads)

    def padded_part(self, total: int) -> Part:
        """This rank's part of what need not divide: ceil(total / size), the last ones less."""
        each = -(-total // self.size)
        start = min(self.rank * each, total)
        return Part(start, min(each, total - start), total)

    def all_reduce(self, x: torch.Tensor, op: Literal["sum", "max", "min"] = "sum") -> torch.Tensor:
        """x, contiguous, replaced on every rank by its sum (maximum, minimum) over the ranks."""
        return x

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """On rank 0 every rank's x, in their order; nothing on the others."""
        return [x]

    def broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """x, contiguous, replaced on every rank by that of `source`."""
        return x


SINGLE = ParallelGroup()


class TorchGroup(ParallelGroup):
    """Ranks joined by torch.distributed.

    `tensors` moves the model's numbers, `control` bytes between the CPUs; `meeting` is for
    `in_step` alone and has its timeout.
    """

    def __init__(self, rank: int, size: int, *, tensors: Any, control: Any, meeting: Any) -> None:
        import torch.distributed as dist

        self.rank, self.size = rank, size
        self._tensors, self._control, self._meeting = tensors, control, meeting
        self._num_exchanges = 0  # of tensors, that this rank has begun
        self._ops = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        self._gather_options = dist.GatherOptions()
        self._gather_options.rootRank = 0

    def all_reduce(self, x: torch.Tensor, op: Literal["sum", "max", "min"] = "sum") -> torch.Tensor:
        self._num_exchanges += 1
        self._tensors.allreduce(x, self._ops[op]).wait()
        return x

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._num_exchanges += 1
        found = [x.new_empty(x.shape) for _ in range(self.size)] if self.rank == 0 else []
        self._tensors.gather(
            [found] if found else [], [x.contiguous()], self._gather_options
        ).wait()
        return found

    def broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        self._num_exchanges += 1
        self._tensors.broadcast(x, source).wait()
        return x

    def broadcast_object(self, value: object = None) -> Any:
        """Rank 0's value, which the others do not give. Pickled: the ranks are one program."""
        import torch

        if self.rank == 0:
            data = pickle.dumps(value, protocol=5)
            frame = len(data).to_bytes(LENGTH_BYTES, "little") + data[:FRAME_BYTES]
            frame += bytes(LENGTH_BYTES + FRAME_BYTES - len(frame))
            self._control.broadcast(torch.frombuffer(bytearray(frame), dtype=torch.uint8), 0).wait()
            if len(data) > FRAME_BYTES:
                rest = torch.frombuffer(
                    bytearray(memoryview(data)[FRAME_BYTES:]), dtype=torch.uint8
                )
                self._control.broadcast(rest, 0).wait()
            return value
        first = torch.empty(LENGTH_BYTES + FRAME_BYTES, dtype=torch.uint8)
        self._control.broadcast(first, 0).wait()
        length = int.from_bytes(first[:LENGTH_BYTES].numpy().tobytes(), "little")
        data = first[LENGTH_BYTES : LENGTH_BYTES + min(length, FRAME_BYTES)].numpy().tobytes()
        if length > FRAME_BYTES:
            rest = torch.empty(length - FRAME_BYTES, dtype=torch.uint8)
            self._control.broadcast(rest, 0).wait()
            data += rest.numpy().tobytes()
        return pickle.loads(data)

    def send(self, x: torch.Tensor, target: int) -> None:
        """Gives x, contiguous and on the CPU, to a rank that calls `receive` for that size."""
        self._control.send([x], target, 0).wait()

    def receive(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """x, contiguous and on the CPU, filled by `source`."""
        self._control.recv([x], source, 0).wait()
        return x

    def in_step(self) -> bool:
        """After a failure: whether all ranks failed before the same exchange, and may go on.

        Else some wait, or on a GPU will, for what the others never send.
        """
        import torch
        import torch.distributed as dist

        bounds = torch.tensor([self._num_exchanges, -self._num_exchanges])
        try:
            self._meeting.allreduce(bounds, dist.ReduceOp.MIN).wait()
        except RuntimeError:  # somebody has not come
            return False
        return int(bounds[0]) == -int(bounds[1])

    def smallest(self, value: int) -> int:
        """The smallest of the ranks' values; all have come here when it is known."""
        import torch
        import torch.distributed as dist

        known = torch.tensor([value], dtype=torch.int64)
        self._control.allreduce(known, dist.ReduceOp.MIN).wait()
        return int(known)


class Rendezvous:
    """Where the ranks of a group meet on one machine: a port that the system chooses."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        listening = socket.create_server((host, 0))
        self.host, self.port = host, int(listening.getsockname()[1])
        self.store = _torch_distributed().TCPStore(
            host,
            self.port,
            is_master=True,
            timeout=JOIN_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )

    def join(self, size: int, backend: Literal["gloo", "nccl"]) -> TorchGroup:
        """Rank 0's own way in; see `join`."""
        return _joined(self.store, self.host, 0, size, backend)


def join(
    host: str, port: int, *, rank: int, size: int, backend: Literal["gloo", "nccl"]
) -> TorchGroup:
    """Another rank's way into the group that meets there. Returns once all have come."""
    store = _torch_distributed().TCPStore(host, port, is_master=False, timeout=JOIN_TIMEOUT)
    return _joined(store, host, rank, size, backend)


def _joined(store: Any, host: str, rank: int, size: int, backend: str) -> TorchGroup:
    dist = _torch_distributed()

    def gloo(name: str, timeout: timedelta) -> Any:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = timeout
        return dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, size, options)

    control = gloo("control", EXCHANGE_TIMEOUT)
    tensors = control
    if backend == "nccl":
        fast = dist.ProcessGroupNCCL.Options()
        fast._timeout = EXCHANGE_TIMEOUT
        tensors = dist.ProcessGroupNCCL(dist.PrefixStore("tensors", store), rank, size, fast)
    return TorchGroup(
        rank, size, tensors=tensors, control=control, meeting=gloo("meeting", MEET_TIMEOUT)
    )


def _torch_distributed() -> Any:
    """Loaded on demand; much of it has no types."""
    import torch.distributed

    return torch.distributed


def check_parts(config: ModelConfig, size: int) -> None:
    """Raises ConfigError where a model cannot be dealt to so many ranks."""
    if _divides(config, size):
        return
    possible = [str(n) for n in range(1, config.num_attention_heads + 1) if _divides(config, n)]
    raise ConfigError(
        f"engine.tensor_parallel_size={size}: the checkpoint's {config.num_attention_heads} "
        f"attention heads, {config.num_key_value_heads} kv heads and intermediate size of "
        f"{config.intermediate_size} cannot be dealt to {size} ranks; use {', '.join(possible)}"
    )


def _divides(config: ModelConfig, size: int) -> bool:
    kv_heads = config.num_key_value_heads
    whole = kv_heads % size == 0 or size % kv_heads == 0
    return whole and config.num_attention_heads % size == 0 and config.intermediate_size % size == 0


def dealt(weights: Sequence[int], size: int) -> list[int]:
    """The rank for each piece of work, largest first, so that none has much more than others."""
    loads = [0] * size
    owners = [0] * len(weights)
    for index in sorted(range(len(weights)), key=lambda i: -weights[i]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += weights[index]
    return owners
