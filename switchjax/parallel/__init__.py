"""Named mesh axes, the table from logical to mesh axes, and the shardings that follow from it."""
