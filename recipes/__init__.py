"""How the weights that ship with the pack were made."""
