"""Tuntox: TCP connections, and the whole tunnel, through the Tox network to a machine behind NAT.

    application --TCP--> [client] --packets--> toxcore
                                                  |  UDP, or a TCP relay
             target <--TCP-- [server] <--packets-- toxcore

``toxcore`` declares the system's library, ``instance`` is one Tox of it, ``loop`` the one thread
that owns it. ``packet`` and ``protocol`` know packets and tunnels and do no I/O. A friend that is
online is a ``link``, each of its connections a ``stream``. ``forwarder`` is what the two roles,
``server`` and ``client``, have in common. ``command`` is ``ttun tox``, ``transport`` carries a
tunnel. docs/tox.md has the details.
"""

LIBRARY = "libtoxcore.so.2"
INSTALL = "apt install libtoxcore2 (other systems: toxcore, c-toxcore)"
