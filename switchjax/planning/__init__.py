"""The compiler's view of a train step: topologies, HLO, memory, roofline, layouts."""
