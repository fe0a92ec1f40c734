"""More than one process: `torchrun --standalone --nproc_per_node=N train.py ...`.

In the supervised stages every process makes the whole batch, from the same random numbers, and
answers for a share of its rows; in RL it draws the numbers of all episodes, and plays its share.
The gradients are summed by one all-reduce a step, so that N processes learn what one would, up to
rounding (with --gate gumbel, --rival compile or --forget: in distribution, see own_luck), and a
training begun with N goes on with any other number. Process 0 alone evaluates, prints and writes.
In a plain `python train.py` there is one process, whose share is everything, and nothing here
communicates.

What this costs: making the batch is not shared (the grid's demonstrations are below 5% of a step;
the ant's are read from disk), nor are evaluations, nor the ant's walker and demonstrations. RL
gathers two or three numbers per episode besides, once an update, for the advantage over all of
them. After Ctrl-C torchrun gives half a minute for the step under way and the checkpoint. Only gloo
has been run; a lost process under nccl may show as torchrun's own message only.
"""
import contextlib
import datetime
import os
import signal

import torch
import torch.distributed as dist


class Lost(Exception):
    """Another process has ended."""


def join():
    """Meet the other processes, if torchrun has started this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    # Imported later (the first optimiser does it), its functions would keep the group, as a default
    # argument, beyond leave; gloo's threads then sometimes abort a process that is done.
    from torch.distributed import nn  # noqa: F401
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # The others wait while process 0 evaluates, or trains the ant's walker.
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    if rank():  # process 0 saves and leaves; the others then lose it
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def leave():
    """End what join began, gloo's threads with it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def count():
    return dist.get_world_size() if dist.is_initialized() else 1


def share(n):
    """The rows, of a batch of n, for which this process answers. n must be a multiple of count."""
    each = n // count()
    return slice(rank() * each, (rank() + 1) * each)


def own(batch):
    """One's share of a batch or a view: a dict of tensors. A view's rows are counted anew."""
    rows = {name: x[share(len(x))] for name, x in batch.items()}
    if "row" in rows:
        rows["row"] = rows["row"] - share(len(batch["row"])).start
    return rows


def own_luck():
    """What a model draws by itself, for its own rows only, must not be the same for every share."""
    if count() > 1:
        torch.manual_seed(torch.initial_seed() + rank())


def part(mask):
    """How much of a mean over `mask`, which covers the whole batch, is made by one's share."""
    return mask[share(len(mask))].sum() / mask.sum()


class Rows:
    """A numpy Generator for one's share of n rows: it draws for all of them, so that each row gets
    what it would get in one process."""

    def __init__(self, rng, n):
        self.rng, self.n = rng, n

    def whole(self, size):
        return (self.n, *size[1:]) if isinstance(size, tuple) else self.n

    def random(self, size):
        return self.rng.random(self.whole(size))[share(self.n)]

    def uniform(self, low, high, size):
        return self.rng.uniform(low, high, self.whole(size))[share(self.n)]

    def standard_normal(self, size):
        return self.rng.standard_normal(self.whole(size))[share(self.n)]


def all_reduce(x):
    """Sum x, in place, over the processes."""
    with lost():
        dist.all_reduce(x)


@contextlib.contextmanager
def lost():
    """Errors of gloo and nccl mean that a partner is gone."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Lost from error


def backward(loss, parameters):
    """loss.backward() for the sum of all processes' losses; returns that sum. One all-reduce, of
    all gradients and the loss in one vector."""
    loss.backward()
    total = loss.detach()
    if count() > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        vector = torch.cat([total[None], *(g.flatten() for g in gradients)])
        all_reduce(vector)
        total, *summed = vector.split([1, *(g.numel() for g in gradients)])
        for gradient, new in zip(gradients, summed):
            gradient.copy_(new.view_as(gradient))
    return total.squeeze()


def gathered(x):
    """x of one's own episodes (n, ...) -> of all (N n, ...)."""
    if count() == 1:
        return x
    whole = x.new_zeros(count() * len(x), *x.shape[1:])
    whole[share(len(whole))] = x
    all_reduce(whole)
    return whole


def agreed(value):
    """Process 0's value of a plain object, e.g. of what it has measured."""
    if count() == 1:
        return value
    box = [value]
    with lost():
        dist.broadcast_object_list(box)
    return box[0]


def wait():
    """Until every process is here: process 0 has written what the others are about to read."""
    if count() > 1:
        all_reduce(torch.zeros(1))
