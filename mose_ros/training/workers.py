"""Many calls of one function, in processes of this machine or on a Ray cluster; the results are the same."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any


def fan_out(
    function: Callable, arguments: Sequence[tuple], processes: int, address: str = ''
) -> Iterator[Any]:
    """Yield function(*arguments) of each, as they finish, each call in a fresh process; in this one where processes = 0.

    address: of a Ray cluster, as `ray.init` takes it, which decides how many run at a time; its machines need this package and
    the same paths. ValueError where it cannot be reached.
    """
    if address:
        yield from _on_ray(function, arguments, address)
        return
    if processes <= 0:
        yield from (function(*one) for one in arguments)
        return
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        waiting = {pool.submit(function, *one) for one in arguments}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # what runs is waited for, here or at the end


def _on_ray(function: Callable, arguments: Sequence[tuple], address: str) -> Iterator[Any]:
    if not arguments:  # no need of a cluster
        return
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')  # nothing is told to anyone
    try:
        import ray
    except ImportError:
        raise ValueError('--address needs Ray; pip install mose_ros[cluster]') from None
    try:
        ray.init(address=address, log_to_driver=False)
    except Exception as error:  # Ray has no type of its own for it
        raise ValueError(
            f'--address {address}: Ray cannot be reached or started: {error}'
        ) from error
    waiting = []
    try:
        # one call, then a fresh process, as with local ones
        task = ray.remote(num_cpus=1, max_calls=1)(function)
        waiting = [task.remote(*one) for one in arguments]
        while waiting:
            done, waiting = ray.wait(waiting)
            yield from ray.get(done)
    finally:
        for one in waiting:
            ray.cancel(one)
        ray.shutdown()
