"""Weight files: reading, naming, checking, converting, listing and downloading them."""
