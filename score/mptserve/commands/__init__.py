"""The subcommands of `mptserve`; cli.py dispatches to them."""
