"""Lanes: data-parallel training whose result does not depend on the number of ranks.

A global batch is cut into `lanes` equal parts. A rank of W runs lanes/W of them, one after another, and the lanes'
gradients are added over a balanced binary tree: its lower levels inside a rank, its upper levels between ranks in
pairs. Floating-point addition is commutative but not associative, so what fixes the bits is which partial sums are
added, and the tree fixes that for every W. A W that divides the lanes only moves the line between the levels.

       rank 0      rank 1                    rank 0
      0  1 | 2  3                  0  1  2  3
      └+─┘ | └+─┘    and           └+─┘  └+─┘      add the same pairs.
        └──+──┘                      └──+─┘

Related: EasyScale (Li et al., SC '23) makes elastic training consistent by replaying virtual workers in the order
of a ring all-reduce; a tree lets the ranks do most of the adding before they talk.
"""

import queue
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from cnn.distributed.world_size import check_world_size

SPLIT_BYTES = 1 << 16
"""A smaller tensor is summed whole: then the number of messages counts, not their size. No part of the result."""

IN_FLIGHT_BYTES = 1 << 19
"""What two ranks swap at a time, over a network: more at once overflows queues on the way, and TCP then backs off; less
pays the latency too often. With more ranks there are more rounds to pay it in. No part of the result."""


class PartialSums:
    """The lower levels of the tree: adds equally shaped lists of tensors, pushed in lane order, two by two."""

    def __init__(self) -> None:
        self._sums: list[tuple[int, list[Tensor]]] = []  # (level, tensors), levels falling, as in a binary counter

    def push(self, tensors: list[Tensor]) -> None:
        """Add a leaf. The tensors become the tree's own and are changed in place."""
        level = 0
        while self._sums and self._sums[-1][0] == level:
            torch._foreach_add_(tensors, self._sums.pop()[1])
            level += 1
        self._sums.append((level, tensors))

    def fold_into(self, index: int, last: Tensor) -> None:
        """Add tensor `index` of every open partial sum to `last`, the last leaf, lowest level first, in place."""
        for _, tensors in reversed(self._sums):
            last.add_(tensors[index])

    def pop_total(self) -> list[Tensor]:
        """The sum of all leaves, of which there were a power of two; the tree is empty again."""
        ((_, total),) = self._sums
        self._sums.clear()
        return total

    def clear(self) -> None:
        """Forget all leaves."""
        self._sums.clear()


class Exchange:
    """The upper levels of the tree: sums tensors over the ranks in pairs.

    A small tensor is swapped whole, in log2(world size) rounds. Of a large one each rank adds up a part: in each round
    the two of a pair keep half of what both hold each, and afterwards the parts are handed round on the same way back
    (recursive halving and doubling: Thakur, Rabenseifner and Gropp, 2005). So a rank of W sends 2·(W-1)/W times the
    tensor rather than log2(W) times, and each element is still added over the same tree.

    On a CPU one thread issues every exchange, in the order in which they were handed over, so that ranks never
    disagree about which comes next and the exchange overlaps what is computed meanwhile. (Chaining the rounds as
    callbacks of futures has been seen to corrupt gradients at four ranks.) On a GPU the rounds are queued on the
    current stream, which does both.

    Args:
        group: process group of all ranks, used by nothing else. None for a single process.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = dist.get_rank(group) if group else 0
        self.world_size = dist.get_world_size(group) if group else 1
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Tensor], Future[Tensor]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="lane-exchange", daemon=True)
        self._thread.start()

    def submit(self, tensor: Tensor, prepare: Callable[[], None] = lambda: None) -> Future[Tensor]:
        """Run `prepare`, then sum `tensor` over all ranks, in place; equal bits on every rank."""

        def job() -> Tensor:
            prepare()
            return self._sum(tensor)

        future: Future[Tensor] = Future(devices=[tensor.device] if tensor.is_cuda else None)
        if tensor.is_cuda or self.world_size == 1:
            future.set_result(job())
        else:
            self._jobs.put((job, future))
        return future

    def close(self) -> None:
        """Finish what was submitted, and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future = item
            try:
                future.set_result(job())
            except Exception as error:  # raised by who waits; this thread must live to answer the others
                future.set_exception(error)  # type: ignore[arg-type]

    def _sum(self, tensor: Tensor) -> Tensor:
        """Sum a vector over all ranks, in place."""
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
        """Send `ours` to the rank at this distance, and receive what it sends into `theirs`."""
        peer = self.rank ^ distance
        swap = [
            dist.P2POp(dist.isend, ours, group=self._group, group_peer=peer),
            dist.P2POp(dist.irecv, theirs, group=self._group, group_peer=peer),
        ]
        for request in dist.batch_isend_irecv(swap):
            request.wait()


