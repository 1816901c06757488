"""What XLA makes of a model: topologies, HLO, memory, roofline, layouts."""
