"""Convert AWQ checkpoints to the Marlin layout, offline."""
