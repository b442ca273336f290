"""Two hosts on this machine: ``ttun demo``, ``ttun bench`` and the traffic that they measure."""
