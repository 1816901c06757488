"""Studies and benchmarks: they measure by running. One writer makes Markdown and JSON of their rows."""
