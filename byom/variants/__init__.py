"""BYOM variants: one file each. `byom.variants.<name>` holds the class that ``byom=<name>`` builds."""
