"""What is measured by running: benchmarks and studies, whose rows one writer turns into Markdown and JSON."""
