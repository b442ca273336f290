#!/bin/sh
# make check-services: run the systemd units under a real systemd, booted in namespaces. As root.
#
# debootstrap makes a Debian 12 with systemd (once), and make install installs ttun in it. Its systemd
# boots in separate namespaces and a control group, with two units: a server and a client of that
# server. A unit of this test checks them, kills one, stops another, and writes the results to a file.
# The network, services and /dev of this machine are not affected.
set -eu
cd "$(dirname "$0")/.."
system=$PWD/build/check-services
if [ "$(id -u)" != 0 ] || ! command -v debootstrap > /dev/null; then
    echo 'requires root and debootstrap: apt install debootstrap; sudo make check-services' >&2
    exit 1
fi
if [ ! -e "$system/made" ]; then
    rm -rf "$system"
    debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,python3,iproute2 bookworm \
        "$system" > /dev/null
    touch "$system/made"
fi
make install PREFIX=/usr/local DESTDIR="$system" > /dev/null

mkdir -p "$system/etc/ttun"
cat > "$system/etc/ttun/office.conf" << 'END'
OPTIONS=-l :20203 --hook-user ttun --up /etc/ttun/up --down /etc/ttun/down --monitor-group adm
END
mkdir -p "$system/etc/systemd/system/ttun-server@office.service.d"
printf '[Service]\nGroup=adm\n' > \
    "$system/etc/systemd/system/ttun-server@office.service.d/group.conf"
cat > "$system/etc/ttun/home.conf" << 'END'
OPTIONS=-s 127.0.0.1 --dev ttun9 --local4 10.9.9.2 --peer4 10.9.9.1 --local6 fd00::2 --peer6 fd00::1 --up /etc/ttun/say --down /etc/ttun/say
END
# The three ways of docs/hooks.md to do without root: one capability, ExecStartPost=+, a path unit.
script() { { echo '#!/bin/sh'; cat; } > "$system/etc/ttun/$1"; chmod 755 "$system/etc/ttun/$1"; }
echo 'ip route replace 198.51.100.0/24 dev "$TTUN_DEVICE"' | script up
echo 'ip route del 198.51.100.0/24 dev "$TTUN_DEVICE" 2> /dev/null || :' | script down
echo 'echo "${TTUN_REASON:+down}" > /run/ttun/ttun-client@home/session' | script say
echo 'echo "started as $(id -u), $(ls -d /sys/class/net/ttun9)" >> /hooks.txt' | script started
echo 'echo "stopped as $(id -u)" >> /hooks.txt' | script stopped
echo 'echo "session $(cat /run/ttun/ttun-client@home/session) as $(id -u)" >> /hooks.txt' | script session
rm -f "$system/hooks.txt"
mkdir -p "$system/etc/systemd/system/ttun-client@home.service.d"
cat > "$system/etc/systemd/system/ttun-client@home.service.d/override.conf" << 'END'
[Service]
ExecStartPost=+/etc/ttun/started
ExecStopPost=+/etc/ttun/stopped
END
cat > "$system/etc/systemd/system/ttun-home-session.path" << 'END'
[Path]
PathModified=/run/ttun/ttun-client@home/session
[Install]
WantedBy=multi-user.target
END
cat > "$system/etc/systemd/system/ttun-home-session.service" << 'END'
[Service]
Type=oneshot
ExecStart=/etc/ttun/session
END
echo 'OPTIONS=--no-such-option' > "$system/etc/ttun/typo.conf"
for name in office home typo; do
    (umask 077; echo 'a key of two tunnels' > "$system/etc/ttun/$name.psk")
