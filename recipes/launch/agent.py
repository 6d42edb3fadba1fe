"""torchrun that ends with one line and the exit status of the rank that failed first: python agent.py OPTIONS.

torchrun.sh starts it. The ranks have printed their errors and tracebacks before, and torchrun's own table and traceback
would hide them.
"""

from __future__ import annotations

import logging
import signal
import sys


def main() -> int | str:
    """Run torchrun with sys.argv, and return the exit status or an error's text."""
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import main as torchrun

    options = get_args_parser().parse_args()
    # The lines below repeat these. Before a restart only torchrun says which rank failed.
    hidden = ["Sending process", "Closing process", "death signal", "termination signal"]
    hidden += ["failed (exitcode"] if options.max_restarts == 0 else []
    for name in ("agent.server", "multiprocessing"):
        logger = logging.getLogger(f"torch.distributed.elastic.{name}.api")
        logger.addFilter(lambda record: not any(text in record.getMessage() for text in hidden))
    try:
        torchrun()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        by = f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with status {status}"
        print(f"rank {rank} {by}; its error or traceback, if it had one, is above", file=sys.stderr)
        return status
    except SignalException as error:
        print(f"stopped by {error.sigval.name}, which was passed to the ranks", file=sys.stderr)
        return 128 + error.sigval
    except (RendezvousError, dist.DistError) as error:
        cause = error.__cause__ or error
        reason = ": ".join([type(cause).__name__, *str(cause).splitlines()[:1]])
        endpoint = options.rdzv_endpoint or f"{options.master_addr}:{options.master_port}"
        if "EADDRINUSE" in reason:
            port = endpoint.rpartition(":")[2]
            return f"error: port {port} of this machine is in use: give another one (--master-port, MASTER_PORT)"
        where = f"{endpoint} (--master-addr and --master-port, MASTER_ADDR and MASTER_PORT)"
        return f"error: the machines did not find each other, or lost each other, at {where}: {reason}"
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
