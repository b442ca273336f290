"""Tuntox: TCP connections, and the whole tunnel, through the Tox network to a machine behind NAT.

    application --TCP--> [forwarder] --packets--> toxcore ~~~UDP or relay~~~> toxcore --> [forwarder] --TCP--> target

``toxcore`` binds the system's library, ``protocol`` knows packets and tunnels and does no I/O,
``loop`` is the one thread that owns the Tox instance, ``forwarder`` joins sockets to tunnels, and
``server`` and ``client`` are the two roles. docs/tox.md tells the whole story.
"""
