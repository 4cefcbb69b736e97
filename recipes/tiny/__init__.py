"""stylemaster-tiny: a small model of the released architecture, from data to weights."""
