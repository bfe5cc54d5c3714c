"""Routers: one file each. `byom.router.<name>` holds the class that ``router=<name>`` builds."""
