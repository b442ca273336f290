"""Tuntox: forward TCP connections, or carry the whole tunnel, to a machine behind NAT over Tox.

    application --TCP--> [client] --packets--> toxcore
                                                  |  UDP, or a TCP relay
             target <--TCP-- [server] <--packets-- toxcore

``toxcore`` declares the C library, ``instance`` wraps one Tox instance, and ``loop`` is the thread
that owns it. ``packet`` and ``protocol`` implement the wire format without I/O. An online friend is
a ``link``; each of its connections is a ``stream``. ``forwarder`` is the code that the ``server``
and ``client`` roles share. ``command`` is ``ttun tox``; ``transport`` carries a ttun tunnel.
docs/tox-protocol.md has the details.
"""

LIBRARY = "libtoxcore.so.2"
INSTALL = "apt install libtoxcore2 (other systems: toxcore, c-toxcore)"
