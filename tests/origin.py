"""What every style says of its origin, whichever host and adapter made it."""

ORIGIN = {"method", "adapter", "images", "images_sha256", "crop"}
TEXTURE = {"selection", "drop_rate", "keep", "include_cls", "seed", "shuffle_seed"}
