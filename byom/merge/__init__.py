"""Merge methods: one file each. `byom.merge.<name>` holds the class that ``merge=<name>`` builds."""
