"""Bundles over HTTP: one process answers for every task, with one encoder in memory."""
