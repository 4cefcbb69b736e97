"""From files to frames: loading, style encoding, and the main path `stylize`."""
