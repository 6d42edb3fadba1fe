"""Bytes that this process has really sent over TCP, which gloo uses on one machine, too."""

from __future__ import annotations

import os
import socket
import struct

_BYTES_ACKED = 120  # offset in struct tcp_info of Linux (include/uapi/linux/tcp.h)


def bytes_sent() -> int:
    """Return the bytes over all open sockets of this process, acknowledged by the other side."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # not TCP, or closed meanwhile
            continue
        total += int(struct.unpack_from("Q", info, _BYTES_ACKED)[0])
    return total
