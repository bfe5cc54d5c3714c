"""Files on disk: named by their content, locked while made, written whole or not at all, or fetched from a hub."""
