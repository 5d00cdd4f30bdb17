"""The command ``devices``."""

from __future__ import annotations

import click

from amoeba_deploy.commands.common import emit
from amoeba_deploy.options import output_options


@click.command()
@click.argument("name", required=False)
@output_options
def devices(name: str | None, as_json: bool, quiet: bool) -> None:
    """List the device catalogue, or what is known of one device and from where.

    \b
    amoeba devices orin-nx
    """
    from amoeba_deploy import console
    from amoeba_deploy.profiles.device import device_names, load_device

    if name is None:
        known = [load_device(each) for each in device_names()]
        emit({"devices": [console.device_summary(d) for d in known]}, as_json, lambda: console.print_devices(known))
    else:
        device = load_device(name)
        emit(console.device_json(device), as_json, lambda: console.print_device(device))
