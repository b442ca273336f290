"""Tuntox: TCP connections, and the whole tunnel, through the Tox network to a machine behind NAT.

    application --TCP--> [client] --packets--> toxcore
                                                  |  UDP, or a TCP relay
             target <--TCP-- [server] <--packets-- toxcore

``toxcore`` binds the system's library, ``packet`` and ``protocol`` know packets and tunnels and do
no I/O, ``loop`` is the one thread that owns the Tox instance, ``stream`` joins a socket to a
tunnel, ``forwarder`` is what ``server`` and ``client``, the two roles, have in common. ``command``
is ``ttun tox``, ``transport`` the tunnel inside. docs/tox.md tells the whole story.
"""

LIBRARY = "libtoxcore.so.2"
INSTALL = "apt install libtoxcore2 (other systems: toxcore, c-toxcore)"
