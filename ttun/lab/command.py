"""The command lines of ``ttun demo`` and ``ttun bench``: their options, and what they run."""

from __future__ import annotations

import argparse

from ttun.commands.parser import add_command, number
from ttun.errors import UsageError
from ttun.process.argv import Parser

MOST_MIB = 1 << 20  # of a transfer of the demo


def add_options(demo: Parser, bench: Parser) -> None:
    """Add the options of the two commands to their parsers."""
    demo.set_defaults(run="demo")
    demo.add_argument(
        "--size",
        type=int,
        default=64,
        metavar="MIB",
        help="amount to transfer each way (default: %(default)s)",
    )
    kinds = bench.add_subparsers(title="benchmarks", dest="kind", metavar="WHAT", required=True)
    codec = add_command(kinds, "codec", "measure encryption and decryption on one core")
    codec.set_defaults(run="bench_codec")
    tunnel = add_command(kinds, "tunnel", "measure a tunnel between two network namespaces")
    tunnel.set_defaults(run="bench_tunnel")
    _bench_options(tunnel, seconds=2.0)
    link = add_command(kinds, "link", "measure a tunnel over an emulated link")
    link.set_defaults(run="bench_link")
    link.add_argument(
        "--rate",
        default="50",
        metavar="DOWN[/UP]",
        help="Mbit/s to the client, and from it if different (default: %(default)s)",
    )
    link.add_argument(
        "--rtt",
        type=float,
        default=40.0,
        metavar="MS",
        help="round-trip time of the idle link (default: %(default)g)",
    )
    link.add_argument(
        "--loss",
        default="0",
        metavar="PERCENT[,PERCENT...]",
        help="packet loss each way; several values: goodput over loss (default: %(default)s)",
    )
    link.add_argument(
        "--queue",
        type=float,
        default=100.0,
        metavar="MS",
        help="queueing delay at which the link drops packets (default: %(default)g)",
    )
    link.add_argument(
        "--congestion-control",
        default="cubic",
        metavar="NAME",
        help="congestion control of both hosts (default: %(default)s)",
    )
    link.add_argument(
        "--emulator",
        default="auto",
        metavar="auto|relay|netem",
        help="link emulator: relay needs a C compiler, netem a kernel module (default: auto, the "
        "first available)",
    )
    _bench_options(link, seconds=10.0)


def _bench_options(command: Parser, seconds: float) -> None:
    command.add_argument(
        "--rounds",
        type=number,
        default=5,
        metavar="N",
        help="measurements to take the median of (default: %(default)s)",
    )
    command.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        metavar="N",
        help="duration of each transfer (default: %(default)g)",
    )
    command.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="OTHER",
        help="competitor: openvpn, wireguard-go (or its path), or 'SERVER COMMAND :: CLIENT "
        "COMMAND' with {peer} for the server's address; after NAME=, under that name (repeatable)",
    )
    command.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    command.add_argument("--plot", metavar="FILE.svg", help="draw a chart (needs matplotlib)")


def run_demo(options: argparse.Namespace) -> int:
    """``ttun demo``."""
    from ttun.lab import demo, netns

    if not 1 <= options.size <= MOST_MIB:
        raise UsageError(f"--size {options.size} is out of range (1 to {MOST_MIB} MiB)")
    netns.end_as_by_ctrl_c()
    return demo.run(options.size)


def run_bench_codec(_: argparse.Namespace) -> int:
    """``ttun bench codec``."""
    from ttun.lab import bench

    return bench.codec()


def run_bench_tunnel(options: argparse.Namespace) -> int:
    """``ttun bench tunnel``."""
    from ttun.lab import bench, netns

    _check_amount(options)
    netns.end_as_by_ctrl_c()
    return bench.tunnel(
        options.rounds, options.seconds, options.against, options.json, options.plot
    )


def run_bench_link(options: argparse.Namespace) -> int:
    """``ttun bench link``."""
    from ttun.lab import bench_link, netns

    _check_amount(options)
    plan = bench_link.Plan(
        bench_link.parse_link(options.rate, options.rtt, options.queue),
        bench_link.parse_losses(options.loss),
        options.rounds,
        options.seconds,
        options.congestion_control,
        options.emulator,
    )
    netns.end_as_by_ctrl_c()
    return bench_link.run(plan, options.against, options.json, options.plot)


def _check_amount(options: argparse.Namespace) -> None:
    if options.rounds < 1 or not 0.01 <= options.seconds <= 3600:
        raise UsageError("out of range: --rounds (1 or more) or --seconds (0.01 to 3600)")


COMMANDS = {
    "demo": run_demo,
    "bench_codec": run_bench_codec,
    "bench_tunnel": run_bench_tunnel,
    "bench_link": run_bench_link,
}
