"""Routers: one file each. `byom.pipeline.router.<name>` holds the class that ``router=<name>`` builds."""
