"""Real processes that talk over gloo: ``together(function, 4)`` runs it on four ranks."""

import faulthandler
import gc
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from patience import seconds

_PRELOADED = [
    "torch",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.parallel",
    "accelerate",
    "gradclip.clipping.kernels.foreach",
    "gradclip.clipping.kernels.rows",
    "gradclip.clipping.ranks.fsdp1",
    "gradclip.clipping.ranks.rendezvous",
    "gradclip.clipping.ranks.share",
    "gradclip.clipping.ranks.topology",
    "gradclip.clipping.ranks.verdict",
    "gradclip.pipeline.trainer",
    "gradclip.pipeline.hooks.record",
    "pytest",
]
FORKED = get_context("forkserver")
"""Starts a process from one that has imported torch: in little time."""
FORKED.set_forkserver_preload(_PRELOADED)


class RanksFailedError(AssertionError):
    """A rank raised, died, or was still running when the time was over."""


def together(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    limit: float | None = None,
    env: dict[str, str] | None = None,
    group_timeout: float | None = None,
) -> list[Any]:
    """Run ``function(rank, *args)`` on so many ranks of a gloo group; return what each returned.

    Args:
        function: At the top of a module that can be imported, as pickling asks.
        ranks: How many processes.
        args: Whatever can be pickled; what the function returns too.
        limit: Seconds after which all are killed; ``patience.seconds()`` where it is not given.
        env: Environment variables of every rank.
        group_timeout: Seconds that a collective waits for a rank; ``limit`` where it is not given.

    Raises:
        RanksFailedError: With every rank's traceback.
    """
    outcomes = outcomes_of(
        function, ranks, *args, limit=limit, env=env, group_timeout=group_timeout
    )
    wrong = [
        f"--- rank {rank}: {outcome.problem}"
        for rank, outcome in enumerate(outcomes)
        if outcome.problem
    ]
    if wrong:
        raise RanksFailedError("\n".join(wrong))
    return [outcome.value for outcome in outcomes]


class Outcome:
    """What became of a rank."""

    def __init__(self) -> None:
        self.value: Any = None
        self.problem = "it never reported"
        self.exit_code: int | None = None
        self.seconds = 0.0


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Run ``function(*args)`` in a process of its own, without a group; return what it returned."""
    (outcome,) = outcomes_of(_without_rank, 1, function, args, grouped=False)
    if outcome.problem:
        raise RanksFailedError(outcome.problem)
    return outcome.value


def _without_rank(rank: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return function(*args)


def outcomes_of(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    limit: float | None = None,
    env: dict[str, str] | None = None,
    group_timeout: float | None = None,
    grouped: bool = True,
) -> list[Outcome]:
    """Run a function as ``together`` does, where ranks are expected to fail.

    ``grouped``: whether they make a process group, before the function is called.
    """
    limit = seconds() if limit is None else limit
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        running = []
        for rank in range(ranks):
            ours, theirs = FORKED.Pipe(duplex=False)
            store = f"{folder}/store" if grouped else None
            setting = (rank, ranks, store, group_timeout or limit, env or {}, limit)
            process = FORKED.Process(target=_rank, args=(theirs, setting, function, args))
            process.start()
            theirs.close()
            running.append((process, ours))
        outcomes = [Outcome() for _ in range(ranks)]
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(running)}
        while waiting and (left := started + limit - time.monotonic()) > 0:
            for pipe in wait(list(waiting), left):
                assert isinstance(pipe, Connection)
                outcome = outcomes[waiting[pipe]]
                outcome.seconds = time.monotonic() - started
                try:
                    outcome.value, outcome.problem = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    outcome.problem = "it died without a word"
                del waiting[pipe]
        for rank in waiting.values():
            outcomes[rank].problem = f"it was still running after {limit:.0f} s"
        for rank, (process, pipe) in enumerate(running):
            process.join(max(0.1, started + limit - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            outcomes[rank].exit_code = process.exitcode
            pipe.close()
        return outcomes


def _rank(
    pipe: Connection, setting: tuple[Any, ...], function: Callable[..., Any], args: Any
) -> None:
    """Be one rank. An ordinary exit of a process with a group aborts now and then: avoid it."""
    gc.freeze()  # what was loaded before is nobody's garbage: its memory stays shared
    rank, ranks, store, group_timeout, env, limit = setting
    os.environ.update(env)
    if store is not None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
        # What launchers set too, and Accelerate asks for; the group is made by then.
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", LOCAL_WORLD_SIZE=str(ranks))
    faulthandler.dump_traceback_later(max(1.0, limit - 2), exit=False)
    import torch  # noqa: PLC0415 - not before the environment is set
    import torch.distributed as dist  # noqa: PLC0415

    torch.set_num_threads(1)
    code = 0
    try:
        if store is not None:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=group_timeout),
            )
        pipe.send_bytes(pickle.dumps((function(rank, *args), "")))
        if store is not None:
            dist.barrier()
    except BaseException as error:  # noqa: BLE001 - whatever it was, the parent must know
        code = 1
        try:
            pipe.send_bytes(pickle.dumps((error, traceback.format_exc())))
        except Exception:  # noqa: BLE001 - what cannot be pickled is told in words
            pipe.send_bytes(pickle.dumps((None, traceback.format_exc())))
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
