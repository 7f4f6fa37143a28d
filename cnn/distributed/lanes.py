"""Lanes: data-parallel training whose result does not depend on the number of ranks.

A global batch is cut into `lanes` equal parts. A rank of W runs lanes/W of them, one after another, and the lanes'
gradients are added over a balanced binary tree: its lower levels inside a rank, its upper levels between pairs of
ranks. Floating-point addition is commutative but not associative, so the bits depend on which partial sums are added.
The tree fixes these for every W that divides the lanes; W only moves the border between the levels.

       rank 0      rank 1                    rank 0
      0  1 | 2  3                  0  1  2  3
      └+─┘ | └+─┘    and           └+─┘  └+─┘      add the same pairs.
        └──+──┘                      └──+─┘

Related: EasyScale (Li et al., SC '23) makes elastic training consistent by replaying virtual workers in the order
of a ring all-reduce; with a tree, ranks do most of the adding before they communicate.
"""

import queue
import threading
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from cnn.distributed.world_size import check_world_size

SPLIT_BYTES = 1 << 16
"""Smaller tensors are exchanged whole: there the number of messages matters, not their size. Not part of the result."""

IN_FLIGHT_BYTES = 1 << 19
"""Bytes that two ranks swap at a time. Over a network, more would overflow queues on the way, so that TCP backs off;
less would pay the latency too often. With more ranks there are more rounds with a latency. Not part of the result."""


class PartialSums:
    """The lower levels of the tree: adds pairs of equally shaped lists of tensors, which are pushed in lane order."""

    def __init__(self) -> None:
        self._sums: list[tuple[int, list[Tensor]]] = []  # (level, tensors), highest level first, like a binary counter

    def push(self, tensors: list[Tensor]) -> None:
        """Adds a leaf, and takes over its tensors, which are changed in place."""
        level = 0
        while self._sums and self._sums[-1][0] == level:
            torch._foreach_add_(tensors, self._sums.pop()[1])
            level += 1
        self._sums.append((level, tensors))

    def fold_into(self, index: int, last: Tensor) -> None:
        """Adds tensor `index` of each open partial sum to `last`, the last leaf, lowest level first, in place."""
        for _, tensors in reversed(self._sums):
            last.add_(tensors[index])

    def pop_total(self) -> list[Tensor]:
        """Returns the sum of all leaves, whose number must be a power of two, and empties the tree."""
        ((_, total),) = self._sums
        self._sums.clear()
        return total

    def clear(self) -> None:
        """Empties the tree."""
        self._sums.clear()


class Exchange:
    """The upper levels of the tree: sums tensors over the ranks in pairs.

    A small tensor is swapped whole, in log2(world size) rounds. Of a large tensor each rank adds up one part: in each
    round both ranks of a pair keep one half each of the part that they share. Afterwards the sums travel back in
    reverse order (recursive halving and doubling: Thakur, Rabenseifner and Gropp, 2005). So a rank of W sends 2·(W-1)/W
    times the tensor rather than log2(W) times, and each element is still added over the same tree.

    On a CPU one thread performs all exchanges in the order of their submission, so that all ranks use the same order,
    and the exchange overlaps with computation. (Chaining the rounds as callbacks of futures has been seen to corrupt
    gradients at four ranks.) On a GPU the rounds are queued on a stream of their own, with the same two effects.

    Args:
        group: process group of all ranks, for the exclusive use of this object. None for a single process.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = dist.get_rank(group) if group else 0
        self.world_size = dist.get_world_size(group) if group else 1
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Tensor], Future[Tensor]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="lane-exchange", daemon=True)
        self._thread.start()
        self._side: torch.cuda.Stream | None = None

    def submit(self, tensor: Tensor, prepare: Callable[[], None] = lambda: None) -> Future[Tensor]:
        """Runs `prepare`, then sums `tensor` over all ranks, in place; equal bits on every rank."""

        def job() -> Tensor:
            prepare()
            return self._sum(tensor)

        future: Future[Tensor] = Future(devices=[tensor.device] if tensor.is_cuda else None)
        if tensor.is_cuda and self.world_size > 1:
            # The caller's stream, which still computes, waits for the sum where it waits for the future. What is used
            # here is freed after that, so that its memory is not reused too early.
            self._side = self._side or torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
            self._side.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(self._side):
                future.set_result(job())
        elif self.world_size == 1:
            future.set_result(job())
        else:
            self._jobs.put((job, future))
        return future

    def close(self) -> None:
        """Finishes the submitted exchanges, and ends the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future = item
            try:
                future.set_result(job())
            except Exception as error:  # raised where the sum is awaited; this thread goes on with the others
                future.set_exception(error)  # type: ignore[arg-type]

    def _sum(self, tensor: Tensor) -> Tensor:
        """Sums a vector over all ranks, in place."""
        at_a_time = IN_FLIGHT_BYTES * (1 if self.world_size == 2 else 4) // tensor.element_size()
        for piece in [tensor] if tensor.is_cuda else torch.split(tensor, at_a_time):
            self._sum_piece(piece)
        return tensor

    def _sum_piece(self, tensor: Tensor) -> None:
        theirs = torch.empty_like(tensor)
        distances = [1 << level for level in range((self.world_size - 1).bit_length())]
        if len(distances) < 2 or tensor.numel() * tensor.element_size() < SPLIT_BYTES:
            for distance in distances:
                self._swap(tensor, theirs, distance)
                tensor.add_(theirs)
            return
        mine, theirs_before = slice(0, tensor.numel()), []
        for distance in distances:
            middle = (mine.start + mine.stop) // 2
            halves = slice(mine.start, middle), slice(middle, mine.stop)
            mine, given = halves if not self.rank & distance else halves[::-1]
            self._swap(tensor[given], theirs[mine], distance)
            tensor[mine].add_(theirs[mine])
            theirs_before.append(given)
        for distance, given in zip(reversed(distances), reversed(theirs_before), strict=True):
            self._swap(tensor[mine], tensor[given], distance)
            mine = slice(min(mine.start, given.start), max(mine.stop, given.stop))

    def _swap(self, ours: Tensor, theirs: Tensor, distance: int) -> None:
        """Sends `ours` to the rank at this distance, and receives its tensor into `theirs`."""
        peer = self.rank ^ distance
        swap = [
            dist.P2POp(dist.isend, ours, group=self._group, group_peer=peer),
            dist.P2POp(dist.irecv, theirs, group=self._group, group_peer=peer),
        ]
        for request in dist.batch_isend_irecv(swap):
            request.wait()


