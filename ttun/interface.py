"""What ``import ttun`` offers. Apart, as all of it needs the extension and ttun itself does not."""

from ttun.client import Client as Client
from ttun.record import Status as Status
from ttun.routes import Network as Network
from ttun.server import Server as Server
from ttun.session import Counters as Counters
from ttun.settings import Addresses as Addresses
from ttun.settings import Limits as Limits
from ttun.settings import Settings as Settings
from ttun.transport import Arrival as Arrival
from ttun.transport import Dialer as Dialer
from ttun.transport import GivenSocket as GivenSocket
from ttun.transport import GivenSockets as GivenSockets
from ttun.transport import Listener as Listener
from ttun.transport import Way as Way
