"""A machine without a network, for processes that have this folder on PYTHONPATH.

A connection beyond the machine fails; with ``SAGE_ATTEMPTS``, the name of a file, it is written there too.
"""

import errno
import ipaddress
import os
import socket


def _refuse(host) -> None:
    host = host.decode() if isinstance(host, bytes) else host
    own = (None, "", "localhost", socket.gethostname())
    try:
        inside = host in own or ipaddress.ip_address(host).is_loopback
    except ValueError:
        inside = False
    if not inside:
        if os.environ.get("SAGE_ATTEMPTS"):
            with open(os.environ["SAGE_ATTEMPTS"], "a") as stream:
                stream.write(f"{host}\n")
        raise OSError(errno.ENETUNREACH, f"no network here, and {host} was asked for")


def _guarded(function, position: int):
    def guarded(*given, **options):
        address = given[position] if len(given) > position else None
        _refuse(address[0] if isinstance(address, tuple) else None if position else address)
        return function(*given, **options)

    return guarded


socket.socket.connect = _guarded(socket.socket.connect, 1)
socket.socket.connect_ex = _guarded(socket.socket.connect_ex, 1)
socket.getaddrinfo = _guarded(socket.getaddrinfo, 0)