class LaneParallel:
    """A network whose gradients and buffers are those of all lanes of a global batch, whatever the number of ranks.

    Use, in every step: `run(lane, loss_of)` for each of `lanes_here` in order; then gradients and buffers are those
    of the whole batch on every rank.

    Args:
        network: the network, on its device, with equal weights on every rank.
        lanes: number of lanes; a power of two.
        exchange: between the ranks.
        on_computed: called in each step when this rank's last gradient is computed; what follows is waiting.

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
        self._averaged = [b for b in network.buffers() if b.is_floating_point()]
        self._buffers = list(network.buffers())
        self._buffers_before: list[Tensor] = []
        self._figures_size = 0
        self._gradients, self._message = PartialSums(), PartialSums()
        self._reduced_message: Future[Tensor] = Future()
        # Buffers are averaged here, and equal at the start, so DDP need not send them.
        self._ddp = DistributedDataParallel(
            network,
            device_ids=[p.device for p in self._parameters[:1] if p.is_cuda] or None,
            forward_sync_buffers=False,
        )
        self._ddp.register_comm_hook(None, self._reduce_bucket)

    def run(self, lane: int, forward: Callable[[nn.Module], tuple[Tensor, Tensor]]) -> None:
        """Run one lane forward and backward; on the last lane here, the sums over all lanes arrive meanwhile.

        Args:
            lane: the next of `lanes_here`.
            forward: given the network to call, returns the lane's mean loss (scalar) and figures to be summed over
                all lanes (float64 vector, the same length in every lane).
        """
        last = lane == self.lanes_here[-1]
        if lane == self.lanes_here[0]:
            self._buffers_before = [buffer.clone() for buffer in self._buffers]
        elif self._buffers:
            torch._foreach_copy_(self._buffers, self._buffers_before)
        # DDP reduces gradients after its own forward only, so earlier lanes go round it.
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
        """Set the buffers to their average over all lanes and return the summed figures, on the device."""
        self._gradients.clear()
        message = self._reduced_message.wait()
        figures, sums = message[: self._figures_size], message[self._figures_size :]
        if self._averaged:
            means = torch.split(sums / self.lanes, [buffer.numel() for buffer in self._averaged])
            torch._foreach_copy_(
                self._averaged, [mean.view_as(b) for mean, b in zip(means, self._averaged, strict=True)]
            )
        return figures

    def _reduce_bucket(self, _: None, bucket: dist.GradBucket) -> Future[Tensor]:
        """DDP's communication hook: fold in this rank's earlier lanes, then exchange with the other ranks."""
        if bucket.is_last():
            self._on_computed()
        pairs = list(zip(bucket.parameters(), bucket.gradients(), strict=True))

        def fold_earlier_lanes() -> None:
            for parameter, gradient in pairs:
                # The bucket's memory is in the parameter's own order (channels_last, say), but the views that DDP
                # hands out are strided as if it were contiguous.
                view = gradient.as_strided(parameter.shape, parameter.stride(), gradient.storage_offset())
                self._gradients.fold_into(self._index[id(parameter)], view)

        return self._exchange.submit(bucket.buffer(), fold_earlier_lanes)


def _take_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None, "every trainable parameter takes part in every lane"
    parameter.grad = None
    return gradient