class LaneParallel:
    """Computes gradients and buffers of a network over all lanes of a global batch, for any number of ranks.

    In every step call `run(lane, forward)` for each of `lanes_here` in order, then `finish()`. Gradients and buffers
    are then those of the whole batch, on every rank.

    Args:
        network: the network, on its device, with equal weights on every rank. What is trained (`requires_grad`) and
            which buffers change (those of modules in training mode) must stay as it is; else make another object.
        lanes: number of lanes; a power of two.
        on_computed: called in each step when this rank has computed its last gradient, and starts to wait.

    Raises:
        InputError: the world size does not divide the lanes.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        lanes: int,
        exchange: Exchange,
        on_computed: Callable[[], None] = lambda: None,
    ) -> None:
        check_world_size(lanes, exchange.world_size)
        self.lanes = lanes
        per_rank = lanes // exchange.world_size
        self.lanes_here = range(exchange.rank * per_rank, (exchange.rank + 1) * per_rank)
        self._exchange, self._on_computed = exchange, on_computed
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        self._index = {id(parameter): i for i, parameter in enumerate(self._parameters)}
        self._buffers = [b for module in network.modules() if module.training for b in module.buffers(recurse=False)]
        self._averaged = [buffer for buffer in self._buffers if buffer.is_floating_point()]
        self._buffers_before: list[Tensor] = []
        self._figures_size = 0
        self._gradients, self._message = PartialSums(), PartialSums()
        self._reduced_message: Future[Tensor] = Future()
        # `finish` averages the buffers, which are equal at the start, so DDP need not send them.
        self._ddp = DistributedDataParallel(
            network,
            device_ids=[p.device for p in self._parameters[:1] if p.is_cuda] or None,
            forward_sync_buffers=False,
        )
        # A bound method would keep this object alive, and with it DDP's copy of the gradients, since the garbage
        # collector does not see DDP's reference to its hook.
        self._ddp.register_comm_hook(weakref.proxy(self), LaneParallel._reduce_bucket)

    def run(self, lane: int, forward: Callable[[nn.Module], tuple[Tensor, Tensor]]) -> None:
        """Runs one lane forward and backward; during the last lane, gradients are summed over all lanes.

        Args:
            lane: the next of `lanes_here`.
            forward: gets the network to call; returns the lane's mean loss (scalar) and figures to be summed over all
                lanes (float64 vector, the same length in every lane).
        """
        last = lane == self.lanes_here[-1]
        if lane == self.lanes_here[0]:
            self._buffers_before = [buffer.clone() for buffer in self._buffers]
        elif self._buffers:
            torch._foreach_copy_(self._buffers, self._buffers_before)
        # DDP reduces gradients only after its own forward, so earlier lanes call the network directly.
        loss, figures = forward(self._ddp if last else self._ddp.module)
        self._figures_size = figures.numel()
        buffers = [torch.cat([buffer.flatten() for buffer in self._averaged]).double()] if self._averaged else []
        self._message.push([torch.cat([figures, *buffers])])
        if last:
            self._reduced_message = self._exchange.submit(self._message.pop_total()[0])
        (loss / self.lanes).backward()  # type: ignore[no-untyped-call]  # the division is exact: a power of two
        if not last:
            self._gradients.push([_take_gradient(parameter) for parameter in self._parameters])

    def finish(self) -> Tensor:
        """Sets the buffers to their average over all lanes; returns the summed figures, on the device."""
        self._gradients.clear()
        message = self._reduced_message.wait()
        figures, sums = message[: self._figures_size], message[self._figures_size :]
        if self._averaged:
            means = torch.split(sums / self.lanes, [buffer.numel() for buffer in self._averaged])
            torch._foreach_copy_(
                self._averaged, [mean.view_as(b) for mean, b in zip(means, self._averaged, strict=True)]
            )
        return figures

    def _reduce_bucket(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Adds this rank's earlier lanes, then exchanges with the other ranks; called by DDP for each bucket."""
        if bucket.is_last():
            self._on_computed()
        pairs = list(zip(bucket.parameters(), bucket.gradients(), strict=True))

        def fold_earlier_lanes() -> None:
            for parameter, gradient in pairs:
                # The bucket's memory is in the parameter's own order (such as channels_last), but DDP's views are
                # strided as if it were contiguous.
                view = gradient.as_strided(parameter.shape, parameter.stride(), gradient.storage_offset())
                self._gradients.fold_into(self._index[id(parameter)], view)

        return self._exchange.submit(bucket.buffer(), fold_earlier_lanes)


def _take_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None, "every trainable parameter takes part in every lane"
    parameter.grad = None
    return gradient