done
cat > "$system/etc/systemd/system/report.service" << 'END'
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/sh /report.sh
[Install]
WantedBy=multi-user.target
END
cat > "$system/report.sh" << 'END'
exec > /report.txt 2>&1
unit=ttun-server@office
pid() { systemctl show -P MainPID $unit; }
state() { echo "$1=$(systemctl show -P ActiveState $unit) $(systemctl show -P NRestarts $unit)"; }
sleep 5
state ready
echo "client=$(systemctl show -P ActiveState ttun-client@home)"
echo "shown=$(/usr/local/bin/ttun show | grep -c 'protocol: x1')"
echo "route=$(ip route show 198.51.100.0/24 | wc -l)"
echo "typo=$(systemctl show -P ActiveState ttun-server@typo) $(systemctl show -P NRestarts ttun-server@typo)"
echo "said=$(journalctl -q -o cat _TRANSPORT=stdout _SYSTEMD_UNIT=ttun-server@typo.service PRIORITY=3 | cut -c 1-12)"
echo "stamps=$(journalctl -q -o cat _TRANSPORT=stdout _SYSTEMD_UNIT=$unit.service PRIORITY=6 | grep -c '^20..[/-]')"
echo "asked=$(setpriv --reuid=nobody --regid=nogroup --groups=adm /usr/local/bin/ttun show | grep -c server)"
echo "user=$(stat -c %U /proc/$(pid))"
sed -n 's/^CapEff:\s*/capabilities=/p; s/^Seccomp:\s*/seccomp=/p' /proc/$(pid)/status
echo "sockets=$(find /run/ttun -type s | wc -l)"
kill -KILL $(pid); sleep 6; state killed
echo "sockets=$(find /run/ttun -type s | wc -l)"
kill -STOP $(pid); sleep 45; state hung
systemctl stop $unit ttun-client@home; echo "left=$(ls -A /run/ttun)"
sort -u /hooks.txt
echo "ended=$(journalctl -q -o cat _SYSTEMD_UNIT=$unit.service | grep -c -e '--down: killed')"
echo "end=$(systemctl show -P Result $unit)"
END
cat > "$system/expected.txt" << 'END'
ready=active 0
client=active
shown=2
route=1
typo=failed 0
said=ttun server:
stamps=0
asked=1
user=ttun
capabilities=0000000000000000
seccomp=2
sockets=2
killed=active 1
sockets=2
hung=active 2
left=
session  as 0
session down as 0
started as 0, /sys/class/net/ttun9
stopped as 0
ended=0
end=success
END
chroot "$system" systemd-sysusers
chroot "$system" systemctl -q enable ttun-server@office ttun-client@home \
    ttun-server@typo ttun-home-session.path report
chroot "$system" systemctl -q mask systemd-udevd console-getty getty@tty1

rm -rf "$system/report.txt" "$system/var/log/journal" # of earlier runs
# With --kill-child, killing this also kills the systemd in the namespace.
unshare --mount sh -ec '
    mount --make-rprivate /
    mount --bind "$0" "$0"
    mkdir -p "$0.cgroup"
    mount -t cgroup2 none "$0.cgroup"
    mkdir -p "$0.cgroup/ttun-check"
    echo 0 > "$0.cgroup/ttun-check/cgroup.procs"
    exec unshare --cgroup --fork --kill-child --pid --uts --ipc --net sh -ec "
        ip link set lo up
        cd \"\$0\"
        mount -t proc proc proc
        mount -t sysfs -o ro sysfs sys
        mount -t cgroup2 none sys/fs/cgroup
        mount -t tmpfs -o mode=755 tmpfs dev
        mkdir dev/net dev/pts dev/shm
        for name in null zero full random urandom tty; do
            touch dev/\$name
            mount --bind /dev/\$name dev/\$name
        done
        mknod -m 666 dev/net/tun c 10 200
        mount --make-rshared .
        mount -t tmpfs tmpfs run
        mount -t tmpfs tmpfs tmp
        exec env -i container=other PATH=/usr/sbin:/usr/bin chroot . /lib/systemd/systemd
    " "$0"
' "$system" < /dev/null &
booted=$!
trap 'kill -KILL $booted 2> /dev/null || :' EXIT
for _ in $(seq 180); do
    if grep -qs '^end=' "$system/report.txt" || ! kill -0 $booted 2> /dev/null; then break; fi
    sleep 1
done
cat "$system/report.txt"
diff "$system/expected.txt" "$system/report.txt"
